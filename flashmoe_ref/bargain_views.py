"""What fewer experts and bits buy and cost: points, frontier, and answers side by side.

A row of a sweep's table becomes a point: bytes read for a token against one measure of
quality. Two settings that continue one prompt are shown with their first difference
marked. **But:** a frontier of points that were measured, not of all that could be.
*Used in notebooks/10; `bargain_widgets.py` adds the controls.*
"""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.axes import Axes

from . import plots
from .engine import Model
from .errors import ConfigError
from .evaluate import first_difference
from .settings import from_row

# column -> (what it is, unit, whether less is better)
QUALITIES = {
    "cost_nats": ("cost on text", "nats a token", True),
    "agreement": ("same likeliest token", "%", False),
    "json_right": ("JSON right in every value", "%", False),
    "json_parses": ("JSON that parses", "%", False),
    "tool_right": ("tool calls right in every value", "%", False),
    "tool_parses": ("tool calls that parse", "%", False),
}
FAMILIES = {  # name -> colour and marker
    "K at 4 bits": (plots.BLUE, "o"),
    "K, not louder": (plots.GREEN, "^"),
    "adaptive K": (plots.PURPLE, "D"),
    "3 bits": (plots.BLACK, "X"),
    "2 bits": (plots.VERMILLION, "s"),
}


# --- the frontier ---------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One setting: what it reads, and how well it does in one respect."""

    name: str
    family: str  # one of FAMILIES
    bytes_per_token: float
    quality: float  # in the unit of QUALITIES


def points(rows: Iterable[Mapping[str, str]], column: str) -> list[Point]:
    """A point for each row of a table, in one respect.

    Raises: KeyError for a column that is not in QUALITIES.
    """
    factor = 100 if QUALITIES[column][1] == "%" else 1
    return [
        Point(
            display_name(row),
            _family(row),
            float(row["bytes_per_token"]),
            factor * float(row[column]),
        )
        for row in rows
    ]


def display_name(row: Mapping[str, str]) -> str:
    """A setting's name, with its K also where the model's own is used."""
    setting = from_row(row)
    if setting.k is None and setting.mass is None:
        rest = "" if setting.is_stored else f", {setting.name}"
        return f"K={row['k_used']}{rest}"
    return setting.name


def _family(row: Mapping[str, str]) -> str:
    setting = from_row(row)
    if setting.bits in (2, 3):
        return f"{setting.bits} bits"
    if setting.mass is not None:
        return "adaptive K"
    return "K at 4 bits" if setting.kept == "renormalized" else "K, not louder"


def frontier(found: Sequence[Point], less_is_better: bool) -> list[Point]:
    """The points that no other beats: none reads as little and does as well.

    From few bytes to many, from worse to better.
    """
    sign = 1 if less_is_better else -1
    best, kept = np.inf, []
    for point in sorted(found, key=lambda p: (p.bytes_per_token, sign * p.quality)):
        if sign * point.quality < best:
            best = sign * point.quality
            kept.append(point)
    return kept


def say_point(found: Sequence[Point], name: str, column: str) -> str:
    """Where one setting stands, in words."""
    what, unit, less = QUALITIES[column]
    (point,) = (p for p in found if p.name == name)
    text = f"{name}: {point.bytes_per_token / 1e6:.2f} MB a token, {what} "
    text += f"{point.quality:.3g} {unit}; "
    if point in frontier(found, less):
        return (
            text + "on the frontier: nothing measured reads as little and does as well"
        )
    sign = 1 if less else -1
    better = [
        p
        for p in frontier(found, less)
        if p.bytes_per_token <= point.bytes_per_token
        and sign * p.quality <= sign * point.quality
    ]
    best = min(better, key=lambda p: sign * p.quality)
    return text + (
        f"beaten by {best.name}: {best.bytes_per_token / 1e6:.2f} MB, "
        f"{best.quality:.3g} {unit}"
    )


