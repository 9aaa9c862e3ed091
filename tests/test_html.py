"""What a model, a file or a user writes is shown as text: never HTML, never a formula.

The places that build HTML are found by reading the package's sources, so that a new one
has to be put to the same test.
"""

import ast
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from ipywidgets import HTML, Dropdown, Label, Widget
from matplotlib.text import Text
from test_tool_chat import Scripted

from flashmoe_ref import bargain_views, bargain_widgets, plots, widgets
from flashmoe_ref.bargain_views import Continuation
from flashmoe_ref.chat_widgets import ChatBox, Transcript
from flashmoe_ref.tool_chat import Event, ToolChat
from flashmoe_ref.toolcalls import format_tool_call
from flashmoe_ref.tools import EXAMPLES
from flashmoe_ref.views import draw_attention, say_attention

ROOT = Path(__file__).parents[1]
EVIL = (
    "<img src=x onerror=\"window.hit = 'img'\"><script>window.hit = 1</script>"
    "</details></div></td></table><svg/onload=alert(1)>'\"><a href=javascript:x>&lt;"
)
# The only functions of the package that write tags, and the tags that they write.
BUILDERS = {
    "chat_widgets.html_of": {"div", "details", "summary"},
    "bargain_views.html_side_by_side": {"table", "tr", "td", "b", "br"},
    "bargain_views._marked": {"mark", "b", "br"},
    "gpu_views.side_by_side": {"table", "tr", "th", "td", "pre", "b", "br"},
}
TAGS = set().union(*BUILDERS.values())
# A tag of HTML in a literal; those of tool calls and control tokens are none.
TAG = re.compile(
    r"</?(?:a|b|br|code|details|div|h\d|i|iframe|img|li|mark|p|pre|script|span|style|"
    r"summary|svg|table|td|th|tr|ul)\b[^<|]*>?"
)


class Read(HTMLParser):
    """What a browser would make of HTML: its tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(widget: Widget) -> str:
    """All that a widget and its children show; fails if more than text got in."""
    text = ""
    if isinstance(widget, HTML):
        read = Read(widget.value)
        assert read.tags <= TAGS, read.tags
        assert read.attributes <= {"style", "open"}, read.attributes
        text += read.text
    for child in getattr(widget, "children", ()):
        text += shown(child)
    return text


# --- every place ----------------------------------------------------------------------


def _functions_with_tags(path: Path) -> set[str]:
    found = set()
    for function in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        documentation = ast.get_docstring(function, clean=False)
        for node in ast.walk(function):
            literal = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if literal and node.value != documentation and TAG.search(node.value):
                found.add(f"{path.stem}.{function.name}")
    return found


def test_tags_are_written_in_known_places_only() -> None:
    found = set()
    for path in (ROOT / "flashmoe_ref").glob("*.py"):
        found |= _functions_with_tags(path)
    assert found == set(BUILDERS), "put the new place to the test in this file"


def test_html_widgets_are_filled_in_known_places_only() -> None:
    """Each is given escaped text, or what one of the builders made."""
    given = []
    for path in sorted((ROOT / "flashmoe_ref").glob("*widgets.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Assign) and ".value" in ast.unparse(
                node.targets[0]
            ):
                given.append(ast.unparse(node.value))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "HTML":
                assert not node.args and not node.keywords, "give it a value later"
    safe = ("escape(", "(escape(", "html_of(", "html_side_by_side(", "plots.png(", "''")
    assert given and all(value.startswith(safe) for value in given), given


def test_notebooks_show_only_numbers_as_html() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code":
                continue
            for name in ("Javascript", "Markdown(", "HTMLMath", "display.HTML"):
                assert name not in source, f"{path.name}: {name}"
            if "HTML(" in source or re.search(r"\.value = f", source):
                for found in re.findall(r"\{([^{}]*)\}", source):
                    assert re.search(r":[.\d,]*f$|^[\d.]+$", found), f"{path}: {found}"


# --- each of them ---------------------------------------------------------------------


def test_an_explorer_shows_text() -> None:
    axes = plots.figure()[1]
    explorer = widgets.Explorer(
        {"name": Dropdown(options=[EVIL])}, lambda name: axes, lambda name: name
    )
    assert shown(explorer) == EVIL
    for control in explorer.controls.values():
        assert not control.description_allow_html


def test_two_continuations_side_by_side_show_text() -> None:
    def run(name: str, prompt: str) -> Continuation:
        pieces = [EVIL, prompt, name]
        return Continuation(name, [1, 2, len(name)], pieces, 1e6, 10.0)

    viewer = bargain_widgets.side_by_side(run, [EVIL, "other"], EVIL)
    texts = Read(viewer.answers.value).text
    assert texts.count(EVIL) == 2 + 2 + 2  # a name twice, a prompt and a piece in each
    assert repr(EVIL) in shown(viewer)
    html = bargain_views.html_side_by_side(run(EVIL, EVIL), run("other", EVIL))
    assert Read(html).tags == {"table", "tr", "td", "b", "br", "mark"}


def test_a_transcript_shows_text() -> None:
    pane = Transcript()
    for kind in ("you", "thinking", "text", "call", "result", "error", "stopped"):
        pane.stream([Event(kind, EVIL[:30]), Event(kind, EVIL[30:])])
    texts = [shown(child) for child in pane.children]
    assert len(texts) == 2 * 7 - 2  # thoughts and texts grow together
    assert sum(EVIL in text for text in texts) == 2
    assert sum(text.endswith((EVIL[:30], EVIL[30:])) for text in texts) == len(texts)


def test_a_chat_box_shows_text() -> None:
    call = format_tool_call("calculate", {"expression": EVIL})
    chat = ToolChat(Scripted(f"{EVIL}{call}", EVIL), EXAMPLES)
    box = ChatBox({EVIL: chat})
    box.field.value = EVIL
    box.send()
    text = shown(box)
    assert text.count(EVIL) == 3  # the message and both answers
    assert json.dumps(EVIL)[1:-1] in text  # the call
    assert "is no part of arithmetic" in text
    names = [w for pane in box.children[1].children for w in pane.children]
    assert [w.value for w in names if isinstance(w, Label)] == [EVIL]


# --- figures --------------------------------------------------------------------------


@pytest.mark.parametrize("token", [r"$\frac$", "$x$", r"\$", "{$^$_", EVIL[:20]])
def test_tokens_in_figures_are_no_formulas(token: str) -> None:
    weights = np.full((1, 3, 3), 1 / 3)
    tokens = [token, "b", token]
    axes = draw_attention(weights, tokens, 0, 2)
    assert plots.png(axes).startswith(b"\x89PNG")
    drawn = [text for text in axes.findobj(Text) if token[:6] in text.get_text()]
    assert len(drawn) >= 3  # the title, and two ticks at least
    assert not any(text.get_parse_math() for text in drawn)
    assert token in say_attention(weights, tokens, 0, 2)
    names = plots.heatmap(np.eye(2), rows=[token, "b"], columns=["a", token])
    plots.mark(names, x=1, text=token)
    plots.png(names)
