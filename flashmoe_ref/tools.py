"""Functions that a model may have called: each with a schema that guards its door.

A tool is a pure function, a name, a description and a JSON schema. Arguments are
checked against the schema before the function sees them: what is missing, unknown, of
another type or out of range never arrives. A keyword that we do not check is refused
when the tool is made, so that no schema promises more than holds. Three examples are at
the end. **But:** a small part of JSON schema; flat arguments.
*Taught in notebooks/13.*
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .accounting import count_parameters
from .calculator import calculate
from .config import PRESETS
from .errors import ConfigError, ToolError

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
_RANGE = frozenset({"enum", "minimum", "maximum"})
# by type: keywords that we hold to, beside type and description
_KEYWORDS: dict[str, frozenset[str]] = {
    "string": frozenset({"enum", "maxLength"}),
    "integer": _RANGE,
    "number": _RANGE,
    "boolean": frozenset(),
}
_ALWAYS = {"type", "description"}


@dataclass(frozen=True)
class Tool:
    """A function that a model may ask for."""

    name: str
    description: str
    parameters: Mapping[str, Mapping[str, Any]]  # name -> schema
    function: Callable[..., object]  # pure: no files, no network, no state
    optional: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises: ConfigError for a name or schema that we could not hold to."""
        if not re.fullmatch(r"[A-Za-z_]\w{0,63}", self.name, re.ASCII):
            raise ConfigError(f"{self.name!r} is no name of a tool: letters, digits, _")
        for name, schema in self.parameters.items():
            known = _KEYWORDS.get(schema.get("type"))
            is_plain = name.isidentifier() and name.isascii()
            if known is None or not is_plain or set(schema) - known - _ALWAYS:
                raise ConfigError(
                    f"tool {self.name!r}, parameter {name!r}: give a type out of "
                    f"{', '.join(_TYPES)}, a plain name, and of other keywords only "
                    f"{', '.join(sorted((known or _RANGE) | {'description'}))}"
                )
        if not set(self.optional) <= set(self.parameters):
            raise ConfigError(f"tool {self.name!r}: optional names no parameter")

    @property
    def schema(self) -> dict[str, Any]:
        """As the chat template takes it."""
        required = [name for name in self.parameters if name not in self.optional]
        parameters = {
            "type": "object",
            "properties": {name: dict(s) for name, s in self.parameters.items()},
            "required": required,
            "additionalProperties": False,
        }
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": function | {"parameters": parameters}}

    def call(self, arguments: Mapping[str, object]) -> object:
        """Check the arguments, then call. Raises: ToolError in words for the model."""
        check_arguments(arguments, self)
        return self.function(**arguments)


def check_arguments(arguments: Mapping[str, object], tool: Tool) -> None:
    """Raises: ToolError naming every argument that the tool's schema does not allow."""
    faults = [
        f"argument {name!r} is missing"
        for name in tool.parameters
        if name not in arguments and name not in tool.optional
    ]
    for name, value in arguments.items():
        if name not in tool.parameters:
            known = ", ".join(tool.parameters) or "none"
            faults.append(f"argument {name!r} is not known; known: {known}")
        elif fault := _fault(value, tool.parameters[name]):
            faults.append(f"argument {name!r} {fault}")
    if faults:
        raise ToolError("; ".join(faults))


def _fault(value: object, schema: Mapping[str, Any]) -> str | None:
    """What is wrong with a value, or None."""
    kind = schema["type"]
    is_bool = isinstance(value, bool)  # which Python counts as an int
    if not isinstance(value, _TYPES[kind]) or is_bool != (kind == "boolean"):
        return f"is not of type {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"must be one of {', '.join(map(str, schema['enum']))}"
    # Written so that NaN is out of every range.
    if "minimum" in schema and not value >= schema["minimum"]:
        return f"must be at least {schema['minimum']}"
    if "maximum" in schema and not value <= schema["maximum"]:
        return f"must be at most {schema['maximum']}"
    if "maxLength" in schema and len(value) > schema["maxLength"]:
        return f"is longer than {schema['maxLength']} characters"
    return None


