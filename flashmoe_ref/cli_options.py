"""The command line's options and its help: what each command does and costs.

**But:** parsing only; `cli.py` acts. *Taught in notebooks/13.*
"""

import argparse
import re
from pathlib import Path
from typing import NoReturn

from . import (
    __version__,
    cli_caching,
    cli_doctor,
    cli_evaluate,
    cli_fetch,
    cli_probe,
    cli_rehearse,
    cli_routing,
    cli_trace,
)
from .errors import one_line

REDUCED = Path(__file__).parents[1] / "data" / "reduced"  # only in a clone

ABOUT = """Run a Mixture-of-Experts model whose experts stay on disk.

A Qwen3.5-MoE layer has hundreds of experts and uses ten for a token. flashmoe keeps
everything else in memory and reads those ten when the router picks them, so the memory
needed is a small part of the model, and the disk decides the speed."""

EXAMPLES = """examples:
  flashmoe generate "Once upon a time"             text from the reduced model
  flashmoe info                                    what it consists of, what it needs
  flashmoe info qwen3.5-397b-a17b                  the same for the published 397B
  flashmoe fetch OWNER/MODEL                       bring a published model here
  flashmoe chat --model DIR --tools tools.json     a conversation with tools
  flashmoe convert BF16_DIR NEW_DIR --bits 4       quantize a published model
  flashmoe pack DIR                                one read an expert instead of nine

'flashmoe COMMAND --help' explains a command and what its options cost."""

GENERATE = """examples:
  flashmoe generate "Once upon a time" --max-tokens 200
  flashmoe generate --temperature 0.8 --top-p 0.95 --seed 7 "It was a dark night"
  flashmoe generate --k 4 "The old man"            4 experts a token, not as trained
  flashmoe generate --experts resident "She"       all in memory, to compare
  flashmoe generate --slots 32 --policy lfu "It"   32 experts of each layer in memory
  flashmoe generate --slots 32 --prefetch look-ahead "We"
  cat story.txt | flashmoe generate --max-tokens 50

The text goes to standard output, the report of what it cost to standard error."""

CHAT = """examples:
  flashmoe chat
  flashmoe chat --system "Answer in JSON."
  flashmoe chat --tools tools.json                 [{"type": "function", "function":
                                                     {"name": ..., "parameters": ...}}]
  flashmoe chat --example-tools                    with a calculator
  echo "Who was Alice?" | flashmoe chat            one question, then it ends

With tools, the model may ask for a call. flashmoe shows it and asks you for the result:
nothing that a model writes is ever executed. The example tools answer by themselves:
three functions of flashmoe that touch nothing, with checked arguments, and at most four
rounds of calls for a message. Lines that begin with a slash are for
flashmoe: /report  /new  /quit"""

INFO = """examples:
  flashmoe info                                    the reduced model
  flashmoe info DIR --k 4                          with 4 experts a token
  flashmoe info qwen3.5-397b-a17b --bits 2         a published model, by its name

Reads config.json and the headers of the files, no weights: it is quick for any size."""

CONVERT = """examples:
  flashmoe convert Qwen3.5-35B-A3B q4 --bits 4
  flashmoe convert Qwen3.5-35B-A3B mixed --bits 4 --dense-bits 8

Writes what mlx-lm's own conversion writes, without ever holding the model in memory. A
run that was cut off goes on when it is started again."""

PACK = """examples:
  flashmoe pack DIR                                into DIR/packed_experts
  flashmoe pack DIR FOLDER

In place, an expert lies in nine pieces (three projections with weight, scales and
biases). Packed, in the layout of flash-moe, it is one read, for a second copy of the
experts on disk. A run that was cut off goes on when it is started again."""

REQUANTIZE = """examples:
  flashmoe requantize DIR q2 --bits 2
  flashmoe requantize DIR q2 --bits 2 --rule least_squares
  flashmoe requantize DIR q23 --bits 2 --down-bits 3 --layer-bits 0-1:4,7:4
  flashmoe requantize DIR all4 --bits 4 --dense-bits 4 --router-bits 4

Two bits nearly halve what four have to read for a token, and cost quality: measure it
before you rely on it. Rules: mlx (MLX's own), minmax, least_squares (slow, closest).
What already has the wanted width is copied byte for byte."""

VERIFY = """examples:
  flashmoe verify DIR
  flashmoe verify DIR --packed FOLDER

Checks headers, sizes and shapes; digests, where flashmoe wrote the files; packed
experts byte for byte against the model."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with 2."""
        self.exit(2, f"flashmoe: {one_line(message)}; see '{self.prog} --help'\n")


