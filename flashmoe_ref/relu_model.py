"""A small dense language model with ReLU feed-forward layers, in NumPy.

The model of `data/relu`, trained by `data/build/relu.py`: RMSNorm, causal attention
with rotary positions, and `down · relu(up · h)`, whose neurons are mostly zero. What a
layer's neurons do can be replaced: `feed_forward` gets what a predictor may look at.
Follows arXiv 2312.11514, which uses OPT-6.7B. **But:** float32, one text at a time.
*Taught in notebooks/11.*

Axes: T tokens, D model width, F neurons of a layer, V vocabulary. Neuron i is row i of
`up` and row i of `down`, which is stored turned around: (F, D), as `up` is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from .config import read_json
from .errors import CheckpointError, ConfigError
from .headers import TensorInfo, read_header, read_tensor
from .layers import AttentionState, attend, rms_norm, rope_angles, rotate

MOST = 1_000_000  # of any size in its config

# layer, its input, the stream after its attention, the same normed -> what it adds
FeedForward = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ReluConfig:
    """Sizes of the model; the numbers are those of `data/relu`."""

    hidden_size: int  # D, 256
    intermediate_size: int  # F, 3,072
    num_hidden_layers: int  # 6
    num_attention_heads: int  # 4
    vocab_size: int  # V, 6,144
    rope_theta: float  # 10,000
    rms_norm_eps: float  # 1e-6

    @classmethod
    def from_json(cls, path: str | Path) -> "ReluConfig":
        """Read config.json.

        Raises: ConfigError if a value is missing, or the file is no JSON.
        """
        raw = read_json(Path(path))
        for field in fields(cls):
            value = raw.get(field.name)
            kinds, most = ((int,), MOST) if field.type is int else ((int, float), 1e9)
            if type(value) not in kinds or not 0 < value <= most:
                raise ConfigError(
                    f"{path}: is not the config of a ReLU model ({field.name} is "
                    f"{value!r}); see data/relu/README.md"
                )
        if raw["hidden_size"] % (2 * raw["num_attention_heads"]):
            raise ConfigError(f"{path}: hidden_size does not divide into even heads")
        return cls(**{field.name: raw[field.name] for field in fields(cls)})

    @property
    def neuron_bytes(self) -> int:
        """A neuron's row and column in float32: 2,048."""
        return 2 * 4 * self.hidden_size


@dataclass
class ReluLayer:
    """Weights of a layer, float32."""

    norm_attention: np.ndarray  # (D,)
    qkv: np.ndarray  # (3D, D)
    out: np.ndarray  # (D, D)
    norm_ffn: np.ndarray  # (D,)
    up: np.ndarray  # (F, D)
    down: np.ndarray  # (F, D), neuron by neuron


