"""The MLX engine on a GPU: the gate, against mlx-lm, and speed against slots.

Everything with the reduced model, out of a warm page cache. All feed the same tokens,
one at a time; one round runs every contender once; medians over rounds. With a file's
name as argument the table is saved as CSV. The full shape: bench_gpu_rehearsal.py.
"""

import csv
import datetime
import statistics
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from flashmoe_ref import load
from flashmoe_ref.engine import Model
from flashmoe_ref.pack import pack

from .bench_engines import REDUCED, MlxLm, Ours

N_PROMPT, N_DECODE, ROUNDS = 8, 88, 5
SLOTS = (None, 32, 64, 128)
TEXT = "Once upon a time there was a little fox who lived in a deep forest. "


class OursByToken(Ours):
    """One of our engines, decoding."""

    def decode(self, ids: list[int]) -> float:
        """Seconds a token, after the first N_PROMPT."""
        state = self.model.new_state()
        for token in ids[:N_PROMPT]:
            self.model.decode(token, state)
        self.model.reset_report()
        for token in ids[N_PROMPT:]:
            self.model.decode(token, state)
        return 1 / self.model.report().decode_tok_s


class MlxLmByToken(MlxLm):
    """mlx-lm, decoding; it waits for each token's logits, as ours do."""

    def decode(self, ids: list[int]) -> float:
        """As `OursByToken.decode`."""
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.model)
        for number, token in enumerate(ids):
            if number == N_PROMPT:
                start = time.perf_counter()
            mx.eval(self.model(mx.array([[token]]), cache=cache))
        return (time.perf_counter() - start) / (len(ids) - N_PROMPT)


def tokens_of(model: Model) -> list[int]:
    """A story, repeated until it is long enough."""
    ids = model.tokenizer.encode(TEXT * 100)
    return ids[: N_PROMPT + N_DECODE]


def gate(folder: Path, ids: list[int]) -> None:
    """Streamed against resident: largest difference of logits, and greedy tokens."""
    with load(folder, engine="mlx", experts="resident") as model:
        wanted, wanted_text = model.logits(ids), greedy(model, ids[:16])
    with load(folder, engine="numpy", compiled=False) as model:
        exact = model.logits(ids)
    spread = float(np.abs(wanted - exact).max())
    agree = np.mean(wanted.argmax(-1) == exact.argmax(-1))
    print(f"resident against numpy in float32: {spread:.3f}, same best {agree:.0%}")
    for slots in SLOTS[:-1]:
        for source in ("packed", "stream"):
            options = {"experts": source, "slots": slots, "threads": 4}
            with load(folder, engine="mlx", **options) as model:
                model.store.inline_bytes = 0  # threads read, and copy to the GPU
                got, text = model.logits(ids), greedy(model, ids[:16])
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
    cases: dict[str, OursByToken | MlxLmByToken] = {"mlx-lm": MlxLmByToken(folder)}
    cases["resident"] = OursByToken(folder, engine="mlx", experts="resident")
    for slots in SLOTS:
        name = f"packed, {slots or 'K shared'} slots"
        cases[name] = OursByToken(folder, engine="mlx", experts="packed", slots=slots)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(ROUNDS + 1):
        for name, case in cases.items():
            seconds = case.decode(ids)
            times[name] += [seconds] if number else []  # the first one warms up
    rows = []
    for name, own in times.items():
        rows.append({"gpu": mx.device_info()["device_name"], "what": name})
        rows[-1]["decode_tok_s"] = round(1 / statistics.median(own), 1)
        ratio = statistics.median(
            theirs / ours for theirs, ours in zip(times["mlx-lm"], own, strict=True)
        )
        rows[-1]["decode_against_mlx_lm"] = round(ratio, 3)
        rows[-1] |= {"mlx": mx.__version__, "date": f"{datetime.date.today()}"}
        print(rows[-1], flush=True)
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
        with load(folder, engine="numpy", compiled=False) as model:
            ids = tokens_of(model)
        rows = measure(folder, ids)
        if table:
            with open(table, "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        gate(folder, ids)


if __name__ == "__main__":
    main(*sys.argv[1:2])
