"""Runs a model over a set of tool-call or JSON prompts and scores every answer.

A set is a file of JSON lines, such as those in data/eval. Each answer becomes an
`Outcome`; a wrong one also tells how likely the model held the token with which it
went wrong, and the token that would have been right.
**But:** one prompt after another; rates assume that prompts are independent.
*Taught in notebooks/10.*
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .engine import Model
from .errors import ConfigError
from .first_wrong import as_json
from .generation import generate_ids
from .layers import softmax
from .small_files import parse_json, read_text
from .structured import STAGES, Score, score_json, score_tool_calls, wilson
from .toolcalls import fault_of_tool, format_tool_call

# Prompts of a set that a run takes if it is not told otherwise. In data/eval a prompt
# has about 90 (json) to 210 tokens (tool), an answer about 50.
LIMIT = 50
MAX_TOKENS = 256  # of an answer; the longest that data/eval wants has fewer than 220


@dataclass(frozen=True)
class Prompt:
    """One line of a set."""

    id: str
    kind: str  # tool | json
    group: str  # what to report apart: "seen", "unseen", or a topic of the harder set
    messages: list[dict[str, Any]]
    wanted: Any  # json: the value; tool: [{"name", "arguments"}, ...]
    tools: list[dict[str, Any]] = field(default_factory=list)
    schema: dict[str, Any] = field(default_factory=dict)  # of the value, json only

    @property
    def wanted_text(self) -> str:
        """One right answer, as the training dialogues would write it."""
        if self.kind == "json":
            return as_json(self.wanted)
        calls = (format_tool_call(c["name"], c["arguments"]) for c in self.wanted)
        return "\n".join(calls)


@dataclass(frozen=True)
class Chance:
    """A token, and the probability that the model gave it (at temperature 1)."""

    text: str  # "" is the end of the answer
    probability: float


@dataclass(frozen=True)
class Outcome:
    """One answer and its score."""

    id: str
    kind: str
    group: str
    seed: int | None  # None: greedy
    text: str
    tokens: list[int]  # without the stop token
    ended: bool  # by itself, not by max_tokens
    score: Score
    chosen: Chance | None = None  # the token that holds the first wrong character
    wanted: Chance | None = None  # the token that would have been right in its place


@dataclass(frozen=True)
class StageRate:
    """How many answers passed a stage, with Wilson's 95 % interval."""

    kind: str
    group: str  # "all", or one group
    stage: str
    n: int
    passed: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Passed of n; 0 without answers."""
        return self.passed / self.n if self.n else 0.0


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read a set. Raises: ConfigError naming the line that is not a prompt."""
    text = read_text(Path(path), ConfigError)
    if text is None:
        raise ConfigError(f"{path}: no such file")
    prompts = []
    # Not splitlines(): a text may hold other characters that end lines.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        where = f"{path}, line {number}"
        value = parse_json(line, where, ConfigError)
        try:
            prompt = Prompt(**value)
        except TypeError as error:
            raise ConfigError(
                f"{where}: not a prompt ({error}); see data/eval/README.md"
            ) from None
        if fault := _fault_of_prompt(prompt):
            raise ConfigError(f"{where}: {fault}; see data/eval/README.md")
        prompts.append(prompt)
    return prompts


def _fault_of_prompt(prompt: Prompt) -> str | None:
    if not isinstance(prompt.kind, str) or prompt.kind not in STAGES:
        return f"kind {prompt.kind!r} is not one of {', '.join(STAGES)}"
    if not isinstance(prompt.id, str) or not isinstance(prompt.group, str):
        return "id and group must be texts"
    if not isinstance(prompt.schema, dict):
        return "schema must be a JSON object"
    calls = prompt.wanted if prompt.kind == "tool" else []
    for name, items in (
        ("messages", prompt.messages),
        ("tools", prompt.tools),
        ("wanted", calls),
    ):
        if not isinstance(items, list) or not all(isinstance(i, dict) for i in items):
            return f"{name} must be a list of JSON objects"
    for call in calls:
        is_call = isinstance(call.get("name"), str)
        if not is_call or not isinstance(call.get("arguments"), dict):
            return "a wanted call has no name or no arguments"
    faults = (fault_of_tool(tool) for tool in prompt.tools)
    return next((f"a tool {fault}" for fault in faults if fault), None)


