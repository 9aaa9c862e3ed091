"""Feed damaged inputs to a reader: each must end in a typed error or a right result.

No other exception, no hang, no memory beyond a bound. A failure tells the kind and the
number of the input, with which `mutate.mutant` makes it again, and its first bytes.
The tests count what they tried; `@inputs(kind, n)` says how many a test will try.
"""

import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mutate
import pytest
from tally import count

from flashmoe_ref.errors import FlashMoeError

MEMORY_BYTES = 1 << 30  # beyond what the process has; no source is above a megabyte
HANG_S = 60  # by the clock: a machine may be busy
SLOW_S = 2.0  # of processor time, for one input
MESSAGE_CHARACTERS = 1000
SHOWN = 600  # bytes of an input, where it failed


class Hung(BaseException):
    """Not an Exception, so that nothing takes it for an error of its own."""


def inputs(kinds: dict[str, int]) -> pytest.MarkDecorator:
    """A test of so many inputs of each kind: it gets `kind` and `n` as arguments."""
    return pytest.mark.parametrize(("kind", "n"), [*kinds.items()], ids=[*kinds])


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Asking for MEMORY_BYTES more fails inside, where the system can see to that."""
    old, statm = resource.getrlimit(resource.RLIMIT_AS), Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


@contextmanager
def bounded_time() -> Iterator[None]:
    """`Hung` is raised inside after HANG_S."""

    def ring(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def survive(
    kind: str,
    n: int,
    source: bytes,
    change: mutate.Mutator,
    read: Callable[[bytes], object],
    names: str = "",
) -> tuple[int, int]:
    """Give n distinct mutants of a source to a reader; returns (read, refused).

    read:  takes the bytes; asserts by itself that what it returns is right.
    names: what the message of an error must contain, such as the file's name.
    """
    n_read = 0
    with bounded_memory():
        for i, made in mutate.distinct(source, kind, n, change):
            try:
                n_read += _outcome(read, made, names)
            except (Exception, Hung) as error:
                shown = f"{made[:SHOWN]!r}{'...' if len(made) > SHOWN else ''}"
                pytest.fail(
                    f"{kind}, input {i} ({len(made):,} bytes): "
                    f"{type(error).__name__}: {error!s:.500}\n{shown}\n{_trail(error)}"
                )
    count(f"inputs: {kind}", n)
    return n_read, n - n_read


def _outcome(read: Callable[[bytes], object], made: bytes, names: str) -> bool:
    """True if it was read, False if it was refused in one clear line."""
    start_s = time.process_time()
    try:
        with bounded_time():
            read(made)
        is_read = True
    except FlashMoeError as error:
        check_message(str(error), names)
        is_read = False
    used_s = time.process_time() - start_s
    assert used_s < SLOW_S, f"took {used_s:.1f} s"
    return is_read


def check_message(message: str, names: str = "") -> None:
    """One line, not endless, that names the file or value."""
    assert message.strip() and "\n" not in message, "the message is not one line"
    assert len(message) <= MESSAGE_CHARACTERS, f"{len(message):,} characters: {message}"
    assert names in message, f"{names} is not named: {message}"


def _trail(error: BaseException) -> str:
    """Where it was raised: the last calls."""
    lines, at = [], error.__traceback__
    while at is not None:
        code = at.tb_frame.f_code
        lines.append(f"{Path(code.co_filename).name}:{at.tb_lineno} {code.co_name}")
        at = at.tb_next
    return " > ".join(lines[-6:])


def planned() -> dict[str, int]:
    """How many inputs each kind will get, from the marks of the tests themselves."""
    found: dict[str, int] = {}
    for path in sorted(Path(__file__).parent.glob("test_fuzz_*.py")):
        module = sys.modules.get(path.stem) or __import__(path.stem)
        for name, test in vars(module).items():
            if not name.startswith("test_"):
                continue
            for mark in getattr(test, "pytestmark", ()):
                if mark.args and mark.args[0] == ("kind", "n"):
                    for kind, n in mark.args[1]:
                        assert kind not in found, f"two tests try {kind}"
                        found[kind] = n
    return found
