"""Inputs that Hypothesis builds from nothing, against the library or a plain model."""

import csv
import io
import json
import struct
from pathlib import Path

import pytest
from fuzz import bounded_memory, bounded_time, check_message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tally import count
from test_fuzz_headers import check_like_the_library
from test_fuzz_tables import check_trace
from test_fuzz_text import TOOLS, check_calls

from flashmoe_ref.errors import FlashMoeError
from flashmoe_ref.headers import DTYPES
from flashmoe_ref.trace_exchange import read_csv

SIZES = st.one_of(
    st.integers(0, 4), st.sampled_from((2**31, 2**61, 2**62, 2**63, 2**64, -1))
)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Tensors that lie end to end, mostly; sometimes with a size of their own."""
    header: dict = {}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(), st.text(), max_size=2))
    at = 0
    for name in draw(st.lists(st.text(max_size=3), max_size=4)):
        dtype = draw(st.sampled_from([*DTYPES]))
        shape = draw(st.lists(st.integers(0, 3) if draw(st.booleans()) else SIZES))
        n_bytes = DTYPES[dtype].itemsize
        for n in shape:
            n_bytes *= n
        gap = draw(st.sampled_from((0,) * 9 + (1, -1)))
        offsets = [at + gap, at + gap + n_bytes]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        at = max(0, min(offsets[1], 10_000))
    text = json.dumps(header, ensure_ascii=draw(st.booleans()))
    data = text.encode("utf-8", "surrogatepass")
    n_more = draw(st.sampled_from((0,) * 9 + (1, -1, 8)))
    return struct.pack("<Q", len(data)) + data + b"\1" * max(0, at + n_more)


TAGS = ("<tool_call>", "</tool_call>", "<function=", ">", "</function>", "</parameter>")
TAGS += (
    "<parameter=",
    "city",
    "days",
    "list",
    "look",
    "\n",
    " ",
    "[1, 2]",
    "3",
    "null",
)
CALLS = st.lists(st.one_of(st.sampled_from(TAGS), st.text(max_size=4)), max_size=40)

ROWS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 3)), max_size=12
)


def tables() -> st.SearchStrategy[bytes]:
    """Picks of few tokens, layers and experts, so that some tables are whole."""

    def whole(order: list[int]) -> list[tuple[int, int, int]]:
        pairs = ((token, layer) for token in (0, 1) for layer in (0, 1))
        return [(t, n, order[(t + n) % 3 + i]) for t, n in pairs for i in (0, 1)]

    def written(head: str, rows: list[tuple[int, int, int]]) -> bytes:
        return (head + "".join(f"{t},{n},{e}\n" for t, n, e in rows)).encode()

    heads = st.sampled_from(("", "token,layer,expert\n", "Layer , token,expert,x\n"))
    return st.builds(
        written, heads, st.one_of(ROWS, st.permutations(range(4)).map(whole))
    )


def check_picks(folder: Path, data: bytes) -> None:
    """The picks are those of the rows, in the order of tokens, layers and rows."""
    path = folder / "t.csv"
    path.write_bytes(data)
    trace = read_csv(path)
    check_trace(trace)
    rows = [*csv.reader(io.StringIO(data.decode()))]
    names = [name.strip().lower() for name in rows[0]]
    order = (0, 1, 2)
    if "token" in names:
        order = tuple(names.index(name) for name in ("token", "layer", "expert"))
        rows = rows[1:]
    picks = sorted(([int(row[i]) for i in order] for row in rows), key=lambda p: p[:2])
    assert trace.picks.ravel().tolist() == [pick[2] for pick in picks]


N = 250  # of each kind; Hypothesis may repeat some
GENERATED = {
    "safetensors file (generated)": (headers(), check_like_the_library),
    "routing table (generated)": (tables(), check_picks),
    "tool calls (generated)": (
        CALLS.map("".join),
        lambda _, text: check_calls(text, TOOLS),
    ),
}


@pytest.mark.parametrize("kind", GENERATED)
def test_generated(tmp_path: Path, kind: str) -> None:
    strategy, check = GENERATED[kind]
    seen, outcomes = set(), {True: 0, False: 0}

    @settings(
        max_examples=N,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(strategy)
    def each(made: bytes | str) -> None:
        seen.add(made)
        is_read = True
        with bounded_time():
            try:
                check(tmp_path, made)
            except FlashMoeError as error:
                check_message(str(error))
                is_read = False
        outcomes[is_read] += 1

    with bounded_memory():
        each()
    assert len(seen) >= N / 2 and outcomes[True] > N / 20
    count(f"inputs: {kind}", len(seen))
