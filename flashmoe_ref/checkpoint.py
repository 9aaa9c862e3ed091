"""A checkpoint on disk -> where every weight lies, under one canonical naming.

Reads headers only, whatever the size of the model. Accepts the Hugging Face layout with
fused experts or one tensor per expert, and the MLX layout; engines never see prefixes,
zero-centred norms or Qwen3-Next's interleaved projections. Follows Qwen3.5's and
Qwen3-Next's files and mlx-lm's conversion rules. **But:** the vision tower and the
multi-token-prediction head are skipped. *Taught in notebooks/06.*
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .accounting import module_shapes
from .config import ModelConfig, read_json
from .errors import CheckpointError
from .guards import check_weights
from .headers import TensorInfo, read_header, read_tensor, stamp, told_in_one_line
from .naming import canonical_name, find_layout, next_projection_rows
from .quantize import QuantizedMatrix, infer_quantization

INDEX_NAME = "model.safetensors.index.json"
FLOATS = ("float32", "bfloat16", "float16")
LONGEST_NAME = 255  # bytes, in all usual file systems

# The five kinds of norm that Hugging Face stores as w - 1; linear_attn.norm is plain.
ZERO_CENTRED = re.compile(r"(^norm|layernorm|q_norm|k_norm)$")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: checked headers, canonical names, no weights in memory."""

    path: Path
    config: ModelConfig
    layout: str  # "hf" (fused experts), "hf-per-expert", "mlx"; "packed": no experts
    tensors: dict[str, TensorInfo]  # by canonical name, for example layers.0.mlp.gate
    quantization: dict[str, tuple[int, int]]  # canonical module -> (bits, group size)
    norms_are_zero_centred: bool
    stamps: dict[Path, tuple[int, int, int]]  # of the shards, before they were read
    guards: bool = True  # refuse weights that hold NaN or infinity

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Read config.json and all headers of a model folder, and check them.

        Raises: ConfigError or CheckpointError naming file, fault and remedy.
        """
        path = Path(path)
        with told_in_one_line(path):
            return cls._open(path)

    @classmethod
    def _open(cls, path: Path) -> "Checkpoint":
        if not path.is_dir():
            raise CheckpointError(f"{path}: is not a folder; give the model's folder")
        raw_config = read_json(path / "config.json")
        config = ModelConfig.from_dict(raw_config, str(path / "config.json"))
        shards = find_shards(path)
        stamps = {shard: stamp(shard, shard) for shard in shards}
        found = _collect(path, shards)
        layout = find_layout(path, found)
        quantization = _infer_quantization(path, config, found)
        _check_overrides(path, raw_config, quantization)
        checkpoint = cls(
            path,
            config,
            layout,
            found,
            quantization,
            _norms_are_zero_centred(path, found, layout),
            stamps,
        )
        checkpoint._check_shapes()
        return checkpoint

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors of the text model."""
        return sum(info.n_bytes for info in self.tensors.values())

    @property
    def dense_bytes(self) -> int:
        """Bytes of everything but the routed experts: what streaming keeps resident."""
        dense = (i.n_bytes for n, i in self.tensors.items() if ".mlp.experts." not in n)
        return sum(dense)

    def check_unchanged(self) -> None:
        """Raises: CheckpointError if a shard is not the file that was opened."""
        for shard, before in self.stamps.items():
            if stamp(shard, shard) != before:
                raise CheckpointError(
                    f"{shard}: was changed or replaced while it was read; what came "
                    f"of it is not to be trusted, begin again"
                )

    def module(self, name: str) -> np.ndarray | QuantizedMatrix:
        """Read a weight matrix (out, in), quantized if the file has it so.

        Shapes: floats come in the file's dtype; conv1d as (C, kernel) float32.
        Raises: CheckpointError if a file changed since its header was read;
                NumericError for NaN or infinity, if there are guards.
        """
        if name.endswith("conv1d"):
            conv = self._read(f"{name}.weight")
            return conv.reshape(len(conv), -1).astype(np.float32)
        source, rows = next_projection_rows(self.config, name, self.tensors)
        parts = {
            kind: self._part(f"{source}.{kind}", rows)
            for kind in ("weight", "scales", "biases")
            if f"{source}.{kind}" in self.tensors
        }
        if "scales" not in parts:
            return parts["weight"]
        return QuantizedMatrix(**parts, **self._widths(source))

    def _read(self, name: str) -> np.ndarray:
        values = read_tensor(self.tensors[name])
        if self.guards:
            check_weights(name, self.tensors[name], values)
        return values

    def _part(self, name: str, rows: np.ndarray | None) -> np.ndarray:
        array = self._read(name)
        return array if rows is None else array[rows]

    def _widths(self, module: str) -> dict[str, int]:
        bits, group_size = self.quantization[module]
        return {"bits": bits, "group_size": group_size}

    def vector(self, name: str) -> np.ndarray:
        """Read a norm, A_log or dt_bias as float32; norms become plain weights.

        Raises: as `module`.
        Source: Qwen3.5 `RMSNorm`, which multiplies by 1 + weight.
        """
        stored = f"{name}.weight" if f"{name}.weight" in self.tensors else name
        values = self._read(stored).astype(np.float32)
        if self.norms_are_zero_centred and ZERO_CENTRED.search(name):
            values += 1.0
        return values

    def _check_shapes(self) -> None:
        for modules in module_shapes(self.config).values():
            for name, shape in modules.items():
                if ".mlp.experts." in name and self.layout == "packed":
                    continue  # see experts.py
                if ".mlp.experts." in name:
                    self._check_experts(name, shape)
                else:
                    self._check_module(name, shape)

    def _check_module(self, name: str, shape: tuple[int, ...]) -> None:
        source, rows = next_projection_rows(self.config, name, self.tensors)
        if rows is not None:
            shape = (self._n_fused_rows(source), shape[1])
        self._check_tensor(source, shape)

    def _n_fused_rows(self, source: str) -> int:
        c = self.config
        if source.endswith("qkvz"):
            return c.conv_dim + c.value_dim
        return 2 * c.linear_num_value_heads

    def _check_experts(self, name: str, shape: tuple[int, ...]) -> None:
        n_experts, rows, columns = shape
        if self.layout == "mlx":
            self._check_tensor(name, shape)
        elif self.layout == "hf-per-expert":
            stem, projection = name.rsplit(".", 1)
            for expert in range(n_experts):
                self._check_tensor(f"{stem}.{expert}.{projection}", (rows, columns))
        elif name.endswith("down_proj"):
            self._check_tensor(name, shape)
        else:  # gate and up are one tensor: gate's rows, then up's
            stem = name.rsplit(".", 1)[0]
            self._check_tensor(f"{stem}.gate_up_proj", (n_experts, 2 * rows, columns))

    def _check_tensor(self, module: str, shape: tuple[int, ...]) -> None:
        if module in self.quantization:
            return self._check_quantized(module, shape)
        name = f"{module}.weight" if f"{module}.weight" in self.tensors else module
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is missing; fetch the model again"
            )
        info = self.tensors[name]
        got = info.shape
        if module.endswith("conv1d"):
            got = tuple(n for n in got if n != 1)
        if got != shape:
            raise self._wrong(info, f"has shape {info.shape}, expected {shape}")
        if info.dtype.name not in FLOATS:
            raise self._wrong(info, f"has dtype {info.dtype}, expected one of {FLOATS}")

    def _check_quantized(self, module: str, shape: tuple[int, ...]) -> None:
        bits, group_size = self.quantization[module]
        wanted = {
            "weight": (*shape[:-1], shape[-1] * bits // 32),
            "scales": (*shape[:-1], shape[-1] // group_size),
            "biases": (*shape[:-1], shape[-1] // group_size),
        }
        for kind, expected in wanted.items():
            info = self.tensors[f"{module}.{kind}"]
            if info.shape != expected:
                raise self._wrong(info, f"has shape {info.shape}, expected {expected}")
            if kind != "weight" and info.dtype.name not in FLOATS:
                raise self._wrong(info, f"has dtype {info.dtype}, expected a float")

    def _wrong(self, info: TensorInfo, what: str) -> CheckpointError:
        return CheckpointError(
            f"{info.file}: tensor {info.name!r} {what} (from config.json); "
            f"do config.json and weights belong together?"
        )


def find_shards(path: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a model, each with the names that the index gives it.

    None stands for "no index: every tensor of the file". A shard in which the index has
    nothing of the text model may be missing.
    Raises: CheckpointError if there are none, or a shard of the index is missing.
    """
    index = path / INDEX_NAME
    if not index.exists() and not index.is_symlink():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{path}: holds no .safetensors file; is the download complete?"
            )
        return dict.fromkeys(files)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; fetch the file again")
    shards: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise CheckpointError(f"{index}: {name!r} is in no plain file: {file!r}")
        shards.setdefault(path / file, set()).add(name)
    absent = {shard for shard in shards if not shard.exists()}
    missing = [
        shard.name
        for shard in shards
        if shard in absent and any(canonical_name(n, index) for n in shards[shard])
    ]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(shards)} shards are missing, first "
            f"{missing[0]}; fetch them"
        )
    return {shard: names for shard, names in shards.items() if shard not in absent}


def _is_plain_name(file: str) -> bool:
    """Whether a file of this name can lie in the model's own folder."""
    is_short = len(file.encode("utf-8", "replace")) <= LONGEST_NAME
    return Path(file).name == file != ".." and is_short and file.isprintable()


def _collect(path: Path, shards: dict[Path, set[str] | None]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for shard, promised in shards.items():
        header = read_header(shard)
        absent = sorted((promised or set()) - set(header))
        if absent:
            raise CheckpointError(
                f"{shard}: tensor {absent[0]!r} is in the index but not in the file; "
                f"index and shards are of different downloads, fetch the model again"
            )
        for name, info in header.items():
            canonical = canonical_name(name, shard)
            if canonical is None:
                continue
            if canonical in found:
                other = found[canonical].file.name
                raise CheckpointError(
                    f"{shard}: tensor {name!r} is also in {other}; remove the files "
                    f"that do not belong to this model"
                )
            found[canonical] = info
    if not found:
        raise CheckpointError(f"{path}: no tensor of a language model found in it")
    return found


def _infer_quantization(
    path: Path, config: ModelConfig, found: dict[str, TensorInfo]
) -> dict[str, tuple[int, int]]:
    widths = {}
    for name, info in found.items():
        module, _, kind = name.rpartition(".")
        if kind in ("scales", "biases") and f"{module}.weight" not in found:
            raise CheckpointError(f"{info.file}: {info.name!r} has no weight beside it")
        if kind != "scales":
            continue
        if f"{module}.biases" not in found:
            raise CheckpointError(
                f"{info.file}: {info.name!r} has no biases beside it, so its "
                f"quantization mode is not 'affine', the only supported one"
            )
        weight = found[f"{module}.weight"]
        if weight.dtype != np.uint32:
            raise CheckpointError(
                f"{weight.file}: {weight.name!r} has scales, but dtype {weight.dtype} "
                f"instead of U32"
            )
        try:
            widths[module] = infer_quantization(
                weight.shape, info.shape, _in_features(config, module)
            )
        except ValueError as error:
            raise CheckpointError(f"{weight.file}: {weight.name!r}: {error}") from None
    return widths


def _in_features(config: ModelConfig, module: str) -> int:
    name = module.rsplit(".", 1)[-1]
    if name == "o_proj":
        return config.num_attention_heads * config.head_dim
    if name == "out_proj":
        return config.value_dim
    if name == "down_proj":
        shared = ".shared_expert." in module
        return (
            config.shared_expert_intermediate_size
            if shared
            else config.moe_intermediate_size
        )
    return config.hidden_size


def _check_overrides(
    path: Path, raw_config: dict, widths: dict[str, tuple[int, int]]
) -> None:
    """What config.json says of a module's quantization must agree with its shapes."""
    where = path / "config.json"
    declared = raw_config.get("quantization", raw_config.get("quantization_config"))
    if declared is None:
        return
    if not isinstance(declared, dict):
        raise CheckpointError(f"{where}: quantization must be an object")
    mode = declared.get("mode", declared.get("quant_method", "affine"))
    if mode != "affine":
        raise CheckpointError(
            f"{where}: quantization mode {mode!r} is not supported; only 'affine' is"
        )
    for name, override in declared.items():
        if "." not in name or not isinstance(override, dict | bool):
            continue  # a global setting such as "bits"
        module = (canonical_name(f"{name}.weight", where) or "").removesuffix(".weight")
        if override is False and module in widths:
            raise CheckpointError(f"{where}: says {name} is not quantized, but it is")
        if isinstance(override, dict) and module:
            _check_override(where, name, override, widths.get(module))


def _check_override(
    where: Path, name: str, override: dict, got: tuple[int, int] | None
) -> None:
    if override.get("mode", "affine") != "affine":
        raise CheckpointError(
            f"{where}: quantization mode {override['mode']!r} of {name} is not "
            f"supported; only 'affine' is"
        )
    wanted = (override.get("bits"), override.get("group_size"))
    if got is None or any(w not in (None, g) for w, g in zip(wanted, got, strict=True)):
        found = "not quantized" if got is None else f"{got[0]} bits, group {got[1]}"
        raise CheckpointError(
            f"{where}: declares {wanted[0]} bits and group {wanted[1]} for {name}, but "
            f"its tensors are {found}; do config.json and weights belong together?"
        )


def _norms_are_zero_centred(
    path: Path, found: dict[str, TensorInfo], layout: str
) -> bool:
    """Tell raw norms (w - 1) from folded ones by the shape of conv1d.

    Hugging Face stores conv1d as (C, 1, kernel) beside raw norms; mlx-lm moves the axis
    to (C, kernel, 1) in the same step in which it adds the 1.
    Source: mlx-lm `qwen3_5.py`, `sanitize`.
    """
    convs = [info for name, info in found.items() if name.endswith("conv1d.weight")]
    raw = {info.shape[-1] != 1 for info in convs}
    if len(raw) > 1:
        raise CheckpointError(
            f"{path}: some conv1d weights are in Hugging Face's layout, others in MLX's"
        )
    return raw.pop() if raw else layout != "mlx"
