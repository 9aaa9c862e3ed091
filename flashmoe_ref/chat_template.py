"""A conversation rendered to a prompt by the checkpoint's own Jinja2 template.

Set up as Hugging Face's `apply_chat_template` does, so model files work as they are;
but run in a process of its own, with limits: see `template_process.py`.
**But:** text only; one template; no date or generation-mask helpers.
*Taught in notebooks/04.*
"""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from .errors import TokenizerError

THINK, THINK_END = "<think>", "</think>"
# -P: the script's folder is the package, whose names are not for other programs
COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("template_process.py")))


class ChatTemplate:
    """One template; `render` makes the prompt. Compiled when it is first used.

    named_tokens: eos_token and the like, which some templates write out.
    """

    def __init__(
        self, source: str, where: Path, named_tokens: Mapping[str, str] | None = None
    ) -> None:
        self.source = source
        self.where = where
        self._named_tokens = dict(named_tokens or {})

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text. enable_thinking is left to the template if None.

        Raises: TokenizerError if the template is invalid, refuses the messages, or
                takes too much time or memory.
        """
        values: dict[str, Any] = dict(self._named_tokens)
        values |= {"messages": [prepare_message(message) for message in messages]}
        values |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
        if enable_thinking is not None:
            values["enable_thinking"] = enable_thinking
        request = json.dumps({"source": self.source, "values": values}, default=str)
        answer = _process.ask(request)
        if "text" in answer:
            return answer["text"]
        if "invalid" in answer:
            line = f", line {answer['line']}" if answer["line"] else ""
            raise TokenizerError(
                f"{self.where}: invalid chat template{line}: {answer['invalid']}; "
                f"download the model's template again"
            )
        raise TokenizerError(
            f"{self.where}: the chat template refused this conversation: "
            f"{answer['refused']}; check its roles, contents and tools"
        )


class _Process:
    """The process that runs templates; started when it is first asked."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._child: subprocess.Popen | None = None
        self._owner = 0  # the process that started it; a fork of it starts its own

    def ask(self, request: str) -> dict[str, Any]:
        """Send one line of JSON, wait for the answer."""
        with self._lock:
            if self._child is None or self._owner != os.getpid():
                self._start()
            try:
                with suppress(BrokenPipeError):  # it was ended, and says no more
                    self._child.stdin.write(request.encode() + b"\n")
                    self._child.stdin.flush()
                line = self._child.stdout.readline()
            except BaseException:  # an answer that comes later is for nobody
                self.stop()
                raise
            if line.endswith(b"\n"):
                return json.loads(line)
            code = self._child.wait()
            self.stop()
        why = f"too much time or memory, so its process was ended ({code})"
        return {"refused": f"it takes {why}"}

    def _start(self) -> None:
        pipe = subprocess.PIPE
        self._owner = os.getpid()
        self._child = subprocess.Popen(
            COMMAND,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the process that asked
        )

    def stop(self) -> None:
        """End it; the next request starts another."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.communicate()  # closes the pipes and waits


_process = _Process()
atexit.register(_process.stop)


def prepare_message(message: dict[str, Any]) -> dict[str, Any]:
    """Bring the two usual forms of an assistant's message into the one of templates.

    Reasoning: `<think>a</think>b` as content becomes reasoning_content a, content b.
    Tool calls: arguments given as JSON text become a mapping.
    Raises: TokenizerError if the arguments are not an object.
    """
    if not isinstance(message, Mapping):
        raise TokenizerError(
            f"message {message!r} is not a dict; give role and content"
        )
    message = dict(message)
    if message.get("role") != "assistant":
        return message
    content = message.get("content")
    if isinstance(content, str) and THINK_END in content:
        reasoning, _, answer = content.rpartition(THINK_END)
        reasoning = reasoning.rpartition(THINK)[2].strip("\n")
        message.setdefault("reasoning_content", reasoning)
        message["content"] = answer.lstrip("\n")
    if message.get("tool_calls"):
        message["tool_calls"] = [*map(_with_mapping, message["tool_calls"])]
    return message


def _with_mapping(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are a mapping, as templates want, not JSON text."""
    function = dict(call.get("function", call))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(
            ValueError, RecursionError
        ):  # then still a str, and refused below
            arguments = json.loads(arguments)
        function["arguments"] = arguments
    if not isinstance(arguments, Mapping):
        raise TokenizerError(
            f"arguments of the call to {function.get('name')!r} are not a JSON object: "
            f"{arguments!r:.60}; give a dict"
        )
    return {**call, "function": function} if "function" in call else function


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same nested lists and dicts with every string, keys too, changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(k)): map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value


def unused_characters(text: str, n: int) -> list[str]:
    """n characters, for private use in Unicode, that the text does not contain."""
    used = set(text)
    free = (chr(code) for code in range(0xE000, 0x110000) if chr(code) not in used)
    return list(islice(free, n))
