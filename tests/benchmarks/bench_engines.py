"""Decode and prefill of the reduced model: our engines against mlx-lm, in one run.

All feed the same tokens (a story that the model wrote), so all route alike. One
round runs every contender once; medians over rounds. All is in a warm page cache.
"""

import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from flashmoe_ref import load
from flashmoe_ref.engine import Model
from flashmoe_ref.generation import generate_ids
from flashmoe_ref.pack import pack

REDUCED = Path(__file__).parents[2] / "data" / "reduced"
PROMPT = "Once upon a time there was a little fox who lived in a deep forest."
N_PREFILL, N_DECODE, ROUNDS = 512, 96, 5


def story(model: Model) -> list[int]:
    """As many tokens as a run needs, the model's own words."""
    ids = model.tokenizer.encode(PROMPT)
    wanted = N_PREFILL + N_DECODE - len(ids)
    sampling = {"temperature": 1.0, "seed": 1}
    model.tokenizer.stop_ids = frozenset()
    return ids + list(generate_ids(model, ids, wanted, **sampling))


class Ours:
    """One of our engines with its options; times a prefill and a decode."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.model = load(folder, **options)

    def run(self, ids: list[int]) -> tuple[float, float]:
        """Seconds a token: of the prompt, and of each token after it."""
        state = self.model.new_state()
        self.model.reset_report()
        self.model.prefill(ids[:N_PREFILL], state)
        prefill = self.model.report()
        self.model.reset_report()
        for token in ids[N_PREFILL:]:
            self.model.decode(token, state)
        decode = self.model.report()
        return 1 / prefill.prefill_tok_s, 1 / decode.decode_tok_s

    def explain(self) -> str:
        """Reads and microseconds of the last run's decode."""
        counters = self.model.store.counters
        if not counters.reads:
            return "no reads"
        return (
            f"{counters.reads / N_DECODE:.0f} reads a token, "
            f"{counters.read_s / counters.reads * 1e6:.0f} us each, "
            f"{counters.wait_s / N_DECODE * 1e6:.0f} us a token waiting"
        )


class MlxLm:
    """mlx-lm with everything resident, in float32, its faster type on a CPU."""

    def __init__(self, folder: Path) -> None:
        from mlx_lm.utils import load_model

        self.model, _ = load_model(folder)
        if mx.default_device() == mx.Device(mx.cpu):
            self.model.set_dtype(mx.float32)

    def run(self, ids: list[int]) -> tuple[float, float]:
        """As `Ours.run`."""
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self.model)
        start = time.perf_counter()
        mx.eval(self.model(mx.array([ids[:N_PREFILL]]), cache=cache)[:, -1])
        middle = time.perf_counter()
        for token in ids[N_PREFILL:]:
            mx.eval(self.model(mx.array([[token]]), cache=cache))
        end = time.perf_counter()
        return (middle - start) / N_PREFILL, (end - middle) / N_DECODE


def contenders(folder: Path, n_experts: int) -> dict[str, Ours | MlxLm]:
    """All that is compared; numpy is compiled."""
    half = n_experts // 2
    cases: dict[str, Ours | MlxLm] = {"mlx-lm": MlxLm(folder)}
    for engine in ("numpy", "mlx"):
        cases[f"{engine} resident"] = Ours(folder, engine=engine, experts="resident")
        for name, source in (("packed", "packed"), ("in place", "stream")):
            for slots in (half, None):
                label = f"{engine} {name}, {slots or 'K shared'} slots"
                cases[label] = Ours(folder, engine=engine, experts=source, slots=slots)
    return cases


def main() -> None:
    """Print the table of rates and the ratios that have bars."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "reduced"
        folder.mkdir()
        for file in REDUCED.iterdir():  # packed files must not land in the repository
            if file.is_file():
                (folder / file.name).symlink_to(file)
        pack(folder, progress=False)
        measure(folder)


def measure(folder: Path) -> None:
    """Rounds over all contenders."""
    with load(folder, engine="numpy") as model:
        ids, n_experts = story(model), model.config.num_experts
    cases = contenders(folder, n_experts)
    times: dict[str, list] = {name: [] for name in cases}
    for round_ in range(ROUNDS + 1):
        for name, case in cases.items():
            seconds = case.run(ids)
            if round_:  # the first one warms up
                times[name].append(seconds)
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in times.items()
    }
    for name, (prefill, decode) in medians.items():
        how = cases[name].explain() if isinstance(cases[name], Ours) else ""
        print(
            f"{name:28} decode {1 / decode:6.0f} tok/s   prefill {1 / prefill:6.0f} "
            f"tok/s   {how}"
        )
    print_ratios(medians, n_experts // 2)


def print_ratios(medians: dict[str, list[float]], half: int) -> None:
    """The ratios that have bars."""
    decode = {name: pair[1] for name, pair in medians.items()}
    for engine, bar in (("numpy", 5.0), ("mlx", 0.95)):
        ours = f"{engine} packed, {half} slots"
        ratio = decode["mlx-lm"] / decode[ours]
        print(f"{ours} against mlx-lm, decode: {ratio:.2f}   (bar: {bar})")
    for engine in ("numpy", "mlx"):
        for name in decode:
            if name.startswith(f"{engine} ") and "resident" not in name:
                ratio = decode[f"{engine} resident"] / decode[name]
                bar = (
                    "   (bar: 0.8)" if name == f"{engine} packed, {half} slots" else ""
                )
                print(f"{name} against resident, decode: {ratio:.2f}{bar}")
    for engine in ("numpy", "mlx"):
        prefill, step = medians[f"{engine} resident"]
        ratio = step / prefill
        print(
            f"{engine} resident: prefill of {N_PREFILL} against decode, a token: "
            f"{ratio:.1f} times faster   (bar: 4)"
        )
