"""Checks the shipped checkpoint with this project's own engine, on a CPU.

Scores held-out dialogues as scoring.py does, by one forward pass over each: the answer
counts as exact if every one of its tokens has the highest logit. With --csv it adds a
row to a table; data/results/reduced_build.csv was made of such rows.

Usage: python check_shipped.py --work DIR [--every N] [--engine numpy|mlx] [--k K]
"""

import argparse
import csv
import json
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


def shares(examples: list[Example], right: list[bool]) -> dict[str, object]:
    """Exact answers by kind and word pool, with counts and 95 % intervals."""
    columns: dict[str, object] = {}
    for kind in COUNTS:
        for pool, unseen in (("", None), ("_seen", False), ("_unseen", True)):
            oks = [
                ok
                for e, ok in zip(examples, right, strict=True)
                if e.kind == kind and unseen in (None, e.unseen)
            ]
            low, high = wilson(sum(oks), len(oks))
            name = kind + pool
            columns[f"{name}_exact"] = round(sum(oks) / len(oks), 4)
            columns |= {f"{name}_n": len(oks)}
            columns |= {f"{name}_low": round(low, 4), f"{name}_high": round(high, 4)}
    return columns


def add_row(path: Path, row: dict[str, object]) -> None:
    """Append to a table, with a header if the table is new."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def how_stored(model: Path) -> dict[str, object]:
    """Bits of the experts, and the rule that made fewer of the shipped four."""
    made = json.loads((model / "conversion.json").read_text())
    rule = made["settings"].get("rule", "mlx")
    return {"bits": made["settings"]["bits"], "rule": rule}


def main() -> None:
    """Load, score, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "data" / "reduced")
    parser.add_argument("--engine", default="numpy")
    parser.add_argument("--k", type=int, default=None)
    parser.add_argument("--every", type=int, default=1, help="every n-th dialogue")
    parser.add_argument("--rows", type=int, default=20, help="rows of books")
    parser.add_argument("--csv", type=Path, help="table to add a row to")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    examples = make_examples(tokenizer, load_pools(options.work))[:: options.every]
    begun = time.time()
    row = how_stored(options.model)
    with load(
        options.model, engine=options.engine, experts="resident", k=options.k
    ) as model:
        row["k"] = options.k or model.config.num_experts_per_tok
        row["book_rows"] = options.rows
        nats = book_nats(model, options.work, options.rows)
        row["books_nats_per_token"] = round(nats, 4)
        right = [is_exact(model, example) for example in examples]
    row |= shares(examples, right)
    for name, value in row.items():
        print(f"{name:22} {value}")
    if options.csv:
        add_row(options.csv, row)
    print(f"{time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
