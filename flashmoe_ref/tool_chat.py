"""A conversation in which the model may use tools: ask, call, answer, and so on.

    chat = ToolChat(session, EXAMPLES)
    for event in chat.say("What is 17 % of 2,340?"):
        ...     # thinking, text, call, result, error or stopped, as they come

The list of tools is fixed when the chat begins. A name that is not in it, arguments
that its schema does not allow and whatever a tool raises go back to the model as an
error, and nothing else happens; calls inside the model's thinking are not calls.
Follows Qwen3.5's format: see `toolcalls.py`. **But:** tools run in this process and are
trusted to be pure and quick; the limits are on the model, not on them.
*Taught in notebooks/13.*
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import NamedTuple

from .chat_template import THINK, THINK_END
from .errors import ConfigError, ToolError
from .generation import ChatSession
from .toolcalls import ToolCall, ToolCallParser, readable_call
from .tools import Tool

MAX_CALLS = 8  # in one answer; more are refused
MAX_RESULT_CHARACTERS = 4000  # a result costs context like everything else
ENOUGH = "error: no more calls are allowed; answer with what you know"


class Event(NamedTuple):
    """What happened, as it comes. A thought or a text may come in many pieces."""

    kind: str  # thinking, text, call, result, error, stopped
    text: str


class ThinkingSplitter:
    """Tells thoughts from the answer in a stream, however it is cut into pieces.

    is_open: the prompt ends with <think>, so the model begins inside.
    """

    def __init__(self, is_open: bool) -> None:
        self.is_thinking = is_open
        self._may_begin = not is_open  # a model may write <think> itself, at the start
        self._buffer = ""  # not given out: a tag may begin in it
        self._trims = False  # no white space before an answer after a thought

    def feed(self, piece: str) -> list[Event]:
        """Add a piece. Returns what is certain by now."""
        self._buffer += piece
        if self._may_begin and not self._begin():
            return []
        events = []
        if self.is_thinking:
            text, tag, rest = self._buffer.partition(THINK_END)
            if not tag:
                text, rest = _before_tag(self._buffer, THINK_END)
            events += [Event("thinking", text)] * bool(text)
            self._buffer = rest
            self.is_thinking, self._trims = not tag, bool(tag)
        if not self.is_thinking:
            text, self._buffer = self._buffer, ""
            text = text.lstrip() if self._trims else text
            self._trims = self._trims and not text
            events += [Event("text", text)] * bool(text)
        return events

    def flush(self) -> list[Event]:
        """The stream ends here: what was held back."""
        text, self._buffer = self._buffer, ""
        kind = "thinking" if self.is_thinking else "text"
        return [Event(kind, text)] if text else []

    def _begin(self) -> bool:
        """Look for <think>; False while that is undecided."""
        begun = self._buffer.lstrip()
        if len(begun) < len(THINK) and THINK.startswith(begun):
            return False
        self._may_begin = False
        if begun.startswith(THINK):
            self.is_thinking, self._buffer = True, begun[len(THINK) :]
        return True


def _before_tag(text: str, tag: str) -> tuple[str, str]:
    """The text without a beginning of the tag at its end, and that beginning."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return text[:-length], text[-length:]
    return text, ""


class ToolChat:
    """A session, and the tools that it may use; `say` does the rest.

    session: made with `chat(model, tools=[tool.schema for tool in tools])`.
    max_rounds: answers whose calls are run, for one message of the user.
    """

    def __init__(
        self,
        session: ChatSession,
        tools: Sequence[Tool],
        max_rounds: int = 4,
        max_tokens: int | None = 1024,
    ) -> None:
        self.session = session
        self.tools = MappingProxyType({tool.name: tool for tool in tools})
        self.max_rounds = max_rounds
        self.max_tokens = max_tokens
        if session.tools != [tool.schema for tool in tools]:
            raise ConfigError("the session was told of other tools than these")
        if len(self.tools) != len(tools) or max_rounds < 1:
            raise ConfigError("two tools have one name, or max_rounds is below 1")
        self._is_open = opens_thinking(session)

    def say(self, text: str) -> Iterator[Event]:
        """Send a message; yields what happens until the model answers without a call.

        Whoever stops listening stops the model.
        """
        pieces = self.session.say(text, self.max_tokens)
        for n_rounds in range(self.max_rounds + 2):
            is_whole = yield from self._answer(pieces)
            calls = self.session.tool_calls
            if not is_whole:
                yield Event("stopped", "the answer ended inside a thought")
            if not is_whole or not calls:
                return
            if n_rounds > self.max_rounds:
                break
            results = []
            for number, call in enumerate(calls):
                may = n_rounds < self.max_rounds and number < MAX_CALLS
                yield Event("call", readable_call(call))
                results.append(self._result(call) if may else ENOUGH)
                yield _shown(results[-1])
            pieces = self.session.answer_tools(results, self.max_tokens)
        yield Event("stopped", f"it still calls tools after {self.max_rounds} rounds")

    def _answer(self, pieces: Iterable[str]) -> Iterator[Event]:
        """Pass an answer on without its calls; returns whether its thought ended."""
        splitter = ThinkingSplitter(self._is_open)
        parser = ToolCallParser(self.session.tools)
        for piece in pieces:
            yield from _without_calls(splitter.feed(piece), parser)
        yield from _without_calls(splitter.flush(), parser)
        rest = [event for event in parser.flush() if isinstance(event, str)]
        yield from (Event("text", text) for text in rest)
        return not splitter.is_thinking

    def _result(self, call: ToolCall) -> str:
        """What the model is told; errors, too, whatever they are."""
        if call.error:
            return f"error: {call.error}"
        if call.name not in self.tools:
            known = ", ".join(self.tools)
            return f"error: there is no tool {call.name!r}; there are: {known}"
        try:
            found = self.tools[call.name].call(call.arguments)
            text = found if isinstance(found, str) else json.dumps(found)
        except ToolError as error:
            return f"error: {error}"
        except Exception as error:  # a fault of the tool, which the model may get round
            return f"error: the tool failed ({type(error).__name__}: {error})"
        if len(text) > MAX_RESULT_CHARACTERS:
            return text[:MAX_RESULT_CHARACTERS] + " ... (cut off here)"
        return text


def opens_thinking(session: ChatSession) -> bool:
    """True if the template ends a prompt with <think>: the model begins inside."""
    message = {"role": "user", "content": "?"}
    prompt = session.model.tokenizer.apply_chat_template(
        [message], None, session.enable_thinking
    )
    return prompt.rstrip().endswith(THINK)


def _without_calls(events: Iterable[Event], parser: ToolCallParser) -> Iterator[Event]:
    for kind, text in events:
        if kind == "thinking":
            yield Event(kind, text)
            continue
        found = parser.feed(text)
        yield from (Event(kind, part) for part in found if isinstance(part, str))


def _shown(result: str) -> Event:
    is_error = result.startswith("error: ")
    return Event("error" if is_error else "result", result.removeprefix("error: "))
