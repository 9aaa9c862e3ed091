"""Policy for notebooks as tests. Their kernels inherit this process's environment."""

import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tests"))  # pytest's own `pythonpath` comes later

import tally  # noqa: E402
from notebook_times import NotebookTimes, processor_seconds  # noqa: E402

os.environ.setdefault("FLASHMOE_PROFILE", "ci")
os.environ.setdefault("PYTHONHASHSEED", "0")
# pytest's own `pythonpath` does not reach kernels
paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
os.environ.pop("MPLBACKEND", None)  # figures must be drawn inline, as in JupyterLab
# Threads that wait by spinning would take the core that another process computes on.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# MLX compiles for the CPU into the temporary folder, and without a lock: two processes
# at once would load what is half written. So each worker of `make test` has its own.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    temporary = Path(tempfile.gettempdir(), f"flashmoe-tests-{os.getuid()}-{worker}")
    temporary.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)

# A script that runs the tests in its background lets them, and what they start, ignore
# Control-C, which some of them are about.
signal.signal(signal.SIGINT, signal.default_int_handler)

times = NotebookTimes()
tried: Counter[str] = Counter()  # see tests/tally.py


def pytest_configure(config: pytest.Config) -> None:
    """Name the sanitizing rules by an absolute path, so that pytest works anywhere."""
    config.option.nbval_sanitize_with = str(ROOT / "tests" / "nbval_sanitize.cfg")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave out what differs in each run: process numbers in warnings, dates in SVG."""
    if hasattr(collector, "skip_compare"):  # nbval's collector of a notebook
        collector.skip_compare += ("stderr", "image/svg+xml")


# --- run time, and what was tried -----------------------------------------------------

# `make test` spreads test files over processes. Tests run there; their reports, with
# what is appended to `user_properties`, arrive in the process that ends the session.
PROCESSOR = "processor time of the kernel"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport]:
    """Send along what the test counted: the report may go to another process."""
    report = yield
    report.user_properties.append(("tally", tally.take()))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up the time of a notebook's cells, and of its kernel's start and end."""
    times.add_wall(report.nodeid, report.duration)
    properties = dict(report.user_properties)
    tried.update(properties.get("tally", {}))
    if PROCESSOR in properties:
        times.note_processor(report.nodeid, properties[PROCESSOR])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """After each cell, look at the kernel's processor time."""
    kernel = getattr(item.parent, "kernel", None)
    if kernel is not None and kernel.is_alive():
        seconds = processor_seconds(kernel.km.provisioner.pid)
        if seconds is not None:  # else it has died, and a test says so
            item.user_properties.append((PROCESSOR, seconds))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where notebooks take longer than a classroom waits."""
    if times.complaints() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the tests tried, and how long each notebook took."""
    if tried:
        terminalreporter.section("inputs tried, faults survived")
        for line in tally.lines(tried):
            terminalreporter.write_line(line)
    if times.wall_s:
        terminalreporter.section("run time of notebooks")
        for line in [*times.summary(), *times.complaints()]:
            terminalreporter.write_line(line)
