"""Execute the notebooks again and store their outputs: `make notebooks`.

    python notebooks/store.py              all of them
    python notebooks/store.py 00 04        those whose names begin so
    python notebooks/store.py --times      run all and store nothing: how long they take
    python notebooks/store.py --links      run nothing, write the navigation lines

Runs every notebook from top to bottom as the tests do, writes its navigation lines, and
removes what must not be stored: widget state, timing, the kernel's own details. Where
an output differs only in what the tests do not compare (times, rates, addresses), the
stored one stays, so that a run without changes leaves no difference for git.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SANITIZE = ROOT / "tests" / "nbval_sanitize.cfg"
NAV = re.compile(r"<!-- nav -->.*?<!-- /nav -->", re.DOTALL)
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"  # holds a random number


def main(arguments: list[str]) -> int:
    """Store every notebook whose name begins with one of the arguments (none: all)."""
    _set_environment()
    options = {name for name in arguments if name.startswith("--")}
    prefixes = tuple(set(arguments) - options)
    if options - {"--times", "--links"}:
        print(__doc__, file=sys.stderr)
        return 2
    paths = sorted(HERE.glob("[0-9]*.ipynb"))
    titles = {path: _title(nbformat.read(path, 4)) for path in paths}
    for path in paths:
        if prefixes and not path.name.startswith(prefixes):
            continue
        start = time.perf_counter()
        old = nbformat.read(path, 4)
        new = old if "--links" in options else execute(old)
        seconds = time.perf_counter() - start
        if "--times" in options:
            print(describe(path, old, seconds), flush=True)
            continue
        if "--links" not in options:
            clean(new)
            keep_equal_outputs(old, new)
            print(f"{path.name}: {seconds:.1f} s", flush=True)
        write_navigation(new, navigation(path, titles))
        nbformat.write(new, path)
    return 0


def describe(path: Path, notebook: nbformat.NotebookNode, run_s: float) -> str:
    """One line: name, cells, words of prose, promised minutes, seconds taken."""
    texts = [c.source for c in notebook.cells if c.cell_type == "markdown"]
    n_words = sum(len(text.split()) for text in texts)
    minutes = re.search(r"\*\*Time\*\* (\d+) min", texts[0])
    reading = minutes.group(1) if minutes else "?"
    return (
        f"{path.stem:24}{len(notebook.cells):4} cells{n_words:6,} words"
        f"{reading:>5} min reading{run_s:7.1f} s running"
    )


def _set_environment() -> None:
    """As conftest.py: the kernel inherits it."""
    os.environ.setdefault("FLASHMOE_PROFILE", "ci")
    os.environ["PYTHONHASHSEED"] = "0"
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.pop("MPLBACKEND", None)


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run a copy of a notebook in a fresh kernel, in the notebooks' folder.

    Raises: nbclient's CellExecutionError with the traceback of the cell that failed.
    """
    fresh = nbformat.from_dict(json.loads(json.dumps(notebook)))
    client = NotebookClient(
        fresh,
        timeout=120,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(HERE)}},
    )
    return client.execute()


def read_rules(path: Path = SANITIZE) -> list[tuple[re.Pattern, str]]:
    """The rules that nbval applies, in order."""
    pairs = re.findall(r"^regex: (.*)$\n^replace: (.*)$", path.read_text(), re.M)
    return [(re.compile(pattern), text) for pattern, text in pairs]


def as_compared(outputs: list, rules: list[tuple[re.Pattern, str]]) -> str:
    """Outputs without what nbval leaves out or replaces."""
    kept = []
    for output in json.loads(json.dumps(outputs)):
        if output.get("name") == "stderr":
            continue
        output.pop("execution_count", None)
        data = output.get("data", {})
        for skipped in (WIDGET_VIEW, "image/svg+xml"):
            data.pop(skipped, None)
        kept.append(output)
    text = json.dumps(kept, ensure_ascii=False)
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def keep_equal_outputs(old: nbformat.NotebookNode, new: nbformat.NotebookNode) -> None:
    """Give cells of new their old outputs where the two compare as equal."""
    rules = read_rules()
    stored = {cell.id: cell for cell in old.cells if cell.cell_type == "code"}
    for cell in new.cells:
        before = stored.get(cell.id)
        if cell.cell_type == "code" and before is not None and before.outputs:
            ignored = "nbval-ignore-output" in cell.metadata.get("tags", [])
            same = before.source == cell.source and ignored
            equal = as_compared(before.outputs, rules) == as_compared(
                cell.outputs, rules
            )
            if same or equal:
                cell.outputs = before.outputs


def _title(notebook: nbformat.NotebookNode) -> str:
    return re.search(r"^# (.+)$", notebook.cells[0].source, re.M).group(1)


def navigation(path: Path, titles: dict[Path, str]) -> str:
    """The line of links to the lessons before and after, and to the contents."""
    paths = list(titles)
    at = paths.index(path)
    links = ["[Contents](README.md)"]
    if at > 0:
        before = paths[at - 1]
        links.insert(0, f"[← {titles[before]}]({before.name})")
    if at + 1 < len(paths):
        after = paths[at + 1]
        links.append(f"[{titles[after]} →]({after.name})")
    return f"<!-- nav -->\n{' | '.join(links)}\n<!-- /nav -->"


def write_navigation(notebook: nbformat.NotebookNode, line: str) -> None:
    """Put the line of links between its marks in the first and the last cell."""
    for cell in (notebook.cells[0], notebook.cells[-1]):
        cell.source = NAV.sub(lambda _: line, cell.source)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Remove what must not be stored; number the cells as a fresh run does."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {
                "display_name": "Python 3 (ipykernel)",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        }
    )
    count = 0
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = join_streams(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = count
            output.get("data", {}).pop(WIDGET_VIEW, None)


def join_streams(outputs: list) -> list:
    """Make one output of pieces that were printed one after the other."""
    joined: list = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last["text"] += output.text
        else:
            joined.append(output)
    return joined


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
