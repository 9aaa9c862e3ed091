"""Views equal what the model computes, and widgets follow their sliders."""

from collections.abc import Iterator

import numpy as np
import pytest
from tiny import write_tiny

from flashmoe_ref import layers, load, plots, views, widgets
from flashmoe_ref.engine import Model
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.quantize import BITS, GROUP_SIZES, RULES

IDS = [5, 17, 3, 44, 17, 60, 2, 91, 17, 8, 30, 31]
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def drawn_without_a_screen() -> Iterator[None]:
    plots.plt.switch_backend("agg")
    yield
    plots.plt.close("all")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """The specification on a tiny random model whose tokenizer writes numbers."""

    class Numbers:
        def decode(self, ids: list[int]) -> str:
            return f" {ids[0]}"

    folder = write_tiny(tmp_path_factory.mktemp("tiny"))
    with load(folder, engine="numpy", compiled=False) as loaded:
        loaded.__dict__["tokenizer"] = Numbers()  # before the cached property is asked
        yield loaded


# --- data -----------------------------------------------------------------------------


def test_names_of_tokens_can_be_seen(model: Model) -> None:
    texts = {0: " sea", 1: "\n\n", 2: " ", 3: "'s"}

    class Few:
        def decode(self, ids: list[int]) -> str:
            return texts[ids[0]]

    class Stub:
        tokenizer = Few()

    assert views.token_names(Stub(), [0, 1, 2, 3]) == ["sea", "⏎⏎", "␣", "'s"]
    assert views.token_names(model, [7, 8]) == ["7", "8"]


def test_routing_is_what_the_router_picks(model: Model) -> None:
    got = views.routing(model, IDS)
    engine, state = model.engine, model.new_state()
    x = engine.embed(np.asarray(IDS))
    for layer, w in enumerate(engine.layers):
        eps = model.config.rms_norm_eps
        mixed = x + engine.mix(
            layer, layers.rms_norm(x, w["input_layernorm"], eps), state
        )
        h = layers.rms_norm(mixed, w["post_attention_layernorm"], eps)
        experts, weights = layers.route_topk(engine.linear(h, w["gate"]), 3)
        assert np.array_equal(got.experts[layer], experts)
        assert np.array_equal(got.weights[layer], weights)
        x = mixed + engine.moe(layer, h)
    assert got.tokens == [str(token) for token in IDS]
    assert got.experts.shape == (4, len(IDS), 3)


def test_fewer_experts_are_the_best_of_the_first_layer(model: Model) -> None:
    three, one = views.routing(model, IDS), views.routing(model, IDS, 1)
    assert (three.k, one.k) == (3, 1)
    assert np.array_equal(one.experts[0], three.experts[0, :, :1])
    assert (one.weights == 1).all()
    assert np.allclose(three.weights.sum(axis=-1), 1)


def test_looking_changes_nothing(model: Model) -> None:
    before = model.logits(IDS)
    views.routing(model, IDS, 2)
    views.attention_of_layer(model, IDS, 3)
    views.delta_states(model, IDS, 0)
    assert np.array_equal(model.logits(IDS), before)
    assert model.config.num_experts_per_tok == 3


def test_attention_weights_times_values_is_attention() -> None:
    q = RNG.normal(size=(5, 6, 8))
    k, v = RNG.normal(size=(2, 9, 3, 8))
    weights = views.attention_weights(q, k)
    assert weights.shape == (6, 5, 9)
    assert np.allclose(weights.sum(axis=-1), 1)
    assert (weights[:, 0, 5:] == 0).all()  # the first of the newest 5 sees 5 of 9
    mixed = np.einsum("htn,nhd->thd", weights, np.repeat(v, 2, axis=1))
    assert np.abs(mixed - layers.attend(q, k, v)).max() < 1e-12


def test_attention_of_a_layer_is_the_model_s(model: Model) -> None:
    weights = views.attention_of_layer(model, IDS, 3)
    engine, c, w = model.engine, model.config, model.engine.layers[3]
    x, state = views._run_to(engine, IDS, 3)
    h = layers.rms_norm(x, w["input_layernorm"], c.rms_norm_eps)
    want = engine.mix(3, h, state)
    v = np.repeat(state.layers[3].v[: len(IDS)], 2, axis=1)  # (T, H, Dh)
    mixed = np.einsum("htn,nhd->thd", weights, v)
    rows = engine.linear(h, w["q_proj"]).reshape(len(IDS), -1, 2 * c.head_dim)
    gated = mixed * layers.sigmoid(rows[..., c.head_dim :])
    got = engine.linear(gated.reshape(len(IDS), -1), w["o_proj"])
    # float32: sums of some hundred products of about 1
    assert np.abs(got - want).max() < 1e-5, np.abs(got - want).max()


def test_delta_states_end_as_a_prompt_does(model: Model) -> None:
    states = views.delta_states(model, IDS, 1)
    state = model.new_state()
    model.prefill(IDS, state)
    assert states.shape == (len(IDS), *state.layers[1].s.shape)
    difference = np.abs(states[-1] - state.layers[1].s).max()
    assert difference < 1e-5, difference
    model.prefill(IDS[:5], shorter := model.new_state())
    assert np.allclose(states[4], shorter.layers[1].s, atol=1e-5)


def test_a_layer_of_the_other_kind_is_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"layer 0 is a Gated DeltaNet.*\[3\]"):
        views.attention_of_layer(model, IDS, 0)
    with pytest.raises(ConfigError, match="layer 3 is attention"):
        views.delta_states(model, IDS, 3)
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        views.routing(model, [1])


def test_mlx_is_refused() -> None:
    class Mlx:
        engine = object()

    with pytest.raises(ConfigError, match="engine='numpy'"):
        views.routing(Mlx(), IDS)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", BITS)
