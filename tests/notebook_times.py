"""How long each notebook took in a test session, and whether that is too long.

conftest.py feeds it: wall time from pytest's reports of a notebook's cells, with start
and end of its kernel, and the processor time of the kernel and what it started. A
notebook is too slow only if both are over the limit: a machine that is busy with other
work stretches the first, two threads add up in the second.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import PurePath

import psutil

EACH_S, ALL_S = 60, 360  # on two cores


def processor_seconds(pid: int) -> float | None:
    """What a running process and its ended children have used; None if it has died."""
    try:
        used = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    children_s = used.children_user + used.children_system
    return used.user + used.system + children_s


@dataclass
class NotebookTimes:
    """Seconds by notebook; ids are pytest's, such as notebooks/00.ipynb::Cell 3."""

    wall_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    processor_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add_wall(self, nodeid: str, seconds: float) -> None:
        """Add the time of one phase of one cell; ids of other tests are left out."""
        path, _, _cell = nodeid.partition("::")
        if path.endswith(".ipynb"):
            self.wall_s[path] += seconds

    def note_processor(self, nodeid: str, seconds: float) -> None:
        """Note the processor time of a notebook's kernel so far; the last one stays."""
        path, _, _cell = nodeid.partition("::")
        self.processor_s[path] = seconds

    def used_s(self, path: str) -> float:
        """What counts: wall time, or processor time where that is less."""
        wall_s = self.wall_s[path]
        return min(wall_s, self.processor_s.get(path, wall_s))

    def complaints(self) -> list[str]:
        """One line for each limit that is broken."""
        used_s = {path: self.used_s(path) for path in self.wall_s}
        lines = [
            f"{path} took {seconds:.0f} s; a notebook has {EACH_S} s"
            for path, seconds in used_s.items()
            if seconds > EACH_S
        ]
        if sum(used_s.values()) > ALL_S:
            lines.append(
                f"the notebooks took {sum(used_s.values()):.0f} s; they have {ALL_S} s"
            )
        return lines

    def summary(self) -> list[str]:
        """A line for each notebook, and one for all of them."""
        times = {PurePath(path).stem: s for path, s in sorted(self.wall_s.items())}
        times["all notebooks"] = sum(times.values())
        return [f"{name:28}{seconds:7.1f} s" for name, seconds in times.items()]
