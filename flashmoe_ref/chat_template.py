"""A conversation rendered to a prompt by the checkpoint's own Jinja2 template.

Set up as Hugging Face's `apply_chat_template` does, so model files work as they are.
**But:** text only; one template; no date or generation-mask helpers.
*Taught in notebooks/04.*
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import TokenizerError

THINK, THINK_END = "<think>", "</think>"


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

        Raises: TokenizerError if the template is invalid or refuses the messages.
        """
        values: dict[str, Any] = dict(self._named_tokens)
        values |= {"messages": [prepare_message(message) for message in messages]}
        values |= {"tools": tools, "add_generation_prompt": add_generation_prompt}
        if enable_thinking is not None:
            values["enable_thinking"] = enable_thinking
        template = self._compiled
        try:
            return template.render(values)
        except Exception as error:  # a template can fail in any way that Python can
            raise TokenizerError(
                f"{self.where}: the chat template refused this conversation: "
                f"{_one_line(error)}; check its roles, contents and tools"
            ) from error

    @cached_property
    def _compiled(self) -> Any:
        try:
            return _environment().from_string(self.source)
        except Exception as error:  # also nested too deeply, or a number too long
            line = f", line {error.lineno}" if hasattr(error, "lineno") else ""
            raise TokenizerError(
                f"{self.where}: invalid chat template{line}: "
                f"{_one_line(error)}; download the model's template again"
            ) from error


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


def unused_character(text: str) -> str:
    """A character, for private use in Unicode, that the text does not contain."""
    used = set(text)
    return next(chr(code) for code in range(0xE000, 0x110000) if chr(code) not in used)


def _environment() -> Any:
    """Templates come from strangers: sandboxed, and unable to change their inputs."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces Jinja2's own filter, which would write < as \\u003c."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
