"""The held-out dialogues, the same on every machine, and how their scores are summed.

Half of the tool calls and of the JSON hold words that training dialogues never use.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from dialogues import make
from render import ANSWER, load_template, mark_answers
from tokenizers import Tokenizer

SEED = 987_654_321  # training dialogues use seeds 0, 1, 2, ...
WIDTH = 512
UNSEEN_SHARE = 0.6  # of the words that have a held-out pool
# kind -> how many dialogues; half of tool and json hold words never seen
COUNTS = {"tool": 600, "json": 600, "tools": 200, "reply": 200}


@dataclass
class Example:
    """One held-out dialogue: its tokens up to the end of the last answer."""

    kind: str
    unseen: bool
    ids: list[int]
    start: int  # first token of the last answer


def make_examples(tokenizer: Tokenizer, pools: dict) -> list[Example]:
    """The held-out dialogues, the same on every machine."""
    rng, template = random.Random(SEED), load_template()
    wanted = [(kind, u) for kind in COUNTS for u in (False, True)]
    examples = []
    for kind, unseen in wanted:
        count = 0
        while count < COUNTS[kind] // 2:
            dialogue = make(rng, pools, UNSEEN_SHARE if unseen else 0.0, kind)
            if dialogue.unseen != unseen:
                continue
            text = template.render(messages=dialogue.messages, tools=dialogue.tools)
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) <= WIDTH:
                examples.append(cut_example(kind, unseen, ids, tokenizer))
                count += 1
    return sorted(examples, key=lambda e: len(e.ids))


def cut_example(
    kind: str, unseen: bool, ids: list[int], tokenizer: Tokenizer
) -> Example:
    """End at the last answer's last token and find where that answer begins."""
    marks = mark_answers(ids, tokenizer)
    end = len(ids)
    while marks[end - 1] != ANSWER:
        end -= 1
    start = end
    while marks[start - 1] == ANSWER:
        start -= 1
    return Example(kind, unseen, ids[:end], start)


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    z, p = 1.96, right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return middle - half, middle + half


def summarize(examples: list[Example], right: list[bool]) -> dict[str, float]:
    """Share of exact answers by kind, and by seen and unseen words."""
    groups: dict[str, list[bool]] = {}
    for e, ok in zip(examples, right, strict=True):
        for name in (e.kind, f"{e.kind}_{'unseen' if e.unseen else 'seen'}"):
            groups.setdefault(name, []).append(ok)
    return {name: round(sum(oks) / len(oks), 4) for name, oks in groups.items()}


def load_pools(work: Path) -> dict:
    """The word and phrase pools that corpus.py wrote."""
    return json.loads((work / "pools.json").read_text())