def draw_frontier(
    found: Sequence[Point],
    column: str,
    chosen: str | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw all points, the frontier through them, and one setting framed."""
    what, unit, less = QUALITIES[column]
    ax = plots.figure()[1] if ax is None else ax
    best = frontier(found, less)
    line = [p.bytes_per_token / 1e6 for p in best], [p.quality for p in best]
    ax.step(*line, where="post", color="#777777", lw=1.5, zorder=1)
    for family, (colour, marker) in FAMILIES.items():
        own = [p for p in found if p.family == family]
        at = [p.bytes_per_token / 1e6 for p in own], [p.quality for p in own]
        if own:
            ax.plot(*at, marker, color=colour, label=family, ms=7, alpha=0.85)
    for point in found:
        if point.name == chosen:
            at = (point.bytes_per_token / 1e6, point.quality)
            ax.plot(*at, "o", mfc="none", mec=plots.BLACK, ms=17, mew=2.5)
            title = title or f"{chosen}: {point.quality:.3g} {unit}"
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02))
    ax.set_title(title or f"Bytes against {what}")
    ax.set_xlabel("MB read for a token that finds nothing in memory")
    ax.set_ylabel(f"{what} ({unit})")
    return ax


# --- how loud the experts are ---------------------------------------------------------


def routed_norms(model: Model, ids: Sequence[int]) -> np.ndarray:
    """Root mean square of the routed experts' output in each layer, on one text.

    The shared expert is left out. Shapes: ids (T,) -> (L,).
    Raises: ConfigError for fewer than 2 ids: they go through as a prompt.
    """
    if len(ids) < 2:
        raise ConfigError("norms need at least 2 tokens: they go through as a prompt")
    squares = np.zeros(model.config.num_hidden_layers)
    engine = model.engine
    as_it_is = engine.experts_of_prompt

    def noted(layer: int, *inputs: object) -> object:
        output = as_it_is(layer, *inputs)
        squares[layer] = np.square(np.asarray(output, np.float64)).mean()
        return output

    engine.experts_of_prompt = noted
    try:
        engine.forward(list(ids), model.new_state())
    finally:
        del engine.experts_of_prompt
    return np.sqrt(squares)


# --- wrong answers --------------------------------------------------------------------


def gallery_lines(record: Mapping[str, object], before: int = 60) -> list[str]:
    """A wrong answer where it went wrong: three lines of plain text.

    record: a line of a sweep's failures, as `structured_runs.as_record` makes them.
    """
    text, at = str(record["text"]), record["position"]
    at = len(text) if at is None else int(at)
    start = max(0, at - before)
    lead = ("…" if start else "") + text[start:at]
    lead = lead.replace("\n", "⏎")
    wrote, wanted = (_token(record, name) for name in ("chosen", "wanted"))
    return [
        f"{record['setting']} · {record['id']} · passed: {record['stage']}",
        f"  {lead}▶{text[at : at + 25]!r}",
        f"  {record['reason']}; wrote {wrote}, wanted {wanted}",
    ]


def _token(record: Mapping[str, object], name: str) -> str:
    token, p = record[f"{name}_token"], record[f"p_{name}"]
    if token is None:
        return "nothing"
    return f"{token!r} ({float(p):.0%})" if token else f"the end ({float(p):.0%})"


# --- side by side ---------------------------------------------------------------------


@dataclass(frozen=True)
class Continuation:
    """What one setting makes of a prompt."""

    name: str
    tokens: list[int]
    pieces: list[str]  # text of each token
    bytes_per_token: float
    tok_s: float


def continue_prompt(
    model: Model, name: str, prompt: Sequence[int], n_tokens: int
) -> Continuation:
    """Continue a prompt greedily, and note what each token cost.

    Bytes are those that the tokens' experts have, in memory or not.
    """
    model.reset_report()
    state, tokens, seconds = model.new_state(), [], []
    logits = model.prefill(prompt, state)
    stop, n_real = model.tokenizer.stop_ids, model.tokenizer.n_real_ids
    for _ in range(n_tokens):
        token = int(logits[:n_real].argmax())
        if token in stop:
            break
        tokens.append(token)
        start = time.perf_counter()
        logits = model.decode(token, state)
        seconds.append(time.perf_counter() - start)
    of_layers = sum(fmt.n_bytes for fmt in model.store.files.formats)
    pieces = [model.tokenizer.decode([token]) for token in tokens]
    rate = 1 / statistics.median(seconds) if seconds else 0.0
    n_bytes = model.report().mean_k * of_layers
    return Continuation(name, tokens, pieces, n_bytes, rate)


def say_side_by_side(left: Continuation, right: Continuation) -> str:
    """Where two continuations part, and what each reads, in words."""
    at = first_difference(left.tokens, right.tokens)
    if at is None:
        return f"{left.name} and {right.name}: the same {len(left.tokens)} tokens"
    a, b = ((c.pieces[at] if at < len(c.pieces) else "the end") for c in (left, right))
    return (
        f"{left.name} and {right.name} part at token {at}: {a!r} or {b!r}; "
        f"{left.bytes_per_token / 1e6:.2f} and {right.bytes_per_token / 1e6:.2f} MB a "
        f"token"
    )


def html_side_by_side(left: Continuation, right: Continuation) -> str:
    """Both texts in two columns, the first token that differs marked in each."""
    at = first_difference(left.tokens, right.tokens)
    cells = "".join(
        f'<td style="width:50%;vertical-align:top;text-align:left">'
        f"<b>{escape(c.name)}</b> · {c.bytes_per_token / 1e6:.2f} MB a token · "
        f"{c.tok_s:.0f} tok/s<br>{_marked(c.pieces, at)}</td>"
        for c in (left, right)
    )
    return f'<table style="width:100%"><tr>{cells}</tr></table>'


def _marked(pieces: list[str], at: int | None) -> str:
    """Pieces as HTML; what a model wrote is text, never markup."""
    shown = [escape(piece).replace("\n", "<br>") for piece in pieces]
    if at is not None:
        shown[at : at + 1] = [f"<mark><b>{''.join(shown[at : at + 1])}</b></mark>"]
    return "".join(shown)
