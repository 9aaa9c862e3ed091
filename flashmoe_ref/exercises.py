"""The exercises of the lessons: `check` says how far a reader's function is.

It prints and never raises, so that a notebook with untouched exercises runs through.
**But:** tries a handful of cases; the notebooks' folded solutions are tested.
*Used in all notebooks.*
"""

import math
from collections.abc import Callable

import numpy as np

from . import layers
from .accounting import (
    count_parameters,
    delta_state_bytes,
    expert_bytes,
    kv_cache_bytes,
)
from .config import PRESETS
from .overlap import Ahead, Layer, pays
from .policies import LruSlots
from .predictors import quality
from .quantize import pack
from .sparsity import Window
from .toy import balance_loss

BIG = PRESETS["qwen3.5-397b-a17b"]
MIDDLE = PRESETS["qwen3.5-122b-a10b"]
RELATIVE = 1e-6  # difference that counts as equal


def check(name: str, function: Callable) -> None:
    """Try a function on the cases of an exercise and print the verdict."""
    print(f"Exercise {name}: {_verdict(name, function)}")


def _verdict(name: str, function: Callable) -> str:
    if name not in CASES:
        return f"no exercise of this name; there are {', '.join(CASES)}"
    for arguments, expected in CASES[name]():
        try:
            got = function(*arguments)
        except Exception as error:
            return f"not right yet: {type(error).__name__}: {error}"
        if got is None:
            return "not attempted"
        if not _equal(got, expected):
            return f"not right yet: got {_short(got)}, expected {_short(expected)}"
    return "correct"


def _equal(got: object, expected: object) -> bool:
    try:
        got, expected = np.asarray(got, float), np.asarray(expected, float)
    except (TypeError, ValueError):
        return bool(got == expected)
    return got.shape == expected.shape and np.allclose(got, expected, rtol=RELATIVE)


def _short(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int | float) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- cases: arguments and the expected result -----------------------------------------

Cases = list[tuple[tuple, object]]


def _bytes_per_token() -> Cases:
    return [
        ((config, k, bits), config.num_hidden_layers * k * expert_bytes(config, bits))
        for config, k, bits in ((BIG, 10, 4), (BIG, 4, 2), (MIDDLE, 8, 8))
    ]


def _seconds_per_token() -> Cases:
    return [
        ((1.7e9, 0.0, 17.5), 1.7e9 / 17.5e9),
        ((1.7e9, 0.71, 5.5), 1.7e9 * 0.29 / 5.5e9),
        ((4.25e9, 1.0, 3.0), 0.0),
    ]


def _active_parameters() -> Cases:
    return [
        ((config, k), count_parameters(config).active(k))
        for config, k in ((BIG, 10), (BIG, 4), (MIDDLE, 8))
    ]


def _greedy() -> Cases:
    class Counting:
        """Stands for a model: the next token is always one more than the last."""

        def new_state(self) -> list:
            return []

        def prefill(self, ids: list[int], state: list) -> np.ndarray:
            state.extend(ids)
            return np.eye(16)[(ids[-1] + 1) % 16]

        def decode(self, token: int, state: list) -> np.ndarray:
            return self.prefill([token], state)

    return [((Counting(), [1, 2], 3), [3, 4, 5]), ((Counting(), [9], 1), [10])]


def _route() -> Cases:
    logits = np.random.default_rng(0).normal(size=(5, 8))
    logits[1, [2, 5]] = 3.0  # a tie
    cases = ((logits, 3), (logits[:, :4], 4), (logits[:2] + 1000, 1))
    return [(case, layers.route_topk(*case)) for case in cases]


def _balance() -> Cases:
    logits = np.random.default_rng(0).normal(size=(40, 6))
    logits[:, 1] += 2
    return [
        ((layers.softmax(logits), layers.route_topk(logits, k)[0]), value)
        for k, value in ((k, balance_loss(logits, k)) for k in (1, 3))
    ]


def _decode_attention() -> Cases:
    rng = np.random.default_rng(0)
    cases = []
    for n_heads, n_kv, n in ((4, 2, 5), (6, 2, 1), (3, 3, 7)):
        q, (k, v) = rng.normal(size=(n_heads, 8)), rng.normal(size=(2, n, n_kv, 8))
        cases.append(((q, k, v), layers.attend(q[None], k, v)[0]))
    return cases