def read_rounded(
    infos: dict[str, TensorInfo], name: str, shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """A tensor in float32; one of 8 bits is multiplied by its rows' scales.

    Raises: CheckpointError if it is missing, or not of the shape that is wanted.
    """
    info = _of_shape(infos, name, shape)
    if info.dtype != np.int8:
        return read_tensor(info).astype(np.float32, copy=False)
    scale = read_tensor(_of_shape(infos, f"{name}.scale", info.shape[:1]))
    return read_tensor(info).astype(np.float32) * scale.astype(np.float32)[:, None]


def _of_shape(
    infos: dict[str, TensorInfo], name: str, shape: tuple[int, ...] | None
) -> TensorInfo:
    if name not in infos:
        raise CheckpointError(f"no tensor {name!r}; see data/relu/README.md")
    info = infos[name]
    if shape not in (None, info.shape):
        raise CheckpointError(
            f"{info.file}: tensor {name!r} has shape {info.shape}, config.json gives "
            f"{shape}; do they belong together?"
        )
    return info


class ReluModel:
    """The whole model in memory: what a model on disk must agree with."""

    def __init__(
        self,
        config: ReluConfig,
        embedding: np.ndarray,
        layers: Sequence[ReluLayer],
        norm: np.ndarray,
    ) -> None:
        self.config, self.embedding, self.norm = config, embedding, norm
        self.layers = list(layers)

    @classmethod
    def load(cls, folder: str | Path) -> "ReluModel":
        """Read config.json and model.safetensors.

        Raises: ConfigError, CheckpointError.
        """
        folder = Path(folder)
        config = ReluConfig.from_json(folder / "config.json")
        infos = read_header(folder / "model.safetensors")
        D, F = config.hidden_size, config.intermediate_size
        shapes = {
            "norm_attention": (D,),
            "attention.qkv": (3 * D, D),
            "attention.out": (D, D),
            "norm_ffn": (D,),
            "up": (F, D),
            "down": (F, D),
        }

        def layer(i: int) -> ReluLayer:
            named = ((f"layers.{i}.{n}.weight", shape) for n, shape in shapes.items())
            return ReluLayer(*(read_rounded(infos, *item) for item in named))

        layers = [layer(i) for i in range(config.num_hidden_layers)]
        embedding = read_rounded(infos, "embedding.weight", (config.vocab_size, D))
        return cls(config, embedding, layers, read_rounded(infos, "norm.weight", (D,)))

    @classmethod
    def random(cls, config: ReluConfig, seed: int = 0) -> "ReluModel":
        """Random weights, for tests. Half of the neurons are zero."""
        c, rng = config, np.random.default_rng(seed)
        D, F = c.hidden_size, c.intermediate_size

        def draw(*shape: int) -> np.ndarray:
            values = rng.standard_normal(shape) / np.sqrt(D)
            return values.astype(np.float32)

        def layer() -> ReluLayer:
            ones = (np.ones(D, np.float32) for _ in range(2))
            first, second = ones
            neurons = draw(F, D), draw(F, D)
            return ReluLayer(first, draw(3 * D, D), draw(D, D), second, *neurons)

        layers = [layer() for _ in range(c.num_hidden_layers)]
        return cls(c, draw(c.vocab_size, D), layers, np.ones(D, np.float32))

    def new_state(self) -> list[AttentionState]:
        """What is remembered of a text: keys and values, layer by layer."""
        heads = self.config.num_attention_heads
        width = self.config.hidden_size // heads
        return [AttentionState.empty(heads, width) for _ in self.layers]

    def forward(
        self,
        ids: Sequence[int],
        state: list[AttentionState],
        feed_forward: FeedForward | None = None,
    ) -> np.ndarray:
        """Process tokens, updating state; dense unless feed_forward is given.

        Shapes: ids (T,) -> logits (T, V).
        Raises: ConfigError for no ids, or ids outside the vocabulary.
        """
        ids = np.asarray(ids)
        if ids.size == 0 or ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ConfigError(f"ids must be in 0..{self.config.vocab_size - 1}")
        feed_forward = feed_forward or self.dense
        x, eps = self.embedding[ids], self.config.rms_norm_eps
        for i, w in enumerate(self.layers):
            after = x + self.attention(i, rms_norm(x, w.norm_attention, eps), state[i])
            x = after + feed_forward(i, x, after, rms_norm(after, w.norm_ffn, eps))
        return rms_norm(x, self.norm, eps) @ self.embedding.T

    def attention(self, layer: int, h: np.ndarray, state: AttentionState) -> np.ndarray:
        """Causal attention over all tokens so far. Shapes: h (T, D) -> (T, D)."""
        w, (T, D) = self.layers[layer], h.shape
        heads = self.config.num_attention_heads
        parts = (h @ w.qkv.T).reshape(T, 3, heads, -1)
        q, k, v = parts.transpose(1, 0, 2, 3)  # each (T, H, Dh)
        places = np.arange(state.n, state.n + T)
        angles = rope_angles(places, D // heads, self.config.rope_theta)
        state.append(rotate(k, *angles), v)
        mixed = attend(rotate(q, *angles), state.k[: state.n], state.v[: state.n])
        return mixed.reshape(T, D) @ w.out.T

    def dense(
        self, layer: int, x: np.ndarray, after: np.ndarray, h: np.ndarray
    ) -> np.ndarray:
        """All neurons of a layer. Shapes: (T, D) -> (T, D)."""
        w = self.layers[layer]
        return neurons_add(h, w.up, w.down)

    def parts(self) -> dict[str, int]:
        """Bytes in float32, by what they are for."""
        attention = sum(w.qkv.nbytes + w.out.nbytes for w in self.layers)
        norms = sum(w.norm_attention.nbytes + w.norm_ffn.nbytes for w in self.layers)
        neurons = sum(w.up.nbytes + w.down.nbytes for w in self.layers)
        return {
            "embedding": self.embedding.nbytes,
            "attention": attention + norms + self.norm.nbytes,
            "feed-forward": neurons,
        }


def neurons_add(h: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """What some neurons add to the stream: relu(h · up) · down.

    Shapes: h (T, D), up and down (n, D) -> (T, D).
    """
    return np.maximum(h @ up.T, 0) @ down


def active_neurons(model: ReluModel, ids: Sequence[int]) -> np.ndarray:
    """Which neurons are not zero, token by token. Shapes: (T,) -> (L, T, F) bool."""
    found = []

    def watch(
        layer: int, x: np.ndarray, after: np.ndarray, h: np.ndarray
    ) -> np.ndarray:
        w = model.layers[layer]
        values = np.maximum(h @ w.up.T, 0)
        found.append(values > 0)
        return values @ w.down

    model.forward(ids, model.new_state(), watch)
    return np.array(found)


def mean_nats(logits: np.ndarray, ids: Sequence[int]) -> float:
    """Mean of minus the log-probability of each next token. Shapes: (T, V), (T,)."""
    logits = logits[:-1].astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    totals = np.log(np.exp(shifted).sum(axis=1))
    return float((totals - shifted[np.arange(len(shifted)), ids[1:]]).mean())
