"""Lessons in a real browser: they run, their sliders work, and text stays text.

Skipped where there is no Chromium or no Playwright. When a test fails, a screenshot and
the logs of page and server stay in tests/browser_artefacts.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest

LESSONS = [
    path.name
    for prefix in ("00", "01")
    for path in sorted((browser.ROOT / "notebooks").glob(f"{prefix}_*.ipynb"))
]
CHROMIUM = browser.find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium here; on Debian and Ubuntu: apt-get install chromium",
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A running JupyterLab: its address and its folder."""
    folder = tmp_path_factory.mktemp("lab")
    with browser.jupyter_lab(folder) as address:
        yield address, folder


@pytest.fixture
def page(lab: tuple[str, Path], request: pytest.FixtureRequest) -> Iterator[object]:
    """An empty page of a fresh browser; leaves a screenshot when the test fails."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=browser.FLAGS
        )
        page = chromium.new_page(viewport={"width": 1400, "height": 1000})
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        failed_before = request.session.testsfailed
        yield page
        if request.session.testsfailed > failed_before:
            _keep_artefacts(page, request.node.name, said, lab[1])
        chromium.close()


def _keep_artefacts(page, name: str, said: list[str], folder: Path) -> None:
    target = browser.ARTEFACTS / name
    target.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=target / "page.png")
    (target / "console.log").write_text("\n".join(said))
    shutil.copy(folder / "server.log", target)


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs_and_its_slider_moves(page, lab: tuple, name: str) -> None:
    browser.open_notebook(page, lab[0], name)
    cells = browser.run_all(page)
    shown = browser.widget_cells(cells)
    assert shown, f"{name} has no widget"
    cell = browser.show_cell(page, shown[0])
    slider = cell.locator(".noUi-handle[role=slider]").first
    slider.wait_for(state="visible", timeout=1000 * browser.PAGE_S)
    before = _shown(cell), slider.get_attribute("aria-valuenow")
    most = float(slider.get_attribute("aria-valuemax"))
    slider.focus()
    slider.press("ArrowLeft" if float(before[1]) >= most else "ArrowRight")
    browser.wait_until(
        lambda: (
            slider.get_attribute("aria-valuenow") != before[1]
            and _shown(cell) != before[0]
        ),
        browser.PAGE_S,
        "the slider's text and figure did not change",
    )


def _shown(cell) -> tuple[list[str], list[str]]:
    """What a widget says (HTML) and draws (the addresses of its pictures)."""
    texts = cell.locator(".widget-html-content").all_inner_texts()
    pictures = cell.locator("img.widget-image").all()
    return texts, [picture.get_attribute("src") for picture in pictures]


EVIL = '<img src=x onerror="window.hit = 1; alert(1)"><script>window.hit = 2</script>'
TEXTS = [
    f"""
from types import SimpleNamespace
from ipywidgets import HTML, Button, Dropdown
from flashmoe_ref.bargain_views import Continuation
from flashmoe_ref.bargain_widgets import side_by_side
from flashmoe_ref.chat_widgets import ChatBox
from flashmoe_ref.plots import figure
from flashmoe_ref.tool_chat import ToolChat
from flashmoe_ref.toolcalls import format_tool_call, parse_tool_calls
from flashmoe_ref.tools import Tool
from flashmoe_ref.widgets import Explorer

EVIL = {EVIL!r}
""",
    """
def echo(text):
    return f"result {text}"


class Session:  # says what a hostile model might say
    tools, tool_calls, enable_thinking = [], [], True
    model = SimpleNamespace(
        tokenizer=SimpleNamespace(apply_chat_template=lambda *_: "<think>")
    )

    def say(self, text, max_tokens):
        call = format_tool_call("echo", {"text": EVIL})
        self.tool_calls = parse_tool_calls(call, self.tools)[1]
        yield f"thought {EVIL}</think>text {EVIL}{call}"

    def answer_tools(self, results, max_tokens):
        self.tool_calls = []
        yield f"</think>answer {EVIL}"


tool = Tool("echo", EVIL, {"text": {"type": "string"}}, echo)
Session.tools = [tool.schema]
box = ChatBox({EVIL: ToolChat(Session(), [tool])})
box
""",
    """
box.field.value = f"prompt {EVIL}"
box.send()
""",
    """
def run(name, prompt):
    return Continuation(name, [1, len(name)], [f"piece {EVIL}", prompt], 1e6, 9.0)


side_by_side(run, [EVIL, "other"], f"prompt {EVIL}")
""",
    """
Explorer({"x": Dropdown(options=[EVIL])}, lambda x: figure()[1], lambda x: f"says {x}")
""",
    """
print(f"printed {EVIL}")
EVIL
""",
]


def test_hostile_text_is_shown_as_text(page, lab: tuple) -> None:
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    browser.add_notebook(lab[1], "hostile.ipynb", TEXTS)
    browser.open_notebook(page, lab[0], "hostile.ipynb")
    cells = browser.run_all(page)
    words = (
        "prompt",
        "thought",
        "text",
        "result",
        "answer",
        "piece",
        "says",
        "printed",
    )
    seen = ""
    for index in range(1, len(cells)):
        output = browser.show_cell(page, index).locator(".jp-Cell-outputWrapper")
        seen += output.evaluate("output => output.textContent")
        assert output.locator("img[src=x], script").count() == 0
    for word in words:
        assert f"{word} {EVIL}" in seen, word
    assert page.evaluate("window.hit") is None and dialogs == []


THREADS = [
    """
import threading
from ipywidgets import HTML, Button
from flashmoe_ref import generate, load

models = {
    name: load("../data/reduced", engine=name, slots=16) for name in ("numpy", "mlx")
}


def told():
    return ["".join(generate(m, "Once upon a time", 16)) for m in models.values()]


want, button, out, equal = told(), Button(description="tell"), HTML("not yet"), []


def tell(_):
    thread = threading.Thread(target=lambda: equal.append(told() == want))
    thread.start()
    equal.append(told() == want)  # at the same time as its thread
    thread.join()
    out.value = f"equal {equal}"


button.on_click(tell)
button
""",
    "out",
    "assert all(told() == want for _ in range(3))",
]


def test_a_click_uses_a_model_that_a_cell_has_made(page, lab: tuple) -> None:
    """In the thread that widgets have, and in one more; on both engines."""
    pytest.importorskip("mlx.core")
    browser.add_notebook(lab[1], "threads.ipynb", THREADS)
    browser.open_notebook(page, lab[0], "threads.ipynb")

    def click() -> None:
        button = page.locator("button.jupyter-button", has_text="tell")
        button.wait_for(state="visible", timeout=1000 * browser.RUN_S)
        button.click()

    browser.run_all(page, click)
    output = browser.show_cell(page, 1).locator(".widget-html-content")
    browser.wait_until(
        lambda: output.inner_text() != "not yet", browser.PAGE_S, "no click arrived"
    )
    assert output.inner_text() == "equal [True, True]"
