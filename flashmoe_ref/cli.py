"""The `flashmoe` command: options in, text and a report out, errors as one line.

Text goes to standard output as it is decoded, everything else to standard error.
**But:** nothing is computed here; options are in `cli_options.py`, the conversation in
`cli_chat.py`. *Taught in notebooks/13.*
"""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TextIO

from . import cli_caching, cli_routing
from .cli_options import REDUCED, build_parser
from .errors import ConfigError, FlashMoeError, one_line

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "seed",
)
DERIVED = (
    "prefill_tok_s",
    "decode_tok_s",
    "bytes_per_token",
    "mean_k",
    "hit_rate",
    "compute_s",
)
MB = 1_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done; 2: an error, told in one line; 130: interrupted; 141: the reader of our
    output went away.
    """
    try:
        args = build_parser().parse_args(argv)
        _let_anything_be_printed()
        COMMANDS[args.command](args)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered has nowhere to go, and must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except MemoryError:
        print("flashmoe: out of memory; see 'flashmoe info'", file=sys.stderr)
        return 2
    except UnicodeDecodeError as error:
        print(f"flashmoe: standard input is not text ({error})", file=sys.stderr)
        return 2
    except (FlashMoeError, OSError) as error:
        note(f"flashmoe: {one_line(str(error))}")
        return 2
    return 0


def _let_anything_be_printed() -> None:
    """A terminal that cannot show a character gets a question mark, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


# A terminal obeys these: it writes elsewhere, changes its title, fills the clipboard.
_OBEYED = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_OBEYED |= dict.fromkeys(range(0x7F, 0xA0), 0x2421)


def _harmless(text: str, stream: TextIO) -> str:
    """Text of a model, a file or a name: on a terminal shown, never obeyed."""
    return text.translate(_OBEYED) if stream.isatty() else text


def say(text: str, end: str = "\n") -> None:
    """Print at once."""
    print(_harmless(text, sys.stdout), end=end, flush=True)


def note(text: str) -> None:
    """Print beside the text: to standard error."""
    print(_harmless(text, sys.stderr), file=sys.stderr, flush=True)


# --- commands -------------------------------------------------------------------------


def run_generate(args: Namespace) -> None:
    """Continue a text."""
    from . import generate

    prompt = _read_prompt(args.prompt)
    with _open_model(args) as model:
        with _recorded(model, args):
            show(generate(model, prompt, args.max_tokens, **_sampling(args)))
        _report(model, args)


def run_chat(args: Namespace) -> None:
    """Hold a conversation."""
    from . import chat
    from .cli_chat import converse, read_tools

    own = _own_tools(args)
    tools = read_tools(args.tools) if args.tools else [t.schema for t in own] or None
    thinking = None if args.thinking is None else args.thinking == "on"
    with _open_model(args) as model:
        session = chat(model, args.system, tools, thinking, **_sampling(args))
        with _recorded(model, args):
            converse(session, args.max_tokens, say, note, own)
        _report(model, args)


def run_info(args: Namespace) -> None:
    """Say what a model is and what it needs."""
    from .info import facts, readable

    found = facts(_model_folder(args), args.k, args.bits, args.group_size)
    say(json.dumps(found.as_dict(), indent=2) if args.json else readable(found))


def run_convert(args: Namespace) -> None:
    """Quantize a model."""
    from .convert import convert

    folder = convert(
        args.source,
        args.target,
        args.bits,
        args.group_size,
        args.dense_bits,
        shard_bytes=int(args.shard_mb * MB),
        progress=not args.no_progress,
    )
    say(f"{folder}: converted to {args.bits} bits")


def run_pack(args: Namespace) -> None:
    """Copy the experts into packed files."""
    from .pack import pack

    folder = pack(_model_folder(args), args.target, not args.no_progress)
    say(f"{folder}: packed; use it with --experts packed")


def run_requantize(args: Namespace) -> None:
    """Write a copy of a model with other bits in its experts."""
    from .requantize import requantize

    folder = requantize(
        args.source,
        args.target,
        args.bits,
        args.group_size,
        args.rule,
        shard_bytes=int(args.shard_mb * MB),
        progress=not args.no_progress,
        down_bits=args.down_bits,
        dense_bits=args.dense_bits,
        router_bits=args.router_bits,
        layer_bits=args.layer_bits,
    )
    say(f"{folder}: experts requantized to {args.bits} bits")


