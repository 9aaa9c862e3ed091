"""Damaged tokenizer files, chat templates, tool schemas and tool calls."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from fuzz import inputs, survive
from mutate import EXTREMES, change_bytes, change_json
from tiny import CONTROL
from tokenizers import decoders, models, pre_tokenizers

from flashmoe_ref.chat_template import ChatTemplate
from flashmoe_ref.cli_chat import read_tools
from flashmoe_ref.tokenizer import Tokenizer
from flashmoe_ref.toolcalls import (
    ToolCall,
    ToolCallParser,
    parse_tool_calls,
    readable_call,
)

TEXT = "Hi there, \u00e9 <|im_end|>\n\t1 "
SMALL_FILES = {
    "tokenizer_config.json": {
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>", "lstrip": False},
        "chat_template": [
            {"name": "default", "template": "{{ messages[0].content }}"},
            {"name": "other", "template": "{{ 1 }}"},
        ],
    },
    "generation_config.json": {
        "eos_token_id": [256, 258],
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.0,
    },
    "config.json": {"eos_token_id": 256, "text_config": {"eos_token_id": [257]}},
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Oslo", "Rome"]},
                    "days": {"type": ["integer", "null"], "minimum": 1},
                    "at": {"anyOf": [{"type": "number"}, {"type": "boolean"}]},
                    "more": {"type": "object"},
                    "list": {"oneOf": [{"type": "array"}]},
                },
                "required": ["city"],
            },
        },
    }
]
CALLS = """Let me see.
<tool_call>
<function=look>
<parameter=city>
Oslo
</parameter>
<parameter=days>
3
</parameter>
<parameter=at>
1.5
</parameter>
<parameter=more>
{"a": [1, {"b": null}]}
</parameter>
<parameter=list>
[[1, 2], ["x"]]
</parameter>
</function>
</tool_call>
<tool_call>
<function=none>
</function>
</tool_call>"""


def tokenizer_json() -> bytes:
    """All bytes, a few merges, five control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("H", "i")]
    words = [*alphabet, "th", "the", "Hi"]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(CONTROL))
    return backend.to_str().encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole set of files."""
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    for name, content in SMALL_FILES.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def use(tokenizer: Tokenizer, data: bytes) -> None:
    """What it does is what the library does; its ids are within its range."""
    backend = tokenizers.Tokenizer.from_str(data.decode("utf-8-sig"))
    backend.no_truncation()
    backend.no_padding()
    ids = tokenizer.encode(TEXT)
    assert ids == backend.encode(TEXT, add_special_tokens=False).ids
    assert all(0 <= i < tokenizer.n_real_ids for i in ids)
    assert isinstance(tokenizer.decode(ids), str)
    for i in tokenizer.encode_plain(TEXT):
        tokenizer.token_bytes(i)
    tokenizer.encode_chat([{"role": "user", "content": TEXT}])


@inputs({"tokenizer.json": 700})
def test_tokenizer(folder: Path, kind: str, n: int) -> None:
    def read(data: bytes) -> None:
        (folder / kind).write_bytes(data)
        use(Tokenizer.from_dir(folder), data)

    n_read, n_refused = survive(kind, n, tokenizer_json(), change_json, read)
    assert n_read > n / 50 and n_refused > n / 4


def stop_ids(folder: Path) -> set[int]:
    """Read anew: the ids of all files, and the token that is named."""
    found: set[int] = set()
    generation, config, tokenizer = (
        json.loads((folder / name).read_text("utf-8-sig"))
        for name in ("generation_config.json", "config.json", "tokenizer_config.json")
    )
    inner = config.get("text_config")
    for values in (generation, config, inner if isinstance(inner, dict) else {}):
        ids = values.get("eos_token_id")
        found |= set(ids) if isinstance(ids, list) else {ids} - {None}
    token = tokenizer.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
        found.add(json.loads(tokenizer_json())["model"]["vocab"].get(token))
        found.discard(None)
        found |= {259 + i for i, text in enumerate(CONTROL) if text == token}
    return found


@inputs({f"{name} (text)": 500 for name in SMALL_FILES})
def test_small_files(folder: Path, kind: str, n: int) -> None:
    name = kind.removesuffix(" (text)")

    def read(data: bytes) -> None:
        (folder / name).write_bytes(data)
        tokenizer = Tokenizer.from_dir(folder)
        assert tokenizer.stop_ids == stop_ids(folder)
        assert all(type(i) is int for i in tokenizer.stop_ids)
        raw = json.loads((folder / "generation_config.json").read_text("utf-8-sig"))
        for setting, value in vars(tokenizer.sampling).items():
            assert value == raw.get(setting)
        tokenizer.apply_chat_template(MESSAGES)

    source = json.dumps(SMALL_FILES[name]).encode()
    n_read, n_refused = survive(kind, n, source, change_json, read)
    assert n_read > n / 50 and n_refused > n / 10


# --- chat templates -------------------------------------------------------------------

SMALL_TEMPLATE = """{%- macro text_of(content) %}
    {%- if content is string %}{{- content }}{%- else %}
    {%- for part in content %}{{- part.text }}{%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}{{- '<tools>' ~ (tools | tojson) ~ '</tools>' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ text_of(message.content) | trim }}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}
