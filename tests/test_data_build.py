"""The generator of data/build: its dialogues are what the chat template renders.

The model was trained on text from data/reduced/chat_template.jinja; these tests hold
the generator, the template, our own renderer and transformers' renderer together.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from flashmoe_ref.chat_template import ChatTemplate
from flashmoe_ref.toolcalls import parse_tool_calls

ROOT = Path(__file__).parents[1]
REDUCED = ROOT / "data" / "reduced"
sys.path.insert(0, str(ROOT / "data" / "build"))

import dialogues  # noqa: E402
import render  # noqa: E402
import values  # noqa: E402

KNOWN = "apple bridge candle dragon ember forest garden hammer island jacket".split()
HELD = "zephyr quartz nimbus".split()
POOLS = {
    "first": ["Alice", "Tom"],
    "first_held": ["Xerxes"],
    "city": ["Oslo", "Rome"],
    "city_held": ["Quito"],
    "words": KNOWN,
    "words_held": HELD,
    "phrases": ["the old bridge fell down", "a candle in the forest"],
    "phrases_held": ["the nimbus came nearer"],
    "tales": ["Once upon a time there was a fox. He lived in a wood."],
    "lists": values.load_lists(),
}
KINDS = ("tool", "tools", "reply", "json", "copy", "chat")
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <tool_call> </tool_call> <tool_response> "
    "</tool_response> <think> </think>"
).split()


@pytest.fixture(scope="module")
def backend() -> Backend:
    """The reduced model's tokenizer."""
    return Backend.from_file(str(REDUCED / "tokenizer.json"))


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    """The chat template as the chat command uses it."""
    path = REDUCED / "chat_template.jinja"
    return ChatTemplate(path.read_text(), path)


def drawn(count: int, unseen_share: float = 0.0) -> list[dialogues.Dialogue]:
    """The same number of dialogues of every kind."""
    rng = random.Random(0)
    return [
        dialogues.make(rng, POOLS, unseen_share, kind)
        for kind in KINDS
        for _ in range(count)
    ]


TRAINING_TEMPLATE = render.load_template()


def training_text(dialogue: dialogues.Dialogue) -> str:
    """The text that the model was trained on."""
    return TRAINING_TEMPLATE.render(messages=dialogue.messages, tools=dialogue.tools)


def test_template_writes_qwens_format(template):
    function = {"name": "sum", "parameters": {"type": "object", "properties": {}}}
    call = {"name": "sum", "arguments": {"a": 1, "words": ["x"], "on": True}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [{"function": call}] * 2},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
    ]
    block = (
        "<tool_call>\n<function=sum>\n<parameter=a>\n1\n</parameter>\n"
        '<parameter=words>\n["x"]\n</parameter>\n<parameter=on>\ntrue\n</parameter>\n'
        "</function>\n</tool_call>"
    )
    wanted = (
        "<|im_start|>system\n# Tools\n\nYou can call these functions:\n<tools>\n"
        '{"type": "function", "function": {"name": "sum", "parameters": '
        '{"type": "object", "properties": {}}}}\n</tools>\n\nBe brief.<|im_end|>\n'
        "<|im_start|>user\nAdd.<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\n\n</think>\n\n{block}\n{block}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n"
        "<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    tools = [{"type": "function", "function": function}]
    assert template.render(messages, tools) == wanted
    thinking = template.render(messages, tools, enable_thinking=True)
    assert thinking == wanted.removesuffix("\n</think>\n\n")


def test_reasoning_before_the_last_question_is_dropped(template):
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1", "reasoning_content": "old"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2", "reasoning_content": "new"},
    ]
    text = template.render(messages, add_generation_prompt=False)
    assert "old" not in text
    assert "<|im_start|>assistant\n1<|im_end|>" in text
    assert "<|im_start|>assistant\n<think>\nnew\n</think>\n\n2<|im_end|>" in text


