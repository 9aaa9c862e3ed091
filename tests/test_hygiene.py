"""What must hold for every file: clean notebooks, a light import, short files."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MARKDOWN = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "notebooks").glob("*.md")),
]
SOURCES = sorted((ROOT / "flashmoe_ref").glob("*.py"))
TAGS = {"exercise", "raises-exception"}
HEAVY = ("mlx", "numba", "matplotlib", "jinja2", "tokenizers", "ipywidgets", "torch")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
MACHINE_PATHS = re.compile(r"/Users/|/home/|/root/|/work/|/tmp/|[A-Z]:\\\\")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def _read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, 4)


def _code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _prose(notebook: nbformat.NotebookNode) -> str:
    cells = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return "\n\n".join(cells)


def _without_code(markdown: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", markdown, flags=re.DOTALL)


# --- the package ----------------------------------------------------------------------


def test_import_is_fast_and_loads_nothing_heavy() -> None:
    code = "import sys, time; t = time.perf_counter(); import flashmoe_ref; " + (
        "print(time.perf_counter() - t, *sys.modules)"
    )
    best_s = float("inf")
    for _ in range(3):  # the first may read from a cold disk
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT
        )
        seconds, *modules = done.stdout.decode().split()
        best_s = min(best_s, float(seconds))
        loaded = {name.split(".")[0] for name in modules}
        assert not loaded & set(HEAVY)
    assert best_s < 0.3


def test_the_public_names_are_the_functions() -> None:
    import flashmoe_ref
    from flashmoe_ref import chat, engine, generate, generation, load

    assert (load, generate, chat) == (
        engine.load,
        generation.generate,
        generation.chat,
    )
    assert flashmoe_ref.generate is generation.generate  # not a module of that name
    assert {"load", "generate", "chat"} <= set(dir(flashmoe_ref))
    with pytest.raises(AttributeError, match="no attribute 'lead'"):
        _ = flashmoe_ref.lead


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert text.startswith('"""')
    assert not MACHINE_PATHS.search(text)
    if not path.name.startswith("cli") and path.name != "exercises.py":
        names = [n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)]
        assert "print" not in names, "printing is for cli.py"


def test_each_promise_about_security_names_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    promises = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(promises) > 8
    for promise in promises:
        names = re.findall(r"`(test_\w+\.py)`", promise)
        assert names, promise
        for name in names:
            assert (ROOT / "tests" / name).exists(), name


# --- notebooks ------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_cells_are_formatted_and_linted(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, *NOTEBOOKS],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@each_notebook
def test_form(path: Path) -> None:
    notebook = _read(path)
    assert path.stat().st_size <= 600_000
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith(f"# {path.name[:2]} · ")
    headings = re.findall(r"^#+ ", _without_code(_prose(notebook)), re.M)
    assert headings.count("# ") == 1
    for words in ("**You will**", "**You need**", "**Time**", "**Model**"):
        assert words in first.source
    for words in ("**Predict.**", "> **What we obscured.**", "## You can now"):
        assert words in _prose(notebook)


@each_notebook
def test_cells(path: Path) -> None:
    notebook = _read(path)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for number, cell in enumerate(_code(notebook), 1):
        assert cell.execution_count == number, "store with 'make notebooks'"
        assert set(cell.metadata) <= {"tags"}
        for tag in cell.metadata.get("tags", []):
            assert tag in TAGS or tag.startswith("nbval-")
        assert len(cell.source.splitlines()) <= 25
        assert not cell.source.rstrip().endswith(";"), "nbval shows it all the same"
        assert not re.search(r"input\(|%pip|!pip", cell.source)


