"""Checkpoint -> packed experts: one file a layer, so that an expert is one read.

Writes the layout of Dan Woods' flash-moe: `packed_experts/layer_00.bin`, with expert e
at byte e * expert_size, and `layout.json`, which says what an expert's record holds.
Ours adds keys to it (`format`, `bits`, `group_size`, `source`), and beside each file
digests, and checksums that are quick enough to be compared at each read. Where layers
differ in their bits, `formats` describes each kind of record and `layers` says which
one a layer has. **But:** only this package reads that: flash-moe knows one size of
expert. *Taught in notebooks/06.*
"""

from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from .arrivals import checksum, checksum_lines, checksum_path
from .checkpoint import Checkpoint
from .experts import (
    LAYOUT_NAME,
    PACKED_FOLDER,
    PROJECTIONS,
    ExpertFiles,
    ExpertFormat,
    experts_in_place,
    packed_name,
)
from .headers import told_in_one_line
from .shards import DTYPE_NAMES
from .writing import (
    check_space,
    identify,
    is_finished,
    new_parts_file,
    open_target,
    progress_bar,
    read_bytes,
    write_small,
)

FORMAT = 1  # of our keys in layout.json
FORMAT_BY_LAYER = 2  # with formats and layers


def pack(
    model_dir: str | Path, target: str | Path | None = None, progress: bool = True
) -> Path:
    """Copy the routed experts of a model into packed files; gives their folder.

    The target is MODEL/packed_experts by default. A run that was cut off goes on if it
    is called again.
    Raises: ConfigError, CheckpointError; PackError if there is no room, or the target
            holds something else.
    Source: flash-moe `repack_experts.py`, for the layout.
    """
    model_dir = Path(model_dir)
    target = Path(target or model_dir / PACKED_FOLDER)
    checkpoint = Checkpoint.open(model_dir)
    experts = experts_in_place(checkpoint)
    layout = describe_layout(checkpoint, experts)
    sizes = {
        target / packed_name(layer): fmt.n_bytes * experts.n_experts
        for layer, fmt in enumerate(experts.formats)
    }
    with open_target(target, layout, LAYOUT_NAME):
        check_space(target, sizes)
        write_small(target / LAYOUT_NAME, layout)
        with progress_bar(target.name, sum(sizes.values()), progress) as bar:
            for layer, (path, layer_bytes) in enumerate(sizes.items()):
                if is_finished(path) and checksum_path(path).exists():
                    bar.update(layer_bytes)
                else:
                    _pack_layer(path, experts, layer, bar, checkpoint)
    return target


def describe_layout(checkpoint: Checkpoint, experts: ExpertFiles) -> dict:
    """The content of layout.json; it names the source by content, not by its place."""
    kinds: list[ExpertFormat] = []
    for fmt in experts.formats:
        if fmt not in kinds:
            kinds.append(fmt)
    described = [_described(fmt) for fmt in kinds]
    layout = {
        "num_layers": len(experts.formats),
        "num_experts": experts.n_experts,
        "format": FORMAT if len(kinds) == 1 else FORMAT_BY_LAYER,
        "source": source_identity(checkpoint),
    }
    if len(kinds) == 1:
        return described[0] | layout
    numbers = [kinds.index(fmt) for fmt in experts.formats]
    return layout | {"formats": described, "layers": numbers}


def _described(fmt: ExpertFormat) -> dict:
    bits, group_size = _widths(fmt)
    return {
        "expert_size": fmt.n_bytes,
        "components": _components(fmt),
        "bits": bits,
        "group_size": group_size,
    }


def source_identity(checkpoint: Checkpoint) -> dict:
    """Identify the routed experts of a checkpoint."""
    return identify(checkpoint, lambda name: ".mlp.experts." in name)


def expert_label(expert: int) -> str:
    """How the list of digests calls an expert."""
    return f"expert {expert}"


def _components(fmt: ExpertFormat) -> list[dict]:
    components, offset = [], 0
    for part in fmt.parts:
        components.append(
            {
                "name": part.name,
                "offset": offset,
                "size": part.n_bytes,
                "shape": list(part.shape),
                "dtype": DTYPE_NAMES[part.dtype],
            }
        )
        offset += part.n_bytes
    return components


def _widths(fmt: ExpertFormat) -> tuple[int | list[int] | None, ...]:
    """Bits and group size: one number each; lists (gate, up, down) if they differ."""
    if not fmt.quantization:
        return None, None
    columns = zip(*(fmt.quantization[p] for p in PROJECTIONS), strict=True)
    return tuple(c[0] if len(set(c)) == 1 else list(c) for c in columns)


def _pack_layer(
    path: Path, experts: ExpertFiles, layer: int, bar: tqdm, checkpoint: Checkpoint
) -> None:
    n_bytes = experts.formats[layer].n_bytes
    labels = {expert_label(e): n_bytes for e in range(experts.n_experts)}
    with ExitStack() as stack, new_parts_file(path, labels) as packed:
        runs = experts.runs[layer]
        numbers = {place[0] for run in runs for place in run.places}
        files = {}
        for n in numbers:
            with told_in_one_line(experts.files[n]):
                files[n] = stack.enter_context(open(experts.files[n], "rb"))
        checksums = [0] * len(labels)
        for expert, label in enumerate(labels):
            for run in runs:  # in the order of the record
                number, offset = run.places[expert]
                data = read_bytes(files[number], offset, run.n_bytes)
                checksums[expert] = checksum([data], checksums[expert])
                bar.update(packed.write(label, data))
        checkpoint.check_unchanged()  # before the file gets its name
        write_small(checksum_path(path), checksum_lines(checksums))
