"""How many inputs, faults and kills the tests tried: counted where they are tried.

A test calls `count("kills of pack")`; conftest.py sends what a test counted along with
its report, so that it arrives also from another process (pytest-xdist), and prints the
sums at the end of the run.
"""

from collections import Counter

_counts: Counter[str] = Counter()


def count(kind: str, n: int = 1) -> None:
    """Add n to what the running test has tried of a kind."""
    _counts[kind] += n


def take() -> dict[str, int]:
    """What was counted since the last call."""
    taken = dict(_counts)
    _counts.clear()
    return taken


def lines(totals: Counter[str]) -> list[str]:
    """One a kind, numbers in a column."""
    width = max((len(f"{n:,}") for n in totals.values()), default=0)
    return [f"{totals[kind]:>{width},} {kind}" for kind in sorted(totals)]
