"""data/eval: the sets are what make.py writes, and their own checkers accept them."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from flashmoe_ref.structured_runs import MAX_TOKENS, Prompt, load_prompts, score_answer
from flashmoe_ref.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
EVAL = ROOT / "data" / "eval"
SETS = {"tool": 200, "json": 200, "hard": 108}
each_set = pytest.mark.parametrize("name", SETS)


def load_script(name: str) -> ModuleType:
    """A script of data/eval as a module."""
    sys.path[:0] = [str(EVAL), str(ROOT / "data" / "build")]
    spec = importlib.util.spec_from_file_location(f"eval_{name}", EVAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.path[:2]
    return module


def prompts(name: str) -> list[Prompt]:
    """One of the sets."""
    return load_prompts(EVAL / f"{name}.jsonl")


def leaves(value: object) -> list:
    """The scalars of a JSON value."""
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves(part)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in leaves(part)]
    return [value]


def spelled_otherwise(value: object) -> object:
    """A JSON value that is as good as the wanted one but for its last leaf."""
    if isinstance(value, dict) and value:
        *_, last = value
        return value | {last: spelled_otherwise(value[last])}
    if isinstance(value, list) and value:
        return [*value[:-1], spelled_otherwise(value[-1])]
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else "x"


def test_the_sets_can_be_made_again_to_the_byte(tmp_path):
    make = load_script("make")
    pools = json.loads((EVAL / "pools.json").read_text("utf-8"))
    for name, made in make.make_sets(pools).items():
        make.write_lines(tmp_path / name, made)
        stored = (EVAL / f"{name}.jsonl").read_bytes()
        assert (tmp_path / name).read_bytes() == stored, name


@each_set
def test_prompts_are_many_and_different(name):
    found = prompts(name)
    assert len(found) == SETS[name]
    assert len({prompt.id for prompt in found}) == len(found)
    assert len({json.dumps(prompt.messages) for prompt in found}) == len(found)
    if name != "hard":
        groups = [prompt.group for prompt in found]
        assert groups.count("seen") == groups.count("unseen") == 100


@each_set
def test_checkers_accept_the_wanted_answer_and_no_other(name):
    for prompt in prompts(name):
        score = score_answer(prompt, prompt.wanted_text)
        assert score.is_right, (prompt.id, score)
        wrong = spelled_otherwise(prompt.wanted)
        text = Prompt(**(vars(prompt) | {"wanted": wrong})).wanted_text
        assert not score_answer(prompt, text).is_right, (prompt.id, text)
        assert not score_answer(prompt, prompt.wanted_text[:-1]).is_right


@each_set
def test_values_stand_in_the_prompt(name):
    numbers = "zero one two three four five six seven eight nine ten eleven twelve"
    for prompt in prompts(name):
        said = " ".join(m["content"] or "" for m in prompt.messages)
        said += json.dumps(prompt.tools, ensure_ascii=False)  # the calls' names
        for value in leaves(prompt.wanted):
            if value is None or isinstance(value, bool):
                continue  # said in a sentence, or not at all
            small = isinstance(value, int) and 0 <= value <= 12
            in_words = small and numbers.split()[value] in said
            assert in_words or str(value) in said, (prompt.id, value)


@each_set
def test_answers_fit_the_limit_of_tokens(name):
    tokenizer = Tokenizer.from_dir(ROOT / "data" / "reduced")
    for prompt in prompts(name):
        assert len(tokenizer.encode(prompt.wanted_text)) < 0.9 * MAX_TOKENS


def test_seen_prompts_have_no_held_out_word():
    pools = json.loads((EVAL / "pools.json").read_text("utf-8"))
    held = {word.lower() for word in pools["words_held"] + pools["first_held"]}
    for name in ("tool", "json"):
        n_unseen = 0
        for prompt in prompts(name):
            values = " ".join(str(v) for v in leaves(prompt.wanted)).lower()
            found = held & set(re.findall(r"[a-z]+", values))
            assert not found or prompt.group == "unseen", (prompt.id, found)
            n_unseen += bool(found)
        assert n_unseen > 60


def test_seeds_are_not_those_of_training():
    make = load_script("make")
    assert isinstance(make.SEED, str)
    assert isinstance(sys.modules["heldout"].SEED, int)  # as those of training are


def test_prose():
    texts = {p.stem: p.read_text("utf-8") for p in (EVAL / "prose").glob("*.txt")}
    assert len(texts) == 10
    assert sum(len(text.encode()) for text in texts.values()) > 40 * 1024
    paragraphs = [p for text in texts.values() for p in text.split("\n") if len(p) > 80]
    assert len(paragraphs) == len(set(paragraphs)) > 100
    words = re.findall(r"[a-z]+", " ".join(texts.values()).lower())
    assert len(set(words)) > 1500  # no filler
    ascii_only = {name for name, text in texts.items() if text.isascii()}
    assert len(ascii_only) == 6
    for text in texts.values():
        assert "\r" not in text and text.endswith("\n") and not text.endswith("\n\n")


def test_the_folder_is_small():
    files = [p for p in EVAL.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert sum(p.stat().st_size for p in files) <= 700_000