# --- three examples -------------------------------------------------------------------

# unit: (what it measures, how many of its base unit); exact by definition
UNITS = {
    "m": ("length", 1.0),
    "km": ("length", 1000.0),
    "cm": ("length", 0.01),
    "mm": ("length", 0.001),
    "inch": ("length", 0.0254),
    "foot": ("length", 0.3048),
    "mile": ("length", 1609.344),
    "kg": ("mass", 1.0),
    "g": ("mass", 0.001),
    "pound": ("mass", 0.45359237),
    "ounce": ("mass", 0.028349523125),
    "s": ("time", 1.0),
    "minute": ("time", 60.0),
    "hour": ("time", 3600.0),
    "day": ("time", 86400.0),
    "byte": ("data", 1.0),
    "kB": ("data", 1e3),
    "MB": ("data", 1e6),
    "GB": ("data", 1e9),
    "TB": ("data", 1e12),
    "KiB": ("data", 2.0**10),
    "MiB": ("data", 2.0**20),
    "GiB": ("data", 2.0**30),
}
# (what lies between, factor): kelvin = factor * (degrees + offset)
TEMPERATURES = {
    "celsius": (273.15, 1.0),
    "fahrenheit": (459.67, 5 / 9),
    "kelvin": (0.0, 1.0),
}


def convert_units(value: float, unit: str, into: str) -> str:
    """A quantity in another unit, for example 3 foot -> "0.9144 m".

    Raises: ToolError if the two measure different things, or it is below 0 K.
    """
    if unit in TEMPERATURES and into in TEMPERATURES:
        return f"{_written(_temperature(value, unit, into))} {into}"
    kinds = [UNITS.get(name, ("temperature", 0.0))[0] for name in (unit, into)]
    if kinds[0] != kinds[1]:
        raise ToolError(f"{unit} is {kinds[0]}, {into} is {kinds[1]}")
    return f"{_written(value * UNITS[unit][1] / UNITS[into][1])} {into}"


def _temperature(value: float, unit: str, into: str) -> float:
    offset, factor = TEMPERATURES[unit]
    kelvin = (value + offset) * factor
    if kelvin < 0:
        raise ToolError(f"{value:g} {unit} is below absolute zero")
    offset, factor = TEMPERATURES[into]
    return kelvin / factor - offset


def _written(value: float) -> str:
    # Twelve digits: what is beyond them is rounding.
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def model_facts(model: str) -> dict[str, int]:
    """Shape and size of a published model, out of a fixed table."""
    config = PRESETS[model]
    counts = count_parameters(config)
    return {
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "experts_per_layer": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "parameters": counts.total,
        "active_parameters": counts.active(),
    }


_UNIT = {"type": "string", "enum": [*UNITS, *TEMPERATURES]}
EXAMPLES = (
    Tool(
        "calculate",
        "Compute an arithmetic expression exactly. Knows + - * / // % **, brackets, "
        "sqrt, abs, round, floor, ceil, min, max, exp, log, log2, log10, sin, cos, "
        "tan, pi and e.",
        {
            "expression": {
                "type": "string",
                "description": "for example 2 * (3 + 4) ** 2",
                "maxLength": 300,
            }
        },
        lambda expression: _written(calculate(expression)),
    ),
    Tool(
        "convert_units",
        "Convert a quantity into another unit of the same kind.",
        {
            "value": {"type": "number", "minimum": -1e300, "maximum": 1e300},
            "unit": _UNIT,
            "into": _UNIT,
        },
        convert_units,
    ),
    Tool(
        "model_facts",
        "Look up the shape and size of a published Mixture-of-Experts model.",
        {"model": {"type": "string", "enum": [*PRESETS]}},
        model_facts,
    ),
)
