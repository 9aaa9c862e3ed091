"""Sampling: each cut-off by hand, and the distribution that is drawn from."""

import numpy as np
import pytest

from flashmoe_ref.errors import ConfigError
from flashmoe_ref.sampling import Sampler, Sampling, filter_probabilities

P = np.array([0.5, 0.2, 0.2, 0.06, 0.04])
LOGITS = np.log(P)


def kept(**settings):
    cut = filter_probabilities(P, Sampling(**settings))
    assert cut.sum() == pytest.approx(1)
    return np.flatnonzero(cut).tolist()


def test_cut_offs_by_hand():
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=1) == [0]
    assert kept(top_k=2) == [0, 1]  # of two equals, the lower id stays
    assert kept(top_k=99) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.5) == [0]
    assert kept(top_p=0.51) == [0, 1]
    assert kept(top_p=1e-9) == [0]  # one always stays
    assert kept(min_p=0.3) == [0, 1, 2]
    assert kept(min_p=1.0) == [0]
    assert kept(top_k=3, top_p=0.6) == [0, 1]


def test_kept_probabilities_keep_their_ratio():
    cut = filter_probabilities(P, Sampling(top_k=2))
    np.testing.assert_allclose(cut[:2], [5 / 7, 2 / 7])


def test_greedy_ignores_padding_rows():
    logits = np.append(LOGITS, 99.0)  # a padding row of the vocabulary
    assert Sampler(Sampling(), [], n_real=5).sample(logits) == 0
    for seed in range(20):
        sampler = Sampler(Sampling(temperature=9.0, seed=seed), [], n_real=5)
        assert sampler.sample(logits) < 5


def test_same_seed_same_tokens():
    def draw(seed):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [], 5)
        return [sampler.sample(LOGITS) for _ in range(50)]

    assert draw(3) == draw(3) != draw(4)


def test_draws_follow_the_distribution():
    sampler = Sampler(Sampling(temperature=1.0), [], 5)
    counts = np.bincount([sampler.sample(LOGITS) for _ in range(20_000)], minlength=5)
    # five standard deviations of a count
    assert (np.abs(counts - 20_000 * P) < 5 * np.sqrt(20_000 * P * (1 - P))).all()


def test_temperature_sharpens():
    cold = Sampler(Sampling(temperature=0.1), [], 5)
    assert np.mean([cold.sample(LOGITS) == 0 for _ in range(500)]) > 0.99


def test_repetition_penalty_by_hand():
    logits = np.array([2.0, 1.5, -1.0, -1.5])
    sampler = Sampler(Sampling(repetition_penalty=2.0), prompt=[0, 2], n_real=4)
    np.testing.assert_allclose(sampler._penalize(logits), [1.0, 1.5, -2.0, -1.5])
    assert sampler.sample(logits) == 1
    assert sampler.sample(logits) == 0  # now 1 counts as seen too: 0.75 against 1.0


def test_presence_penalty_counts_generated_tokens_only():
    logits = np.array([2.0, 1.5, 1.2])
    sampler = Sampler(Sampling(presence_penalty=0.6), prompt=[0, 1], n_real=3)
    assert [sampler.sample(logits) for _ in range(4)] == [0, 1, 0, 0]
    np.testing.assert_array_equal(logits, [2.0, 1.5, 1.2])  # untouched


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"presence_penalty": float("inf")},
        {"seed": -1},
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**bad)
