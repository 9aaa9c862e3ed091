"""The MLX engine on a GPU: the gate, against mlx-lm, and speed against slots.

Everything with the reduced model, out of a warm page cache. All feed the same tokens;
one round runs every contender once; medians over rounds. With a file's name as argument
the table is saved as CSV. The full shape is `flashmoe rehearse`.
"""

import csv
import statistics
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from flashmoe_ref import load
from flashmoe_ref.engine import Model
from flashmoe_ref.pack import pack

from .bench_engines import N_DECODE, N_PREFILL, REDUCED, MlxLm, Ours

ROUNDS = 5
SLOTS = (None, 16, 32, 64, 96, 128)
TEXT = "Once upon a time there was a little fox who lived in a deep forest. "


def tokens_of(model: Model) -> list[int]:
    """A story, repeated until it is long enough."""
    ids = model.tokenizer.encode(TEXT * 100)
    return ids[: N_PREFILL + N_DECODE]


def gate(folder: Path, ids: list[int]) -> None:
    """Streamed against resident: largest difference of logits, and greedy tokens."""
    with load(folder, engine="mlx", experts="resident") as model:
        wanted, wanted_text = model.logits(ids[:96]), greedy(model, ids[:16])
    with load(folder, engine="numpy") as model:
        exact = model.logits(ids[:96])
    spread = float(np.abs(wanted - exact).max())
    agree = np.mean(wanted.argmax(-1) == exact.argmax(-1))
    print(f"resident against numpy in float32: {spread:.3f}, same best {agree:.0%}")
    for slots in SLOTS[:-1]:
        for source in ("packed", "stream"):
            options = {"experts": source, "slots": slots, "threads": 4}
            with load(folder, engine="mlx", **options) as model:
                model.store.inline_bytes = 0  # threads read, and copy to the GPU
                got, text = model.logits(ids[:96]), greedy(model, ids[:16])
            differs = float(np.abs(got - wanted).max())
            print(
                f"{source}, {slots or 'K shared'} slots, against resident: prompt "
                f"differs by {differs:.3g}; 64 decoded tokens equal: "
                f"{text == wanted_text}"
            )


def greedy(model: Model, ids: list[int]) -> list[int]:
    """64 tokens, fed one at a time so that only decoding is compared."""
    state, found = model.new_state(), []
    for token in ids:
        logits = model.decode(token, state)
    for _ in range(64):
        found.append(int(np.argmax(logits)))
        logits = model.decode(found[-1], state)
    return found


def measure(folder: Path, ids: list[int]) -> list[dict]:
    """Rounds over mlx-lm, our engine resident, and packed with more and more slots."""
    cases: dict[str, Ours | MlxLm] = {"mlx-lm": MlxLm(folder)}
    cases["resident"] = Ours(folder, engine="mlx", experts="resident")
    for slots in SLOTS:
        name = f"packed, {slots or 'K shared'} slots"
        cases[name] = Ours(folder, engine="mlx", experts="packed", slots=slots)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for number in range(ROUNDS + 1):
        for name, case in cases.items():
            seconds = case.run(ids)
            times[name] += [seconds] if number else []
    rows = []
    for name, pairs in times.items():
        prefill, decode = (statistics.median(c) for c in zip(*pairs, strict=True))
        rows.append({"what": name, "prefill_tok_s": round(1 / prefill, 1)})
        rows[-1]["decode_tok_s"] = round(1 / decode, 1)
        ratio = statistics.median(
            theirs[1] / ours[1]
            for theirs, ours in zip(times["mlx-lm"], pairs, strict=True)
        )
        rows[-1]["decode_against_mlx_lm"] = round(ratio, 3)
        explained = case.explain() if isinstance(case := cases[name], Ours) else ""
        print(rows[-1], explained)
    return rows


def main(table: str | None = None) -> None:
    """Gate and table, which is also written to a file of that name."""
    if mx.default_device() != mx.Device(mx.gpu):
        print("skipped: MLX has no GPU here")
        return
    about = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
    print(about.get("device_name"), "mlx", mx.__version__)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "reduced"
        folder.mkdir()
        for file in REDUCED.iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file)
        pack(folder, progress=False)
        with load(folder, engine="numpy") as model:
            ids = tokens_of(model)
        gate(folder, ids)
        rows = measure(folder, ids)
    if table:
        with open(table, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:2])
