"""A conversation with tools in a notebook: thoughts folded, calls shown, streaming.

    pane = Transcript()
    display(pane)
    pane.stream(chat.say("How many GB are 7.08 MB times 600?"))

What a model writes is shown, never obeyed: it is escaped, and no markup of it becomes
HTML. **But:** plain text only, no Markdown. *Used in notebooks/13.*
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from ipywidgets import HTML, Button, HBox, Label, Layout, Text, VBox

from .errors import FlashMoeError
from .tool_chat import Event, ToolChat

_STYLE = {
    "you": "font-weight: bold",
    "text": "",
    "call": "font-family: monospace; color: #1f5fa8",
    "result": "font-family: monospace; color: #2b6e3f",
    "error": "font-family: monospace; color: #a83232",
    "stopped": "font-style: italic; color: #a83232",
}
_MARKS = {"you": "you: ", "call": "call ", "result": "= ", "error": "error: "}


def html_of(kind: str, text: str, is_growing: bool = False) -> str:
    """One part of a conversation as HTML; every character is shown as it is.

    A thought is folded away, and open only while it grows.
    Raises: KeyError for a kind that is not an event's.
    """
    shown = escape(text)
    if kind == "thinking":
        body = f'<div style="white-space: pre-wrap; color: #666">{shown}</div>'
        state = " open" if is_growing else ""
        return f"<details{state}><summary>thinking</summary>{body}</details>"
    style = f"white-space: pre-wrap; {_STYLE[kind]}"
    return f'<div style="{style}">{_MARKS.get(kind, "")}{shown}</div>'


class Transcript(VBox):
    """A conversation that grows; each part has a widget of its own, the last one grows.

    parts: what happened so far, pieces joined, as (kind, text).
    """

    def __init__(self) -> None:
        self.parts: list[Event] = []
        super().__init__(layout=Layout(width="100%", min_width="0"))

    def add(self, kind: str, text: str) -> None:
        """Show one more piece. Pieces of a thought or of a text are joined."""
        grows = kind in ("thinking", "text")
        if self.parts and grows and self.parts[-1].kind == kind:
            text = self.parts.pop().text + text
        else:
            self.settle()
            self.children = (*self.children, HTML())
        self.parts.append(Event(kind, text))
        self.children[-1].value = html_of(kind, text, is_growing=grows)

    def stream(self, events: Iterable[Event]) -> str:
        """Show events as they come; returns the text of the answer."""
        first = len(self.parts)
        try:
            for kind, text in events:
                self.add(kind, text)
        finally:
            self.settle()
        return "".join(part.text for part in self.parts[first:] if part.kind == "text")

    def settle(self) -> None:
        """Fold the last part if it is a thought: nothing follows it any more."""
        if self.parts:
            self.children[-1].value = html_of(*self.parts[-1])


class ChatBox(VBox):
    """A field to write in, above one transcript or several side by side.

    chats: by the name to show, for example {"4 bits": ToolChat, "2 bits": ToolChat}.
    They answer one after the other.
    """

    def __init__(self, chats: Mapping[str, ToolChat], message: str = "") -> None:
        self._chats = dict(chats)
        self.field = Text(message, description="you", layout=Layout(width="80%"))
        self.button = Button(description="send")
        self.transcripts = {name: Transcript() for name in self._chats}
        self.button.on_click(lambda _: self.send())
        panes = [_pane(name, pane) for name, pane in self.transcripts.items()]
        super().__init__([HBox([self.field, self.button]), HBox(panes)])

    def send(self) -> Sequence[str]:
        """Send what is in the field to every chat; returns their answers.

        An error is shown in the transcript.
        """
        message = self.field.value.strip()
        if not message:
            return ()
        self.button.disabled = True  # a second click would begin in the middle
        try:
            answers = []
            for name, chat in self._chats.items():
                pane = self.transcripts[name]
                pane.add("you", message)
                try:
                    answers.append(pane.stream(chat.say(message)))
                except FlashMoeError as error:  # else it would be shown nowhere
                    pane.add("error", f"{error}")
            self.field.value = ""
            return answers
        finally:
            self.button.disabled = False


def _pane(name: str, transcript: Transcript) -> VBox:
    layout = Layout(flex="1 1 0", min_width="0", padding="0 8px")
    return VBox([Label(name), transcript], layout=layout)