def build_parser() -> Parser:
    """All commands and options."""
    parser = Parser("flashmoe", description=ABOUT, epilog=EXAMPLES, **_LAYOUT)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_chat(commands)
    _add_info(commands)
    _add_convert(commands)
    _add_pack(commands)
    _add_requantize(commands)
    _add_verify(commands)
    about, examples = cli_trace.ABOUT, cli_trace.EXAMPLES
    cli_trace.add_options(_command(commands, "trace", about, examples))
    about, examples = cli_fetch.ABOUT, cli_fetch.EXAMPLES
    cli_fetch.add_options(_command(commands, "fetch", about, examples))
    cli_probe.add_options(
        _command(commands, "probe", cli_probe.ABOUT, cli_probe.EXAMPLES)
    )
    doctor = _command(commands, "doctor", cli_doctor.ABOUT, cli_doctor.EXAMPLES)
    _add_model_argument(doctor, "its folder, or the name of a published model")
    cli_doctor.add_options(doctor)
    about, examples = cli_rehearse.ABOUT, cli_rehearse.EXAMPLES
    cli_rehearse.add_options(_command(commands, "rehearse", about, examples))
    about, examples = cli_evaluate.ABOUT, cli_evaluate.EXAMPLES
    evaluate = _command(commands, "evaluate", about, examples)
    _add_model_argument(evaluate, "its folder")
    cli_evaluate.add_options(evaluate)
    return parser


_LAYOUT = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,
}


def _command(commands, name: str, about: str, examples: str) -> Parser:
    return commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog=examples,
        **_LAYOUT,
    )


def _add_generate(commands) -> None:
    parser = _command(commands, "generate", "continue a text", GENERATE)
    parser.add_argument(
        "prompt", nargs="?", help="the text; '-' or nothing reads standard input"
    )
    _add_model_options(parser)
    _add_sampling_options(parser, max_tokens=256)
    _add_report_options(parser)


def _add_chat(commands) -> None:
    parser = _command(commands, "chat", "hold a conversation", CHAT)
    parser.add_argument("--system", metavar="TEXT", help="instructions that come first")
    parser.add_argument(
        "--tools", type=Path, metavar="FILE.json", help="a JSON list of tool schemas"
    )
    parser.add_argument(
        "--example-tools",
        action="store_true",
        help="give it a calculator, units and a table of models, which answer by "
        "themselves",
    )
    parser.add_argument(
        "--thinking",
        choices=("on", "off"),
        help="whether the model thinks aloud first (default: as its template says)",
    )
    _add_model_options(parser)
    _add_sampling_options(parser, max_tokens=512)
    _add_report_options(parser)


def _add_info(commands) -> None:
    parser = _command(commands, "info", "say what a model is and what it needs", INFO)
    _add_model_argument(parser, "its folder, or the name of a published model")
    parser.add_argument("--k", type=int, help="experts a token (default: as trained)")
    _add_width_options(
        parser, "for a published model: bits of its weights, 16 for bf16"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_convert(commands) -> None:
    about = "quantize a Hugging Face model into MLX's layout"
    parser = _command(commands, "convert", about, CONVERT)
    parser.add_argument(
        "source", type=Path, help="folder of the model in bf16 or float"
    )
    parser.add_argument("target", type=Path, help="new folder")
    _add_width_options(parser, "bits of the routed experts: 2, 3, 4, 5, 6 or 8")
    parser.add_argument(
        "--dense-bits",
        type=int,
        metavar="N",
        help="bits of all other matrices (default: the same; gates always get 8)",
    )
    _add_file_options(parser)


def _add_pack(commands) -> None:
    about = "copy the experts so that each is one read"
    parser = _command(commands, "pack", about, PACK)
    _add_model_argument(parser, "its folder")
    parser.add_argument(
        "target", type=Path, nargs="?", help="folder (default: MODEL/packed_experts)"
    )
    _add_progress_option(parser)


def _add_requantize(commands) -> None:
    about = "write a copy whose experts have fewer bits"
    parser = _command(commands, "requantize", about, REQUANTIZE)
    parser.add_argument("source", type=Path, help="folder of a quantized model")
    parser.add_argument("target", type=Path, help="new folder")
    parser.add_argument("--bits", type=int, required=True, help="2, 3, 4, 5, 6 or 8")
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="32, 64 or 128 (default: as it is)"
    )
    parser.add_argument(
        "--rule", default="mlx", help="mlx, minmax or least_squares (default: mlx)"
    )
    _add_mixed_options(parser)
    _add_file_options(parser)