def test_quantized_view(bits: int, rule: str) -> None:
    w = RNG.normal(size=(8, 128)).astype(np.float32)
    views_of = [views.quantized_view(w, bits, size, rule) for size in GROUP_SIZES]
    for view, size in zip(views_of, GROUP_SIZES, strict=True):
        assert np.array_equal(view.group, w[0, :size])
        assert len(view.levels) == 2**bits
        nearest = np.abs(view.group[:, None] - view.levels).min(axis=1)
        assert np.allclose(np.abs(view.errors[:size]), nearest, atol=1e-6)
        assert view.bits_per_weight == bits + 32 / size
        assert 1 <= view.used <= min(2**bits, size)
        want = np.sqrt(np.mean(view.errors**2) / np.mean(w**2))
        assert view.relative_error == pytest.approx(want)
    assert views_of[0].relative_error < views_of[-1].relative_error  # smaller groups


def test_no_error_where_the_weights_are_levels() -> None:
    w = np.tile(np.arange(-8, 8, dtype=np.float32), (1, 8))
    view = views.quantized_view(w, 4, 64)
    assert view.relative_error == 0
    assert sorted(view.levels) == list(range(-8, 8))
    assert view.used == 16


# --- figures and words ----------------------------------------------------------------


def test_words() -> None:
    picks = np.array([[[4, 1], [2, 0]]]), np.array([[[0.75, 0.25], [0.5, 0.5]]])
    routing = views.Routing(["the", "sea"], *picks)
    want = "layer 0, token 1 “sea”, K=2: experts 2 (50%), 0 (50%)"
    assert views.say_routing(routing, 0, 1) == want
    weights = np.array([[[1, 0], [0.25, 0.75]]])
    want = "head 0, token 1 “sea” looks 75% at 1 “sea”, 25% at 0 “the”"
    assert views.say_attention(weights, routing.tokens, 0, 1) == want
    states = np.zeros((2, 1, 2, 2))
    states[0], states[1] = 1.0, 1.5
    said = [views.say_state(states, routing.tokens, 0, token) for token in (0, 1)]
    assert said[0].endswith("“the”: size 2, changed by 2")
    assert said[1].endswith("“sea”: size 3, changed by 1")


def test_figures_show_the_data(model: Model) -> None:
    routing = views.routing(model, IDS)
    left, right = views.draw_routing(routing, 2, 11)
    assert np.allclose(left.images[0].get_array(), routing.weights[2, 2:].T)
    assert [t.get_text() for t in left.texts[:2]] == [
        str(e) for e in routing.experts[2, 2:4, 0]
    ]
    heights = [bar.get_height() for bar in right.patches]
    assert np.allclose(heights, 100 * routing.weights[2, 11])
    states = views.delta_states(model, IDS, 0)
    left, right = views.draw_state(states, routing.tokens, 5, 3)
    assert np.array_equal(left.images[0].get_array(), states[3, 5])
    weights = views.attention_of_layer(model, IDS, 3)
    ax = views.draw_attention(weights, routing.tokens, 1, 4)
    assert np.array_equal(ax.images[0].get_array(), weights[1])
    for drawn in (left, ax):
        assert len(plots.png(drawn)) <= 100_000


# --- widgets --------------------------------------------------------------------------


def _is_png(explorer: widgets.Explorer) -> bool:
    return bytes(explorer.picture.value).startswith(b"\x89PNG")


def test_router_explorer_follows_its_sliders(model: Model) -> None:
    asked = []

    def routing_for(k: int) -> views.Routing:
        asked.append(k)
        return views.routing(model, IDS, k)

    explorer = widgets.router_explorer(routing_for, k_max=3)
    assert _is_png(explorer)
    before = explorer.picture.value
    for name, value in (("K", 2), ("layer", 3), ("token", 9), ("K", 3), ("K", 2)):
        explorer.controls[name].value = value
    want = views.say_routing(views.routing(model, IDS, 2), 3, 9)
    assert explorer.text.value == want
    assert explorer.picture.value != before
    assert asked == [3, 2]  # each K once
    assert not plots.plt.get_fignums()  # none is left to be shown by the notebook


def test_attention_and_state_viewers_follow_their_sliders(model: Model) -> None:
    names = views.token_names(model, IDS)
    weights = views.attention_of_layer(model, IDS, 3)
    states = views.delta_states(model, IDS, 0)
    for explorer, say, data in (
        (widgets.attention_viewer(weights, names), views.say_attention, weights),
        (widgets.state_viewer(states, names), views.say_state, states),
    ):
        explorer.controls["head"].value = 2
        explorer.controls["token"].value = 6
        assert explorer.text.value == say(data, names, 2, 6)
        assert _is_png(explorer)


def test_quantization_explorer_follows_its_sliders() -> None:
    w = RNG.normal(size=(16, 128)).astype(np.float32)
    explorer = widgets.quantization_explorer(w)
    explorer.controls["bits"].value = 2
    explorer.controls["group"].value = 32
    explorer.controls["rule"].value = "least_squares"
    want = views.say_quantized(views.quantized_view(w, 2, 32, "least_squares"))
    assert explorer.text.value == want
    assert _is_png(explorer)


def test_a_stored_notebook_holds_no_bytes_of_the_picture() -> None:
    """IPython cuts the text of a widget after 110 characters; nbval compares it."""
    explorer = widgets.quantization_explorer(np.ones((1, 128), np.float32))
    assert "PNG" not in repr(explorer)[:110]
    names = ["a", "<b>"]
    viewer = widgets.attention_viewer(np.ones((1, 2, 2)) / 2, names)
    assert "PNG" not in repr(viewer)[:110]
    assert "&lt;b&gt;" in viewer.text.value  # a token is no markup