def _tokens_that_fit() -> Cases:
    return [
        ((config, n_bytes, width), n_bytes // kv_cache_bytes(config, 1, width))
        for config, n_bytes, width in ((BIG, 10**9, 2), (MIDDLE, 24 * 10**9, 1))
    ]


def _delta_step() -> Cases:
    rng = np.random.default_rng(0)
    cases = []
    for decay, beta in ((0.9, 0.3), (1.0, 1.0), (0.5, 0.0)):
        s, k, v = rng.normal(size=(5, 4)), rng.normal(size=4), rng.normal(size=5)
        step = (s[None], k[None], k[None], v[None], np.array([decay]), np.array([beta]))
        _, after = layers.delta_rule_step(*step)
        cases.append(((s, k, v, decay, beta), after[0]))
    return cases


def _crossing() -> Cases:
    return [
        ((config,), delta_state_bytes(config) // kv_cache_bytes(config, 1) + 1)
        for config in (BIG, MIDDLE)
    ]


def _pack_row() -> Cases:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 2**bits, 64), bits) for bits in (4, 3, 5)]
    return [
        ((row.astype(np.uint8), bits), pack(row.astype(np.uint8), bits).tolist())
        for row, bits in rows
    ]


def _row_product() -> Cases:
    rng = np.random.default_rng(0)
    cases = []
    for n_groups in (4, 1):
        q = rng.integers(0, 16, (n_groups, 32)).astype(np.uint8)
        x = rng.normal(size=q.shape)
        scales, biases = rng.normal(size=(2, n_groups))
        weights = q * scales[:, None] + biases[:, None]
        cases.append(((q, scales, biases, x), (weights * x).sum()))
    return cases


def _place_of() -> Cases:
    cases = []
    for n_header, start, shape, expert in (
        (18_072, 1_000, [128, 64, 32], 37),
        (120, 0, [8, 4, 2], 7),
    ):
        n_bytes = 4 * shape[1] * shape[2]
        offsets = [start, start + shape[0] * n_bytes]
        entry = {"dtype": "U32", "shape": shape, "data_offsets": offsets}
        place = (8 + n_header + start + expert * n_bytes, n_bytes)
        cases.append(((n_header, entry, expert), place))
    return cases


def _pages_touched() -> Cases:
    return [
        (([(0, 4096)], 4096), 1),
        (([(4095, 2)], 4096), 2),
        (([(10, 20), (40, 20)], 4096), 1),
        (([(512, 27_648), (40_000, 1)], 4096), 8),
    ]


def _recall_and_waste() -> Cases:
    rng, cases = np.random.default_rng(0), []
    for n_named, k in ((4, 10), (12, 4)):
        order = rng.random((2, 6, 16)).argsort(axis=2)
        named, picks = order[0, :, :n_named], order[1, :, :k]
        found = quality(named[:, None], picks[:, None], record_bytes=1)
        expected = (found.recall, found.wasted_bytes)
        cases.append(((named.tolist(), picks.tolist()), expected))
    return cases


def _it_pays() -> Cases:
    trials = (
        (2.0, 1.0, 0.6, 0.3, 0.5),
        (2.0, 1.0, 0.3, 0.6, 0.5),  # precision below contention
        (1.0, 9.0, 0.6, 0.3, 0.0),  # the waste does not fit
        (1.0, 9.0, 0.6, 0.05, 0.0),
    )
    return [
        ((c, d, r, w, k), pays(Layer(c, d), Ahead(r, w), k)) for c, d, r, w, k in trials
    ]


def _lru_hits() -> Cases:
    rng = np.random.default_rng(0)
    cases = []
    for keys, n_slots in (
        ([1, 2, 1, 3, 2], 2),
        (rng.integers(0, 6, 60).tolist(), 3),
        (rng.zipf(1.5, 80).tolist(), 4),
    ):
        slots = LruSlots(n_slots)
        hits = sum(not slots.assign([key])[1] for key in keys)
        cases.append(((keys, n_slots), hits))
    return cases


def _bits_of_row() -> Cases:
    return [((500, 3.5e9), 4), ((2500, 9.8e9), 2), ((2581, 18e9), 4)]


def _count_reads() -> Cases:
    rng = np.random.default_rng(0)
    drawn = [rng.choice(8, 3, replace=False).tolist() for _ in range(20)]
    cases = []
    for requests, n_slots in (
        ([[0, 1], [2], [0, 3]], 3),
        ([[0, 1], [2, 3], [3, 0]], 2),
        ([[0, 1, 2], [3, 0], [1, 2]], 3),  # 0 is needed, though used longest ago
        (drawn, 5),
    ):
        slots = LruSlots(n_slots)
        n_reads = sum(len(slots.assign(experts)[1]) for experts in requests)
        cases.append(((requests, n_slots), n_reads))
    return cases


