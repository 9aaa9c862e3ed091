"""The conversation of `flashmoe chat`: lines in, answers out, tool calls by hand.

Nothing that a model writes is ever executed: a call is shown, and the person at the
keyboard types what the tool would answer. Only the tools of `tools.EXAMPLES`, pure
functions of ours, answer by themselves where they are asked for. **But:** one line is
one message.
*Taught in notebooks/13.*
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from .errors import ConfigError
from .generation import ChatSession
from .small_files import parse_json, read_text
from .tool_chat import Event, ToolChat
from .toolcalls import ToolCall, ToolCallParser, fault_of_tool, readable_call
from .tools import Tool

Say = Callable[..., None]
MAX_FAULTY = 2  # answers with nothing but faulty calls that get their error back


def read_tools(path: Path) -> list[dict]:
    """Read a JSON list of tool schemas, as OpenAI's and Qwen's interfaces take them.

    Raises: ConfigError naming the file and what is wrong with it.
    """
    text = read_text(path, ConfigError)
    if text is None:
        raise ConfigError(f"{path}: no such file")
    tools = parse_json(text, path, ConfigError)
    if not isinstance(tools, list) or not tools:
        raise ConfigError(f"{path}: must hold a JSON list of tool schemas")
    for number, tool in enumerate(tools, 1):
        if fault := fault_of_tool(tool):
            raise ConfigError(f"{path}: tool {number} {fault}")
    return tools


def converse(
    session: ChatSession,
    max_tokens: int | None,
    say: Say,
    note: Callable[[str], None],
    tools: Sequence[Tool] = (),
) -> None:
    """Hold a conversation until the input ends or /quit; the session remembers it.

    tools: that answer by themselves; of all others the result is asked for.
    """
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  arrow keys and history in input()
        note("Type a message. /report  /new  /quit (or Ctrl-D)")
    while (line := _ask("you> ")) is not None:
        command = line.strip()
        if command == "/quit":
            return
        if command == "/report":
            note(str(session.model.report()))
        elif command == "/new":
            session = _begin_again(session)
            note("a new conversation")
        elif command.startswith("/"):
            note(f"{command} is not a command: /report  /new  /quit")
        elif command and tools:
            chat = ToolChat(session, tools, max_tokens=max_tokens)
            _show_events(chat.say(line), say, note)
        elif command:
            _answer(session, session.say(line, max_tokens), max_tokens, say, note)


def _show_events(
    events: Iterable[Event], say: Say, note: Callable[[str], None]
) -> None:
    """Print what happens in an answer with tools; of a thought only its length."""
    n_thought, at_line_start = 0, True
    try:
        for kind, text in events:
            if kind == "thinking":
                n_thought += len(text)
                continue
            if n_thought:
                note(f"[thought for {n_thought} characters]")
                n_thought = 0
            if kind == "text":
                say(text, end="")
                at_line_start = text.endswith("\n")
            else:
                say(("" if at_line_start else "\n") + f"[{kind}] {text}")
                at_line_start = True
    finally:
        if not at_line_start:
            say("")


def _begin_again(session: ChatSession) -> ChatSession:
    has_system = session.messages[:1] and session.messages[0]["role"] == "system"
    system = session.messages[0]["content"] if has_system else None
    return ChatSession(
        session.model, system, session.tools, session.enable_thinking, session.sampling
    )


def _answer(
    session: ChatSession,
    pieces: Iterable[str],
    max_tokens: int | None,
    say: Say,
    note: Callable[[str], None],
) -> None:
    """Show an answer; while it asks for tools, get their results and go on."""
    _show(pieces, session.tools, say)
    n_faulty = 0
    while session.tool_calls:
        n_faulty = n_faulty + 1 if all(c.error for c in session.tool_calls) else 0
        if n_faulty > MAX_FAULTY:
            note(f"{n_faulty} faulty answers in a row: say something else")
            return
        results = []
        for call in session.tool_calls:
            result = _result_of(call, note)
            if result is None:  # the input has ended
                return
            results.append(result)
        _show(session.answer_tools(results, max_tokens), session.tools, say)


def _show(pieces: Iterable[str], tools: list[dict] | None, say: Say) -> None:
    """Print text as it comes, and calls in a readable form when they are complete."""
    parser = ToolCallParser(tools)
    at_line_start = True
    try:
        for piece in pieces:
            for event in parser.feed(piece):
                at_line_start = _show_event(event, at_line_start, say)
        for event in parser.flush():
            at_line_start = _show_event(event, at_line_start, say)
    finally:
        if not at_line_start:
            say("")


def _show_event(event: str | ToolCall, at_line_start: bool, say: Say) -> bool:
    if isinstance(event, str):
        say(event, end="")
        return event.endswith("\n")
    say(("" if at_line_start else "\n") + f"[call] {readable_call(event)}")
    return True


def _result_of(call: ToolCall, note: Callable[[str], None]) -> str | None:
    """What the tool answers, typed by the user; a faulty call gets its error back."""
    if call.error:
        note(f"[{call.name or '?'} gets] error: {call.error}")
        return f"error: {call.error}"
    return _ask(f"result of {call.name!r}> ")  # !r: a terminal obeys some characters


def _ask(prompt: str) -> str | None:
    """One line from the user, or None at the end of the input."""
    if sys.stdin.isatty():
        try:
            return input(prompt)
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