def run_verify(args: Namespace) -> None:
    """Check files."""
    from .verify import verify

    found = verify(_model_folder(args), args.packed, not args.no_progress)
    text = f"{found.n_files} files are right, {found.n_bytes:,} bytes compared"
    if found.n_unchecked:
        text += f"; {found.n_unchecked} have no digests, only headers were checked"
    say(text)


def run_trace(args: Namespace) -> None:
    """Say what a recorded run did, and write it in other forms."""
    from .cli_trace import run

    run(args, say, note)


def run_fetch(args: Namespace) -> None:
    """Bring a published model to this disk."""
    from .cli_fetch import run

    run(args, say, note)


def run_probe(args: Namespace) -> None:
    """Measure disk, memory and engines."""
    from .cli_probe import run

    run(args, say)


def run_evaluate(args: Namespace) -> None:
    """Measure what fewer experts or bits cost."""
    from .cli_evaluate import run

    run(args, _model_folder(args), say, note)


def run_doctor(args: Namespace) -> None:
    """Say whether a model will run, and how fast."""
    from .cli_doctor import run

    run(args, _model_folder(args), say)


def run_rehearse(args: Namespace) -> None:
    """Run a published shape with random weights."""
    from .cli_rehearse import run

    run(args, say)


COMMANDS = {
    "generate": run_generate,
    "chat": run_chat,
    "info": run_info,
    "convert": run_convert,
    "pack": run_pack,
    "requantize": run_requantize,
    "verify": run_verify,
    "trace": run_trace,
    "fetch": run_fetch,
    "probe": run_probe,
    "doctor": run_doctor,
    "evaluate": run_evaluate,
    "rehearse": run_rehearse,
}


# --- shared by commands ---------------------------------------------------------------


def show(pieces: Iterable[str]) -> None:
    """Print text as it is decoded, and end its line whatever happens."""
    try:
        for piece in pieces:
            say(piece, end="")
    finally:
        say("")


def _model_folder(args: Namespace) -> str:
    if args.model is not None:
        return args.model
    if not REDUCED.is_dir():
        raise ConfigError("no model given: name its folder")
    return os.path.relpath(REDUCED)


def _open_model(args: Namespace):
    from . import load

    return load(
        _model_folder(args),
        engine=args.engine,
        experts=args.experts,
        compiled=not args.no_compile,
        **cli_routing.chosen(args, _model_folder(args)),
        **cli_caching.chosen(args),
    )


@contextmanager
def _recorded(model, args: Namespace) -> Iterator[None]:
    """Record what happens inside, if --trace asks for it, also if it is cut short."""
    if args.trace is None:
        yield
        return
    from .trace import record

    if not args.trace.absolute().parent.is_dir() or args.trace.is_dir():
        raise ConfigError(f"--trace {args.trace}: name a file in a folder that exists")
    try:
        with record(model) as trace:
            yield
    finally:
        if trace.n_tokens:
            trace.save(args.trace)
            note(f"{args.trace}: {trace.n_tokens} tokens recorded")


def _own_tools(args: Namespace) -> Sequence:
    """Tools that answer by themselves."""
    if not args.example_tools:
        return ()
    if args.tools:
        raise ConfigError("--tools and --example-tools: give one of them")
    from .tools import EXAMPLES

    return EXAMPLES


def _sampling(args: Namespace) -> dict[str, float]:
    return {name: getattr(args, name) for name in SAMPLING}


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise ConfigError("no prompt: give a text, or pipe one in")
    if prompt in (None, "-"):
        prompt = sys.stdin.read()
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("the prompt is not UTF-8 text") from None
    if not prompt:
        raise ConfigError("the prompt is empty: give at least one character")
    return prompt


def _report(model, args: Namespace) -> None:
    if args.no_report:
        return
    report = model.report()
    if args.json:
        derived = {name: getattr(report, name) for name in DERIVED}
        note(json.dumps(asdict(report) | derived))
    else:
        note(f"\n{report}")


if __name__ == "__main__":
    sys.exit(main())
