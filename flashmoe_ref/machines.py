"""Machines to plan for: this one, a probed one, or one that is only typed in.

Memory bandwidths are those of data sheets, disks those that somebody published: each
chip's note says who. Follows Apple's and NVIDIA's specifications.
**But:** a disk differs with its size and age, so `flashmoe probe` beats every entry.
*Taught in notebooks/12.*
"""

import math
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from .config import read_json
from .errors import ConfigError

RECORD_BYTES = 7_077_888  # an expert of the 397B at 4 bits: what a disk is asked for
GB = 1e9
MEMORY_GB = 1.073741824  # memory is sold in GB of 2^30 bytes
MOST_GB = 1e9  # an exabyte, of memory or disk: more is a slip of the keyboard


@dataclass(frozen=True)
class Machine:
    """What the cost model needs to know of a machine."""

    name: str
    kind: str  # mac, nvidia, pc or phone: the classes in which errors are told
    memory_gb: float  # as sold, so of 2^30 bytes; a discrete GPU's own is not counted
    memory_gb_s: float  # of the processor that computes
    disk_gb_s: float
    disk_is_measured: bool  # expert-sized reads at random, not a data sheet's figure
    core_speed: float = (
        1.3  # of one core, an M1's is 1: what a synchronisation waits for
    )
    computes_on: str = "gpu"  # or cpu
    reclaimable_gb: float | None = None  # free, or held by what can be dropped at once
    disk_free_gb: float | None = None
    matvec_gb_s: float | None = None  # weights through matrix x vector, if probed
    copy_gb_s: float | None = None  # out of the page cache, if probed
    gpu_memory_gb: float | None = None  # a discrete GPU's own: slots lie there
    host_gb_s: float | None = None  # of the memory that caches files, if another


@dataclass(frozen=True)
class Chip:
    """One row of CHIPS."""

    title: str
    kind: str
    memory_gb_s: float
    core_speed: float
    disk_gb_s: float
    source: str  # of the disk's rate
    is_measured: bool = False
    gpu_memory_gb: float | None = None


# Speed of one core to an M1's, by generation; after Geekbench 6, single core, rounded.
M1, M2, M3, M4, M5, PC = 1.0, 1.1, 1.3, 1.6, 1.8, 1.3
HOST_GB_S = 83  # two channels of DDR5-5200
TYPICAL = "typical of reviews, no source of its own"


def _card(
    title: str, rate: float, memory: float, disk: float = 5.0, source: str = TYPICAL
) -> Chip:
    return Chip(title, "nvidia", rate, PC, disk, source, gpu_memory_gb=memory)


