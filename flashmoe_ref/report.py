"""What a run cost: speed, reads, hits, waiting and memory, always with its mode.

A figure without its mode (engine, source, K, slots) says nothing, so a report always
carries both. **But:** totals only; `trace.py` records single events.
*Taught in notebooks/00.*
"""

import resource
import sys
from dataclasses import dataclass

from .streaming import Counters


@dataclass
class Meter:
    """Counts tokens and seconds while a model runs."""

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    generated_tokens: int = 0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Report:
    """One run, summed up. Seconds, bytes (GB = 1e9) and tokens per second."""

    mode: dict[str, object]  # engine, experts, k, trained_k, bits, slots, threads
    prompt_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    hits: int  # experts found in a slot
    misses: int  # experts read because they were needed
    prefetched: int  # experts read ahead
    prefetch_hits: int  # of those, used before they were evicted
    routed: int  # tokens times layers whose routing was cut: see routing_cut.py
    picked: int  # experts that these kept
    reads: int
    bytes_read: int
    read_s: float  # spent in reads, all threads together
    wait_s: float  # the computing thread stood still for reads
    peak_memory_bytes: int  # of the whole process, Python included
    model_bytes: int  # the model's tensors on disk
    resident_bytes: int  # dense weights and slots

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens a second; 0 if nothing ran."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Decoded tokens a second; 0 if nothing ran."""
        return self.generated_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes read per token, prompt and generated together."""
        n_tokens = self.prompt_tokens + self.generated_tokens
        return self.bytes_read / n_tokens if n_tokens else 0.0

    @property
    def mean_k(self) -> float:
        """Experts that a token used in a layer, on average."""
        return self.picked / self.routed if self.routed else float(self.mode["k"])

    @property
    def hit_rate(self) -> float:
        """Share of requested experts that were in a slot; 1 if none was requested."""
        n = self.hits + self.misses
        return self.hits / n if n else 1.0

    @property
    def compute_s(self) -> float:
        """Everything but waiting for reads."""
        return self.prefill_s + self.decode_s - self.wait_s

    def __str__(self) -> str:
        total_s = self.prefill_s + self.decode_s
        share = self.wait_s / total_s if total_s else 0.0
        lines = {
            "mode": ", ".join(f"{key} {value}" for key, value in self.mode.items()),
            "prefill": f"{self.prompt_tokens} tokens, {self.prefill_tok_s:.1f} tok/s",
            "decode": f"{self.generated_tokens} tokens, {self.decode_tok_s:.1f} tok/s",
            "experts": f"{self.misses} read, {self.hits} found in a slot "
            f"(hit rate {self.hit_rate:.0%})",
            "kept": f"{self.mean_k:.2f} experts a token and layer on average",
            "ahead": f"{self.prefetched} read, {self.prefetch_hits} of them used",
            "read": f"{self.bytes_read / 1e6:.1f} MB in {self.reads} reads, "
            f"{self.bytes_per_token / 1e6:.3f} MB a token",
            "time": f"{self.compute_s:.2f} s computing, {self.wait_s:.2f} s waiting "
            f"for reads ({share:.0%}), {self.read_s:.2f} s inside reads",
            "memory": f"{self.resident_bytes / 1e6:.1f} MB of weights and slots for a "
            f"model of {self.model_bytes / 1e6:.1f} MB; process peak "
            f"{self.peak_memory_bytes / 1e6:.0f} MB",
        }
        if "mass" not in self.mode:
            del lines["kept"]
        if not self.prefetched:
            del lines["ahead"]
        return "\n".join(f"{name:8}{text}" for name, text in lines.items())


def make_report(
    mode: dict[str, object],
    meter: Meter,
    counters: Counters,
    model_bytes: int,
    resident_bytes: int,
) -> Report:
    """Freeze what meter and counters hold now."""
    return Report(
        mode=dict(mode),
        **vars(meter),
        **vars(counters),
        peak_memory_bytes=peak_memory_bytes(),
        model_bytes=model_bytes,
        resident_bytes=resident_bytes,
    )


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
