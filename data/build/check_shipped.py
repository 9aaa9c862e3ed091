"""Checks the shipped checkpoint with this project's own engine, on a CPU.

Scores held-out dialogues as scoring.py does, by one forward pass over each: the answer
counts as exact if every one of its tokens has the highest logit.

Usage: python check_shipped.py --work DIR [--every N] [--engine numpy|mlx] [--k K]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from heldout import COUNTS, Example, load_pools, make_examples, wilson
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from flashmoe_ref import load  # noqa: E402


def is_exact(model, example: Example) -> bool:
    """Would greedy decoding give exactly the wanted answer?"""
    logits = model.logits(example.ids[:-1])  # (T - 1, V)
    predicted = logits[example.start - 1 :].argmax(-1)
    return bool((predicted == np.array(example.ids[example.start :])).all())


def book_nats(model, work: Path, n_rows: int) -> float:
    """Nats a token over rows of 512 held-out tokens, evenly spread."""
    ids = np.load(work / "held.npy").astype(np.int64)
    starts = np.linspace(0, len(ids) - 512, n_rows).astype(int)
    total = 0.0
    for start in starts:
        row = ids[start : start + 512]
        logits = model.logits(row[:-1].tolist()).astype(np.float64)
        top = logits.max(-1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(-1))
        total += (log_sum - logits[np.arange(511), row[1:]]).sum()
    return total / (511 * n_rows)


def report(examples: list[Example], right: list[bool]) -> None:
    """A line for each kind and word pool, with its 95 % interval."""
    for kind in COUNTS:
        for name, unseen in (("all", None), ("seen", False), ("unseen", True)):
            oks = [
                ok
                for e, ok in zip(examples, right, strict=True)
                if e.kind == kind and unseen in (None, e.unseen)
            ]
            low, high = wilson(sum(oks), len(oks))
            share = f"{sum(oks) / len(oks):.3f} [{low:.3f}, {high:.3f}]"
            print(f"{kind:6} {name:7} {share} n={len(oks)}", flush=True)


def main() -> None:
    """Load, score, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "data" / "reduced")
    parser.add_argument("--engine", default="numpy")
    parser.add_argument("--k", type=int, default=None)
    parser.add_argument("--every", type=int, default=1, help="every n-th dialogue")
    parser.add_argument("--rows", type=int, default=20, help="rows of books")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    examples = make_examples(tokenizer, load_pools(options.work))[:: options.every]
    begun = time.time()
    with load(
        options.model, engine=options.engine, experts="resident", k=options.k
    ) as model:
        print(f"books {book_nats(model, options.work, options.rows):.3f} nats a token")
        right = [is_exact(model, example) for example in examples]
    report(examples, right)
    print(f"{time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
