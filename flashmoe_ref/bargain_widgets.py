"""The explorers of lesson 10: one setting on the frontier, and two settings' answers.

As in `widgets.py`: controls by name, a text that follows them, no `interact`. Whatever
a model wrote is escaped before it is shown. **But:** the side-by-side generator runs
the models when a control changes, so it keeps the kernel busy for a moment.
*Used in notebooks/10.*
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import escape

from ipywidgets import HTML, Dropdown, Text, VBox

from .bargain_views import (
    QUALITIES,
    Continuation,
    display_name,
    draw_frontier,
    html_side_by_side,
    points,
    say_point,
    say_side_by_side,
)
from .errors import FlashMoeError
from .widgets import Explorer

WIDE = {"width": "80%"}


def frontier_explorer(
    rows: Sequence[Mapping[str, str]], column: str = "cost_nats"
) -> Explorer:
    """Every setting of a table against one measure; the chosen one is framed.

    Starts with the table's first row.
    """
    columns = [
        (what, name) for name, (what, *_) in QUALITIES.items() if name in rows[0]
    ]
    names = [display_name(row) for row in rows]
    controls = {
        "measure": Dropdown(options=columns, value=column, description="measure"),
        "setting": Dropdown(options=names, value=names[0], description="setting"),
    }
    return Explorer(
        controls,
        lambda column, name: draw_frontier(points(rows, column), column, name),
        lambda column, name: say_point(points(rows, column), name, column),
    )


class SideBySide(VBox):
    """A prompt and two settings; their texts with the first difference marked."""

    def __init__(
        self,
        run: Callable[[str, str], Continuation],
        names: Sequence[str],
        prompt: str,
    ) -> None:
        self.controls = {
            "prompt": Text(
                prompt, description="prompt", layout=WIDE, continuous_update=False
            ),
            "left": Dropdown(options=names, value=names[0], description="left"),
            "right": Dropdown(options=names, value=names[-1], description="right"),
        }
        self.text, self.answers = HTML(), HTML()
        self._run = cache(run)
        for control in self.controls.values():
            control.observe(self._update, "value")
        self._update()
        super().__init__([*self.controls.values(), self.text, self.answers])

    def _update(self, _change: object = None) -> None:
        prompt = self.controls["prompt"].value or " "
        names = (self.controls[side].value for side in ("left", "right"))
        try:
            both = [self._run(name, prompt) for name in names]
        except FlashMoeError as error:  # a callback's exceptions are shown nowhere
            self.text.value, self.answers.value = escape(f"{error}"), ""
            return
        self.text.value = escape(say_side_by_side(*both))
        self.answers.value = html_side_by_side(*both)


def side_by_side(
    run: Callable[[str, str], Continuation], names: Sequence[str], prompt: str
) -> SideBySide:
    """The same prompt, two settings: what each writes, reads and how fast.

    run(name, prompt) continues a prompt with one setting; each pair is run once.
    Starts with the first name on the left and the last on the right.
    """
    return SideBySide(run, names, prompt)
