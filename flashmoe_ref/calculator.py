"""Arithmetic as text -> a number, by a grammar of its own: nothing is ever executed.

    sum     = product { ("+" | "-") product }
    product = signed { ("*" | "/" | "//" | "%") signed }
    signed  = { "-" | "+" } power
    power   = atom [ ("**" | "^") signed ]
    atom    = number | constant | function "(" sum { "," sum } ")" | "(" sum ")"

Whole numbers stay exact; round takes a half to the even neighbour. Length, depth and
size are bounded, so any text takes at most milliseconds and gives a finite number or a
ToolError. **But:** no variables, no units. *Taught in notebooks/13.*
"""

import math
import re
from collections.abc import Callable

from .errors import ToolError

MAX_CHARACTERS = 300
MAX_DEPTH = 40  # brackets and signs within each other
MAX_BITS = 1024  # of a whole number; a float ends there, too
CONSTANTS = {"pi": math.pi, "e": math.e}
# name: function, fewest and most arguments
FUNCTIONS: dict[str, tuple[Callable[..., float], int, int]] = {
    "sqrt": (math.sqrt, 1, 1),
    "abs": (abs, 1, 1),
    "round": (lambda x, digits=0: _rounded(x, digits), 1, 2),
    "floor": (math.floor, 1, 1),
    "ceil": (math.ceil, 1, 1),
    "min": (min, 1, 20),
    "max": (max, 1, 20),
    "exp": (math.exp, 1, 1),
    "log": (math.log, 1, 2),
    "log2": (math.log2, 1, 1),
    "log10": (math.log10, 1, 1),
    "sin": (math.sin, 1, 1),
    "cos": (math.cos, 1, 1),
    "tan": (math.tan, 1, 1),
}
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[A-Za-z_]\w*)|(?P<sign>\*\*|//|[-+*/%^(),]))",
    re.ASCII,
)
_AS_PEOPLE_WRITE = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"})


def calculate(expression: str) -> int | float:
    """The value of an arithmetic expression, such as "2 * (3 + 4) ** 2".

    Order: as in Python: ** first, from the right, then signs, products, sums.
    Raises: ToolError saying what is wrong and where.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ToolError(f"the expression is longer than {MAX_CHARACTERS} characters")
    parser = _Parser(_tokens(expression.translate(_AS_PEOPLE_WRITE)))
    value = parser.sum(0)
    if parser.next:
        raise ToolError(f"{parser.next!r} is not expected there")
    return value


def _tokens(text: str) -> list[tuple[str, str]]:
    """[(kind, token)], kind being number, name or sign."""
    tokens, at = [], 0
    text = text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if not found:
            raise ToolError(f"{text[at:].strip()[0]!r} is no part of arithmetic")
        tokens.append((found.lastgroup, found[found.lastgroup]))
        at = found.end()
    return tokens


class _Parser:
    """Recursive descent; each method reads and computes its rule of the grammar."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._at = 0

    @property
    def next(self) -> str:
        """The next token, "" at the end."""
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    def _take(self) -> str:
        token = self.next
        self._at += 1
        return token

    def sum(self, depth: int) -> int | float:
        value = self._product(depth)
        while self.next in ("+", "-"):
            sign = self._take()
            value = _apply(sign, value, self._product(depth))
        return value

    def _product(self, depth: int) -> int | float:
        value = self._signed(depth)
        while self.next in ("*", "/", "//", "%"):
            sign = self._take()
            value = _apply(sign, value, self._signed(depth))
        return value

    def _signed(self, depth: int) -> int | float:
        if depth > MAX_DEPTH:
            raise ToolError(f"it is nested more than {MAX_DEPTH} deep")
        if self.next in ("-", "+"):
            sign = self._take()
            value = self._signed(depth + 1)
            return -value if sign == "-" else value
        return self._power(depth)

    def _power(self, depth: int) -> int | float:
        value = self._atom(depth)
        if self.next in ("**", "^"):
            self._take()
            value = _apply("**", value, self._signed(depth + 1))
        return value

    def _atom(self, depth: int) -> int | float:
        kind = self._tokens[self._at][0] if self.next else "end"
        token = self._take()
        if kind == "number":
            return _number(token)
        if kind == "name" and self.next == "(":
            return _call(token, self._arguments(depth))
        if kind == "name":
            return _constant(token)
        if token != "(":
            raise ToolError(
                f"a number is missing before {token!r}"
                if token
                else "it ends too early"
            )
        value = self.sum(depth + 1)
        self._close()
        return value

    def _arguments(self, depth: int) -> list[int | float]:
        self._take()
        values = [self.sum(depth + 1)]
        while self.next == ",":
            self._take()
            values.append(self.sum(depth + 1))
        self._close()
        return values

    def _close(self) -> None:
        if self._take() != ")":
            raise ToolError("a bracket is not closed")


def _number(token: str) -> int | float:
    return _checked(int(token) if token.isdigit() else float(token))


def _constant(name: str) -> float:
    if name not in CONSTANTS:
        known = ", ".join([*CONSTANTS, *FUNCTIONS])
        raise ToolError(f"{name!r} is not known; known: {known}")
    return CONSTANTS[name]


def _call(name: str, values: list[int | float]) -> int | float:
    if name not in FUNCTIONS:
        raise ToolError(f"{name!r} is not known; known: {', '.join(FUNCTIONS)}")
    function, fewest, most = FUNCTIONS[name]
    if not fewest <= len(values) <= most:
        raise ToolError(f"{name} does not take {len(values)} numbers")
    return _guarded(function, name, *values)


def _apply(sign: str, a: int | float, b: int | float) -> int | float:
    return _guarded(_OPERATORS[sign], sign, a, b)


def _guarded(
    function: Callable[..., float], name: str, *values: int | float
) -> int | float:
    """Compute, and tell in words what Python raises."""
    try:
        return _checked(function(*values))
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except OverflowError:
        raise ToolError("the result is too large") from None
    except ValueError as error:
        if isinstance(error, ToolError):
            raise
        shown = ", ".join(str(value)[:20] for value in values)
        raise ToolError(f"{name} is not defined for {shown}") from None


def _checked(value: object) -> int | float:
    if isinstance(value, complex):
        raise ToolError("the result is not a real number")
    if isinstance(value, int):
        is_large = value.bit_length() > MAX_BITS
    else:
        is_large = not math.isfinite(value)
    if is_large:
        raise ToolError("the result is too large")
    return value


def _power(a: int | float, b: int | float) -> int | float:
    if isinstance(a, int) and isinstance(b, int) and b > 0:
        # Known before it is computed, which would take for ever.
        if a.bit_length() > 1 and (a.bit_length() - 1) * b > MAX_BITS:
            raise OverflowError
        if a in (0, 1, -1):
            return a if b % 2 else abs(a)
    return a**b


def _rounded(value: int | float, digits: int | float) -> int | float:
    if digits != int(digits) or abs(digits) > 300:
        raise ValueError
    return round(value, int(digits)) if digits else round(value)


_OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "**": _power,
}
