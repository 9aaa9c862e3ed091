"""How tests compare logits: a limit, and on failure where the difference begins."""

from collections.abc import Callable, Iterable

import numpy as np

from flashmoe_ref.engine import Model

# Two float32 implementations that sum in different orders differ by about 1e-5 where
# logits reach 6; a wrong convention costs 1e-3 and more.
LIMIT = 5e-5
# Where the best two logits are closer than this, rounding may choose either token.
CLEAR_GAP = 1e-3


def assert_close(
    got: np.ndarray,
    wanted: np.ndarray,
    what: str,
    limit: float = LIMIT,
    explain: Callable[[], str] = str,
) -> None:
    """Compare arrays whose rows are tokens; `explain` adds to the failure's message."""
    assert got.shape == wanted.shape, f"{what}: shape {got.shape}, not {wanted.shape}"
    assert got.dtype == np.float32, f"{what}: {got.dtype}"
    difference = np.abs(got - wanted)
    if difference.max() <= limit:  # false for NaN too
        return
    rows = difference.reshape(len(got), -1).max(axis=1)
    first = int(np.argmax(~(rows <= limit)))
    raise AssertionError(
        f"{what}: max |difference| {difference.max():.2g}, mean "
        f"{difference.mean():.2g}, limit {limit:.0e}; first in row {first} of "
        f"{len(rows)}, by {rows[first]:.2g}; {np.sum(rows > limit)} rows differ. "
        + explain()
    )


def hidden_states(model: Model, ids: np.ndarray) -> np.ndarray:
    """Embeddings, then the residual stream after each layer: (L + 1, T, D)."""
    runner, state = model.engine, model.new_state()
    x = runner.embed(np.asarray(ids))
    hidden = [np.array(x)]
    for layer in range(model.config.num_hidden_layers):
        x = runner.layer(layer, x, state)
        hidden.append(np.array(x))
    return np.stack(hidden)


def first_difference(hidden: np.ndarray, wanted: np.ndarray, config: object) -> str:
    """Say in which layer, and at which token, two sets of hidden states part."""
    for i, (ours, theirs) in enumerate(zip(hidden, wanted, strict=True)):
        difference = np.abs(ours - theirs).max(axis=-1)
        if not difference.max() <= LIMIT:
            where = f"layer {i - 1} ({config.layer_types[i - 1]})" if i else "embedding"
            token = int(np.argmax(~(difference <= LIMIT)))
            return f"Hidden states part in {where}, token {token}."
    return "Hidden states of a full pass agree."


def in_steps(model: Model, ids: np.ndarray, sizes: Iterable[int]) -> np.ndarray:
    """Logits (T, V) of passes over `sizes` tokens each, with the state kept between."""
    state, start, rows = model.new_state(), 0, []
    for size in sizes:
        part = ids[start : start + size]
        rows.append(model.engine.forward(part, state, all_logits=True))
        start += size
    assert start == state.n_tokens == len(ids)
    return np.concatenate(rows)


def assert_same_choices(model: Model, prompt: list[int], theirs: list[int]) -> None:
    """Check a greedy continuation by another implementation, token by token.

    Ours is fed with theirs, so one token within CLEAR_GAP does not end the comparison.
    """
    state = model.new_state()
    logits = model.prefill(prompt, state)
    for i, token in enumerate(theirs):
        best = int(np.argmax(logits))
        gap = float(logits[best] - logits[token])
        assert gap <= CLEAR_GAP, (
            f"token {i} of {len(theirs)} is {token} there, {best} here, "
            f"by {gap:.2g} logits; limit {CLEAR_GAP:.0e}"
        )
        logits = model.decode(token, state)
