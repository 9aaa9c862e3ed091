"""The toy: hand-worked cases, its gradient three ways, and what training must show."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_ref import layers, toy, toy_training
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.toy import ToySizes
from flashmoe_ref.toy_training import gradient_mlx, gradient_numpy, train

needs_mlx = pytest.mark.skipif(
    importlib.util.find_spec("mlx") is None, reason="MLX is not installed"
)
SMALL = ToySizes(width=5, n_experts=6, k=3, expert_width=4, shared_width=3)


def batch_and_weights(seed=0, n_tokens=40, sizes=SMALL):
    task = toy.make_task(seed, width=sizes.width, n_clusters=4)
    batch = task.draw(np.random.default_rng(seed + 1), n_tokens)
    w = toy.init_weights(seed + 2, sizes)
    w["gate"] *= 5  # weights far from equal, so that their derivative matters
    return batch, w


# --- the task and the layer -----------------------------------------------------------


def test_task_has_the_geometry_that_it_promises():
    task = toy.make_task(0, width=8, n_clusters=6, distance=4, common=6)
    directions = (task.centres - task.centres.mean(axis=0)) / 4
    gram = directions @ directions.T
    # unit vectors at right angles, less their mean: I - 1/C
    np.testing.assert_allclose(gram, np.eye(6) - 1 / 6, atol=1e-12)
    products = task.maps @ task.maps.transpose(0, 2, 1)
    np.testing.assert_allclose(
        products, np.broadcast_to(np.eye(8), (6, 8, 8)), atol=1e-12
    )
    batch = task.draw(np.random.default_rng(1), 4000)
    assert abs(toy.squared_error(0, batch.target) - 1) < 0.05
    with pytest.raises(ConfigError, match="n_clusters=9"):
        toy.make_task(0, width=8, n_clusters=9)


def test_target_is_the_clusters_map_of_the_noise():
    task = toy.make_task(3)
    x, target, cluster = task.draw(np.random.default_rng(4), 20)
    for token in range(20):
        noise = x[token] - task.centres[cluster[token]]
        np.testing.assert_allclose(target[token], task.maps[cluster[token]] @ noise)


def test_layer_token_by_token():
    (x, _, _), w = batch_and_weights()
    experts, weights = toy.route(x, w, SMALL.k)
    for token in range(5):
        row = x[[token]]
        wanted = layers.shared_expert(row, w)
        for e, weight in zip(experts[token], weights[token], strict=True):
            wanted += weight * layers.expert_mlp(
                row, w["gate_proj"][e], w["up_proj"][e], w["down_proj"][e]
            )
        got = toy.moe(x, w, experts, weights)[[token]]
        np.testing.assert_allclose(got, wanted, atol=1e-12)


@given(st.integers(0, 1000), st.permutations(range(SMALL.n_experts)))
@settings(max_examples=20, deadline=None)
def test_renaming_experts_changes_nothing(seed, order):
    (x, _, _), w = batch_and_weights(seed, n_tokens=6)
    renamed = dict(w)
    for name in ("gate", *toy.MATRICES):
        renamed[name] = w[name][list(order)]
    outputs = (toy.moe(x, v, *toy.route(x, v, SMALL.k)) for v in (w, renamed))
    np.testing.assert_allclose(*outputs, atol=1e-12)


@given(st.integers(0, 1000), st.integers(1, SMALL.n_experts))
@settings(max_examples=30, deadline=None)
def test_renormalised_weights_are_the_softmax_of_the_kept_logits(seed, k):
    logits = np.random.default_rng(seed).normal(size=(7, SMALL.n_experts))
    experts, weights = layers.route_topk(logits, k)
    kept = np.take_along_axis(logits, experts, axis=-1)
    np.testing.assert_allclose(weights, layers.softmax(kept), atol=1e-14)


def test_cut_with_renormalising_is_a_smaller_k():
    (x, _, _), w = batch_and_weights()
    experts, weights = toy.route(x, w, 3)
    fewer, wanted = toy.route(x, w, 2)
    np.testing.assert_array_equal(experts[:, :2], fewer)
    np.testing.assert_allclose(toy.cut(weights, 2, renormalise=True), wanted)
    np.testing.assert_array_equal(toy.cut(weights, 2, False), weights[:, :2])


# --- measures -------------------------------------------------------------------------


def test_load_by_hand():
    experts = np.array([[0, 1], [0, 2], [0, 1]])
    np.testing.assert_allclose(toy.expert_load(experts, 4), [3 / 6, 2 / 6, 1 / 6, 0])
    assert toy.effective_experts(np.array([0.5, 0.5, 0.0])) == pytest.approx(2)
    assert toy.count_idle(np.array([0.5, 0.47, 0.02, 0.01])) == 2


def test_balance_loss_at_its_ends():
    even = np.log(np.array([[0.7, 0.3], [0.3, 0.7]]))
    assert toy.balance_loss(even, 1) == pytest.approx(1)
    one = np.array([[50.0, 0.0, 0.0, 0.0]])
    assert toy.balance_loss(one, 1) == pytest.approx(4)
    two = np.array([[50.0, 50.0, 0.0, 0.0]])
    assert toy.balance_loss(two, 2) == pytest.approx(2)  # E / k


def test_balance_loss_of_tokens_that_all_agree():
    p = np.array([0.5, 0.3, 0.2])
    logits = np.log(np.tile(p, (9, 1)))
    assert toy.balance_loss(logits, 2) == pytest.approx(3 * (0.5 * 0.5 + 0.5 * 0.3))


def test_weight_by_cluster_by_hand():
    experts, cluster = np.array([[0, 1], [2, 0], [1, 2]]), np.array([0, 0, 1])
    weights = np.array([[0.6, 0.4], [0.8, 0.2], [0.7, 0.3]])
    wanted = [[0.4, 0], [0.2, 0.7], [0.4, 0.3]]
    got = toy.weight_by_cluster(experts, weights, cluster, 3)
    np.testing.assert_allclose(got, wanted)


def test_best_scale_of_parallel_and_of_orthogonal_parts():
    kept, rest = np.array([[2.0, 0.0]]), np.array([[0.0, 3.0]])
    assert toy.best_scale(kept, kept + rest) == pytest.approx(1)
    assert toy.best_scale(kept, 1.25 * kept) == pytest.approx(1.25)


# --- the gradient three ways ----------------------------------------------------------


def total(w, batch, balance):
    loss, _ = gradient_numpy(w, batch, SMALL.k, balance)
    return loss.error + balance * loss.balance


@pytest.mark.parametrize("balance", [0.0, 0.7])
def test_gradient_by_hand_equals_finite_differences(balance):
    batch, w = batch_and_weights()
    _, gradient = gradient_numpy(w, batch, SMALL.k, balance)
    assert set(gradient) == set(w)
    rng, step = np.random.default_rng(0), 1e-6
    for name, array in w.items():
        direction = rng.standard_normal(array.shape)
        slope = [
            total(w | {name: array + sign * step * direction}, batch, balance)
            for sign in (1, -1)
        ]
        got = np.sum(gradient[name] * direction)
        # central differences err by step^2, rounding by 1e-16 / step
        wanted = (slope[0] - slope[1]) / (2 * step)
        assert got == pytest.approx(wanted, rel=1e-6, abs=1e-8), name


@needs_mlx
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 3, 6])
def test_gradient_by_hand_equals_automatic(seed, k):
    batch, w = batch_and_weights(seed)
    (loss, by_hand), (other, automatic) = (
        gradient(w, batch, k, 0.3) for gradient in (gradient_numpy, gradient_mlx)
    )
    np.testing.assert_allclose(loss, other, rtol=1e-12)
    assert set(by_hand) == set(automatic)
    for name in w:
        # float64 sums of a few hundred products in another order
        np.testing.assert_allclose(
            by_hand[name], automatic[name], rtol=1e-9, atol=1e-13, err_msg=name
        )


def test_losses_are_those_of_the_layer():
    batch, w = batch_and_weights()
    loss, _ = gradient_numpy(w, batch, SMALL.k, 0.1)
    y = toy.moe(batch.x, w, *toy.route(batch.x, w, SMALL.k))
    logits = layers.linear(batch.x, w["gate"])
    assert loss.error == pytest.approx(toy.squared_error(y, batch.target))
    assert loss.balance == pytest.approx(toy.balance_loss(logits, SMALL.k))


def test_score_puts_the_measures_together():
    batch, w = batch_and_weights()
    score, (loss, _) = toy.score(w, batch, 3), gradient_numpy(w, batch, 3, 0.0)
    assert (score.error, score.balance) == pytest.approx(loss)
    load = toy.expert_load(toy.route(batch.x, w, 3)[0], SMALL.n_experts)
    assert score.effective == toy.effective_experts(load)
    assert score.idle == toy.count_idle(load)


def test_unused_experts_get_no_gradient_but_from_the_balance():
    batch, w = batch_and_weights()
    batch = batch._replace(x=np.abs(batch.x))
    w["gate"][2] = -10.0  # of positive inputs: never among the best
    _, gradient = gradient_numpy(w, batch, SMALL.k, 0.0)
    for name in ("gate", *toy.MATRICES):
        assert not gradient[name][2].any(), name
        assert gradient[name][[0, 1, 3, 4, 5]].any(), name
    w["gate"][2] = -0.2
    _, gradient = gradient_numpy(w, batch, SMALL.k, 1.0)
    assert gradient["gate"][2].any()


def test_with_one_expert_the_error_does_not_teach_the_router():
    batch, w = batch_and_weights()
    _, gradient = gradient_numpy(w, batch, 1, 0.0)
    assert not gradient["gate"].any()


# --- training -------------------------------------------------------------------------


def test_first_step_of_adam_is_the_rate():
    w = {"a": np.array([1.0, 1.0])}
    toy_training.Adam(w, rate=0.1).step(w, {"a": np.array([3.0, -0.01])})
    np.testing.assert_allclose(w["a"], [0.9, 1.1], rtol=1e-6)


@needs_mlx
def test_backends_train_alike():
    task, w = toy.make_task(0), toy.init_weights(0, ToySizes())
    runs = [
        train(task, w, 4, 0.1, seed=0, n_steps=60, backend=name)
        for name in ("numpy", "mlx")
    ]
    assert [run.backend for run in runs] == ["numpy", "mlx"]
    for name in w:
        # rounding of 1e-16 grows with the steps, but not to a fourth digit
        np.testing.assert_allclose(*(r.weights[name] for r in runs), atol=1e-8)


def test_training_leaves_its_start_alone_and_keeps_snapshots():
    task, w = toy.make_task(0), toy.init_weights(0, ToySizes())
    before = {name: array.copy() for name, array in w.items()}
    run = train(task, w, 4, 0.1, 0, n_steps=3, snapshots=(0, 3), backend="numpy")
    for name in w:
        np.testing.assert_array_equal(w[name], before[name])
        np.testing.assert_array_equal(run.snapshots[0][name], before[name])
        np.testing.assert_array_equal(run.snapshots[3][name], run.weights[name])
    assert len(run.losses) == 3 and list(run.snapshots) == [0, 3]


def test_unknown_backend_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="'torch'"):
        toy_training.pick_backend("torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert toy_training.pick_backend()[0] == "numpy"
    with pytest.raises(ConfigError, match="not installed"):
        toy_training.pick_backend("mlx")


def top_weight(w, batch):
    """Mean, over clusters, of the largest weight that one expert has there."""
    routing = toy.route(batch.x, w, 4)
    return toy.weight_by_cluster(*routing, batch.cluster, 16).max(axis=0).mean()


def test_experts_specialise_and_balance_keeps_them_in_use():
    task, w = toy.make_task(1), toy.init_weights(1, ToySizes())
    test = task.draw(np.random.default_rng(9), 2000)
    scores, top = {}, {}
    for balance in (0.0, 0.1):
        run = train(task, w, 4, balance, 1, n_steps=250, backend="numpy")
        scores[balance] = toy.score(run.weights, test, 4)
        assert scores[balance].error < 0.6  # a constant makes 1
        top[balance] = top_weight(run.weights, test)
    assert scores[0.1].effective > 1.4 * scores[0.0].effective, scores
    assert scores[0.1].idle < scores[0.0].idle, scores
    assert top[0.1] > top_weight(w, test) + 0.1, top
