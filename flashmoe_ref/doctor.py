"""Will it run here, how fast, and what would help: `flashmoe doctor`.

Puts the cost model on one model and one machine, checks that files and weights fit, and
recommends settings: the least that is lost for a speed at which one can read along.
**But:** what a setting costs in quality was measured on the reduced model, not on this
one; rates that nobody probed are those that others published.
*Taught in notebooks/12 and 13.*
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .accounting import count_parameters
from .errors import ConfigError
from .info import ModelFacts, in_bytes
from .machines import GB, MEMORY_GB, Machine
from .planner import (
    CONTEXT,
    FITTED,
    PREFILL_FACTOR,
    USABLE,
    Coefficients,
    Prediction,
    Sizes,
    predict,
    prompt_seconds,
    run_of,
    sizes_of,
    split_memory,
)
from .quality import SWEEP, cost_in_quality, read_sweep
from .quantize import BITS

READABLE_TOK_S = 3.0  # about as fast as one reads aloud
LEAST_BITS = 4  # below, flash-moe's JSON broke; never recommended, only shown
PROMPT_TOKENS = 512
OVERHEAD_BYTES = 1e9  # Python, buffers, activations
SMALL_S = 0.005  # a token's time below which engines' own work decides
WORTH = 1.1  # a change for less is not recommended
SLOTS_SHARE = 0.9  # of what memory leaves: slots cannot be given back under pressure
SMALL_PIECE_BYTES = 1 << 20  # reads below are slow by their number: pack
FAST_DISK_GB_S = 5.0  # needs more than four reads under way


@dataclass(frozen=True)
class Check:
    """Does something fit?"""

    name: str
    need_gb: float
    have_gb: float
    fits: bool
    note: str


@dataclass(frozen=True)
class Advice:
    """Settings for `flashmoe generate`, and why."""

    k: int
    bits: int
    slots: int | None  # of each layer; None: trust the system's file cache
    source: str  # stream or packed
    threads: int
    why: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """What something else would give."""

    name: str
    tok_s: float
    gain: float  # of speed, as a factor
    quality: str | None  # what it costs, where it was measured; None: nothing known


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `flashmoe doctor` says."""

    model: str
    machine: Machine
    checks: tuple[Check, ...]
    advice: Advice
    prediction: Prediction
    prompt_s: tuple[float, float, float]  # likely, shortest, longest
    changes: tuple[Change, ...]  # by gain, largest first
    notes: tuple[str, ...]

    @property
    def runs(self) -> bool:
        """Whether all of it fits."""
        return all(check.fits for check in self.checks)

    def as_dict(self) -> dict:
        """For JSON."""
        derived = {"runs": self.runs, "dominates": self.prediction.dominates}
        return asdict(self) | derived


SizesFor = Callable[[int, int], Sizes]  # of k and bits


def diagnose(
    facts: ModelFacts,
    machine: Machine,
    k: int | None = None,
    bits: int | None = None,
    sweep: Path = SWEEP,
    c: Coefficients = FITTED,
) -> Diagnosis:
    """Look at a model, from its headers, on a machine. k, bits: as wanted, not advised.

    c: of the cost model, for example with the hits of a recorded run.
    Raises: ConfigError for a K or width that does not exist.
    """
    stored = stored_bits(facts)
    if bits is not None and (bits not in (*BITS, 16) or bits > stored):
        raise ConfigError(
            f"bits={bits} cannot be made of the {stored} that are stored; give one of "
            f"{', '.join(str(b) for b in (*BITS, 16) if b <= stored)}"
        )

    def sizes_for(k: int, bits: int) -> Sizes:
        return sizes_of(facts, None if bits == stored else bits).with_k(k)

    advice = recommend(facts, machine, sizes_for, k, bits, c)
    sizes = sizes_for(advice.k, advice.bits)
    run = run_of(sizes, machine, _slots_gb(advice, sizes))
    seconds = prompt_seconds(run, sizes, PROMPT_TOKENS, c)
    prompt_s = (seconds, seconds / PREFILL_FACTOR, seconds * PREFILL_FACTOR)
    return Diagnosis(
        model=facts.name,
        machine=machine,
        checks=(_check_disk(facts, sizes, machine), *_check_memory(sizes, machine)),
        advice=advice,
        prediction=predict(run, c),
        prompt_s=prompt_s,
        changes=_changes(sizes_for, advice, machine, read_sweep(sweep), c),
        notes=tuple(_notes(facts, machine, predict(run, c))),
    )


