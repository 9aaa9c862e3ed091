"""Mapped experts give the bits that read ones give."""

import numpy as np
import pytest
from tiny import write_tiny

from flashmoe_ref import load
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.mapped import load_mapped

IDS = [5, 3, 80, 7, 2, 90, 41, 11]


@pytest.mark.parametrize("n_shards", [1, 3])
def test_mapped_equals_read_to_the_bit(tmp_path, n_shards):
    folder = write_tiny(tmp_path / "model", n_shards=n_shards)
    with load(folder, engine="numpy") as read, load_mapped(folder) as mapped:
        np.testing.assert_array_equal(mapped.logits(IDS), read.logits(IDS))
        states = read.new_state(), mapped.new_state()
        for token in IDS:
            want, got = read.decode(token, states[0]), mapped.decode(token, states[1])
            np.testing.assert_array_equal(got, want)
        report = mapped.report()
    assert (report.reads, report.bytes_read) == (0, 0)
    assert "mapped" in str(report)


def test_fewer_experts(tmp_path):
    folder = write_tiny(tmp_path / "model")
    with load(folder, engine="numpy", k=2) as read, load_mapped(folder, k=2) as mapped:
        np.testing.assert_array_equal(mapped.logits(IDS), read.logits(IDS))


def test_files_are_not_written_to(tmp_path):
    folder = write_tiny(tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    with load_mapped(folder) as mapped:
        mapped.logits(IDS)
        mapped.store.bank(0).arrays["gate_proj.weight"][0] = 0  # copy-on-write
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("layout", ["hf", "hf-per-expert"])
def test_experts_that_lie_apart_are_refused(tmp_path, layout):
    with pytest.raises(ConfigError, match="not stacked"):
        load_mapped(write_tiny(tmp_path / "model", layout=layout))
