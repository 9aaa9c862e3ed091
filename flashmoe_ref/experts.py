"""Which bytes, in which file, are expert e of layer l: in place, or in packed files.

In place, an expert lies in nine pieces in the checkpoint's own safetensors files (gate,
up and down projection, each with weight, scales and biases). Packed, in the layout of
Dan Woods' flash-moe (`packed_experts/layer_00.bin`), the nine lie together and one read
fetches them. **But:** nothing is read here; see `streaming.py`.
*Taught in notebooks/06.*
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checkpoint import Checkpoint
from .config import MAX_LAYERS, ModelConfig, read_json
from .errors import CheckpointError
from .headers import DTYPES, TensorInfo, told_in_one_line
from .naming import PACKED_FOLDER
from .quantize import QuantizedMatrix, infer_quantization

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
KINDS = ("weight", "scales", "biases")
LAYOUT_NAME = "layout.json"
FLOATS = ("BF16", "F16", "F32")  # BF16 where a layout names no dtype


@dataclass(frozen=True)
class Part:
    """One array of an expert's record, for example gate_proj.scales."""

    name: str
    shape: tuple[int, ...]  # of one expert
    dtype: np.dtype
    n_bytes: int


@dataclass(frozen=True)
class ExpertFormat:
    """What one expert of a layer consists of, in the order of the packed record."""

    parts: tuple[Part, ...]  # nine when quantized, three when not
    quantization: dict[str, tuple[int, int]]  # projection -> bits, group; may be empty

    @property
    def n_bytes(self) -> int:
        """Bytes of one expert."""
        return sum(part.n_bytes for part in self.parts)

    def matrix(
        self, arrays: dict[str, np.ndarray], projection: str
    ) -> np.ndarray | QuantizedMatrix:
        """One projection from arrays by part name, which may have leading axes."""
        weight = arrays[f"{projection}.weight"]
        if projection not in self.quantization:
            return weight
        bits, group_size = self.quantization[projection]
        scales, biases = (arrays[f"{projection}.{kind}"] for kind in KINDS[1:])
        return QuantizedMatrix(weight, scales, biases, bits, group_size)


@dataclass(frozen=True)
class Run:
    """Bytes that lie together: for each expert, they fill parts[first:last]."""

    first: int
    last: int
    n_bytes: int
    places: tuple[tuple[int, int], ...]  # by expert: (number of the file, offset)


@dataclass(frozen=True)
class ExpertFiles:
    """Where all routed experts of a model lie: an expert takes one read per run."""

    kind: str  # "in place" or "packed"
    files: tuple[Path, ...]
    formats: tuple[ExpertFormat, ...]  # by layer
    runs: tuple[tuple[Run, ...], ...]  # by layer

    @property
    def n_experts(self) -> int:
        """Experts in each layer."""
        return len(self.runs[0][0].places)

    @property
    def n_bytes(self) -> int:
        """Bytes of all experts of all layers."""
        return self.n_experts * sum(fmt.n_bytes for fmt in self.formats)


# --- in place -------------------------------------------------------------------------


def experts_in_place(checkpoint: Checkpoint) -> ExpertFiles:
    """Find every expert inside the checkpoint's own files.

    Raises: CheckpointError if they are in packed files only.
    """
    if checkpoint.layout == "packed":
        raise CheckpointError(
            f"{checkpoint.path}: its experts are in {PACKED_FOLDER} only; use "
            f"experts='packed' (--experts packed)"
        )
    files: dict[Path, int] = {}
    formats, runs = [], []
    for layer in range(checkpoint.config.num_hidden_layers):
        fmt = _format_of_layer(checkpoint, layer)
        formats.append(fmt)
        runs.append(_runs_of_layer(checkpoint, layer, fmt, files))
    return ExpertFiles("in place", tuple(files), tuple(formats), tuple(runs))


def _format_of_layer(checkpoint: Checkpoint, layer: int) -> ExpertFormat:
    parts, quantization = [], {}
    for projection in PROJECTIONS:
        module = f"layers.{layer}.mlp.experts.{projection}"
        if module in checkpoint.quantization:
            quantization[projection] = checkpoint.quantization[module]
        for kind in KINDS if projection in quantization else KINDS[:1]:
            part_name = f"{projection}.{kind}"
            info, shape = _info_and_shape(checkpoint, layer, part_name)
            n_bytes = int(np.prod(shape)) * info.dtype.itemsize
            parts.append(Part(part_name, shape, info.dtype, n_bytes))
    return ExpertFormat(tuple(parts), quantization)