def stored_bits(facts: ModelFacts) -> int:
    """Bits of the experts as stored; 16 for floats; rounded where they are mixed."""
    per_weight = 8 * facts.expert_bytes / count_parameters(facts.config).per_expert
    return 16 if per_weight > 15 else max(2, math.floor(per_weight))


# --- does it fit? ---------------------------------------------------------------------


def _check_disk(facts: ModelFacts, sizes: Sizes, machine: Machine) -> Check:
    need = (sizes.dense_bytes + sizes.routed_bytes) / GB
    if facts.n_files:
        return Check("disk", need, need, True, "the model is there")
    if (free := machine.disk_free_gb) is None:
        return Check("disk", need, math.nan, True, "room is not known")
    return Check("disk", need, free, need <= free, "free now")


def _check_memory(sizes: Sizes, machine: Machine) -> list[Check]:
    """The least that streaming takes, against what there is, and what is free now."""
    least = sizes.dense_bytes + sizes.state_bytes + OVERHEAD_BYTES
    need = (least + sizes.k * sizes.expert_bytes) / GB
    have = USABLE * machine.memory_gb * MEMORY_GB
    note = f"of {machine.memory_gb:g} GB, {1 - USABLE:.0%} left to the system"
    checks = [Check("memory", need, have, need <= have, note)]
    if machine.gpu_memory_gb is not None:
        own = machine.gpu_memory_gb * MEMORY_GB
        checks.append(Check("GPU memory", need, own, need <= own, "the card's own"))
    if machine.reclaimable_gb is not None:
        now = machine.reclaimable_gb
        note = "free now, or held by caches that give way"
        checks.append(Check("memory now", need, now, need <= now, note))
    return checks


# --- what to do -----------------------------------------------------------------------


def recommend(
    facts: ModelFacts,
    machine: Machine,
    sizes_for: SizesFor,
    k: int | None,
    bits: int | None,
    c: Coefficients = FITTED,
) -> Advice:
    """The first rung of the ladder that is fast enough to read along, else the first.

    Rungs lose more and more: as trained; fewer bits, down to 4; fewer experts.
    """
    rungs = _ladder(facts, k, bits)
    speeds = [predict(run_of(sizes_for(*rung), machine), c).tok_s for rung in rungs]
    fast = [i for i, speed in enumerate(speeds) if speed >= READABLE_TOK_S]
    chosen, why = (fast[0] if fast else 0), []
    if len(rungs) > 1 and not fast:
        why.append(
            f"no K and bits that can be recommended reach {READABLE_TOK_S:g} tok/s "
            f"here, so nothing is cut; the table says what cuts would give"
        )
    elif chosen:
        why.append(
            f"as stored and trained it would reach {speeds[0]:.1f} tok/s; this is the "
            f"least that has to be cut for {READABLE_TOK_S:g}"
        )
    if rungs[chosen][1] < stored_bits(facts):
        tool = "convert" if stored_bits(facts) == 16 else "requantize"
        why.append(f"make the {rungs[chosen][1]} bits with 'flashmoe {tool}'")
    sizes = sizes_for(*rungs[chosen])
    slots, reason = _advise_slots(sizes, machine, c)
    source, packing = _advise_source(facts, sizes, machine)
    threads = 8 if machine.disk_gb_s >= FAST_DISK_GB_S else 4
    return Advice(*rungs[chosen], slots, source, threads, (*why, reason, packing))


