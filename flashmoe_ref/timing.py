"""Time several ways of doing the same thing, side by side.

A machine that does other things slows whatever runs at that moment. So each contender
runs once a round, in turns, and the median over rounds counts; ratios of medians
travel from one machine to another far better than seconds do.
**But:** measures wall time, in one process, after one run that warms caches up.
*Used in notebooks/05.*
"""

import statistics
import time
from collections.abc import Callable, Mapping


def time_in_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int = 9
) -> dict[str, float]:
    """Median time of each run, by name.

    Units:  seconds a call.
    Raises: ValueError if rounds is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}
