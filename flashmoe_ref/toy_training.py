"""Training the toy: its gradient twice, by MLX and by hand, and Adam.

`gradient_mlx` writes the loss and lets MLX differentiate it; `gradient_numpy` has the
derivation of notebooks/01 line by line. Both compute in float64 on the CPU and agree to
rounding, so a training gives the same figures with and without MLX. Follows Adam (arXiv
1412.6980). **But:** MLX computes all experts for every token and multiplies most by 0;
no clipping, no weight decay; each step has fresh tokens. *Taught in notebooks/01.*
"""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .errors import ConfigError
from .layers import expert_mlp, linear, route_topk, sigmoid, softmax
from .toy import MATRICES, Batch, Task, Weights, expert_load, expert_outputs

SHARED = tuple(f"shared_{name}" for name in MATRICES)
COOLING = 0.3  # the learning rate falls to 0 over this last part of the training


class Loss(NamedTuple):
    """The two parts of what is minimised: error + coefficient * balance."""

    error: float  # mean squared error
    balance: float  # `toy.balance_loss`


Gradient = Callable[[Weights, Batch, int, float], tuple[Loss, Weights]]


# --- by hand --------------------------------------------------------------------------


def gradient_numpy(
    w: Weights, batch: Batch, k: int, balance: float
) -> tuple[Loss, Weights]:
    """Loss and its gradient, derived by hand.

    balance is the coefficient of the balance loss. Shapes: the gradient has w's.
    Raises: ValueError if k is not in 1..E.
    """
    x, target = batch.x, batch.target
    logits = linear(x, w["gate"])  # (T, E)
    experts, weights = route_topk(logits, k)
    outputs = expert_outputs(x, w, experts)  # (T, k, D)
    gate = sigmoid(linear(x, w["shared_expert_gate"]))  # (T, 1)
    shared = expert_mlp(x, *(w[name] for name in SHARED))
    miss = gate * shared + np.einsum("tk,tkd->td", weights, outputs) - target
    dy = 2 * miss / miss.size  # (T, D): dL/dy

    gradient = experts_backward(x, w, experts, weights, dy)
    parts = mlp_backward(x, *(w[name] for name in SHARED), gate * dy)
    gradient |= dict(zip(SHARED, parts, strict=True))
    d_gate = np.sum(dy * shared, axis=-1, keepdims=True) * gate * (1 - gate)
    gradient["shared_expert_gate"] = d_gate.T @ x

    d_logits = np.zeros_like(logits)
    d_kept = weights_backward(weights, np.einsum("td,tkd->tk", dy, outputs))
    np.put_along_axis(d_logits, experts, d_kept, axis=-1)  # all others stay 0
    value, d_balance = balance_backward(logits, experts)
    gradient["gate"] = (d_logits + balance * d_balance).T @ x
    return Loss(float(np.mean(miss**2)), value), gradient


def weights_backward(weights: np.ndarray, d_weights: np.ndarray) -> np.ndarray:
    """From dL/dweights to dL/dlogits of the kept experts.

    Shapes: (T, k), (T, k) -> (T, k). Renormalised weights are the softmax of the kept
    logits alone, so this is softmax's derivative, and no other logit has any.
    """
    mean = np.sum(weights * d_weights, axis=-1, keepdims=True)
    return weights * (d_weights - mean)


def balance_backward(
    logits: np.ndarray, experts: np.ndarray
) -> tuple[float, np.ndarray]:
    """The balance loss and dL/dlogits. Shapes: logits (T, E), experts (T, k) -> (T, E).

    Load is a count: it changes in jumps and has no derivative. Only probabilities do.
    """
    n_tokens, n_experts = logits.shape
    p, load = softmax(logits), expert_load(experts, n_experts)
    value = n_experts * np.sum(load * p.mean(axis=0))
    mean = np.sum(p * load, axis=-1, keepdims=True)  # (T, 1)
    return float(value), n_experts / n_tokens * p * (load - mean)