def _ladder(
    facts: ModelFacts, k: int | None, bits: int | None
) -> list[tuple[int, int]]:
    trained, stored = facts.config.num_experts_per_tok, stored_bits(facts)
    fewer_bits = [stored] + [LEAST_BITS] * (stored > LEAST_BITS)
    widths = fewer_bits if bits is None else [bits]
    experts = [trained, math.ceil(0.6 * trained), math.ceil(0.4 * trained)]
    counts = experts if k is None else [k]
    rungs = [(counts[0], width) for width in widths]
    return rungs + [(count, widths[-1]) for count in counts[1:]]


def _advise_slots(
    sizes: Sizes, machine: Machine, c: Coefficients
) -> tuple[int | None, str]:
    run = run_of(sizes, machine, slots_gb=math.inf)
    room = SLOTS_SHARE * float(split_memory(run).slots_gb) * GB
    if machine.gpu_memory_gb is not None:
        own = machine.gpu_memory_gb * MEMORY_GB * GB
        room = min(room, own - sizes.dense_bytes - sizes.state_bytes - OVERHEAD_BYTES)
    slots = min(sizes.n_experts, int(room / sizes.n_layers / sizes.expert_bytes))
    if slots < sizes.k:
        return None, f"memory has no room for {sizes.k} slots of each layer"
    gb = slots * sizes.n_layers * sizes.expert_bytes / GB
    with_slots = predict(run_of(sizes, machine, gb), c).tok_s
    gain = with_slots / predict(run_of(sizes, machine), c).tok_s
    if gain < WORTH:
        return None, "slots would save copies only: trust the system's file cache"
    return slots, (
        f"{gb:.3g} GB of slots save copies from the file cache: x {gain:.2f}; try it "
        f"without, too, as flash-moe was faster so on an M3 Max"
    )


def _slots_gb(advice: Advice, sizes: Sizes) -> float:
    return (advice.slots or 0) * sizes.n_layers * sizes.expert_bytes / GB


def _advise_source(
    facts: ModelFacts, sizes: Sizes, machine: Machine
) -> tuple[str, str]:
    piece = sizes.expert_bytes / facts.n_reads
    if piece >= SMALL_PIECE_BYTES:
        return "stream", "pieces of an expert are large: read them in place"
    room = machine.disk_free_gb
    if room is not None and room * GB < sizes.routed_bytes * 1.02:
        return "stream", "packing would help, but the disk has no room for a copy"
    text = f"an expert lies in pieces of {in_bytes(piece)}: pack it into one"
    return "packed", text


# --- what would help ------------------------------------------------------------------


def _changes(
    sizes_for: SizesFor,
    advice: Advice,
    machine: Machine,
    sweep: list[dict[str, str]],
    c: Coefficients,
) -> tuple[Change, ...]:
    sizes = sizes_for(advice.k, advice.bits)
    now = predict(run_of(sizes, machine, _slots_gb(advice, sizes)), c).tok_s
    faster = replace(
        machine,
        memory_gb_s=2 * machine.memory_gb_s,
        matvec_gb_s=machine.matvec_gb_s and 2 * machine.matvec_gb_s,
    )
    disk = replace(machine, disk_gb_s=2 * machine.disk_gb_s)
    tried = [
        ("twice the memory", sizes, replace(machine, memory_gb=2 * machine.memory_gb)),
        ("a disk twice as fast", sizes, disk),
        ("twice the memory bandwidth", sizes, faster),
    ]
    quality: dict[str, str | None] = {}
    for k, bits in _other_settings(advice, sizes.trained_k):
        name = f"K={k}" if k != advice.k else f"{bits} bits"
        tried.append((name, sizes_for(k, bits), machine))
        quality[name] = cost_in_quality(sweep, k, bits, sizes.trained_k)
    changes = []
    for name, other, place in tried:
        slots = 0.0
        if advice.slots is not None:  # in as much memory as they may have there
            found, _ = _advise_slots(other, place, c)
            slots = (found or 0) * other.n_layers * other.expert_bytes / GB
        tok_s = predict(run_of(other, place, slots), c).tok_s
        changes.append(Change(name, tok_s, tok_s / now, quality.get(name)))
    return tuple(sorted(changes, key=lambda change: -change.gain))


