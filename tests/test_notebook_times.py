"""Run time of notebooks: added up, and a session fails for one that is too slow."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from notebook_times import NotebookTimes, processor_seconds

ROOT = Path(__file__).parents[1]


def test_a_notebook_beyond_its_time_fails_the_session() -> None:
    times = NotebookTimes()
    for nodeid, seconds in (
        ("notebooks/00.ipynb::Cell 0", 50.0),
        ("notebooks/00.ipynb::Cell 1", 9.0),
        ("tests/test_x.py::test_y", 1000.0),
    ):
        times.add_wall(nodeid, seconds)
    assert times.wall_s == {"notebooks/00.ipynb": 59.0}
    assert not times.complaints()
    times.add_wall("notebooks/00.ipynb::Cell 2", 10.0)
    assert times.complaints() == ["notebooks/00.ipynb took 69 s; a notebook has 60 s"]
    # slow because others computed
    times.note_processor("notebooks/00.ipynb::Cell 2", 30.0)
    assert not times.complaints()
    for number in range(1, 8):
        times.add_wall(f"notebooks/0{number}.ipynb::Cell 0", 50.0)
    assert times.complaints() == ["the notebooks took 380 s; they have 360 s"]
    assert times.summary()[-1].split() == ["all", "notebooks", "419.0", "s"]


def test_processor_time_of_a_process_is_seen() -> None:
    assert processor_seconds(os.getpid()) > 0.1  # this process's own
    assert processor_seconds(2**22 + 1) is None  # no such process


# Stands in for nbval: a notebook of one cell, whose text is what the kernel computes.
NBVAL = """
import subprocess, sys
from types import SimpleNamespace
import pytest, notebook_times

notebook_times.EACH_S = 1

class Cell(pytest.Item):
    def runtest(self):
        assert self.parent.process.stdout.readline()

class Notebook(pytest.File):
    def setup(self):
        code = self.path.read_text() + "\\nprint(flush=True)\\ninput()"
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        self.process = subprocess.Popen([sys.executable, "-c", code], **pipes)
        km = SimpleNamespace(provisioner=SimpleNamespace(pid=self.process.pid))
        self.kernel = SimpleNamespace(km=km, is_alive=lambda: True)

    def teardown(self):
        self.process.communicate(b"\\n")

    def collect(self):
        yield Cell.from_parent(self, name="Cell 0")

def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb":
        return Notebook.from_parent(parent, path=file_path)
"""


@pytest.mark.parametrize("n_processes", ["0", "2"])
def test_a_session_fails_for_a_notebook_that_computes_too_long(
    tmp_path: Path, n_processes: str
) -> None:
    """Also where its cells run in other processes than the one that adds up."""
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "stand_in.py").write_text(NBVAL)
    (tmp_path / "waits.ipynb").write_text("import time\ntime.sleep(1.1)")
    computes = "import time\nwhile time.process_time() < 1.1:\n    pass"
    (tmp_path / "computes.ipynb").write_text(computes)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    options = f"-n {n_processes} --dist loadfile -p stand_in -p no:nbval".split()
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    too_long = re.findall(r"(\w+)\.ipynb took \d+ s; a notebook has 1 s", done.stdout)
    assert too_long == ["computes"], done.stdout
