"""Settings that people give: of the right kind and in range, or refused.

True is no number here, although Python counts with it, and 2.0 is no whole one: who
writes them meant something else. NumPy's numbers are as good as Python's.
"""

import numpy as np


def is_whole(value: object, low: int, high: int | None = None) -> bool:
    """Whether a setting is a whole number in low..high; high None: from low on."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return False
    return low <= value and (high is None or value <= high)


def is_number(value: object) -> bool:
    """Whether a setting is a number that a float can hold; NaN and infinity are not."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int | np.integer):
        return abs(int(value)) < 1 << 63
    return isinstance(value, float | np.floating) and bool(np.isfinite(value))
