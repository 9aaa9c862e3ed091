"""Write the lessons as hand-outs for live coding: `make handout`.

    python notebooks/handout.py            all of them, into handout/
    python notebooks/handout.py 00 04      those whose names begin so

A hand-out keeps headings, questions to predict, exercises and code; it leaves out the
explanations, the folded answers and all outputs. It runs where it lies. Git ignores it.
"""

import re
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
TARGET = HERE.parent / "handout"
FOLDED = re.compile(r"<details>.*?</details>", re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|\.\./|#)")
KEPT = ("#", "**Time**", "**You need**")


def main(prefixes: list[str]) -> int:
    """Write the hand-outs of the notebooks whose names begin so (none: all)."""
    TARGET.mkdir(exist_ok=True)
    for path in sorted(HERE.glob("[0-9]*.ipynb")):
        if not prefixes or path.name.startswith(tuple(prefixes)):
            nbformat.write(hand_out(nbformat.read(path, 4)), TARGET / path.name)
            print(TARGET / path.name)
    return 0


def hand_out(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A notebook's copy without explanations, answers and outputs."""
    cells = []
    for cell in notebook.cells:
        cell = nbformat.from_dict(cell)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        else:
            cell.source = shorten(cell.source)
        if cell.source:
            cells.append(cell)
    return nbformat.from_dict({**notebook, "cells": cells})


def shorten(markdown: str) -> str:
    """The paragraphs that a reader at the keyboard needs; all of an exercise."""
    text = FOLDED.sub("", markdown).strip()
    if not text.startswith("### Exercise"):
        paragraphs = re.split(r"\n\s*\n", text)
        text = "\n\n".join(p for p in paragraphs if _is_kept(p))
    return LINK.sub("](../notebooks/", text)


def _is_kept(paragraph: str) -> bool:
    return paragraph.startswith(KEPT) or "**Predict.**" in paragraph


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