def _other_settings(advice: Advice, trained_k: int) -> list[tuple[int, int]]:
    counts = {math.ceil(share * trained_k) for share in (0.6, 0.4)}
    fewer = [(k, advice.bits) for k in sorted(counts, reverse=True) if k < advice.k]
    return fewer + [(advice.k, bits) for bits in (4, 3, 2) if bits < advice.bits]


def _notes(facts: ModelFacts, machine: Machine, found: Prediction) -> list[str]:
    notes = []
    if found.tok_s > 1 / SMALL_S:
        notes.append(
            "a model this small is bound by what an engine does beside reading and "
            "multiplying, which is not in the cost model: it will be slower"
        )
    if not facts.n_files:
        notes.append("sizes follow from the configuration: no files were read")
    if machine.matvec_gb_s is None:
        notes.append(
            "rates are published ones; measure yours: flashmoe probe --json p.json, "
            "then --probe p.json"
        )
    notes.append(
        f"memory counts {CONTEXT} tokens of context; the interval holds four of five "
        f"published runs"
    )
    return notes


# --- for people -----------------------------------------------------------------------


def readable(found: Diagnosis) -> str:
    """The diagnosis as text."""
    p, advice = found.prediction, found.advice
    lines = [f"{found.model} on {_machine_line(found.machine)}", ""]
    lines += [_check_line(check) for check in found.checks]
    verdict = "it fits" if found.runs else "it does not fit: what follows would be so"
    slots = "none (file cache)" if advice.slots is None else f"{advice.slots} a layer"
    lines += [f"  {verdict}", "", "recommended"]
    lines += [
        f"  K {advice.k}, {advice.bits} bits, slots {slots}, experts {advice.source}, "
        f"threads {advice.threads}"
    ]
    lines += [f"  - {reason}" for reason in advice.why]
    seconds, shortest, longest = map(_short, found.prompt_s)
    lines += [
        "",
        "predicted",
        f"  decode   {_short(p.tok_s)} tok/s, likely {_short(p.low)} to "
        f"{_short(p.high)}",
        f"  prefill  {PROMPT_TOKENS} tokens in {seconds} s, between {shortest} and "
        f"{longest} s (not calibrated)",
        f"  {p.hit_rate:.0%} of a token's experts are found in memory",
        "",
        f"where a token's {1e3 / p.tok_s:,.0f} ms go: {p.dominates} first",
    ]
    for name, part in sorted(p.parts_s.items(), key=lambda item: -item[1]):
        if part:
            lines.append(f"  {name:18}{part * 1e3:8.1f} ms  {part * p.tok_s:4.0%}")
    lines += ["", "what would help"]
    for change in found.changes:
        text = f"  {change.name:28}x {change.gain:.2f}   {_short(change.tok_s)} tok/s"
        lines.append(text + (f"   {change.quality}" if change.quality else ""))
    if any(change.quality for change in found.changes):
        lines.append("  (quality: of the reduced model, against all K as trained)")
    return "\n".join([*lines, "", *(f"note: {note}" for note in found.notes)])


def _short(value: float) -> str:
    """Two digits that count, without an exponent: 0.42, 5.3, 170."""
    return f"{float(f'{value:.2g}'):,.10g}"


def _machine_line(machine: Machine) -> str:
    return (
        f"{machine.name}: memory {machine.memory_gb:.3g} GB at "
        f"{machine.memory_gb_s:.3g} GB/s, disk {machine.disk_gb_s:.3g} GB/s"
        f"{'' if machine.disk_is_measured else ' (as quoted)'}, computes on the "
        f"{machine.computes_on}"
    )


def _check_line(check: Check) -> str:
    if math.isnan(check.have_gb):
        return f"  {check.name:12}needs {check.need_gb:8.1f} GB; {check.note}"
    answer = "ok" if check.fits else "NO"
    return (
        f"  {check.name:12}needs {check.need_gb:8.1f} GB, has {check.have_gb:8.1f} GB "
        f"{answer} ({check.note})"
    )
