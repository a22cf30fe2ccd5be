"""A GGUF file becomes a Hugging Face folder, one tensor at a time.

Names, layouts and the config follow transformers' own GGUF support. Every tensor is dequantized and stored as float16,
which from then on is the model's source dtype.
"""

import copy
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qexport.checkpoint import write_tensors, write_text
from qexport.errors import PlanError, SourceError
from qexport.events import Advanced, Note, Observer, Started
from qexport.models import mapping
from qexport.models.build import hollow, model_class

_SHARD = 64 << 20
# Computed from the config by transformers: never stored by it.
_DERIVED = {"rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"}
_VERSION = 1


def convert(path: Path, *, work: Path, observer: Observer) -> Path:
    """Convert a GGUF file, unless an earlier call did.

    Args:
        path: the file.
        work: folder for conversions; a folder named after the file and its state is made in it.
        observer: is told of the progress.

    Returns:
        A folder with config, tokenizer and float16 safetensors shards.

    Raises:
        SourceError: the file is no GGUF, or a value does not fit float16.
        PlanError: transformers does not know the architecture, or tensors have no place in it.
    """
    stat = path.stat()
    key = hashlib.sha256(f"{_VERSION} {path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = work / f"{path.stem}-{key}"
    if (folder / "config.json").is_file():
        return folder
    observer(Note(f"{path.name}: converting GGUF to float16 safetensors in {folder}."))
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(path, temporary, observer)
        if folder.exists():  # another process was faster
            shutil.rmtree(temporary)
        else:
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _write(path: Path, folder: Path, observer: Observer) -> None:
    settings, config = _side_files(path, folder)
    reader = _reader(path)
    _rope_factors(reader, config, path.name)
    config.dtype = torch.float16
    config.architectures = [model_class(config).__name__]
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    shards: dict[str, str] = {}
    pending: dict[str, Tensor] = {}
    count = 0

    def flush() -> None:
        nonlocal count
        if pending:
            count += 1
            file = f"model-{count:05}.safetensors"
            write_tensors(folder / file, pending, None)
            shards.update(dict.fromkeys(pending, file))
            pending.clear()

    for name, tensor in _tensors(path, reader, config, settings, observer):
        if sum(t.nbytes for t in pending.values()) + tensor.nbytes > _SHARD:
            flush()
        pending[name] = tensor
    flush()
    index = {"metadata": {}, "weight_map": dict(sorted(shards.items()))}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    # Last: its presence says that the folder is complete.
    final = config.to_dict()
    for transient in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        final.pop(transient, None)
    write_text(folder / "config.json", json.dumps(final, indent=2, sort_keys=True, default=str) + "\n")


def _side_files(path: Path, folder: Path) -> tuple[dict[str, Any], PretrainedConfig]:
    """Write the tokenizer; returns the config as transformers reads it from the file, raw and made."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SourceError(f"{path}: is not a readable GGUF file: it does not start with GGUF. Fetch it again.")
    try:
        # Nothing but the config is kept: the parsed vocabulary is larger than many a layer.
        settings: dict[str, Any] = load_gguf_checkpoint(path, return_tensors=False)["config"]
        options = {key: value for key, value in settings.items() if key != "model_type"}
        config: PretrainedConfig = AutoConfig.for_model(settings["model_type"], **options)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False).save_pretrained(folder)
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise PlanError(
            f"{path.name}: transformers can't read this GGUF file: {error}. Start from the safetensors model."
        ) from error
    return settings, config


def _reader(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise SourceError(f"{path}: is not a readable GGUF file: {error}. Fetch it again.") from error


def _tensors(
    path: Path, reader: Any, config: PretrainedConfig, parsed: dict[str, Any], observer: Observer
) -> Iterator[tuple[str, Tensor]]:
    """All tensors under their in-memory names, float16."""
    model = hollow(config)
    architecture = str(reader.fields["general.architecture"].contents())
    reader.fields.clear()  # the vocabulary again
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed)
    names: dict[str, str] = get_gguf_hf_weights_map(_Outline(model, 1), processor)
    stored = [t for t in reader.tensors if t.name not in _DERIVED]
    strangers = [t.name for t in stored if t.name not in names and not _is_part(t.name, names)]
    if strangers:
        raise PlanError(
            f"{path.name}: {type(model).__name__} has no place for {mapping.listed(strangers)}. "
            "Start from the safetensors model."
        )
    parts_left = Counter(names[t.name] for t in stored if t.name in names)
    made: dict[str, Any] = {"tensors": {}}
    observer(Started("convert", len(stored), "tensors"))
    for done, tensor in enumerate(stored, 1):
        result = processor.process(
            weights=_dequantized(path, tensor), name=tensor.name, tensor_key_mapping=names, parsed_parameters=made
        )
        if result.name in names:
            made["tensors"][names[result.name]] = torch.from_numpy(np.ascontiguousarray(result.weights))
        home = names.get(tensor.name)
        if home is not None:
            parts_left[home] -= 1
        for name in [n for n in made["tensors"] if parts_left[n] <= 0]:
            yield name, _half(path.name, name, made["tensors"].pop(name))
        observer(Advanced("convert", done, tensor.name))
    for name, value in made["tensors"].items():
        yield name, _half(path.name, name, value)


class _Outline:
    """A model as `get_gguf_hf_weights_map` sees it, without its deeper modules: it would ask each for a map."""

    def __init__(self, module: Any, depth: int) -> None:
        self.config, self._module, self._depth = getattr(module, "config", None), module, depth

    def state_dict(self) -> Any:
        return self._module.state_dict()

    def named_children(self) -> list[tuple[str, "_Outline"]]:
        """Some files name their tensors as the bare decoder does, so that one level is looked at."""
        return [(n, _Outline(m, self._depth - 1)) for n, m in self._module.named_children()] if self._depth else []


def _is_part(name: str, names: dict[str, str]) -> bool:
    """Stacked experts and GPT-2's head are claimed by the processors, under names without suffix or with another."""
    return name.removesuffix(".weight") in names or name == "output.weight"


def _dequantized(path: Path, tensor: Any) -> np.ndarray[Any, Any]:
    from gguf import dequantize

    # Read rather than mapped, so that memory holds one tensor and not the file.
    raw = np.fromfile(path, dtype=np.uint8, count=int(tensor.n_bytes), offset=int(tensor.data_offset))
    data = raw.view(tensor.data.dtype).reshape(tensor.data.shape)
    return dequantize(data, tensor.tensor_type)


def _half(where: str, name: str, tensor: Tensor) -> Tensor:
    half = tensor.to(torch.float16)
    if not torch.isfinite(half).all():
        raise SourceError(
            f"{where}: {name} holds values outside float16, up to {tensor.abs().max():.3g}. "
            "Start from the safetensors model."
        )
    return half


def _rope_factors(reader: Any, config: PretrainedConfig, where: str) -> None:
    """Llama 3 files keep their rotary scaling as a tensor, which transformers passes over: put it back into the config.

    Raises:
        PlanError: the factors are not those of Llama 3's rule.
    """
    stored = [t for t in reader.tensors if t.name == "rope_freqs.weight"]
    if not stored:
        return
    factors = torch.from_numpy(np.array(stored[0].data, dtype=np.float32).reshape(-1))
    plain = dict(config.rope_parameters)
    scaled = {
        **plain,
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    before = frequencies(config, plain)
    after = frequencies(config, scaled)
    if before.shape != factors.shape or not torch.allclose(before / after, factors, rtol=1e-3):
        raise PlanError(
            f"{where}: rope_freqs.weight holds rotary factors that are not Llama 3's. "
            "transformers does not read them: start from the safetensors model."
        )
    config.rope_parameters = scaled


def frequencies(config: PretrainedConfig, rope: dict[str, Any]) -> Tensor:
    """Rotary frequencies, float32 [head_dim / 2], under some rotary settings."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if rope["rope_type"] == "default":
        return plain
    own = copy.deepcopy(config)
    own.rope_parameters = rope
    frequencies: Tensor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](own, "cpu")[0]
    return frequencies
