"""Replacement policies: by hand, against their specification, and the optimum."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe_ref.policies import (
    POLICIES,
    ClockSlots,
    FifoSlots,
    LfuSlots,
    LruSlots,
    PageCache,
    make_slots,
    most_frequent,
)
from flashmoe_ref.simulator import (
    Requests,
    access_requests,
    decode_requests,
    join,
    prompt_requests,
    simulate,
    simulate_pages,
)

ALL = (*POLICIES, "static")
each_policy = pytest.mark.parametrize("policy", ALL)


def one_layer(groups, n_experts=10) -> Requests:
    """Requests of a single layer."""
    tokens = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    experts = np.concatenate([np.empty(0, int), *groups]).astype(int)
    return access_requests(tokens, np.zeros_like(tokens), experts, n_experts)


def local_picks(n_tokens=300, n_layers=3, n_experts=32, k=4, seed=0, stay=0.5):
    """Picks with favourites (Zipf) and locality: (T, L, K), best first."""
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(n_experts) for _ in range(n_layers)])
    weights = 1 / np.arange(1, n_experts + 1)
    score = rng.gumbel(size=(n_tokens, n_layers, n_experts)) + np.log(weights)
    for t in range(1, n_tokens):  # some of the last token's luck stays
        kept = rng.random((n_layers, n_experts)) < stay
        score[t] = np.where(kept, score[t - 1], score[t])
    ranks = np.argsort(-score, axis=2)[..., :k]
    return np.take_along_axis(order[None], ranks, axis=2)


# --- by hand --------------------------------------------------------------------------

# three slots; one expert a request
ROW = [[1], [2], [3], [1], [4], [1], [2], [5], [1]]


@pytest.mark.parametrize(
    ("policy", "hits"),
    [
        ("lru", "...x.x..x"),  # 4 replaces 2, 2 replaces 3, 5 replaces 4
        ("fifo", "...x....x"),  # 4 replaces 1, 1 replaces 2, 2 replaces 3, 5 4
        ("lfu", "...x.x..x"),  # 1 has the highest score throughout
        ("clock", "...x.x..x"),  # 1 is marked and spared
        ("belady", "...x.xx.x"),  # 4 replaces 3, which never comes again
    ],
)
def test_a_row_by_hand(policy, hits):
    got = simulate(one_layer(ROW), policy, 3).hits
    assert "".join("x" if hit else "." for hit in got) == hits


def test_lru_by_hand():
    lru = LruSlots(3)
    assert lru.assign([5, 6, 7]) == ([0, 1, 2], [5, 6, 7])
    assert lru.assign([5]) == ([0], [])
    assert lru.assign([8]) == ([1], [8])  # 6 was used longest ago
    assert lru.assign([6, 5]) == ([2, 0], [6])  # 7 goes; 5 is needed now, so it stays


def test_fifo_spares_what_the_request_needs():
    fifo = FifoSlots(2)
    fifo.assign([1, 2])
    assert fifo.assign([1, 3]) == ([0, 1], [3])  # 1 is oldest, but needed: 2 goes
    assert fifo.assign([4]) == ([0], [4])


def test_clock_gives_a_second_chance():
    clock = ClockSlots(3)
    clock.assign([1, 2, 3])
    clock.assign([1])
    assert clock.assign([4]) == ([1], [4])  # 1 loses its mark, 2 goes
    assert clock.assign([5]) == ([2], [5])  # the hand stood at 3
    assert clock.assign([6]) == ([0], [6])  # 1 has no mark any more


def test_lfu_forgets_slowly():
    lfu = LfuSlots(2, half_life=2)
    lfu.assign([1])
    lfu.assign([1])  # score 2; from now on a use counts 2
    lfu.assign([2])
    assert lfu.assign([3])[1] == [3]  # 1 and 2 are equal; 1 was used longer ago
    assert set(lfu.slots) == {2, 3}
    assert lfu.score == {1: 2, 2: 2, 3: 2}
    assert lfu.worth == 4


def test_pinned_experts_stay_and_are_never_missing():
    lru = LruSlots(4, pinned=[7, 8])
    assert lru.assign([7, 1, 2]) == ([3, 0, 1], [1, 2])
    assert lru.assign([3, 8, 7]) == ([0, 2, 3], [3])  # 1 goes
    assert lru.prefetch([7, 4]) == ([4], [1])  # 2 goes


def test_a_prefetch_is_no_use_and_keeps_what_it_is_told():
    lru = LruSlots(3)
    lru.assign([1, 2, 3])
    assert lru.prefetch([1]) == ([], [])
    assert lru.prefetch([4], keep=[1]) == ([4], [1])  # 2 goes, the oldest is kept
    assert lru.assign([5]) == ([0], [5])  # the prefetch was no use of 1


def test_forgotten_slots_are_free():
    for policy in ("lru", "lfu", "fifo", "clock"):
        slots = make_slots(policy, 2)
        slots.assign([1, 2])
        slots.forget([1, 9])
        assert slots.assign([3]) == ([0], [3])
        assert slots.assign([2]) == ([1], [])


def test_pages_by_hand():
    cache = PageCache(4)
    assert cache.read([0, 1]) == 2
    assert cache.read([1, 2]) == 1  # page 1 holds the end of one, the start of another
    assert cache.read([5, 6]) == 2  # one place was free, the other was page 0's
    assert cache.read([1]) == 0
    assert cache.read([0]) == 1


def test_static_pinning_by_hand():
    requests = one_layer([[1], [2], [1], [3], [1], [2], [2], [1]])
    got = simulate(requests, "static", 2).hits  # 1 is pinned, one slot passes the rest
    assert got.tolist() == [True, False, True, False, True, False, True, True]
    counts = np.array([[0, 3, 1], [3, 2, 2]])
    np.testing.assert_array_equal(
        most_frequent(counts, 1), [[False, True, False], [True, False, False]]
    )
    np.testing.assert_array_equal(
        most_frequent(counts, 3, shared=True), [[False, True, False], [True, True, 0]]
    )


# --- traces as requests ---------------------------------------------------------------


def test_requests_of_a_decode_and_of_a_prompt():
    picks = np.array([[[3, 1], [0, 2]], [[1, 2], [2, 0]]])  # (T, L, K)
    decode = decode_requests(picks, 4)
    assert decode.layers.tolist() == [0, 1, 0, 1]
    assert decode.experts.tolist() == [3, 1, 0, 2, 1, 2, 2, 0]
    assert decode.keys.tolist() == [3, 1, 4, 6, 1, 2, 6, 4]
    assert decode.counts().tolist() == [[0, 2, 1, 1], [2, 0, 2, 0]]
    prompt = prompt_requests(picks, 4, chunk=2, capacity=2)
    assert prompt.layers.tolist() == [0, 0, 1]
    assert prompt.experts.tolist() == [1, 2, 3, 0, 2]
    assert prompt.starts.tolist() == [0, 2, 3, 5]
    both = join(prompt, decode)
    assert both.starts.tolist() == [0, 2, 3, 5, 7, 9, 11, 13]
    rows = np.indices((2, 2, 2)).reshape(3, -1)
    table = access_requests(rows[0], rows[1], picks.ravel(), 4)
    for name in ("layers", "starts", "experts", "ahead"):
        np.testing.assert_array_equal(getattr(table, name), getattr(decode, name))


def test_predictions_come_before_the_request_they_are_for():
    picks = np.array([[[3, 1], [0, 2]]])
    predicted = np.array([[[-1, -1], [2, -1]]])
    requests = decode_requests(picks, 4, predicted)
    assert requests.layers.tolist() == [0, 1, 1]
    assert requests.ahead.tolist() == [False, True, False]
    assert requests.experts.tolist() == [3, 1, 2, 0, 2]
    got = simulate(requests, "lru", 2)
    assert got.hits.tolist() == [False, False, False, True]
    assert (got.prefetched, got.prefetch_hits, got.misses) == (1, 1, 3)


@pytest.mark.parametrize("group", [[1, 1], [10], [-1]])
def test_impossible_requests_are_refused(group):
    with pytest.raises(ValueError, match=r"twice|0\.\.9"):
        one_layer([[0, 1], group])


def test_what_cannot_be_simulated_is_refused():
    requests = one_layer([[1, 2, 3]])
    with pytest.raises(ValueError, match="2 slots"):
        simulate(requests, "lru", 2)
    with pytest.raises(ValueError, match="mru"):
        simulate(requests, "mru", 3)
    with pytest.raises(ValueError, match="n_pages=0"):
        simulate_pages(requests, np.zeros((10, 1, 2), int), 0)


def test_no_requests_no_hits():
    for policy in ALL:
        got = simulate(one_layer([]), policy, 3)
        assert got.hit_rate == 1
        assert got.misses == 0


# --- compiled against the classes -----------------------------------------------------


@st.composite
def runs(draw, with_prefetch=True):
    """Requests of some layers, slots that hold them, and pinned experts."""
    n_experts, n_layers = draw(st.integers(2, 9)), draw(st.integers(1, 3))
    expert = st.integers(0, n_experts - 1)
    group = st.sets(expert, min_size=1, max_size=3).map(sorted)
    request = st.tuples(
        st.integers(0, n_layers - 1),
        group.flatmap(st.permutations),
        st.booleans() if with_prefetch else st.just(False),
    )
    rows = draw(st.lists(request, min_size=1, max_size=60))
    layers, groups, ahead = zip(*rows, strict=True)
    starts = np.cumsum([0, *(len(group) for group in groups)])
    requests = Requests(
        np.array(layers), starts, np.concatenate(groups), np.array(ahead), n_experts
    )
    pins = draw(st.sets(st.integers(0, n_layers * n_experts - 1), max_size=4))
    pinned = np.zeros((n_layers, n_experts), bool)
    pinned.ravel()[list(pins)] = True
    return requests, pinned, draw(st.integers(6, 12)) + len(pins)


@settings(max_examples=150, deadline=None)
@given(
    run=runs(),
    policy=st.sampled_from(["lru", "lfu", "fifo", "clock"]),
    shared=st.booleans(),
    life=st.integers(1, 5),
)
def test_the_simulator_follows_the_classes(run, policy, shared, life):
    requests, pinned, n_slots = run
    options = {"shared": shared, "pinned": pinned, "half_life": life}
    fast = simulate(requests, policy, n_slots, **options)
    plain = simulate(requests, policy, n_slots, **options, compiled=False)
    np.testing.assert_array_equal(fast.codes, plain.codes)


@settings(max_examples=50, deadline=None)
@given(run=runs(with_prefetch=False), shared=st.booleans(), less=st.integers(0, 3))
def test_the_compiled_optimum_follows_its_class(run, shared, less):
    requests, pinned, n_slots = run
    options = {"shared": shared, "pinned": pinned}
    fast = simulate(requests, "belady", n_slots - less, **options)
    plain = simulate(requests, "belady", n_slots - less, **options, compiled=False)
    np.testing.assert_array_equal(fast.codes, plain.codes)


@each_policy
@pytest.mark.parametrize("shared", [False, True])
def test_long_traces_agree_too(policy, shared):
    """Long enough for old entries to be cleared away and for many doublings."""
    requests = decode_requests(local_picks(700), 32)
    fast = simulate(requests, policy, 12, shared, half_life=1)
    plain = simulate(requests, policy, 12, shared, half_life=1, compiled=False)
    np.testing.assert_array_equal(fast.codes, plain.codes)


@settings(max_examples=50, deadline=None)
@given(run=runs(), n_pages=st.integers(1, 40), size=st.integers(1, 9000))
def test_compiled_pages_follow_their_class(run, n_pages, size):
    requests = run[0]
    n_keys = requests.keys.max() + 1
    first = np.arange(n_keys) * size // 4096
    last = (np.arange(n_keys) * size + size - 1) // 4096
    spans = np.stack([first, last], axis=1)[:, None]
    fast = simulate_pages(requests, spans, n_pages)
    plain = simulate_pages(requests, spans, n_pages, compiled=False)
    np.testing.assert_array_equal(fast, plain)


def test_a_record_can_be_partly_in_the_page_cache():
    requests = one_layer([[0], [1], [0]])
    spans = np.array([[[0, 6]], [[6, 9]]])  # page 6 is shared
    assert simulate_pages(requests, spans, 10).tolist() == [7, 3, 0]
    # With 8 pages, 8 and 9 push out 0 and 1, which then push out 2 and 3, and so on:
    # only page 6, used twice, is still there.
    assert simulate_pages(requests, spans, 8).tolist() == [7, 3, 6]


# --- what must hold for every policy --------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(run=runs(with_prefetch=False), shared=st.booleans())
def test_belady_is_never_beaten(run, shared):
    requests, pinned, n_slots = run
    n_slots = max(3, n_slots - 6 - int(pinned.sum()))
    best = simulate(requests, "belady", n_slots, shared).misses
    for policy in ("lru", "lfu", "fifo", "clock"):
        assert simulate(requests, policy, n_slots, shared).misses >= best
    static = simulate(requests, "static", n_slots, shared)
    counts, largest = requests.counts(), int(np.diff(requests.starts).max())
    pins = most_frequent(counts, n_slots - largest, shared)
    n_read_before = int(np.sum(pins & (counts > 0)))
    assert static.misses + n_read_before >= best


def _least_misses(groups, n_slots):
    """By every choice of what stays: all contents that can be, step by step."""
    from itertools import combinations

    states = {frozenset(): 0}
    for group in map(frozenset, groups):
        after = {}
        for held, misses in states.items():
            others, room = held - group, n_slots - len(group)
            for kept in combinations(sorted(others), min(room, len(others))):
                new = group | set(kept)
                cost = misses + len(group - held)
                after[new] = min(after.get(new, cost), cost)
        states = after
    return min(states.values())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sets(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=9
    ),
    st.integers(3, 5),
)
def test_belady_is_the_least_of_all_choices(groups, n_slots):
    requests = one_layer([sorted(group) for group in groups])
    assert simulate(requests, "belady", n_slots).misses == _least_misses(
        groups, n_slots
    )


@each_policy
def test_enough_slots_read_each_expert_once(policy):
    requests = decode_requests(local_picks(), 32)
    n_distinct = len(np.unique(requests.keys))
    misses = simulate(requests, policy, 32, pinned=None).misses
    assert misses <= n_distinct
    if policy != "static":
        assert misses == n_distinct


@each_policy
def test_a_cache_finds_what_is_local(policy):
    """Skewed, local picks: every policy beats what chance would give."""
    requests = decode_requests(local_picks(2000), 32)
    assert simulate(requests, policy, 12).hit_rate > 12 / 32 + 0.1


def test_lru_by_stack_distances():
    """LRU of n slots hits where fewer than n others came since: another algorithm."""
    picks = local_picks(150, n_layers=1)
    requests = decode_requests(picks, 32)
    for n_slots in (4, 7, 20):
        order, hits = [], []
        for token in picks[:, 0].tolist():
            hits += [e in order[:n_slots] for e in token]
            inside = [e for e in token if e in order[:n_slots]]
            others = [e for e in token if e not in inside]
            recent = [*others[::-1], *inside[::-1]]
            order = recent + [e for e in order if e not in recent]
        assert simulate(requests, "lru", n_slots).hits.tolist() == hits


def test_a_million_accesses_a_second():
    picks = local_picks(4000, n_layers=8, n_experts=128, k=10)
    requests = decode_requests(picks, 128)
    for policy, shared in [(p, s) for p in ALL for s in (False, True)]:
        n_slots = 256 if shared else 32
        simulate(requests, policy, n_slots, shared)  # compiled by now
        seconds = []
        for _ in range(3):
            start = time.process_time()  # other processes do not count
            simulate(requests, policy, n_slots, shared)
            seconds.append(time.process_time() - start)
        rate = len(requests.experts) / min(seconds)
        assert rate > 1e6, f"{policy}, shared={shared}: {rate / 1e6:.2f} M a second"
