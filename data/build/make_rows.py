"""Writes the training dialogues as part files of packed rows, on many processes.

Part k holds the dialogues of seed k, whatever the number of processes, so a run can be
repeated and continued. train.py reads the parts in order and waits for the next one.

Usage: python make_rows.py --work DIR --rows DIR --parts N --processes N
"""

import argparse
import multiprocessing
import os
from pathlib import Path

import numpy as np

PER_PART = 2500  # dialogues
WIDTH = 512  # tokens a row


def write_part(task: tuple[Path, Path, int]) -> int:
    """Make part number k: (rows, 2, 512) uint16, tokens and marks. Returns its rows."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    from heldout import load_pools
    from render import build_rows
    from tokenizers import Tokenizer

    work, rows, k = task
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    tokens, marks = build_rows(k, PER_PART, WIDTH, tokenizer, load_pools(work))
    order = np.random.default_rng(k).permutation(len(tokens))
    part = np.stack([tokens, marks.astype(np.uint16)], 1)[order]
    unfinished = rows / f"unfinished_{k}.npy"
    np.save(unfinished, part)
    unfinished.rename(rows / f"part_{k:05d}.npy")
    return len(part)


def main() -> None:
    """Write all parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--parts", type=int, default=480)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    options.rows.mkdir(parents=True, exist_ok=True)
    os.nice(10)  # the training process goes first
    tasks = [(options.work, options.rows, k) for k in range(options.parts)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        n_rows = sum(pool.imap(write_part, tasks))
    print(f"{options.parts * PER_PART} dialogues in {n_rows} rows", flush=True)


if __name__ == "__main__":
    main()
