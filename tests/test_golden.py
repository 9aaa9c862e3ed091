"""Both engines against Hugging Face transformers, in float32, on random checkpoints.

The logits were made by golden/make_golden.py, which says what each array holds.
"""

import numpy as np
import pytest
from comparing import assert_close, first_difference, hidden_states, in_steps

from flashmoe_ref import load
from flashmoe_ref.checkpoint import Checkpoint

PROMPT, CHUNK, FEWER_EXPERTS = 40, 7, 2  # as in make_golden.py


@pytest.fixture(scope="module")
def case(golden, engine):
    """A loaded model and its golden arrays."""
    folder, arrays = golden
    with load(folder, **engine) as model:
        yield model, arrays


def explainer(model, arrays):
    def explain():
        hidden = hidden_states(model, arrays["ids"])
        return first_difference(hidden, arrays["hidden"], model.config)

    return explain


def test_full_pass(case):
    model, arrays = case
    got = model.logits(arrays["ids"])
    assert_close(got, arrays["full"], "full", explain=explainer(*case))


def test_every_layer(case):
    model, arrays = case
    hidden = hidden_states(model, arrays["ids"])
    for i, (ours, theirs) in enumerate(zip(hidden, arrays["hidden"], strict=True)):
        assert_close(ours, theirs, f"hidden state {i}")


def test_prefill_then_decode(case):
    model, arrays = case
    ids = arrays["ids"]
    got = in_steps(model, ids, [PROMPT] + [1] * (len(ids) - PROMPT))
    assert_close(got[:PROMPT], arrays["full"][:PROMPT], "prefill")
    assert_close(got[PROMPT:], arrays["decode"], "decode", explain=explainer(*case))


def test_one_token_at_a_time(case):
    model, arrays = case
    got = in_steps(model, arrays["ids"], [1] * len(arrays["ids"]))
    assert_close(got, arrays["full"], "token by token", explain=explainer(*case))


def test_chunked_prefill(case):
    model, arrays = case
    n_chunks, rest = divmod(len(arrays["ids"]), CHUNK)
    got = in_steps(model, arrays["ids"], [CHUNK] * n_chunks + [rest])
    assert_close(got, arrays["chunked"], "chunked", explain=explainer(*case))


def test_prompt_of_several_delta_rule_chunks(case):
    model, arrays = case
    assert len(arrays["long_ids"]) > 128 and len(arrays["long_ids"]) % 64
    assert_close(model.logits(arrays["long_ids"]), arrays["long"], "long")


def test_last_token_alone_has_the_same_logits(case):
    model, arrays = case
    state = model.new_state()
    got = model.engine.forward(arrays["ids"], state)
    assert_close(got[None], arrays["full"][-1:], "last token")


def test_fewer_experts_are_weighted_anew(golden, engine):
    folder, arrays = golden
    with load(folder, **engine, k=FEWER_EXPERTS) as model:
        assert_close(model.logits(arrays["ids"]), arrays["fewer"], "k=2")


def test_golden_files_can_tell(golden):
    """The checkpoints differ where conventions do, and rounding cannot hide it."""
    folder, arrays = golden
    config = Checkpoint.open(folder).config
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert config.linear_num_value_heads >= 2 * config.linear_num_key_heads
    assert config.rotary_dim < config.head_dim
    assert config.shared_expert_intermediate_size != config.moe_intermediate_size
    assert config.num_experts_per_tok < config.num_experts
    assert arrays["margin"] > 1e-4 and arrays["sensitivity"] < 2e-5
    assert 3 < np.abs(arrays["full"]).max() < 10
    assert "torch 2.13.0" in str(arrays["versions"])
    assert "transformers 5.24.0" in str(arrays["versions"])
