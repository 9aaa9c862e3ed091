"""JupyterLab in a headless Chromium: what test_browser.py needs to drive it.

The server works on a copy of the notebooks, with a home folder of its own, on a free
port of 127.0.0.1 and behind a token; it ends with the test, and by itself if the test
is killed. Chromium is the system's (Debian: apt-get install chromium): Playwright's
client drives it, and no browser is downloaded.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import psutil
import pytest

ROOT = Path(__file__).parents[1]
ARTEFACTS = ROOT / "tests" / "browser_artefacts"  # ignored by git
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
START_S, PAGE_S, RUN_S = 120, 120, 300  # for a slow and busy machine
QUIET = {  # JupyterLab's settings: no pop-up over the page, nothing from the network
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
}
IDLE_S = 300  # a server whose test was killed ends this long after its last kernel

# Run in the page; `jupyterapp` is there because the server exposes it.
CELLS = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const kernel = panel.sessionContext.session?.kernel;
    return {
        idle: kernel?.status === "idle",
        cells: panel.content.model.toJSON().cells,
    };
}"""
READY = """(name) => {
    const panel = window.jupyterapp?.shell.currentWidget;
    return panel?.context?.isReady && panel.context.path.endsWith(name)
        && panel.sessionContext?.session?.kernel?.status === "idle";
}"""
# Not awaited: a command's promise may never come back to Playwright.
RUN_ALL = '() => { window.jupyterapp.commands.execute("notebook:run-all-cells"); }'
SHOW = """async (index) => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.activeCellIndex = index;
    await notebook.scrollToItem(index, "start");
}"""


def find_chromium() -> str | None:
    """The path of the system's Chromium or Chrome."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def copy_notebooks(folder: Path) -> None:
    """Copy the lessons, without outputs, beside a link to the models."""
    (folder / "notebooks").mkdir()
    (folder / "data").symlink_to(ROOT / "data")
    for path in (ROOT / "notebooks").iterdir():
        if path.suffix == ".md":
            shutil.copy(path, folder / "notebooks")
        elif path.suffix == ".ipynb":
            notebook = nbformat.read(path, 4)
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    cell.outputs, cell.execution_count = [], None
            nbformat.write(notebook, folder / "notebooks" / path.name)


def _environment(home: Path, settings: dict) -> dict[str, str]:
    jupyter = {
        f"JUPYTER_{name}_DIR": str(home / name.lower())
        for name in ("CONFIG", "DATA", "RUNTIME")
    }
    lab = {
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    for name, values in (QUIET | settings).items():
        file = home / "settings" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own = {"HOME": str(home), "IPYTHONDIR": str(home / "ipython")}
    # matplotlib's list of fonts takes seconds to make: use the one that is there
    return kept | jupyter | lab | own | {"XDG_CACHE_HOME": cache}


def add_notebook(folder: Path, name: str, cells: list[str]) -> None:
    """Put a notebook of code cells beside the lessons."""
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(notebook, folder / "notebooks" / name)


@contextmanager
def jupyter_lab(folder: Path, settings: dict | None = None) -> Iterator[str]:
    """Serve folder/notebooks; gives the address, with {} for the path in the page."""
    home = folder / "home"
    home.mkdir()
    copy_notebooks(folder)
    token, port = secrets.token_hex(16), _free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [
        f"--ServerApp.root_dir={folder}",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
        "--LabApp.expose_app_in_browser=True",
        f"--MappingKernelManager.cull_idle_timeout={IDLE_S}",
        "--MappingKernelManager.cull_connected=True",
        f"--ServerApp.shutdown_no_activity_timeout={IDLE_S}",
    ]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(home, settings or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for_server(server, f"{address}/api?token={token}", folder / "server.log")
        yield f"{address}/lab/tree/notebooks/{{}}?reset&token={token}"
    finally:
        _stop(server)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for_server(server: subprocess.Popen, url: str, log: Path) -> None:
    def answers() -> bool:
        assert server.poll() is None, f"JupyterLab ended:\n{log.read_text()[-3000:]}"
        try:
            return urllib.request.urlopen(url, timeout=5).status == 200
        except OSError:
            return False

    wait_until(answers, START_S, "JupyterLab did not answer")


def wait_until(condition: Callable[[], object], limit_s: float, what: str) -> None:
    """Ask again and again; fail with `what` after limit_s seconds."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"{what} within {limit_s} s"
        time.sleep(0.2)


def _stop(server: subprocess.Popen) -> None:
    """End the server and its kernels, politely and then not."""
    family = psutil.Process(server.pid).children(recursive=True)
    server.terminate()  # shuts its kernels down
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    for process in psutil.wait_procs(family, timeout=5)[1]:
        process.kill()


# --- the page -------------------------------------------------------------------------


def open_notebook(page, address: str, name: str) -> None:
    """Load JupyterLab with one notebook and wait for its kernel."""
    page.goto(address.format(name), timeout=1000 * PAGE_S)
    page.wait_for_function(READY, arg=name, timeout=1000 * PAGE_S)


def run_all(page, meanwhile: Callable[[], None] = lambda: None) -> list[dict]:
    """Run all cells and wait until they have run. Returns the cells with outputs.

    meanwhile: what to do in the page while they run.
    Fails with the error of the first cell that raises one.
    """
    page.evaluate(RUN_ALL)
    meanwhile()
    state: dict = {}

    def has_run() -> bool:
        state.update(page.evaluate(CELLS))
        code = [cell for cell in state["cells"] if cell["cell_type"] == "code"]
        for cell in code:
            for output in cell["outputs"]:
                if output["output_type"] == "error":
                    text = f"{output['ename']}: {output['evalue']}"
                    pytest.fail(f"{text} in\n{''.join(cell['source'])}")
        return state["idle"] and all(cell["execution_count"] for cell in code)

    wait_until(has_run, RUN_S, "the cells did not all run")
    return state["cells"]


def widget_cells(cells: list[dict]) -> list[int]:
    """Which cells show a widget."""
    kind = "application/vnd.jupyter.widget-view+json"
    return [
        index
        for index, cell in enumerate(cells)
        if any(kind in output.get("data", {}) for output in cell.get("outputs", []))
    ]


def show_cell(page, index: int):
    """Scroll to a cell (those off the screen are not painted); returns its place."""
    page.evaluate(SHOW, index)
    return page.locator(
        f".jp-NotebookPanel:not(.lm-mod-hidden) "
        f".jp-Cell[data-windowed-list-index='{index}']"
    )
