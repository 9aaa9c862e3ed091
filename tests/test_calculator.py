"""The calculator against Python's own arithmetic, and against any text at all."""

import math
import time

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from flashmoe_ref.calculator import FUNCTIONS, MAX_DEPTH, calculate
from flashmoe_ref.errors import ToolError

BY_HAND = {
    "2 * (3 + 4) ** 2": 98,
    "-2 ** 2": -4,
    "2 ** 3 ** 2": 512,
    "2 ** -1": 0.5,
    "7 // 2 - 7 % 4": 0,
    "-7 // 2": -4,
    "1.5e3 + .5": 1500.5,
    "2^10": 1024,
    "6 × 7 − 2 ÷ 4": 41.5,
    "--3": 3,
    "10 / 4": 2.5,
    "12345678901234567890 + 1": 12345678901234567891,
    "sqrt(16) + abs(-2) + min(3, 1, 2) + max(1, 2)": 9,
    "round(2.71828, 2) + round(2.5) + floor(2.9) + ceil(2.1)": 9.72,
    "log(8, 2) + log10(1000) + log2(4)": 8,
    "sin(pi / 2) + log(e) + cos(0) + tan(0) + exp(0)": 4,
}


@pytest.mark.parametrize(("text", "value"), BY_HAND.items())
def test_by_hand(text: str, value: float) -> None:
    assert calculate(text) == pytest.approx(value, rel=1e-14)


def test_whole_numbers_are_exact() -> None:
    assert calculate("2 ** 200 - 1") == 2**200 - 1
    assert type(calculate("6 // 2 * 3 ** 2")) is int


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ends too early"),
        ("1 +", "ends too early"),
        ("(1", "bracket is not closed"),
        ("1)", "'\\)' is not expected"),
        ("1 2", "'2' is not expected"),
        ("* 3", "missing before '\\*'"),
        ("min()", "missing before"),
        ("sqrt(1, 2)", "does not take 2"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("log(1, 1)", "division by zero"),
        ("sqrt(-1)", "sqrt is not defined for -1"),
        ("log(0)", "log is not defined for 0"),
        ("(-1) ** 0.5", "not a real number"),
        ("9 ** 9 ** 9", "too large"),
        ("9e999", "too large"),
        ("1e308 * 10", "too large"),
        ("2 ** 1024 + 0.5", "too large"),
        ("round(1, 0.5)", "round is not defined"),
        ("x + 1", "'x' is not known; known: pi, e, sqrt"),
        ("__import__('os')", "no part of arithmetic"),
        ("open(1)", "'open' is not known"),
        ("().__class__", "no part of arithmetic"),
        ("1 if 1 else 2", "not expected"),
        ("1_000", "not expected"),
        ("lambda: 1", "no part of arithmetic"),
        ("1" * 301, "longer than 300"),
        ("(" * 100 + "1", f"more than {MAX_DEPTH} deep"),
        ("-" * 100 + "1", f"more than {MAX_DEPTH} deep"),
        ("1 ** " * 59 + "1", f"more than {MAX_DEPTH} deep"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        calculate(text)


NUMBERS = st.integers(0, 10**6) | st.floats(0, 1e6).map(lambda x: round(x, 3))
TREES = st.recursive(
    NUMBERS,
    lambda parts: (
        st.tuples(st.sampled_from(["+", "-", "*", "/", "//", "%"]), parts, parts)
        | st.tuples(st.just("neg"), parts)
        | st.tuples(st.sampled_from(["abs", "floor"]), parts)
    ),
    max_leaves=8,
)


def _value(tree: object) -> float:
    if not isinstance(tree, tuple):
        return tree
    name, *parts = tree
    values = [_value(part) for part in parts]
    one = {"neg": lambda a: -a, "abs": abs, "floor": math.floor}
    two = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b,
        "//": lambda a, b: a // b,
        "%": lambda a, b: a % b,
    }
    return (one | two)[name](*values)


def _text(tree: object) -> str:
    if not isinstance(tree, tuple):
        return repr(tree)
    name, *parts = tree
    texts = [_text(part) for part in parts]
    if len(texts) == 2:
        return f"({texts[0]} {name} {texts[1]})"
    return f"(-{texts[0]})" if name == "neg" else f"{name}({texts[0]})"


@settings(deadline=None)
@given(TREES)
def test_as_python_computes(tree: object) -> None:
    text = _text(tree)
    try:
        value = _value(tree)
    except (ZeroDivisionError, OverflowError, ValueError):
        value = math.inf
    if len(text) > 300 or not math.isfinite(value):
        with pytest.raises(ToolError):
            calculate(text)
    else:
        assert calculate(text) == value


OPERANDS = st.sampled_from(["1", "2", "3", "0.5", "10"])
SIGNS = st.sampled_from(["+", "-", "*", "/", "//", "%", "* -", "** 2 *", "** -", "**"])


@settings(deadline=None)
@given(OPERANDS, st.lists(st.tuples(SIGNS, OPERANDS), max_size=6))
def test_the_order_is_pythons(first: str, rest: list[tuple[str, str]]) -> None:
    text = first + "".join(f" {sign} {number}" for sign, number in rest)
    # Of towers such as 10 ** 10 ** 10 Python would make numbers of gigabytes.
    n_powers = text.count("**")
    assume(n_powers < 2 or (n_powers == 2 and "10" not in text))
    try:
        value = eval(text)  # only ours: digits and signs
    except (ZeroDivisionError, OverflowError):
        value = math.inf
    large = isinstance(value, int) and value.bit_length() > 1024
    if isinstance(value, complex) or large or not math.isfinite(value):
        with pytest.raises(ToolError):
            calculate(text)
    else:
        try:
            assert calculate(text) == value
        except ToolError as error:  # a part of it was too large, the whole is not
            assert "large" in str(error)


PIECES = st.sampled_from(
    [*FUNCTIONS, "pi", "e", *"+-*/%^(),.0123456789 ", "**", "//", "1e300", "9" * 90]
)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.lists(PIECES, max_size=40).map("".join))
@example("max(" * 30)
@example("floor(1.7e308)+floor(1.7e308)")
@example("sqrt(-" + "9" * 90 + "**3)")
def test_any_text_gives_a_number_or_a_tool_error(text: str) -> None:
    start = time.process_time()
    try:
        value = calculate(text)
    except ToolError as error:
        assert str(error)
    else:
        assert isinstance(value, int) or math.isfinite(value)
    assert time.process_time() - start < 1
