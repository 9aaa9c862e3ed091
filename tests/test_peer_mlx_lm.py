"""Both engines against mlx-lm, in float32, on the same quantized checkpoints."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from comparing import assert_close, assert_same_choices, first_difference, in_steps
from comparing import hidden_states as our_hidden_states

from conftest import END_ID, GOLDEN, read_golden
from flashmoe_ref import load
from flashmoe_ref.convert import convert

mlx_lm = pytest.importorskip("mlx_lm")
mx = pytest.importorskip("mlx.core")

REDUCED = Path(__file__).parents[1] / "data" / "reduced"
PROMPT, CHUNK = 40, 7
GREEDY_TOKENS = 200


@pytest.fixture(autouse=True, scope="module")
def on_cpu() -> Iterator[None]:
    """mlx-lm computes on the CPU, in float32 there once its weights are float32."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


def load_in_float32(folder: Path):
    """mlx-lm's model of a folder. Scales and biases too: it rounds to their dtype."""
    model, _ = mlx_lm.utils.load_model(folder, lazy=True)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def their_steps(model, ids: np.ndarray, sizes: list[int]) -> np.ndarray:
    """mlx-lm's logits (T, V) of passes over `sizes` tokens each, with its cache."""
    cache = mlx_lm.models.cache.make_prompt_cache(model)
    parts = np.split(ids, np.cumsum(sizes)[:-1])
    return np.concatenate(
        [np.array(model(mx.array(part)[None], cache=cache)[0]) for part in parts]
    )


def their_hidden_states(model, ids: np.ndarray) -> np.ndarray:
    """The same as `comparing.hidden_states`, computed by mlx-lm."""
    from mlx_lm.models.base import create_attention_mask

    inner = getattr(model, "language_model", model).model
    x = inner.embed_tokens(mx.array(ids)[None])
    hidden = [x]
    for layer in inner.layers:
        mask = None if layer.is_linear else create_attention_mask(x, None)
        hidden.append(layer(hidden[-1], mask, None))
    return np.array(mx.concatenate(hidden))


@pytest.fixture(scope="module")
def conversions(mlx4, tmp_path_factory) -> dict[str, Path]:
    """One checkpoint that mlx-lm quantized, and three that we did."""
    folder = tmp_path_factory.mktemp("converted")
    settings = {
        "qwen35_fused": {"bits": 3, "group_size": 64, "dense_bits": 6},
        "qwen35_per_expert": {"bits": 4, "group_size": 32, "dense_bits": 8},
        "qwen3_next": {"bits": 2, "group_size": 32, "dense_bits": 5},
    }
    ours = {
        name: convert(GOLDEN / name, folder / name, progress=False, **chosen)
        for name, chosen in settings.items()
    }
    return {"by mlx-lm": mlx4, **ours}


@pytest.fixture(
    scope="module",
    params=["by mlx-lm", "qwen35_fused", "qwen35_per_expert", "qwen3_next"],
)
def peer(request, conversions):
    """A checkpoint folder, mlx-lm's model of it, and token ids."""
    name = request.param
    arrays = read_golden("qwen35_fused" if name == "by mlx-lm" else name)
    return conversions[name], load_in_float32(conversions[name]), arrays["ids"]


@pytest.fixture(scope="module")
def case(peer, engine):
    """Our model, mlx-lm's, token ids, and what to add to a failure's message."""
    folder, theirs, ids = peer
    with load(folder, **engine) as ours:

        def explain() -> str:
            hidden = our_hidden_states(ours, ids), their_hidden_states(theirs, ids)
            return first_difference(*hidden, ours.config)

        yield ours, theirs, ids, explain


def test_full_pass(case):
    ours, theirs, ids, explain = case
    wanted = their_steps(theirs, ids, [len(ids)])
    assert_close(ours.logits(ids), wanted, "full", explain=explain)


def test_prefill_then_decode(case):
    ours, theirs, ids, explain = case
    sizes = [PROMPT] + [1] * (len(ids) - PROMPT)
    wanted = their_steps(theirs, ids, sizes)
    assert_close(in_steps(ours, ids, sizes), wanted, "decode", explain=explain)


def test_chunked_prefill(case):
    ours, theirs, ids, explain = case
    n_chunks, rest = divmod(len(ids), CHUNK)
    sizes = [CHUNK] * n_chunks + [rest]
    wanted = their_steps(theirs, ids, sizes)
    assert_close(in_steps(ours, ids, sizes), wanted, "chunked", explain=explain)


def test_hidden_states_of_mlx_lm_are_those_that_it_computes_with(peer):
    """The helper that explains failures repeats mlx-lm's own loop over layers."""
    _, theirs, ids = peer
    inner = getattr(theirs, "language_model", theirs)
    last = inner.model.norm(mx.array(their_hidden_states(theirs, ids)[-1:]))
    got = np.array(inner.lm_head(last)[0])
    np.testing.assert_array_equal(got, their_steps(theirs, ids, [len(ids)]))


def test_prompt_longer_than_any_buffer(mlx4, engine):
    """More tokens than a prefill chunk (512), and than the first KV cache (256)."""
    # With this seed no router has to choose between experts closer than 9e-4.
    ids = np.random.default_rng(0).integers(0, END_ID, 600)
    n_prompt = 590
    sizes = [n_prompt] + [1] * (len(ids) - n_prompt)
    wanted = their_steps(load_in_float32(mlx4), ids, sizes)
    with load(mlx4, **engine) as ours:
        state = ours.new_state()
        got = ours.prefill(ids[:n_prompt], state, all_logits=True)
        assert_close(got, wanted[:n_prompt], "long prefill")
        got = np.stack([ours.decode(int(token), state) for token in ids[n_prompt:]])
        assert_close(got, wanted[n_prompt:], "decode after it")


def greedy_by_mlx_lm(model, prompt: list[int], n_tokens: int) -> list[int]:
    """The continuation by mlx-lm's own loop; it does not stop at an end token."""
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(prompt), model, max_tokens=n_tokens)
    return [int(token) for token, _ in steps]


def test_what_we_convert_generates_the_same_text_in_mlx_lm(
    tokenized_golden, tmp_path, engine
):
    folder = convert(tokenized_golden, tmp_path / "ours", progress=False)
    theirs, tokenizer = mlx_lm.load(str(folder))  # as a user does, tokenizer and all
    theirs.set_dtype(mx.float32)
    prompt = tokenizer.encode("It was late in the evening when")
    tokens = greedy_by_mlx_lm(theirs, prompt, 60)
    assert len(set(tokens)) > 5, "a text that only repeats itself shows little"
    with load(folder, **engine) as ours:
        assert ours.tokenizer.encode("It was late in the evening when") == prompt
        assert_same_choices(ours, prompt, tokens)


@pytest.mark.skipif(
    not (REDUCED / "config.json").exists(),
    reason="data/reduced holds no trained model yet",
)
def test_reduced_model_generates_the_same_tokens(engine):
    with load(REDUCED, **engine) as ours:
        prompt = ours.tokenizer.encode("It was late in the evening when")
        theirs = load_in_float32(REDUCED)
        tokens = greedy_by_mlx_lm(theirs, prompt, GREEDY_TOKENS)
        assert len(tokens) == GREEDY_TOKENS
        assert_same_choices(ours, prompt, tokens)
