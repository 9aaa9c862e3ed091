"""What a cut of K or bits cost the reduced model: read from its sweep.

The table is made by `sweep.py`; where it is missing, nothing is said. **But:** another
model loses other amounts; only the order is likely to be the same.
*Taught in notebooks/10 and 12.*
"""

from pathlib import Path

from .errors import ConfigError
from .small_files import number, parse_table, read_text

SWEEP = Path(__file__).parents[1] / "data" / "results" / "sweep.csv"  # in a clone
PLAIN = {"rule": "mlx", "kept": "renormalized"}
EMPTY = ("group_size", "down_bits", "dense_bits", "router_bits", "mass")


def read_sweep(path: Path = SWEEP) -> list[dict[str, str]]:
    """Rows of the table; none if there is no file. Raises: ConfigError."""
    text = read_text(path, ConfigError)
    return [] if text is None else parse_table(text, path, ConfigError)


def cost_in_quality(
    sweep: list[dict[str, str]], k: int, bits: int, trained_k: int
) -> str | None:
    """What a cut cost the reduced model, from its sweep; None if it has no such row.

    K is matched by its share of the trained one.
    Raises: ConfigError naming the column of a value that is none.
    """
    base = _row(sweep, None, None)
    if base is None:
        return None
    base_k = round(number(base, "k_used", ConfigError))
    same = round(k / trained_k * base_k)
    width = None if str(bits) == base.get("expert_bits") else bits
    row = _row(sweep, None if same == base_k else same, width)
    if row is None or row is base:
        return None
    was = number(base, "perplexity", ConfigError)
    if was <= 0:
        raise ConfigError(f"column perplexity: {was:g} is none")
    change = number(row, "perplexity", ConfigError) / was - 1
    text = f"perplexity {change:+.1%}"
    for name in ("tool_right", "tools_right"):
        if row.get(name) and base.get(name):
            now, was = (number(r, name, ConfigError) for r in (row, base))
            return text + f", tool calls right {now:.0%} (was {was:.0%})"
    return text


def _row(sweep: list[dict[str, str]], k: int | None, bits: int | None) -> dict | None:
    """The plain row of a K and bits; None: as the model is."""
    wanted = PLAIN | {"k": str(k or ""), "bits": str(bits or "")}
    wanted |= dict.fromkeys(EMPTY, "")
    for row in sweep:
        if all(row.get(name, "") == value for name, value in wanted.items()):
            return row
    return None
