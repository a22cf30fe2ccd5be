"""Size of a stored model, from the headers of its safetensors files: what is on disk is what counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import nn

from qexport.checkpoint import Reader, read_json
from qexport.container import METADATA_KEY, parse, read_shard_metadata
from qexport.errors import CheckpointError
from qexport.formats.specs import LinearSpec
from qexport.runtime.packed import Packed

Modules = Mapping[str, tuple[LinearSpec, int, int]]


@dataclass(frozen=True)
class Sizes:
    """Stored sizes.

    Attributes:
        bits_per_weight: of the quantized modules, all their tensors counted but biases; in a dense model of its
            matrices.
        bits_per_parameter: of everything.
        nbytes: of the safetensors files.
    """

    bits_per_weight: float
    bits_per_parameter: float
    nbytes: int


def measure(folder: Path, model: nn.Module | None = None) -> Sizes:
    """Sizes of a packed or dense directory.

    Args:
        folder: the directory.
        model: the loaded model; needed only where the files don't describe themselves, as after `save_pretrained`.

    Raises:
        CheckpointError: a file is missing or damaged, or nothing says how large the modules are.
    """
    reader = Reader(folder)
    nbytes = sum((folder / file).stat().st_size for file in reader.files)
    stored = sum(reader.meta(name).nbytes for name in reader.names)
    config = read_json(folder / "config.json").get("quantization_config")
    if config is None:
        matrices = [reader.meta(name) for name in reader.names if len(reader.meta(name).shape) > 1]
        numel = sum(prod(reader.meta(name).shape) for name in reader.names)
        if not matrices:
            raise CheckpointError(f"{folder}: holds no weights. Check the path.")
        held = 8 * sum(m.nbytes for m in matrices) / sum(prod(m.shape) for m in matrices)
        return Sizes(held, 8 * stored / numel, nbytes)
    parse(config, str(folder / "config.json"))
    modules = packed_modules(reader, model)
    names = {f"{name}.{field}" for name, (spec, n, k) in modules.items() for field in spec.layout(n, k)}
    packed = sum(reader.meta(name).nbytes for name in names)
    weights = sum(n * k for _, n, k in modules.values())
    dense = sum(prod(reader.meta(name).shape) for name in reader.names if name not in names)
    return Sizes(8 * packed / weights, 8 * stored / (weights + dense), nbytes)


def packed_modules(reader: Reader, model: nn.Module | None = None) -> Modules:
    """Spec, n and k of every packed module: from the files, else from the model that was loaded from them."""
    found: dict[str, tuple[LinearSpec, int, int]] = {}
    for file in reader.files:
        if METADATA_KEY in reader.metadata[file]:
            found |= read_shard_metadata(reader.metadata[file], file)
    if not found and model is not None:
        found = {name: (m.spec, m.n, m.k) for name, m in model.named_modules() if isinstance(m, Packed)}
    if not found:
        raise CheckpointError(
            f"{reader.folder}: no file says how large its quantized modules are. A folder of `qexport quantize` does."
        )
    return found
