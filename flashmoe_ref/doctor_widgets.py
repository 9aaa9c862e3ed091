"""The doctor with sliders: memory, disk, K and bits against speed.

Needs a running kernel; a notebook shows the view of the first state above it.
**But:** one chip, whose memory bandwidth and cores stay as they are; `flashmoe doctor`
takes any machine. *Used in notebooks/12 and 13.*
"""

from functools import cache

from ipywidgets import IntSlider, SelectionSlider

from .errors import ConfigError
from .machines import Machine, machine
from .planner_fit import sizes_of_published
from .planner_views import MEMORY_GB, doctor_view, draw_doctor, say_doctor
from .ranges import is_whole
from .widgets import Explorer, one_of

DISK_GB_S = (0.5, 1, 2, 3, 5.5, 7, 12.6, 17.5, 25, 50, 100)
BITS = (2, 3, 4, 8)
STYLE = {"description_width": "90px"}  # else "memory (GB)" is cut off


def doctor_explorer(
    model: str = "qwen3.5-397b-a17b",
    place: Machine | None = None,
    k: int = 4,
    bits: int = 4,
) -> Explorer:
    """Memory, disk, K and bits against speed, for a published model.

    place: the machine that memory and disk are changed of; an M3 Max by default. It
    starts with the memory and the disk of the sliders that are nearest to its own.
    Raises: ConfigError for a k or bits that the sliders do not have.
    """
    place, trained_k = (
        place or machine("m3-max-48"),
        sizes_of_published(model).trained_k,
    )
    if not is_whole(k, 1, trained_k):
        raise ConfigError(f"k={k!r} is outside 1..{trained_k}")
    controls = {
        "memory": _slider("memory (GB)", MEMORY_GB, place.memory_gb),
        "disk": _slider("disk (GB/s)", DISK_GB_S, place.disk_gb_s),
        "K": IntSlider(
            k,
            min=1,
            max=trained_k,
            description="K",
            continuous_update=False,
            style=STYLE,
        ),
        "bits": SelectionSlider(
            options=BITS,
            value=one_of("bits", bits, BITS),
            description="bits",
            style=STYLE,
        ),
    }
    view = cache(lambda *choice: doctor_view(*choice, model, place))
    return Explorer(
        controls,
        lambda *choice: draw_doctor(view(*choice)),
        lambda *choice: say_doctor(view(*choice)),
    )


def _slider(name: str, options: tuple, value: float) -> SelectionSlider:
    nearest = min(options, key=lambda option: abs(option - value))
    return SelectionSlider(
        options=options,
        value=nearest,
        description=name,
        continuous_update=False,
        style=STYLE,
    )
