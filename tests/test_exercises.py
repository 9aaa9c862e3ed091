"""Solutions of the exercises are right, with no more than a lesson's imports.

The rest of a lesson runs as a test of its own, with the exercises as the reader finds
them.
"""

import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTION = re.compile(r"```python\n# solution: (\S+)\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_solutions(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, 4)
    prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    solutions = dict(SOLUTION.findall(prose))
    exercises = {
        cell.id: cell
        for cell in notebook.cells
        if "exercise" in cell.metadata.get("tags", [])
    }
    assert len(exercises) >= 2
    assert set(solutions) == set(exercises)
    before = _verdicts(notebook)
    assert before and all("not attempted" in verdict for verdict in before)
    for name, cell in exercises.items():
        cell.source = solutions[name]
    notebook.cells = [cell for cell in notebook.cells if _is_needed(cell)]
    monkeypatch.chdir(ROOT / "notebooks")
    after = _run(notebook)
    assert len(after) == len(before)
    assert all(": correct" in verdict for verdict in after), after


def _is_needed(cell: nbformat.NotebookNode) -> bool:
    """Imports, exercises, and what checks them."""
    is_exercise = "exercise" in cell.metadata.get("tags", [])
    starts = ("import ", "from ", "check(")
    return cell.cell_type == "code" and (is_exercise or cell.source.startswith(starts))


def _run(notebook: nbformat.NotebookNode) -> list[str]:
    """Run cells with names of their own; what those that check an exercise print."""
    names, verdicts = {"__name__": "__main__"}, []
    for cell in notebook.cells:
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(cell.source, cell.id, "exec", dont_inherit=True), names)
        if cell.source.startswith("check("):
            verdicts.append(printed.getvalue())
    return verdicts


def _verdicts(notebook: nbformat.NotebookNode) -> list[str]:
    """What is stored of the cells that check an exercise."""
    return [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.source.startswith("check(")
    ]


def test_check_never_raises(capsys: pytest.CaptureFixture) -> None:
    from flashmoe_ref.exercises import check

    def wrong(*args: object) -> int:
        return -1

    def broken(*args: object) -> int:
        raise KeyError("oops")

    for function, verdict in (
        (lambda *args: None, "not attempted"),
        (wrong, "not right yet"),
        (broken, "KeyError"),
    ):
        check("0.1", function)
        assert verdict in capsys.readouterr().out
    check("99.9", wrong)
    assert "no exercise" in capsys.readouterr().out


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