"""
PIECES = (
    *("{% for m in messages %}", "{% endfor %}", "{% if messages %}", "{% endif %}"),
    *("{% else %}", "{% break %}", "{% macro f(x) %}", "{% endmacro %}", "{{ f(1) }}"),
    *("{{ messages }}", "{{ messages[0].content }}", "{{ tools | tojson(indent=2) }}"),
    *("{{ messages[9].content }}", "{{ nothing.at.all }}", "{{ 1 / 0 }}", "{{ loop }}"),
    *("{{ raise_exception('no') }}", "{{ raise_exception(messages) }}", "{{ 1 + '' }}"),
    *("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ self }}"),
    *("{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{{ y }}"),
    *("{% set x = namespace(a=[]) %}", "{% set x.a = x.a + [x.a] %}", "{{ x.a }}"),
    *("{{ '%s%s' % 'a' }}", "{{ '{0.__class__}'.format(1) }}", "{{ 'a' | nosuch }}"),
    *("{{ messages | map(attribute='content') | join(',') }}", "{{ 'x' ~ 1 ~ none }}"),
    *("{{ messages | sort }}", "{{ messages | sum }}", "{{ messages[0] | items }}"),
    *("{% raw %}", "{% endraw %}", "{#", "#}", "{{", "}}", "{%", "%}", "{%-", "-}}"),
    *("{% filter upper %}", "{% endfilter %}", "{% set y %}", "{% endset %}"),
    *("{% call f(1) %}", "{% endcall %}", "{{ " + "(" * 300 + "1" + ")" * 300 + " }}"),
    *("{{ " + "9" * 5000 + " }}", "{{ -" * 50, "{% if 1 %}" * 120, "{{ [" * 400),
    *("{% for a in messages %}" * 30, "{{ 1e999 | int }}", "{{ 'a' | int(base=99) }}"),
    *("{{ dict(a=1).popitem() }}", "{{ cycler().next() }}", "{{ range(5)[9] }}"),
)


def change_template(data: bytes, rng: random.Random) -> bytes:
    """Lines and pieces of Jinja taken out, put in and exchanged; or bytes changed."""
    if rng.random() < 0.3:
        return change_bytes(data, rng)
    lines = data.decode().split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, change = rng.randrange(len(lines)), rng.randrange(4)
        if change == 0 and len(lines) > 1:
            del lines[i]
        elif change == 1:
            lines.insert(i, rng.choice(PIECES))
        elif change == 2:
            lines[i] += rng.choice(PIECES)
        else:
            lines[i] = rng.choice(lines)
    return "\n".join(lines).encode()


@inputs({"chat template": 600})
def test_templates(folder: Path, kind: str, n: int) -> None:
    def read(data: bytes) -> None:
        (folder / "chat_template.jinja").write_bytes(data)
        source = data.decode("utf-8", "replace").lstrip("\ufeff")
        made = ChatTemplate(source, folder).render(MESSAGES, TOOLS)
        assert isinstance(made, str) and len(made) < 1e7

    n_read, n_refused = survive(
        kind, n, SMALL_TEMPLATE.encode(), change_template, read, str(folder)
    )
    assert n_read > n / 50 and n_refused > n / 4


# --- tools ----------------------------------------------------------------------------


@inputs({"tool schemas": 700})
def test_schemas(tmp_path: Path, kind: str, n: int) -> None:
    """What `read_tools` takes, serves to read a call."""
    path = tmp_path / "tools.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check_calls(CALLS, read_tools(path))

    n_read, n_refused = survive(
        kind, n, json.dumps(TOOLS).encode(), change_json, read, path.name
    )
    assert n_read > n / 50 and n_refused > n / 10


def change_calls(data: bytes, rng: random.Random) -> bytes:
    """Tags and values exchanged; or bytes changed."""
    if rng.random() < 0.4:
        return change_bytes(data, rng)
    lines = data.decode().split("\n")
    values = (*EXTREMES, "</parameter>", "<parameter=x>", "</tool_call>", "<tool_call>")
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, change = rng.randrange(len(lines)), rng.randrange(4)
        if change == 0 and len(lines) > 1:
            del lines[i]
        elif change == 1:
            lines.insert(i, rng.choice((*values, *lines)))
        elif change == 2:
            lines[i] = rng.choice((*values, *lines))
        else:
            lines[i] = rng.choice((lines[i] + lines[-1], lines[i] * 50, lines[i][:-1]))
    return "\n".join(lines).encode()


def check_calls(text: str, tools: list[dict]) -> None:
    """A text in pieces gives what it gives as a whole; every call can be shown."""
    content, calls = parse_tool_calls(text, tools)
    parser, events = ToolCallParser(tools), []
    for i in range(0, len(text), 7 if len(text) < 10_000 else 4096):
        events += parser.feed(text[i : i + (7 if len(text) < 10_000 else 4096)])
    events += parser.flush()
    assert "".join(e for e in events if isinstance(e, str)) == content
    assert [e for e in events if isinstance(e, ToolCall)] == calls
    for call in calls:
        assert "\n" not in readable_call(call)
        assert call.error is None or len(call.error) < 1000
        json.dumps(call.arguments, allow_nan=False).encode()


@inputs({"tool calls": 1500})
def test_calls(kind: str, n: int) -> None:
    def read(data: bytes) -> None:
        check_calls(data.decode("utf-8", "replace"), TOOLS)

    n_read, n_refused = survive(kind, n, CALLS.encode(), change_calls, read)
    assert (n_read, n_refused) == (n, 0)  # whatever a model writes can be read