CHIPS = {
    "m1": Chip("M1", "mac", 68, M1, 2.9, TYPICAL),
    "m1-pro": Chip("M1 Pro", "mac", 200, M1, 5.3, "awas-k/flash-moe-M1"),
    "m1-max": Chip("M1 Max", "mac", 400, M1, 4.4, "JustVugg/colibri", True),
    "m1-ultra": Chip("M1 Ultra", "mac", 800, M1, 6.89, "JustVugg/colibri", True),
    "m2": Chip("M2", "mac", 100, M2, 1.5, "carloslfu/slotstream, 256 GB", True),
    "m2-pro": Chip("M2 Pro", "mac", 200, M2, 5.0, TYPICAL),
    "m2-max": Chip("M2 Max", "mac", 400, M2, 5.5, TYPICAL),
    "m2-ultra": Chip("M2 Ultra", "mac", 800, M2, 6.0, TYPICAL),
    "m3": Chip("M3", "mac", 100, M3, 3.18, "JustVugg/colibri", True),
    "m3-pro": Chip("M3 Pro", "mac", 150, M3, 5.0, TYPICAL),
    "m3-max": Chip("M3 Max", "mac", 400, M3, 5.5, "danveloper/flash-moe, cold", True),
    "m3-ultra": Chip("M3 Ultra", "mac", 819, M3, 7.0, TYPICAL),
    "m4": Chip("M4", "mac", 120, M4, 3.0, TYPICAL),
    "m4-pro": Chip("M4 Pro", "mac", 273, M4, 6.59, "JustVugg/colibri", True),
    "m4-max": Chip("M4 Max", "mac", 546, M4, 7.0, TYPICAL),
    "m5": Chip("M5", "mac", 153, M5, 6.0, TYPICAL),
    "m5-pro": Chip("M5 Pro", "mac", 307, M5, 17.3, "carloslfu/slotstream", True),
    "m5-max": Chip("M5 Max", "mac", 614, M5, 12.6, "boyle", True),
    "a18-pro": Chip("A18 Pro", "mac", 60, 1.5, 1.6, TYPICAL),
    "a19": Chip("A19", "phone", 68, 1.5, 2.5, "Alexintosh/flash-moe"),
    "a19-pro": Chip("A19 Pro", "phone", 77, 1.6, 3.2, "DirectorFeng: 512 GB or more"),
    "rtx-2080-ti": _card("RTX 2080 Ti", 616, 11),
    "rtx-3060": _card("RTX 3060", 360, 12),
    "rtx-4090": _card("RTX 4090", 1008, 24, 7.0, "ssubbotin/flash-moe"),
    "rtx-5090": _card("RTX 5090", 1792, 32),
    "h100": _card("H100", 3350, 80),
    "gb10": Chip("GB10", "nvidia", 273, PC, 5.58, "JustVugg/colibri", True),
    "strix-halo": Chip("Strix Halo", "pc", 256, PC, 3.27, "JustVugg/colibri", True),
    "pc": Chip("PC, two channels of DDR5", "pc", HOST_GB_S, PC, 5.0, TYPICAL),
    "snapdragon": Chip("Snapdragon, UFS 4", "phone", 68, PC, 4.0, "its rating"),
}
ON_CPU = ("pc", "strix-halo", "snapdragon")  # what computes there, in published runs
EXAMPLES = "m3-max-48, m5-max-128, rtx-4090-64, a19-pro-12, pc-64"


def machine(name: str) -> Machine:
    """A machine by its chip and memory: m3-max-48.

    Raises: ConfigError with the names that there are.
    """
    match = re.fullmatch(r"(.+?)-(\d+(?:\.\d+)?)(?:gb)?", name.lower())
    chip = CHIPS.get(match.group(1)) if match else None
    if chip is None:
        raise ConfigError(
            f"machine {name!r} is not known; write a chip and its memory, such as "
            f"{EXAMPLES}; chips: {', '.join(CHIPS)}"
        )
    memory_gb = float(match.group(2))
    if not 0 < memory_gb < MOST_GB:
        raise ConfigError(
            f"machine {name!r}: memory must be more than 0 and below {MOST_GB:g} GB"
        )
    return Machine(
        name=f"{chip.title}, {memory_gb:g} GB",
        kind=chip.kind,
        memory_gb=memory_gb,
        memory_gb_s=chip.memory_gb_s,
        disk_gb_s=chip.disk_gb_s,
        disk_is_measured=chip.is_measured,
        core_speed=chip.core_speed,
        gpu_memory_gb=chip.gpu_memory_gb,
        host_gb_s=HOST_GB_S if chip.gpu_memory_gb else None,
        computes_on="cpu" if match.group(1) in ON_CPU else "gpu",
    )


def parse_quantity(text: str, unit: str) -> float:
    """A number with its unit, or without: "48GB", "17.5 GB/s", "17.5".

    Returns: in GB, or GB/s. Raises: ConfigError.
    """
    factors = {"MB": 1e-3, "GB": 1.0, "TB": 1e3, "GIB": 1.073741824}
    tail = "/s" if unit.endswith("/s") else ""
    pattern = rf"\s*(\d+(?:\.\d+)?)\s*(?:(MB|GB|TB|GiB){tail})?\s*"
    match = re.fullmatch(pattern, text, re.IGNORECASE)
    value = match and float(match.group(1)) * factors[(match.group(2) or "GB").upper()]
    if not value or value > MOST_GB:
        raise ConfigError(f"{text!r} is no quantity; write for example 48{unit}")
    return value


