"""Held-out measurements: books in nats a token, dialogues by exact greedy match.

Greedy decoding gives exactly the wanted answer if and only if, with the wanted answer
as input, every one of its tokens has the highest logit. So one forward pass measures
what generation would, for hundreds of dialogues at once.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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


@torch.no_grad()
def exact_matches(
    model, examples: list[Example], device: str, batch: int = 200
) -> list[bool]:
    """For each example: would greedy decoding give exactly the wanted answer?"""
    right = []
    for first in range(0, len(examples), batch):
        group = examples[first : first + batch]
        width = -(-max(len(e.ids) for e in group) // 64) * 64
        ids = torch.zeros(len(group), width, dtype=torch.long)
        answer = torch.zeros(len(group), width, dtype=torch.bool)
        for row, e in enumerate(group):
            ids[row, : len(e.ids)] = torch.tensor(e.ids)
            answer[row, e.start : len(e.ids)] = True
        ids, answer = ids.to(device), answer[:, 1:].to(device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        # Logits only where an answer token is predicted: (tokens, V)
        predicted = model.lm_head(hidden[:, :-1][answer]).argmax(-1)
        wrong = torch.zeros_like(answer)
        wrong[answer] = predicted != ids[:, 1:][answer]
        right += (~wrong.any(1)).tolist()
    return right


@torch.no_grad()
def book_loss(
    model, books: torch.Tensor, batch: int = 64
) -> tuple[float, torch.Tensor]:
    """Nats a token over rows of 512 tokens, and the most likely tokens.

    Shapes: books (rows, 512) -> argmax (rows, 511) int16.
    """
    total, best = 0.0, []
    for first in range(0, len(books), batch):
        ids = books[first : first + batch].long()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)[:, :-1].float()
        targets = ids[:, 1:].reshape(-1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        total += loss.double().item()
        best.append(logits.argmax(-1).to(torch.int16))
    return total / (books.shape[0] * (books.shape[1] - 1)), torch.cat(best)


def summarize(examples: list[Example], right: list[bool]) -> dict[str, float]:
    """Share of exact answers by kind, and by seen and unseen words."""
    groups: dict[str, list[bool]] = {}
    for e, ok in zip(examples, right, strict=True):
        for name in (e.kind, f"{e.kind}_{'unseen' if e.unseen else 'seen'}"):
            groups.setdefault(name, []).append(ok)
    return {name: round(sum(oks) / len(oks), 4) for name, oks in groups.items()}


def load_held(work: Path, device: str) -> torch.Tensor:
    """The held-out books as rows of 512 tokens, (rows, 512) int32 on the device."""
    ids = np.load(work / "held.npy")
    rows = ids[: len(ids) // WIDTH * WIDTH].reshape(-1, WIDTH)
    return torch.tensor(rows.astype(np.int32), device=device)


def load_pools(work: Path) -> dict:
    """The word and phrase pools that corpus.py wrote."""
    return json.loads((work / "pools.json").read_text())
