"""One setting to be measured: how many experts a token uses, and how they are stored.

A setting is a line of a CSV file, or made in code. What it leaves empty stays as the
model has it, so one list of settings serves every model.
**But:** says what is wanted; whether a model allows it, `requantize` and `load` know.
*Used in notebooks/10.*
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from . import routing_cut
from .config import ModelConfig
from .errors import ConfigError
from .quantize import BITS, GROUP_SIZES, RULES
from .small_files import parse_table, read_text

KEPT = (*routing_cut.KEPT, "scaled")


@dataclass(frozen=True)
class Setting:
    """None means: as the model is.

    Raises: ConfigError for what cannot be meant.
    """

    k: int | None = None  # experts a token
    bits: int | None = None  # of the routed experts, requantized
    group_size: int | None = None
    rule: str = "mlx"  # of requantizing: mlx, minmax, least_squares
    down_bits: int | None = None  # of the experts' down projection, where it differs
    dense_bits: int | None = None  # of everything that is no expert and no gate
    router_bits: int | None = None  # of the router and the shared expert's gate
    kept: str = "renormalized"  # as-routed; scaled: renormalized, norm corrected
    mass: float | None = None  # adaptive: the share of the router's weight to keep

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("kept", self.kept, KEPT),
            ("rule", self.rule, tuple(RULES)),
            ("bits", self.bits, (None, *BITS)),
            ("group_size", self.group_size, (None, *GROUP_SIZES)),
        ):
            if value not in choices:
                known = ", ".join(str(c) for c in choices if c is not None)
                raise ConfigError(f"{name}={value!r} is not one of {known}")
        if self.mass is not None and not 0 < self.mass <= 1:
            raise ConfigError(f"mass={self.mass} is outside 0..1")
        stored = (self.group_size, self.down_bits, self.dense_bits, self.router_bits)
        if self.bits is None and any(value is not None for value in stored):
            raise ConfigError(
                f"{self.name}: give bits, too; those of the model itself leave its "
                f"experts as they are"
            )

    @property
    def is_stored(self) -> bool:
        """Whether the model's own files will do."""
        return self.bits is None

    @property
    def weights(self) -> "Setting":
        """The part that says how weights are stored; settings that share it share
        files."""
        return replace(self, k=None, kept="renormalized", mass=None)

    @property
    def routing(self) -> dict[str, object]:
        """The keywords of load(), but for the factors that `scaled` needs."""
        kept = "renormalized" if self.kept == "scaled" else self.kept
        return {"k": self.k, "kept": kept, "mass": self.mass}

    @property
    def name(self) -> str:
        """Short words for a table: 'K=4, 2 bits minmax'. 'as shipped' if nothing is
        set."""
        parts = [f"K={self.k}"] if self.k is not None else []
        parts += [f"mass {self.mass:g}"] if self.mass is not None else []
        if self.bits is not None:
            parts.append(f"{self.bits} bits {self.rule}")
        for text, value in (
            ("group", self.group_size),
            ("down", self.down_bits),
            ("rest", self.dense_bits),
            ("router", self.router_bits),
        ):
            parts += [f"{text} {value}"] if value is not None else []
        parts += [self.kept] if self.kept != "renormalized" else []
        return ", ".join(parts) or "as shipped"

    def as_row(self) -> dict[str, str]:
        """As text by column; empty where nothing is set."""
        return {
            name: "" if value is None else f"{value}"
            for name, value in asdict(self).items()
        }


COLUMNS = tuple(field.name for field in fields(Setting))
_KINDS = {"rule": str, "kept": str, "mass": float}  # all others are whole numbers


def from_row(row: dict[str, str]) -> Setting:
    """The setting of a line of a table; columns of other things are skipped.

    Raises: ConfigError naming the value.
    """
    values = {}
    for name in COLUMNS:
        if not (text := (row.get(name) or "").strip()):
            continue
        try:
            values[name] = _KINDS.get(name, int)(text)
        except ValueError:
            raise ConfigError(f"column {name}: {text!r} is no number") from None
    return Setting(**values)


def read_settings(path: str | Path) -> list[Setting]:
    """Settings from a CSV file with any of COLUMNS; each once, in their order.

    Raises: ConfigError naming the row.
    """
    text = read_text(Path(path), ConfigError)
    if text is None:
        raise ConfigError(f"{path}: no such file")
    found = []
    rows = parse_table(text, path, ConfigError)
    if not rows:
        raise ConfigError(f"{path}: holds no settings")
    if not set(rows[0]) <= set(COLUMNS):
        raise ConfigError(
            f"{path}: its first line must name columns out of {', '.join(COLUMNS)}"
        )
    for n, row in enumerate(rows, 1):
        try:
            found.append(from_row(row))
        except ConfigError as error:
            raise ConfigError(f"{path}, row {n}: {error}") from None
    return unique(found)


def check_experts(settings: Iterable[Setting], config: ModelConfig) -> None:
    """Refuse, before anything is measured, a k that the model does not have.

    Raises: ConfigError.
    """
    for setting in settings:
        if setting.k is not None:
            config.with_experts_per_token(setting.k)


def unique(settings: Iterable[Setting]) -> list[Setting]:
    """Each setting once, in order."""
    return list(dict.fromkeys(settings))
