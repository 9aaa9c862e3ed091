"""Writes the tool-call and JSON sets of this folder, always the same bytes.

tool.jsonl and json.jsonl come from the generators that made the training dialogues
(data/build), with words of pools.json and seeds of their own: training seeds are
numbers, these are texts. hard.jsonl comes from hard.py.

Usage: python make.py [--out DIR]
       python make.py --pools POOLS     (anew from the training's pools.json)
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "build"))

from dialogues import Dialogue, make  # noqa: E402
from hard import TOPICS  # noqa: E402
from heldout import UNSEEN_SHARE  # noqa: E402

SEED = "flashmoe evaluation 1: "
COUNTS = {"tool": 80, "tools": 20, "json": 100}  # of each, seen and unseen words
PER_TOPIC = 9  # prompts of each topic of the harder set
POOL_SIZES = {"words": 3000, "words_held": 1000, "phrases": 400, "phrases_held": 200}


def main() -> None:
    """Write the three sets, or the pools that they draw from."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--pools", type=Path, help="pools.json of a training")
    options = parser.parse_args()
    if options.pools:
        write_pools(json.loads(options.pools.read_text()), options.out / "pools.json")
    pools = json.loads((HERE / "pools.json").read_text(encoding="utf-8"))
    for name, prompts in make_sets(pools).items():
        write_lines(options.out / f"{name}.jsonl", prompts)


def make_sets(pools: dict) -> dict[str, list[dict]]:
    """All prompts: {"tool": [...], "json": [...], "hard": [...]}."""
    sets: dict[str, list[dict]] = {"tool": [], "json": []}
    for kind, count in COUNTS.items():
        for group in ("seen", "unseen"):
            rng = random.Random(f"{SEED}{kind} {group}")
            dialogues = draw(rng, pools, kind, group == "unseen", count)
            for number, dialogue in enumerate(dialogues, 1):
                prompt = {"id": f"{kind}-{group}-{number:03d}"}
                prompt |= {"kind": "json" if kind == "json" else "tool"}
                prompt |= {"group": group} | as_prompt(dialogue)
                sets[prompt["kind"]].append(prompt)
    return sets | {"hard": make_hard()}


def draw(
    rng: random.Random, pools: dict, kind: str, unseen: bool, count: int
) -> list[Dialogue]:
    """`count` dialogues with, or without, words never used in training."""
    found: list[Dialogue] = []
    while len(found) < count:
        dialogue = make(rng, pools, UNSEEN_SHARE if unseen else 0.0, kind)
        if dialogue.unseen == unseen:
            found.append(dialogue)
    return found


def as_prompt(dialogue: Dialogue) -> dict:
    """All but the last answer as the prompt, and that answer as what is wanted."""
    *messages, answer = dialogue.messages
    if dialogue.tools:
        wanted = [call["function"] for call in answer["tool_calls"]]
        return {"messages": messages, "wanted": wanted, "tools": dialogue.tools}
    wanted = json.loads(answer["content"])
    asked = "\n\n".join(message["content"] for message in messages)
    return {"messages": messages, "wanted": wanted, "schema": schema_of(asked, wanted)}


def schema_of(asked: str, wanted: dict) -> dict:
    """The schema that the instruction states; what the text does not say is null."""
    shape = stated_shape(asked, wanted)
    properties = {key: field_schema(shape[key], value) for key, value in wanted.items()}
    return {"type": "object", "properties": properties, "required": [*wanted]}


def stated_shape(asked: str, wanted: dict) -> dict:
    """{key: type word, or the keys of an object}, from either form of instruction."""
    for begin in re.finditer(r"\{", asked):
        try:
            shape, _ = json.JSONDecoder().raw_decode(asked, begin.start())
        except json.JSONDecodeError:
            continue
        if shape.keys() == wanted.keys():
            return shape
    shape = {}
    for key in wanted:
        found = re.search(rf"(?<![\w(]){key} \(([^()]+)\)", asked)
        word, _, inner = found.group(1).partition(": ")
        shape[key] = dict.fromkeys(inner.split(", "), "") if inner else word
    return shape


def field_schema(word: str | dict, value: object) -> dict:
    """JSON schema of one field; null is always allowed."""
    if word == "list of strings":
        return {"type": ["array", "null"], "items": {"type": "string"}}
    if isinstance(word, dict):
        known = value or dict.fromkeys(word)
        parts = {key: part_schema(word[key], known[key]) for key in word}
        return {
            "type": ["object", "null"],
            "properties": parts,
            "required": [*parts],
        }
    return {"type": [word, "null"]}


def part_schema(word: str, value: object) -> dict:
    """JSON schema inside an object, whose types only one form of instruction states."""
    if word:
        return {"type": word}
    return {} if value is None else {"type": _name_of_type(value)}


def _name_of_type(value: object) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number"}
    return names[type(value)]


def make_hard() -> list[dict]:
    """The harder set, topic by topic, no prompt twice."""
    prompts: list[dict] = []
    for topic, make_one in TOPICS.items():
        rng = random.Random(f"{SEED}{topic}")
        found: list[dict] = []
        while len(found) < PER_TOPIC:
            prompt = make_one(rng)
            if prompt not in found:
                found.append(prompt)
        prompts += [
            {"id": f"hard-{topic}-{n}", "kind": prompt["kind"], "group": topic} | prompt
            for n, prompt in enumerate(found, 1)
        ]
    return prompts


def write_lines(path: Path, prompts: list[dict]) -> None:
    """One JSON object a line."""
    lines = [json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def write_pools(pools: dict, path: Path) -> None:
    """A part of a training's pools, as large as these sets need."""
    rng = random.Random(f"{SEED}pools")
    kept = {name: pools[name] for name in ("first", "first_held", "city", "city_held")}
    for name, count in POOL_SIZES.items():
        kept[name] = sorted(rng.sample(pools[name], count))
    kept |= {"lists": pools["lists"]}
    path.write_text(json.dumps(kept, ensure_ascii=False, indent=0) + "\n", "utf-8")


if __name__ == "__main__":
    main()