def _info_and_shape(
    checkpoint: Checkpoint, layer: int, part_name: str
) -> tuple[TensorInfo, tuple[int, ...]]:
    """The tensor that holds a part for expert 0, and the part's shape."""
    stem, tensors = f"layers.{layer}.mlp.experts", checkpoint.tensors
    if checkpoint.layout == "mlx":
        info = tensors[f"{stem}.{part_name}"]
        return info, info.shape[1:]
    if checkpoint.layout == "hf-per-expert":
        info = tensors[f"{stem}.0.{part_name}"]
        return info, info.shape
    if part_name.startswith("down"):
        info = tensors[f"{stem}.down_proj"]
        return info, info.shape[1:]
    info = tensors[f"{stem}.gate_up_proj"]
    return info, (info.shape[1] // 2, info.shape[2])


def _runs_of_layer(
    checkpoint: Checkpoint, layer: int, fmt: ExpertFormat, files: dict[Path, int]
) -> tuple[Run, ...]:
    stem, tensors = f"layers.{layer}.mlp.experts", checkpoint.tensors
    experts = range(checkpoint.config.num_experts)

    def number(info: TensorInfo) -> int:
        return files.setdefault(info.file, len(files))

    def stacked(name: str, first: int, last: int) -> Run:
        info = tensors[f"{stem}.{name}"]
        stride = info.n_bytes // len(experts)
        file = number(info)
        places = tuple((file, info.offset + e * stride) for e in experts)
        return Run(first, last, stride, places)

    if checkpoint.layout == "mlx":
        return tuple(stacked(p.name, i, i + 1) for i, p in enumerate(fmt.parts))
    if checkpoint.layout == "hf":  # an expert's gate and up rows lie together
        return stacked("gate_up_proj", 0, 2), stacked("down_proj", 2, 3)
    runs = []
    for i, part in enumerate(fmt.parts):
        infos = [tensors[f"{stem}.{e}.{part.name}"] for e in experts]
        places = tuple((number(info), info.offset) for info in infos)
        runs.append(Run(i, i + 1, part.n_bytes, places))
    return tuple(runs)


# --- packed ---------------------------------------------------------------------------


def packed_experts(folder: str | Path, config: ModelConfig) -> ExpertFiles:
    """Open a folder of packed experts by its layout.json; files are checked for size.

    Reads the layout of flash-moe's own repacking tool too, which has no dtype entries:
    bits and group follow from the sizes, and scales are then bf16.
    Raises: CheckpointError naming file, fault and remedy.
    """
    folder = Path(folder)
    where = folder / LAYOUT_NAME
    with told_in_one_line(where):
        is_there = where.exists()
    if not is_there:
        raise CheckpointError(
            f"{folder}: holds no packed experts ({LAYOUT_NAME} is missing); "
            f"make them with 'flashmoe pack', or use --experts stream"
        )
    layout = read_json(where)
    _check_numbers(layout, where, num_layers=config.num_hidden_layers)
    _check_numbers(layout, where, num_experts=config.num_experts)
    kinds, layers = formats_of_layout(layout, where)
    known = [_packed_format(kind, config, where) for kind in kinds]
    for kind, fmt in zip(kinds, known, strict=True):
        _check_numbers(kind, where, expert_size=fmt.n_bytes)
    formats = tuple(known[number] for number in layers)
    files = tuple(folder / packed_name(i) for i in range(config.num_hidden_layers))
    for file, fmt in zip(files, formats, strict=True):
        with told_in_one_line(file):
            _check_size(file, fmt.n_bytes * config.num_experts)
    runs = tuple(
        (Run(0, len(fmt.parts), fmt.n_bytes, _packed_places(i, fmt, config)),)
        for i, fmt in enumerate(formats)
    )
    return ExpertFiles("packed", files, formats, runs)


def formats_of_layout(layout: dict, where: Path) -> tuple[list[dict], list[int]]:
    """The kinds of records that a layout.json describes, and each layer's number.

    flash-moe knows one kind, described at the top; ours may have a list of them.
    Raises: CheckpointError if a layer has none.
    """
    n_layers = layout.get("num_layers")
    if type(n_layers) is not int or not 1 <= n_layers <= MAX_LAYERS:
        raise CheckpointError(f"{where}: num_layers is {n_layers!r}; pack again")
    if layout.get("format", 1) not in (1, 2):
        raise CheckpointError(
            f"{where}: is of format {layout['format']!r}, this flashmoe reads 1 and 2; "
            f"pack again"
        )
    if "formats" not in layout:
        return [layout], [0] * n_layers
    kinds, layers = layout["formats"], layout.get("layers")
    are_lists = isinstance(kinds, list) and isinstance(layers, list)
    if not are_lists or not all(isinstance(kind, dict) for kind in kinds):
        raise CheckpointError(f"{where}: formats and layers must be lists; pack again")
    numbers = [n for n in layers if type(n) is int and 0 <= n < len(kinds)]
    if len(numbers) != n_layers or len(layers) != n_layers:
        raise CheckpointError(
            f"{where}: layers must name one of {len(kinds)} formats for each of the "
            f"{n_layers} layers; pack again"
        )
    return kinds, layers


def _check_numbers(layout: dict, where: Path, **wanted: int) -> None:
    for key, value in wanted.items():
        if layout.get(key) != value:
            raise CheckpointError(
                f"{where}: {key} is {layout.get(key)!r}, the model needs {value}; "
                f"pack this model again"
            )


def packed_name(layer: int) -> str:
    """File name of a layer's packed experts."""
    return f"layer_{layer:02d}.bin"


def _packed_places(
    layer: int, fmt: ExpertFormat, config: ModelConfig
) -> tuple[tuple[int, int], ...]:
    return tuple((layer, e * fmt.n_bytes) for e in range(config.num_experts))


def _check_size(file: Path, n_bytes: int) -> None:
    if not file.exists():
        raise CheckpointError(f"{file}: no such file; run 'flashmoe pack' again")
    if file.stat().st_size != n_bytes:
        raise CheckpointError(
            f"{file}: has {file.stat().st_size:,} bytes, expected {n_bytes:,}; "
            f"run 'flashmoe pack' again"
        )


def _packed_format(layout: dict, config: ModelConfig, where: Path) -> ExpertFormat:
    components = layout.get("components")
    if not isinstance(components, list) or not components:
        raise CheckpointError(f"{where}: has no list of components; pack again")
    sizes, dtypes, offset = {}, {}, 0
    for entry in components:
        if not isinstance(entry, dict) or entry.get("offset") != offset:
            raise CheckpointError(
                f"{where}: component {entry!r} does not start at byte {offset}"
            )
        name, size = entry.get("name"), entry.get("size")
        is_new = isinstance(name, str) and name not in sizes
        if type(size) is not int or size < 1 or not is_new:
            raise CheckpointError(f"{where}: component {name!r} has size {size!r}")
        sizes[name], dtypes[name] = size, entry.get("dtype")
        offset += size
    order = [f"{p}.{kind}" for p in PROJECTIONS for kind in KINDS]
    if list(sizes) not in (order, order[::3]):
        raise CheckpointError(
            f"{where}: components are {list(sizes)}, expected {order} in this order"
        )
    fmt = _format_from_sizes(sizes, dtypes, config, where)
    _check_described(layout, fmt, where)
    return fmt


def _check_described(layout: dict, fmt: ExpertFormat, where: Path) -> None:
    """What our own keys say of shapes and widths must be what the sizes say."""
    for entry, part in zip(layout["components"], fmt.parts, strict=True):
        if entry.get("shape", [*part.shape]) != [*part.shape]:
            raise CheckpointError(
                f"{where}: component {part.name!r} has shape {entry['shape']!r}, its "
                f"size gives {[*part.shape]}; pack again"
            )
    widths = [fmt.quantization[p] for p in PROJECTIONS if p in fmt.quantization]
    for i, key in enumerate(("bits", "group_size")):
        found = [width[i] for width in widths]
        said = layout.get(key)
        if said is not None and found != (
            said if isinstance(said, list) else [said] * 3
        ):
            raise CheckpointError(
                f"{where}: {key} is {said!r}, the sizes give {found}; pack again"
            )


def _format_from_sizes(
    sizes: dict[str, int], dtypes: dict[str, object], config: ModelConfig, where: Path
) -> ExpertFormat:
    d, f = config.hidden_size, config.moe_intermediate_size
    parts, quantization = [], {}
    for name, size in sizes.items():
        projection, kind = name.split(".")
        rows, columns = (d, f) if projection == "down_proj" else (f, d)
        quantized = f"{projection}.scales" in sizes
        allowed = ("U32",) if quantized and kind == "weight" else FLOATS
        said = allowed[0] if dtypes[name] is None else dtypes[name]
        dtype = DTYPES[said] if said in allowed else None
        if dtype is None or size % (rows * dtype.itemsize):
            raise CheckpointError(
                f"{where}: component {name!r} of {size} bytes, dtype {dtypes[name]!r}, "
                f"does not fit {rows} rows; was another model packed here?"
            )
        shape = (rows, size // rows // dtype.itemsize)
        parts.append(Part(name, shape, dtype, size))
        if kind == "scales":
            try:
                widths = infer_quantization(parts[-2].shape, shape, columns)
            except ValueError as error:
                raise CheckpointError(f"{where}: {projection}: {error}") from None
            quantization[projection] = widths
        elif not quantized and shape[1] != columns:
            raise CheckpointError(f"{where}: component {name!r} has a wrong size")
    return ExpertFormat(tuple(parts), quantization)