def _add_mixed_options(parser: Parser) -> None:
    texts = {
        "down": "of the experts' down projections, which errors pass through last",
        "dense": "of everything that is no expert and no gate: read once, not streamed",
        "router": "of the gates, whose errors pick other experts (usually 8)",
    }
    for name, text in texts.items():
        help = f"bits {text} (default: {'as --bits' if name == 'down' else 'as it is'})"
        parser.add_argument(f"--{name}-bits", type=int, metavar="N", help=help)
    parser.add_argument(
        "--layer-bits",
        type=_layer_bits,
        metavar="L:N,...",
        help="bits of the experts of single layers, in place of the above: 0-1:4,7:4",
    )


def _layer_bits(text: str) -> dict[int, int]:
    """'0-1:4,7:8' -> {0: 4, 1: 4, 7: 8}."""
    found = {}
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?:(\d{1,3})", item.strip())
        if not match:
            raise argparse.ArgumentTypeError(
                f"{item!r} is not LAYER:BITS or FIRST-LAST:BITS"
            )
        first, last, bits = match[1], match[2] or match[1], int(match[3])
        found |= dict.fromkeys(range(int(first), int(last) + 1), bits)
    return found


def _add_verify(commands) -> None:
    about = "check that files hold what was written"
    parser = _command(commands, "verify", about, VERIFY)
    _add_model_argument(parser, "its folder, or a folder of packed experts")
    parser.add_argument(
        "--packed", type=Path, metavar="DIR", help="its packed experts, if elsewhere"
    )
    _add_progress_option(parser)


# --- groups of options ----------------------------------------------------------------


def _add_model_argument(parser: Parser, what: str) -> None:
    """MODEL may be given by its place or as --model MODEL."""
    parser.add_argument(
        "model", nargs="?", default=argparse.SUPPRESS, help=f"{what}{_default_model()}"
    )
    parser.add_argument("--model", default=None, help=argparse.SUPPRESS)


def _default_model() -> str:
    return " (default: data/reduced)" if REDUCED.is_dir() else ""


def _add_model_options(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="DIR", help=f"the model's folder{_default_model()}"
    )
    group.add_argument(
        "--engine",
        default="auto",
        help="numpy: compiled for the CPU; mlx: Apple GPU, CUDA or CPU; auto: "
        "mlx where it has a GPU (default)",
    )
    group.add_argument(
        "--experts",
        default="stream",
        help="stream: read in place from the model's files (default); packed: from "
        "packed_experts, one read each, after 'flashmoe pack'; resident: all in memory",
    )
    group.add_argument(
        "--no-compile",
        action="store_true",
        help="numpy engine without Numba: the specification itself, much slower",
    )
    cli_routing.add_options(parser)
    cli_caching.add_options(parser)


def _add_sampling_options(parser: Parser, max_tokens: int) -> None:
    group = parser.add_argument_group("choosing tokens")
    options = {
        "max-tokens": (int, max_tokens, f"stop after N (default: {max_tokens})"),
        "temperature": (float, 0.0, "0 always takes the likeliest (default); 1 draws"),
        "top-k": (int, 0, "draw from the N likeliest only (default: 0, all)"),
        "top-p": (float, 1.0, "draw from the likeliest that hold this probability"),
        "min-p": (float, 0.0, "drop what is less likely than this share of the best"),
        "repetition-penalty": (float, 1.0, "above 1: avoid what was said (default: 1)"),
        "presence-penalty": (float, 0.0, "above 0: prefer new words (default: 0)"),
        "seed": (int, 0, "same seed, same text (default: 0)"),
    }
    for name, (kind, default, text) in options.items():
        group.add_argument(
            f"--{name}", type=kind, default=default, metavar="N", help=text
        )


def _add_report_options(parser: Parser) -> None:
    group = parser.add_argument_group("report")
    group.add_argument("--json", action="store_true", help="report as JSON")
    group.add_argument("--no-report", action="store_true", help="print none")
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.npz",
        help="record every pick, read and wait; see 'flashmoe trace'",
    )


def _add_width_options(parser: Parser, what: str) -> None:
    parser.add_argument("--bits", type=int, default=4, metavar="N", help=what)
    parser.add_argument(
        "--group-size",
        type=int,
        default=64,
        metavar="N",
        help="weights that share a scale: 32, 64 (default) or 128",
    )


def _add_file_options(parser: Parser) -> None:
    parser.add_argument(
        "--shard-mb",
        type=_megabytes,
        default=5000.0,
        metavar="N",
        help="largest size of a file, in MB of a million bytes (default: 5000)",
    )
    _add_progress_option(parser)


def _megabytes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not within 0..1e9")
    return value


def _add_progress_option(parser: Parser) -> None:
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