def _count_spoiled() -> Cases:
    right = [("read", 0, 7), ("read", 1, 9), ("compute", 1, 9), ("compute", 0, 7)]
    late = [("read", 0, 7), ("read", 0, 5), ("compute", 0, 7), ("compute", 0, 5)]
    return [
        ((right,), 0),
        ((late,), 1),
        ((right + late,), 1),
        (([("compute", 3, 1), *late, ("compute", 1, 5)],), 3),  # nothing was read
    ]


def _experts_kept() -> Cases:
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    return [
        ((weights, mass), n) for mass, n in ((0.35, 1), (0.5, 2), (0.85, 3), (1.0, 4))
    ] + [((np.full(10, 0.1), 0.55), 6)]


def _unbeaten() -> Cases:
    return [
        (([(2, 0.0), (1, 0.4), (1, 0.1), (3, 0.0)],), [0, 2]),
        (([(5, 5)],), [0]),
        (([(1, 3), (2, 2), (3, 1), (3, 3)],), [0, 1, 2]),
    ]


def _reads_of_window() -> Cases:
    rng = np.random.default_rng(0)
    drawn = rng.random((12, 20)) < 0.3
    texts = [[set(np.flatnonzero(row).tolist()) for row in drawn]]
    texts.append([{1, 2}, {2, 3}, {1}, {1}])
    cases = []
    for wanted, k in ((texts[0], 0), (texts[0], 3), (texts[1], 1), (texts[1], 2)):
        window = Window(k, 20)
        masks = ([i in ids for i in range(20)] for ids in wanted)
        reads = [len(window.advance(np.array(mask))[0]) for mask in masks]
        cases.append(((wanted, k), reads))
    return cases


def _delete_by_swap() -> Cases:
    return [
        (([5, 6, 7, 8], 5), [8, 6, 7]),
        (([5, 6, 7, 8], 7), [5, 6, 8]),
        (([5, 6], 6), [5]),
        (([9], 9), []),
    ]


def _token_seconds() -> Cases:
    cases = []
    for rates, hit in (((240.0, 5.5, 38.0), 0.7), ((45.0, 1.9, 7.0), 0.0)):
        read_gb, picked_gb, sync_s = 4.94, 1.7, 0.06
        compute, disk, copy = rates
        expected = (read_gb + picked_gb) / compute + sync_s
        expected += (1 - hit) * picked_gb / disk + hit * picked_gb / copy
        cases.append(((read_gb, picked_gb, sync_s, hit, compute, disk, copy), expected))
    return cases


def _disk_for() -> Cases:
    return [
        ((10.0, 0.06, 0.8), 0.8 / 0.04),
        ((2.0, 0.1, 1.2), 3.0),
        ((10.0, 0.12, 0.8), math.inf),  # too slow before the disk is asked
        ((10.0, 0.06, 0.0), 0.0),
    ]


def _files_that_fit() -> Cases:
    return [
        ((40, 6, 4, 60), 8),
        ((400, 6, 4, 60), 60),  # no more than there are
        ((9, 6, 4, 60), 0),
        ((5, 6, 4, 60), 0),
        ((46, 6, 4, 60), 10),
    ]


def _answer_of_a_tool() -> Cases:
    tools = {
        "add": (lambda a, b: a + b, {"a", "b"}),
        "half": (lambda a: 1 / (a * 2), {"a"}),
    }
    calls = (
        ("add", {"a": 1, "b": 2}, 3),
        ("open", {"a": 1}, "error: no such tool"),
        ("add", {"a": 1}, "error: wrong arguments"),
        ("add", {"a": 1, "b": 2, "c": 3}, "error: wrong arguments"),
        ("add", {"a": 1, "b": "x"}, "error: the tool failed"),
        ("half", {"a": 0}, "error: the tool failed"),
    )
    return [((name, given, tools), expected) for name, given, expected in calls]


CASES = {
    "0.1": _bytes_per_token,
    "0.2": _seconds_per_token,
    "1.1": _route,
    "1.2": _balance,
    "2.1": _decode_attention,
    "2.2": _tokens_that_fit,
    "3.1": _delta_step,
    "3.2": _crossing,
    "4.1": _active_parameters,
    "4.2": _greedy,
    "5.1": _pack_row,
    "5.2": _row_product,
    "6.1": _place_of,
    "6.2": _pages_touched,
    "8.1": _lru_hits,
    "8.2": _bits_of_row,
    "9.1": _recall_and_waste,
    "9.2": _it_pays,
    "10.1": _experts_kept,
    "10.2": _unbeaten,
    "7.1": _count_reads,
    "7.2": _count_spoiled,
    "11.1": _reads_of_window,
    "11.2": _delete_by_swap,
    "12.1": _token_seconds,
    "12.2": _disk_for,
    "13.1": _files_that_fit,
    "13.2": _answer_of_a_tool,
}