@each_notebook
def test_outputs(path: Path) -> None:
    cells = _code(_read(path))
    ignored = [c for c in cells if "nbval-ignore-output" in c.metadata.get("tags", [])]
    compared = [cell for cell in cells if cell.outputs and cell not in ignored]
    assert len(ignored) <= 2
    assert len(compared) >= 8
    for cell in cells:
        text = json.dumps(cell.outputs)
        assert not MACHINE_PATHS.search(text)
        raises = "raises-exception" in cell.metadata.get("tags", [])
        for output in cell.outputs:
            assert raises or output.output_type != "error"
            images = output.get("data", {}).get("image/png", "")
            assert len(images) <= 140_000  # 100 KB in base64
            assert "application/vnd.jupyter.widget-view+json" not in output.get(
                "data", {}
            )


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the scripts beside the notebooks importable."""
    monkeypatch.syspath_prepend(ROOT / "notebooks")


@each_notebook
def test_navigation_is_current(path: Path, tools: None) -> None:
    from store import _title, navigation

    titles = {other: _title(_read(other)) for other in NOTEBOOKS}
    notebook = _read(path)
    line = navigation(path, titles)
    assert line in notebook.cells[0].source, "store with 'make notebooks'"
    assert line in notebook.cells[-1].source, "store with 'make notebooks'"


@each_notebook
def test_handout_has_questions_and_code_but_no_answers(path: Path, tools: None) -> None:
    from handout import hand_out

    lesson = _read(path)
    short = hand_out(lesson)
    assert [c.source for c in _code(short)] == [c.source for c in _code(lesson)]
    assert not any(cell.outputs for cell in _code(short))
    prose = _prose(short)
    assert "<details>" not in prose and "# solution:" not in prose
    assert len(prose) < 0.6 * len(_prose(lesson))
    for text in ("# ", "**Predict.**", "### Exercise"):
        assert prose.count(text) == _prose(lesson).count(text) or text == "# "
    for _image, _label, target in LINK.findall(prose):
        file = target.partition("#")[0]
        if not target.startswith("http"):
            assert (ROOT / "handout" / file).resolve().exists(), target
    assert lesson == _read(path)  # it was not changed


@each_notebook
def test_readme_says_how_long_a_lesson_takes(path: Path) -> None:
    minutes = re.search(
        r"\*\*Time\*\* (\d+) minutes reading", _read(path).cells[0].source
    )
    assert minutes, "**Time** N minutes reading, about M seconds running ..."
    readme = (ROOT / "notebooks" / "README.md").read_text("utf-8")
    rows = [line for line in readme.splitlines() if f"({path.name})" in line]
    assert len(rows) == 1, "give the lesson a row in the table of notebooks/README.md"
    assert re.search(rf"\| {minutes.group(1)} min \| \d+ s \|$", rows[0]), rows[0]


@each_notebook
def test_first_use_of_a_term_links_to_the_glossary(path: Path) -> None:
    assert "(glossary.md#" in _prose(_read(path))


@pytest.mark.parametrize("path", [*NOTEBOOKS, *MARKDOWN], ids=lambda path: path.name)
def test_links_resolve(path: Path) -> None:
    text = _prose(_read(path)) if path.suffix == ".ipynb" else path.read_text("utf-8")
    for image, label, target in LINK.findall(_without_code(text)):
        assert label.strip(), f"link to {target} has no text"
        if image:
            assert len(label) > 10, f"image {target} needs a description"
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), target
        if anchor and place.suffix == ".md":
            assert anchor in _anchors(place), target


def _anchors(path: Path) -> set[str]:
    """As GitHub and JupyterLab make them, and explicit <a id="...">."""
    text = path.read_text("utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    made = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    return made | set(re.findall(r'<a id="([^"]+)">', text))


# --- the classroom --------------------------------------------------------------------


def test_environment_serves_binder() -> None:
    """What can be checked without conda: the names, and that all is listed once."""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    *conda, pip = listed["dependencies"]
    assert listed["channels"] == ["conda-forge"]
    assert "pip" in conda and pip == {"pip": ["-e .[test]"]}
    (python,) = (name for name in conda if name.startswith("python="))
    assert python.partition("=")[2] in SpecifierSet(project["requires-python"])
    assert "flashmoe-ref[lab]" in project["optional-dependencies"]["test"]


def test_make_lab_opens_the_first_lesson() -> None:
    done = subprocess.run(
        ["make", "-n", "lab"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert f"notebooks/{NOTEBOOKS[0].name}" in done.stdout
    assert NOTEBOOKS[0].name.startswith("00_")