def experts_backward(
    x: np.ndarray,
    w: Weights,
    experts: np.ndarray,
    weights: np.ndarray,
    dy: np.ndarray,
) -> Weights:
    """Gradients of the experts' matrices; exactly 0 for an expert that nobody chose.

    Shapes: x and dy (T, D), experts and weights (T, k) -> as w, by name.
    """
    gradient = {name: np.zeros_like(w[name]) for name in MATRICES}
    for e in np.unique(experts):
        tokens, ranks = np.nonzero(experts == e)
        d_output = weights[tokens, ranks, None] * dy[tokens]
        parts = mlp_backward(x[tokens], *(w[name][e] for name in MATRICES), d_output)
        for name, part in zip(MATRICES, parts, strict=True):
            gradient[name][e] = part
    return gradient


def mlp_backward(
    x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of one expert's matrices.

    Shapes: x and dy (T, D), gate and up (F, D), down (D, F) -> as the matrices.
    """
    a, b = linear(x, gate), linear(x, up)  # (T, F)
    s = sigmoid(a)
    silu_a = a * s
    dh = dy @ down  # (T, F), where h = silu(a) * b
    da = dh * b * (s + silu_a * (1 - s))  # silu'(a) = s + silu(a) (1 - s)
    db = dh * silu_a
    return da.T @ x, db.T @ x, dy.T @ (silu_a * b)


# --- by MLX ---------------------------------------------------------------------------


def gradient_mlx(
    w: Weights, batch: Batch, k: int, balance: float
) -> tuple[Loss, Weights]:
    """The same by MLX's automatic differentiation, in float64 on the CPU."""
    import mlx.core as mx

    with mx.stream(mx.cpu):  # GPUs have no float64

        def to_mlx(array: np.ndarray) -> mx.array:
            return mx.array(array, dtype=mx.float64)

        def total(w: dict[str, mx.array]) -> tuple[mx.array, ...]:
            error, value = _losses_mlx(w, to_mlx(batch.x), to_mlx(batch.target), k)
            return error + balance * value, error, value

        arrays = {name: to_mlx(array) for name, array in w.items()}
        (_, error, value), gradient = mx.value_and_grad(total)(arrays)
        mx.eval(error, value, gradient)
        loss = Loss(error.item(), value.item())
        return loss, {name: np.array(array) for name, array in gradient.items()}


def _losses_mlx(w: dict, x, target, k: int) -> tuple:
    """Error and balance loss; all arrays are MLX's."""
    import mlx.core as mx

    n_experts, f, d = w["gate_proj"].shape
    p = _softmax_mlx(x @ w["gate"].T)  # (T, E)
    experts = mx.stop_gradient(mx.argsort(-p, axis=-1)[:, :k])
    kept = mx.take_along_axis(p, experts, axis=-1)
    kept = kept / kept.sum(axis=-1, keepdims=True)
    weights = mx.put_along_axis(mx.zeros_like(p), experts, kept, axis=-1)  # (T, E)
    # All experts side by side are one wide expert, whose hidden units are weighted.
    gate, up = (w[name].reshape(n_experts * f, d) for name in MATRICES[:2])
    h = (_silu_mlx(x @ gate.T) * (x @ up.T)).reshape(-1, n_experts, f)
    h = (h * weights[:, :, None]).reshape(-1, n_experts * f)
    y = h @ w["down_proj"].swapaxes(1, 2).reshape(n_experts * f, d)
    gate, up, down = (w[name] for name in SHARED)
    shared = (_silu_mlx(x @ gate.T) * (x @ up.T)) @ down.T
    y = y + _sigmoid_mlx(x @ w["shared_expert_gate"].T) * shared
    chosen = mx.put_along_axis(mx.zeros_like(p), experts, mx.ones_like(kept), axis=-1)
    load = mx.stop_gradient(chosen).mean(axis=0) / k
    return mx.mean((y - target) ** 2), n_experts * mx.sum(load * p.mean(axis=0))


# NOTE: MLX 0.32's exp, sigmoid and softmax of float64 have the precision of float32;
# tanh and expm1 have all 53 bits.


def _sigmoid_mlx(x):
    import mlx.core as mx

    return 0.5 * mx.tanh(0.5 * x) + 0.5


def _silu_mlx(x):
    return x * _sigmoid_mlx(x)


def _softmax_mlx(x):
    import mlx.core as mx

    e = mx.expm1(x - mx.stop_gradient(x.max(axis=-1, keepdims=True))) + 1
    return e / e.sum(axis=-1, keepdims=True)


# --- training -------------------------------------------------------------------------


class Adam:
    """Adam: a step is the mean gradient over the root of the mean squared gradient."""

    def __init__(
        self, w: Weights, rate: float, beta1: float = 0.9, beta2: float = 0.99
    ) -> None:
        self.rate, self.beta1, self.beta2 = rate, beta1, beta2
        self.mean = {name: np.zeros_like(array) for name, array in w.items()}
        self.square = {name: np.zeros_like(array) for name, array in w.items()}
        self.n_steps = 0

    def step(self, w: Weights, gradient: Weights, cooling: float = 1.0) -> None:
        """Change w in place, at cooling times the rate."""
        self.n_steps += 1
        # Means start at 0; dividing by this removes that start from them.
        bias1 = 1 - self.beta1**self.n_steps
        bias2 = 1 - self.beta2**self.n_steps
        for name, g in gradient.items():
            self.mean[name] += (1 - self.beta1) * (g - self.mean[name])
            self.square[name] += (1 - self.beta2) * (g * g - self.square[name])
            root = np.sqrt(self.square[name] / bias2) + 1e-8
            w[name] -= cooling * self.rate * self.mean[name] / bias1 / root


@dataclass
class Training:
    """A finished training: the weights and how they came about."""

    weights: Weights
    backend: str  # "mlx" or "numpy"
    losses: list[Loss] = field(default_factory=list)  # of each step, before it
    snapshots: dict[int, Weights] = field(default_factory=dict)  # by steps done


def train(
    task: Task,
    w: Weights,
    k: int,
    balance: float,
    seed: int,
    n_steps: int = 500,
    n_tokens: int = 256,
    rate: float = 0.03,
    snapshots: Iterable[int] = (),
    backend: str = "auto",
) -> Training:
    """Train a copy of w on fresh tokens of a task.

    balance is the coefficient of the balance loss; n_tokens are drawn for each step.
    backend: "mlx", "numpy", or "auto", which is MLX where it is installed.
    Raises: ConfigError for an unknown or missing backend.
    """
    backend, gradient_of = pick_backend(backend)
    w = {name: array.copy() for name, array in w.items()}
    rng, adam = np.random.default_rng(seed), Adam(w, rate)
    result = Training(w, backend)
    for step in range(n_steps + 1):
        if step in snapshots:
            result.snapshots[step] = {name: array.copy() for name, array in w.items()}
        if step < n_steps:
            loss, gradient = gradient_of(w, task.draw(rng, n_tokens), k, balance)
            result.losses.append(loss)
            adam.step(w, gradient, min(1, (1 - step / n_steps) / COOLING))
    return result


def pick_backend(name: str = "auto") -> tuple[str, Gradient]:
    """The name of a backend and its gradient function.

    Raises: ConfigError if there is none of this name, or MLX is not installed.
    """
    has_mlx = importlib.util.find_spec("mlx") is not None
    if name == "auto":
        name = "mlx" if has_mlx else "numpy"
    if name not in ("mlx", "numpy"):
        raise ConfigError(f"backend {name!r} is not one of mlx, numpy, auto")
    if name == "mlx" and not has_mlx:
        raise ConfigError("backend mlx: MLX is not installed; use numpy or auto")
    return name, gradient_mlx if name == "mlx" else gradient_numpy
