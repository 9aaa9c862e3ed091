"""A script that renders chat templates, which strangers write, in a process apart.

A template is a program. Here it gets JSON and gives text; Jinja2's sandbox keeps it
from Python's internals, and the system's limits end it when it computes too long or
takes too much memory, without harm to the process that asked. One request a line, one
answer a line. **But:** macOS does not hold a process to a size of memory; there only
time and length are bounded. *Taught in notebooks/04.*
"""

import json
import resource
import sys
import time
from contextlib import suppress
from functools import lru_cache

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_S = 2  # for one prompt; a long conversation takes milliseconds
MEMORY_BYTES = 1 << 30
MAX_CHARACTERS = 20_000_000  # some ten times what fits into a context


def main() -> None:
    """Answer requests until there are no more."""
    with suppress(ValueError, OSError):  # not everywhere
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _limit_time()
        answer = json.dumps(_answer(request["source"], request["values"]))
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


def _limit_time() -> None:
    """From now on so many seconds; then the system kills this process."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    end = int(time.process_time()) + 1 + CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (end, most))


def _answer(source: str, values: dict) -> dict[str, object]:
    """{"text": ...}, {"invalid": why, "line": where} or {"refused": why}."""
    try:
        template = _compiled(source)
    except Exception as error:  # also nested too deeply, or a number too long
        return {"invalid": _one_line(error), "line": getattr(error, "lineno", None)}
    try:
        return {"text": _render(template, values)}
    except Exception as error:  # a template can fail in any way that Python can
        return {"refused": _one_line(error)}


def _render(template: jinja2.Template, values: dict) -> str:
    pieces, n_characters = [], 0
    for piece in template.generate(values):
        pieces.append(piece)
        n_characters += len(piece)
        if n_characters > MAX_CHARACTERS:
            raise jinja2.TemplateError(f"writes over {MAX_CHARACTERS:,} characters")
    return "".join(pieces)


@lru_cache(16)
def _compiled(source: str) -> jinja2.Template:
    """Set up as Hugging Face's `apply_chat_template` does, so model files just work."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
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
    return " ".join(str(error).split())[:500] or type(error).__name__


if __name__ == "__main__":
    main()
