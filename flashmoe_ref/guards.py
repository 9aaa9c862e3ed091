"""No NaN and no infinity among weights: looked for when they enter memory.

One such value makes all that follows noise. A float is NaN or infinite when all bits of
its exponent are set, so its raw integer tells, whatever the format. Of a quantized
matrix only scales and biases are looked at: its weights are small integers.
An expert is looked at on arrival, see `arrivals.py`.
**But:** a finite scale can still be too large; see `first_nan.py` for what comes of it.
*Taught in notebooks/07.*
"""

from math import isnan

import numpy as np

from .errors import NumericError, RoutingError
from .headers import TensorInfo

# all bits of the exponent, and the integer of the same width
EXPONENTS = {
    "bfloat16": (0x7F80, np.uint16),
    "float16": (0x7C00, np.uint16),
    "float32": (0x7F80_0000, np.uint32),
}
BLOCK_VALUES = 1 << 16  # looked at together: what the processor's own cache holds
REMEDY = (
    "the file is damaged, or was made from damaged weights: fetch or make it again; "
    "--no-guards (guards=False) computes with it all the same"
)


def first_bad(values: np.ndarray) -> int | None:
    """The number of the first value that is NaN or infinite; None if there is none.

    Shapes: values of any shape, contiguous. What is not a float has neither.
    """
    if values.dtype.name not in EXPONENTS:
        return None
    mask, integer = EXPONENTS[values.dtype.name]
    bits, mask = values.reshape(-1).view(integer), integer(mask)
    for start in range(0, bits.size, BLOCK_VALUES):
        exponents = bits[start : start + BLOCK_VALUES] & mask
        if exponents.max() == mask:
            return start + int(np.argmax(exponents == mask))
    return None


def check_weights(name: str, info: TensorInfo, values: np.ndarray) -> None:
    """Refuse a tensor that holds NaN or infinity.

    name: the canonical one, for example layers.3.mlp.gate.scales.
    Raises: NumericError naming file, layer, module and the first such value.
    """
    at = first_bad(values)
    if at is None:
        return
    index = tuple(int(i) for i in np.unravel_index(at, values.shape))
    raise NumericError(
        f"{info.file}: {in_words(name)}: value {index} is {values[index]}, in tensor "
        f"{info.name!r}; {REMEDY}"
    )


def check_routing(layer: int, weights: np.ndarray) -> None:
    """Refuse experts that were picked by scores with NaN or infinity.

    Shapes: weights (T, K) of `route_topk`, or (K,) of one token. One such score makes
    all of a token's weights NaN.
    Raises: RoutingError.
    """
    # one token's without NumPy, a call of which costs as much as a layer's norm
    is_bad = isnan(weights[0]) if weights.ndim == 1 else np.isnan(weights[:, 0]).any()
    if is_bad:
        raise RoutingError(f"the router of layer {layer} has scores of NaN or infinity")


def in_words(name: str) -> str:
    """'layers.3.mlp.gate.scales' -> 'layer 3, mlp.gate.scales'."""
    if not name.startswith("layers."):
        return name
    _, layer, module = name.split(".", 2)
    return f"layer {layer}, {module}"
