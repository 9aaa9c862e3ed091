"""Text from a model: the decode loop, and a chat that keeps its state across turns.

**But:** one sequence at a time, no speculation. *Taught in notebooks/00 and 04.*
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import numpy as np

from .engine import Model
from .errors import ConfigError
from .numpy_model import check_ids
from .ranges import is_whole
from .sampling import Sampler, Sampling


def generate(
    model: Model,
    prompt: str | Sequence[int],
    max_tokens: int | None = 256,
    **sampling: float,
) -> Iterator[str]:
    """Continue a text; yields pieces of it as they are decoded.

    prompt:     text, or token ids (for example of `model.tokenizer.encode_chat`).
    max_tokens: stop after so many; None: at a stop token or when the context is full.
    sampling:   temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
                seed; see `sampling.Sampling`. The default is greedy.
    Raises: ConfigError at once for bad settings or a prompt that does not fit.
    """
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    elif isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, bytes):
        ids = list(prompt)
    else:
        raise ConfigError(
            f"prompt: give text or a list of token ids, not {type(prompt).__name__}"
        )
    tokens = generate_ids(model, ids, max_tokens, **sampling)
    return _as_text(model, tokens)


def generate_ids(
    model: Model,
    ids: Sequence[int],
    max_tokens: int | None = 256,
    state: object = None,
    **sampling: float,
) -> Iterator[int]:
    """Continue token ids; yields ids, without the stop token. Arguments as `generate`.

    state: continue from this state, which ids have not been fed to yet (default: new).
    """
    settings = _sampling(sampling)
    check_max_tokens(max_tokens)
    state = model.new_state() if state is None else state
    limit = model.config.max_position_embeddings
    n_after_prompt = state.n_tokens + len(ids)
    if n_after_prompt >= limit:
        raise ConfigError(
            f"the prompt makes {n_after_prompt:,} tokens, the model takes fewer than "
            f"{limit:,}; shorten it"
        )
    check_ids(ids, state.n_tokens, model.config)
    sampler = Sampler(settings, ids, model.tokenizer.n_real_ids)
    n_most = limit - n_after_prompt
    if max_tokens is not None:
        n_most = min(n_most, max_tokens)
    return _decode_loop(model, ids, n_most, state, sampler)


def check_max_tokens(max_tokens: int | None) -> None:
    """Raises: ConfigError."""
    if max_tokens is not None and not is_whole(max_tokens, 1):
        raise ConfigError(
            f"max_tokens={max_tokens!r} must be a whole number of at least 1, or None"
        )


def _decode_loop(
    model: Model, ids: Sequence[int], n_most: int, state: object, sampler: Sampler
) -> Iterator[int]:
    stop_ids = model.tokenizer.stop_ids
    logits = model.prefill(ids, state)
    n_tokens = state.n_tokens
    for i in range(n_most):
        token = sampler.sample(logits)
        if token in stop_ids:
            return
        yield token
        if i + 1 < n_most:  # the last token's successor is never needed
            with model.alone():  # no other thread comes between
                if state.n_tokens != n_tokens:
                    raise ConfigError(
                        "something else used this text's state while it was being "
                        "generated; give each text a state of its own"
                    )
                logits = model.decode(token, state)
            n_tokens += 1


def _as_text(model: Model, tokens: Iterator[int]) -> Iterator[str]:
    from .tokenizer import StreamDecoder

    decoder = StreamDecoder(model.tokenizer)
    for token in tokens:
        if piece := decoder.push(token):
            yield piece
    if piece := decoder.flush():
        yield piece


def _sampling(settings: dict[str, float]) -> Sampling:
    unknown = set(settings) - set(Sampling.__dataclass_fields__)
    if unknown:
        raise ConfigError(
            f"unknown setting {min(unknown)!r}; known: "
            f"{', '.join(Sampling.__dataclass_fields__)}"
        )
    return Sampling(**settings)


def chat(
    model: Model,
    system: str | None = None,
    tools: list[dict] | None = None,
    enable_thinking: bool | None = None,
    **sampling: float,
) -> "ChatSession":
    """Start a conversation. Keyword arguments as `generate`.

    tools: JSON schemas of functions that the model may ask to be called; it never
    calls anything itself: see `ChatSession.tool_calls` and `answer_tools`.
    """
    return ChatSession(model, system, tools, enable_thinking, _sampling(sampling))


class ChatSession:
    """A conversation. What was processed once is not processed again.

    The recurrent state cannot be rewound, but the template may render an old answer
    differently from how it was generated (Qwen drops old thoughts). So the state is
    kept twice: as it is now, and as it was before the last answer. Whoever sends a
    message gives up an answer that is not finished; two threads at once are refused.
    """

    def __init__(
        self,
        model: Model,
        system: str | None,
        tools: list[dict] | None,
        enable_thinking: bool | None,
        sampling: Sampling,
    ) -> None:
        self.model = model
        self.tools = tools
        self.enable_thinking = enable_thinking
        self.sampling = sampling
        self.messages: list[dict] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.tool_calls: list = []  # that the last answer asks for
        self.n_reused = 0  # tokens of the last prompt that were already processed
        self._lock = Lock()  # held while the state moves
        self._n_turns = 0
        self._forget()

    def say(self, text: str, max_tokens: int | None = 512) -> Iterator[str]:
        """Send a message of the user; yields the answer as it is decoded."""
        return self._turn([{"role": "user", "content": text}], max_tokens)

    def answer_tools(
        self, results: Sequence[object], max_tokens: int | None = 512
    ) -> Iterator[str]:
        """Send the results of the last answer's tool calls, in their order.

        Results that are not text are sent as JSON.
        Raises: ConfigError if their number differs from that of the calls.
        """
        if len(results) != len(self.tool_calls):
            raise ConfigError(
                f"{len(results)} results for {len(self.tool_calls)} tool calls"
            )
        texts = [
            r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)
            for r in results
        ]
        return self._turn([{"role": "tool", "content": t} for t in texts], max_tokens)

    def _turn(self, new: list[dict], max_tokens: int | None) -> Iterator[str]:
        """Feed what is new and decode an answer; the messages change at its end."""
        check_max_tokens(max_tokens)
        with self._alone():
            self._n_turns += 1
            messages = self.messages + new
            prompt = self._encode(messages, True)
            history = self._encode(messages, False)
            self._rewind_for(prompt)
            n_done = self._state.n_tokens
            if prompt[: len(history)] == history and len(history) > n_done:
                self._prefill(history)
            rest = prompt[self._state.n_tokens :]
            if not rest:
                raise ConfigError("the chat template opens no turn for the assistant")
            self._before_answer = (list(self._ids), self._state.snapshot())
            tokens = generate_ids(
                self.model, rest, max_tokens, self._state, **vars(self.sampling)
            )
            self._fed = list(prompt)
            return self._answer(self._n_turns, messages, len(prompt), tokens)

    def _answer(
        self, turn: int, messages: list[dict], n_prompt: int, tokens: Iterator[int]
    ) -> Iterator[str]:
        steps = iter(lambda: self._next(turn, tokens), None)
        yield from _as_text(self.model, steps)
        with self._alone(turn):
            self._remember(messages, self._fed[n_prompt:])

    def _next(self, turn: int, tokens: Iterator[int]) -> int | None:
        """The answer's next token, None at its end."""
        with self._alone(turn):
            try:
                token = next(tokens, None)
            except BaseException:
                self._forget()
                raise
            if token is not None:
                self._fed.append(token)
            return token

    @contextmanager
    def _alone(self, turn: int | None = None) -> Iterator[None]:
        """Let no other thread, and no earlier turn, move the state meanwhile."""
        if not self._lock.acquire(blocking=False):
            raise ConfigError(
                "this chat is at work in another thread; wait for its answer, or give "
                "each thread a chat of its own"
            )
        try:
            if turn not in (None, self._n_turns):
                raise ConfigError(
                    "another message was sent before this answer was finished, "
                    "which gave it up"
                )
            yield
        finally:
            self._lock.release()

    def _remember(self, messages: list[dict], answer: list[int]) -> None:
        """Take an answer, which is complete, into the conversation."""
        from .toolcalls import parse_tool_calls

        text = self.model.tokenizer.decode(answer)
        reasoning, thought, text = text.rpartition("</think>")
        content, self.tool_calls = parse_tool_calls(text, self.tools)
        message = {"role": "assistant", "content": content}
        if thought:
            message["reasoning_content"] = reasoning
        if any(call.error for call in self.tool_calls):
            message["content"] = text  # as written: the template could not repeat it
        elif self.tool_calls:
            message["tool_calls"] = [
                {"function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        self.messages = [*messages, message]

    @property
    def _ids(self) -> list[int]:
        """What the state has processed; an answer's last token comes after it."""
        return self._fed[: self._state.n_tokens]

    def _prefill(self, ids: list[int]) -> None:
        """Process the rest of ids, of which the state has the beginning."""
        try:
            self.model.prefill(ids[self._state.n_tokens :], self._state)
        except BaseException:
            self._forget()
            raise
        self._fed = ids

    def _forget(self) -> None:
        """Start from nothing: a state is undefined after an error inside a layer."""
        self._fed, self._state = [], self.model.new_state()
        self._before_answer = ([], self._state.snapshot())

    def _encode(self, messages: list[dict], add_generation_prompt: bool) -> list[int]:
        return self.model.tokenizer.encode_chat(
            messages, self.tools, self.enable_thinking, add_generation_prompt
        )

    def _rewind_for(self, prompt: list[int]) -> None:
        """Keep as much processed text as the new prompt begins with, but not all."""
        if prompt[: self._state.n_tokens] != self._ids or self._ids == prompt:
            ids, snapshot = self._before_answer
            if prompt[: len(ids)] == ids:
                self._fed = list(ids)
                self._state.restore(snapshot)
            else:
                self._fed, self._state = [], self.model.new_state()
        self.n_reused = self._state.n_tokens