# --- this machine ---------------------------------------------------------------------

FALLBACK = {"Darwin": "m1", "Linux": "pc"}  # where nothing tells more


def this_machine(folder: str | Path = ".") -> Machine:
    """Memory and room of this machine; rates of its chip, as published, not measured.

    Raises: ConfigError if the system does not tell how much memory it has.
    """
    system = platform.system()
    key = (_apple_chip() if system == "Darwin" else None) or FALLBACK.get(system, "pc")
    memory_gb = _memory_gb()
    found = machine(f"{key}-{memory_gb:.1f}")
    place = Path(folder)
    free_gb = shutil.disk_usage(place if place.exists() else ".").free / GB
    name = f"this machine ({found.name})"
    if system != "Darwin":
        name = f"this machine ({platform.machine()}, {memory_gb:.1f} GB)"
    return replace(
        found, name=name, disk_free_gb=free_gb, reclaimable_gb=_reclaimable_gb()
    )


def _memory_gb() -> float:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError, AttributeError):
        raise ConfigError(
            "the system does not tell its memory; say it with --memory 16GB"
        ) from None


def _reclaimable_gb() -> float | None:
    """Memory that can be had at once: free, or held by caches of files."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        match = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.M)
        return int(match.group(1)) * 1024 / GB if match else None
    text = _output("vm_stat")
    page = re.search(r"page size of (\d+) bytes", text)
    kinds = ("free", "inactive", "purgeable", "speculative")
    found = [re.search(rf"Pages {kind}:\s+(\d+)", text) for kind in kinds]
    if page is None or not all(found):
        return None
    return sum(int(match.group(1)) for match in found) * int(page.group(1)) / GB


def _apple_chip() -> str | None:
    """The key of an Apple chip: "Apple M3 Max" -> m3-max."""
    title = _output("sysctl", "-n", "machdep.cpu.brand_string").strip()
    key = title.removeprefix("Apple ").lower().replace(" ", "-")
    return key if key in CHIPS else None


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


# --- a probe's figures ----------------------------------------------------------------


def with_probe(known: Machine, path: str | Path) -> Machine:
    """Put what `flashmoe probe --json` measured in place of published rates.

    Raises: ConfigError if the file is no probe's.
    """
    raw = read_json(Path(path))
    try:
        memory = max(map(_rate, raw["memory_gb_s"].values()))
        matvec = {key: _rate(rate) for key, rate in raw["matvec_gb_s"].items()}
        on_gpu = {key: rate for key, rate in matvec.items() if key.endswith("the gpu")}
        rates = raw["disk"]["rates"] if raw["disk"] else []
        disk, warm = _disk_rate(rates, "cold", "direct"), _disk_rate(rates, "warm")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path}: is no file of 'flashmoe probe --json' ({error!r}); make it again"
        ) from None
    return replace(
        known,
        name=f"{known.name}, probed",
        memory_gb_s=known.memory_gb_s if on_gpu else memory,
        computes_on="gpu" if on_gpu else "cpu",
        matvec_gb_s=max((on_gpu or matvec).values(), default=None),
        disk_gb_s=disk or known.disk_gb_s,
        disk_is_measured=disk is not None or known.disk_is_measured,
        copy_gb_s=warm,
    )


def _disk_rate(rates: list[dict], *modes: str) -> float | None:
    """The rate at the size nearest to an expert's, at the best depth up to 8."""
    found = [r for r in rates if r["mode"] in modes and _rate(r["depth"]) <= 8]
    if not found:
        return None
    sizes = (_rate(r["n_bytes"]) for r in found)
    size = min(sizes, key=lambda n: abs(n - RECORD_BYTES))
    return max(_rate(r["rate_gb_s"]) for r in found if r["n_bytes"] == size)


def _rate(value: object) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is no rate")
    return value