def choose_prompts(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """`limit` of the prompts, evenly spread over the set; all for None.

    The same limit always gives the same prompts, so configurations can be paired.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be at least 1")
    if limit is None or limit >= len(prompts):
        return list(prompts)
    return [prompts[i * len(prompts) // limit] for i in range(limit)]


def score_answer(prompt: Prompt, text: str) -> Score:
    """Score an answer by its prompt's own checker."""
    if prompt.kind == "json":
        return score_json(text, prompt.schema, prompt.wanted)
    return score_tool_calls(text, prompt.tools, prompt.wanted)


def count_tokens(model: Model, prompts: Sequence[Prompt]) -> tuple[int, int]:
    """Tokens of the prompts and of right answers: what a run will take, about."""
    encode = model.tokenizer.encode
    n_prompt = sum(len(_encode(model, prompt)) for prompt in prompts)
    return n_prompt, sum(len(encode(prompt.wanted_text)) + 1 for prompt in prompts)


def run_prompts(
    model: Model,
    prompts: Sequence[Prompt],
    limit: int | None = LIMIT,
    seeds: Sequence[int] = (),
    max_tokens: int = MAX_TOKENS,
    explain: bool = True,
    **sampling: float,
) -> Iterator[Outcome]:
    """Answer prompts and score the answers, one outcome at a time.

    limit:    how many, evenly spread over the set (`choose_prompts`); None: all.
    seeds:    none: greedily, once. Otherwise each prompt is answered once a seed, with
              `sampling` (temperature, top_p, ...), and read only once.
    explain:  find `chosen` and `wanted` for wrong answers (not for those that were only
              cut off by max_tokens); costs one more reading of the answer.
    Raises: ConfigError for settings that do not go together.
    """
    if bool(seeds) != bool(sampling.get("temperature")):
        raise ConfigError("give seeds and a temperature above 0, or neither")
    if "seed" in sampling or sampling.get("repetition_penalty", 1) != 1:
        raise ConfigError("use seeds=...; repetition_penalty is not supported here")
    chosen = choose_prompts(prompts, limit)
    return _outcomes(model, chosen, seeds or (None,), max_tokens, explain, sampling)


def summarize(outcomes: Iterable[Outcome]) -> list[StageRate]:
    """Rates a stage: of each kind over all groups, then group by group."""
    gathered: dict[tuple[str, str], list[int]] = {}
    for outcome in outcomes:
        for group in ("all", outcome.group):
            gathered.setdefault((outcome.kind, group), []).append(outcome.score.passed)
    order = sorted(gathered, key=lambda key: (key[0], key[1] != "all", key[1]))
    return [
        _rate(kind, group, stage, gathered[kind, group])
        for kind, group in order
        for stage in range(1, len(STAGES[kind]) + 1)
    ]


def as_record(outcome: Outcome) -> dict[str, Any]:
    """An outcome as one line for a file of JSON lines: the failures kept as text."""
    score = outcome.score
    record = {"id": outcome.id, "kind": outcome.kind, "group": outcome.group}
    record |= {"seed": outcome.seed, "stage": score.stage, "passed": score.passed}
    record |= {"reason": score.reason, "position": score.position}
    record |= {"text": outcome.text, "n_tokens": len(outcome.tokens)}
    for name in ("chosen", "wanted"):
        chance = getattr(outcome, name)
        record[f"{name}_token"] = chance and chance.text
        record[f"p_{name}"] = chance and round(chance.probability, 4)
    return record


def _rate(kind: str, group: str, stage: int, passed: list[int]) -> StageRate:
    n_passed = sum(p >= stage for p in passed)
    low, high = wilson(n_passed, len(passed))
    name = STAGES[kind][stage - 1]
    return StageRate(kind, group, name, len(passed), n_passed, low, high)


def _encode(model: Model, prompt: Prompt) -> list[int]:
    return model.tokenizer.encode_chat(
        prompt.messages, prompt.tools or None, enable_thinking=False
    )


def _outcomes(
    model: Model,
    prompts: Sequence[Prompt],
    seeds: Sequence[int | None],
    max_tokens: int,
    explain: bool,
    sampling: dict[str, float],
) -> Iterator[Outcome]:
    """As `run_prompts`. A prompt is read once, all but its last token."""
    for prompt in prompts:
        *start, last = _encode(model, prompt)
        state = model.new_state()
        model.prefill(start, state)
        snapshot = state.snapshot()
        for seed in seeds:
            settings = sampling if seed is None else {**sampling, "seed": seed}
            state.restore(snapshot)
            tokens = [*generate_ids(model, [last], max_tokens, state, **settings)]
            outcome = _outcome(model, prompt, seed, tokens, len(tokens) < max_tokens)
            if explain and _went_wrong(outcome):
                state.restore(snapshot)
                chosen, wanted = _explain(model, state, last, tokens, outcome.score)
                outcome = replace(outcome, chosen=chosen, wanted=wanted)
            yield outcome


def _outcome(
    model: Model, prompt: Prompt, seed: int | None, tokens: list[int], ended: bool
) -> Outcome:
    text = model.tokenizer.decode(tokens)
    score = score_answer(prompt, text)
    return Outcome(
        prompt.id, prompt.kind, prompt.group, seed, text, tokens, ended, score
    )


def _went_wrong(outcome: Outcome) -> bool:
    """False for a right answer, and for one that was right as far as it came."""
    position = outcome.score.position
    return position is not None and (outcome.ended or position < len(outcome.text))


def _explain(
    model: Model, state: object, last: int, tokens: list[int], score: Score
) -> tuple[Chance, Chance]:
    """The chosen and the right token where an answer went wrong, with probabilities.

    state: has read the prompt but for its last token.
    """
    n_before, right = _parting(model, tokens, score)
    logits = model.prefill([last, *tokens[:n_before]], state)
    p = softmax(logits[: model.tokenizer.n_real_ids].astype("f8"))
    chosen = tokens[n_before] if n_before < len(tokens) else None
    return _chance(model, p, chosen), _chance(model, p, right)


def _parting(model: Model, tokens: list[int], score: Score) -> tuple[int, int | None]:
    """How many tokens come before the wrong one, and which would have been right."""
    decode = model.tokenizer.decode
    n = 0  # tokens that end before the first wrong character
    while n < len(tokens) and len(decode(tokens[: n + 1])) <= score.position:
        n += 1
    right = _right_token(model, tokens, n, score)
    while n < len(tokens) and right == tokens[n]:  # it differs in a later byte only
        n += 1
        right = _right_token(model, tokens, n, score)
    return n, right


def _right_token(
    model: Model, tokens: list[int], n_before: int, score: Score
) -> int | None:
    """The token after the first n_before that a right answer goes on with.

    None: it ends there. The answer so far and its right continuation are split anew,
    from the place where the wrong token begins, as the model may spell in pieces.
    """
    tokenizer = model.tokenizer
    start = len(tokenizer.decode(tokens[:n_before]))
    right = tokenizer.decode(tokens)[: score.position] + score.expected
    if not score.expected and not right[start:].strip():
        return None
    whole = tokenizer.encode(right)
    if whole[:n_before] == tokens[:n_before]:
        return whole[n_before] if n_before < len(whole) else None
    rest = tokenizer.encode(right[start:])
    return rest[0] if rest else None


def _chance(model: Model, p: Any, token: int | None) -> Chance:
    """A token and its probability; for None the likeliest of the stop tokens."""
    if token is None:
        return Chance("", float(max(p[i] for i in model.tokenizer.stop_ids)))
    return Chance(model.tokenizer.decode([token]), float(p[token]))