def test_training_text_is_prompt_and_answer_of_the_chat(backend, template):
    for dialogue in drawn(40):
        text = training_text(dialogue)
        ids = backend.encode(text, add_special_tokens=False).ids
        prompt = template.render(dialogue.messages[:-1], dialogue.tools or None)
        prompt_ids = backend.encode(prompt, add_special_tokens=False).ids
        assert ids[: len(prompt_ids)] == prompt_ids, text
        marks = render.mark_answers(ids, backend)
        answer = backend.decode(ids[len(prompt_ids) :], skip_special_tokens=False)
        assert text == prompt + answer
        n_answer = len(ids) - len(prompt_ids) - 1  # all but the newline at the end
        assert marks[len(prompt_ids) :] == [render.ANSWER] * n_answer + [render.PROMPT]


def test_answers_hold_the_structured_tool_calls():
    for dialogue in drawn(100)[:200]:  # tool and tools
        answer = training_text(dialogue).split("</think>\n\n")[-1]
        _, calls = parse_tool_calls(answer.split("<|im_end|>")[0], dialogue.tools)
        wanted = [c["function"] for c in dialogue.messages[-1]["tool_calls"]]
        got = [{"name": call.name, "arguments": call.arguments} for call in calls]
        assert got == wanted


def test_transformers_renders_the_same():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(REDUCED / "tokenizer.json")
    )
    source = (REDUCED / "chat_template.jinja").read_text()
    for dialogue in drawn(20):
        text = theirs.apply_chat_template(
            dialogue.messages,
            tools=dialogue.tools or None,
            chat_template=source,
            tokenize=False,
        )
        assert text == training_text(dialogue)


def test_values_stand_in_the_text():
    for dialogue in drawn(100)[300:400]:
        answer = json.loads(dialogue.messages[-1]["content"])
        text = " ".join(m["content"] for m in dialogue.messages[:-1])
        for value in leaves(answer):
            assert value is None or isinstance(value, bool) or says(text, value)


def leaves(value: object) -> list:
    """The scalars of a JSON value."""
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves(part)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in leaves(part)]
    return [value]


def says(text: str, value: object) -> bool:
    """Whether the text holds a value, perhaps as a number word."""
    if str(value) in text:
        return True
    return isinstance(value, int) and values.NUMBER_WORDS[value] in text


def test_training_never_uses_held_out_words():
    held = {word.lower() for word in [*HELD, "Xerxes", "Quito"]}
    for dialogue in drawn(100):
        assert not dialogue.unseen
        text = json.dumps(dialogue.messages).lower()
        assert not any(word in text for word in held)
    unseen = [d for d in drawn(100, unseen_share=0.6) if d.unseen]
    assert len(unseen) > 200


def test_the_same_seed_makes_the_same_dialogues():
    first = [training_text(d) for d in drawn(5)]
    assert first == [training_text(d) for d in drawn(5)]
    assert len(set(first)) > 0.9 * len(first)


def test_rows_hold_every_document_whole_and_once():
    rng = random.Random(1)
    documents = []
    for number in range(200):
        length = rng.randint(1, 60)
        documents.append(([number] * length, [1] * length))
    tokens, marks = render.pack_rows(documents, 64, pad_id=999)
    assert tokens.shape == marks.shape
    assert ((tokens == 999) == (marks == render.PADDING)).all()
    for number, (ids, _) in enumerate(documents):
        rows, columns = np.nonzero(tokens == number)
        assert len(rows) == len(ids) and len(set(rows.tolist())) == 1
        assert columns.max() - columns.min() == len(ids) - 1
    assert (marks > 0).mean() > 0.9


def test_special_tokens_are_the_last_ids(backend):
    ids = [backend.token_to_id(token) for token in SPECIAL]
    assert ids == list(range(6131, 6140))
    assert backend.get_vocab_size() == 6140
    text = "Naïve ﬁsh — 1234 'tis\n\n  done <tool_call>\n"
    assert backend.decode(backend.encode(text).ids, skip_special_tokens=False) == text
    assert len(backend.encode("1234").ids) == 4
