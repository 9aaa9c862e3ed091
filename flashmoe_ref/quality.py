"""What a cut of K or bits cost the reduced model: read from its sweep.

The table is made by `sweep.py`; where it is missing, nothing is said. **But:** another
model loses other amounts; only the order is likely to be the same.
*Taught in notebooks/10 and 12.*
"""

import csv
from pathlib import Path

SWEEP = Path(__file__).parents[1] / "data" / "results" / "sweep.csv"  # in a clone
PLAIN = {"rule": "mlx", "kept": "renormalized"}
EMPTY = ("group_size", "down_bits", "dense_bits", "router_bits", "mass")


def read_sweep(path: Path = SWEEP) -> list[dict[str, str]]:
    """Rows of the table; none if there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def cost_in_quality(
    sweep: list[dict[str, str]], k: int, bits: int, trained_k: int
) -> str | None:
    """What a cut cost the reduced model, from its sweep; None if it has no such row.

    K is matched by its share of the trained one.
    """
    base = _row(sweep, None, None)
    if base is None:
        return None
    base_k = int(base["k_used"])
    same = round(k / trained_k * base_k)
    width = None if str(bits) == base.get("expert_bits") else bits
    row = _row(sweep, None if same == base_k else same, width)
    if row is None or row is base:
        return None
    change = float(row["perplexity"]) / float(base["perplexity"]) - 1
    text = f"perplexity {change:+.1%}"
    for name in ("tool_right", "tools_right"):
        if row.get(name) and base.get(name):
            text += f", tool calls right {float(row[name]):.0%}"
            return text + f" (was {float(base[name]):.0%})"
    return text


def _row(sweep: list[dict[str, str]], k: int | None, bits: int | None) -> dict | None:
    """The plain row of a K and bits; None: as the model is."""
    wanted = PLAIN | {"k": str(k or ""), "bits": str(bits or "")}
    wanted |= dict.fromkeys(EMPTY, "")
    for row in sweep:
        if all(row.get(name, "") == value for name, value in wanted.items()):
            return row
    return None
