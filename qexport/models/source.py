"""A model to read from: a folder, a repository of the Hub or a GGUF file, as tensors under their in-memory names."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qexport.checkpoint import Reader, companions, read_json
from qexport.errors import CheckpointError, PlanError, SourceError
from qexport.events import Note, Observer, ignore
from qexport.folders import cache_folder
from qexport.models import gguf, mapping
from qexport.models.auto import read_config, read_tokenizer, reason
from qexport.models.build import hollow, model_class, quiet
from qexport.models.fetch import Headers, check_weights, fetch, repo_files
from qexport.models.parts import WeightView

# Elements that are converted at a time.
PIECE = 1 << 22


@dataclass
class Source:
    """An opened model. Tensors go by the names that they have in the loaded model's state dict.

    Attributes:
        folder: where its files are.
        name: what the user called it.
        commit: the Hub's commit, if it came from there.
        config: its configuration; where the checkpoint holds two different tensors that the config ties,
            `tie_word_embeddings` becomes False when `origins` is first asked for.
        stored: the checkpoint under its own names.
    """

    folder: Path
    name: str
    commit: str | None
    config: PretrainedConfig
    stored: mapping.Stored

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on the meta device."""
        return hollow(self.config)

    @cached_property
    def origins(self) -> Mapping[str, mapping.Origin]:
        """Where each tensor of the model comes from; of tied tensors, only the first is listed."""
        found = mapping.map_checkpoint(self.model, self.stored, self.name)
        if found.untied:
            # transformers loads such a checkpoint untied, with a warning: the config is wrong, the tensors are right.
            self.config = copy.deepcopy(self.config)
            self.config.tie_word_embeddings = False
            self.config.get_text_config().tie_word_embeddings = False
            self.__dict__["model"] = hollow(self.config)
            found = mapping.map_checkpoint(self.model, self.stored, self.name)
        return found.origins

    def _origin(self, param: str) -> mapping.Origin:
        origin = self.origins.get(param) or self.origins.get(mapping.tied_names(self.model).get(param, ""))
        if origin is None:
            raise SourceError(f"{self.name}: has no tensor {param}.")
        return origin

    def meta(self, param: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Stored dtype and shape of a tensor, from headers alone."""
        origin = self._origin(param)
        return origin.dtype, origin.shape

    def read(self, param: str) -> Tensor:
        """A tensor in its stored dtype, on the CPU."""
        return mapping.read(self.model, self.stored, self._origin(param))

    def read_as(self, param: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
        """A tensor in another dtype, on a device; a large one is converted in pieces and is never in memory twice."""
        origin = self._origin(param)
        if not isinstance(origin, mapping.Plain) or origin.dtype == dtype or torch.Size(origin.shape).numel() < PIECE:
            return self.read(param).to(device, dtype)
        out = torch.empty(origin.shape, dtype=dtype, device=device)
        rows = max(PIECE * origin.shape[0] // out.numel(), 1)
        for start in range(0, origin.shape[0], rows):
            stop = min(start + rows, origin.shape[0])
            out[start:stop] = self.stored.read_rows(origin.key, start, stop)
        return out

    def view(self, view: WeightView) -> Tensor:
        """A weight as float32 [n, k], contiguous and never shared with another."""
        origin = self._origin(view.param)
        if view.index is None:
            weight = mapping.read(self.model, self.stored, origin)
        else:
            weight = mapping.read_slice(self.model, self.stored, origin, view.index)
        weight = weight.T if view.transposed else weight
        return weight.to(torch.float32).contiguous()

    def chunks(self, param: str, size: int = 1 << 24) -> Iterator[bytes]:
        """The bytes of a tensor, `size` at a time; one that has to be merged is made whole first."""
        origin = self._origin(param)
        if isinstance(origin, mapping.Plain):
            yield from self.stored.chunks(origin.key, size)
            return
        data = self.read(param).contiguous().flatten().view(torch.uint8)
        for start in range(0, data.numel(), size):
            yield data[start : start + size].numpy().tobytes()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; raises `SourceError` when its folder has none."""
        advice = "Put tokenizer.json and tokenizer_config.json beside the weights."
        return read_tokenizer(self.folder, name=self.name, advice=advice)

    def companions(self) -> tuple[Path, ...]:
        """Files that a quantized copy keeps as they are: tokenizer, chat template, generation settings, processor."""
        return companions(self.folder)


def open_source(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    work: Path | None = None,
    weights: bool = True,
    observer: Observer = ignore,
) -> Source:
    """Open a model for reading.

    Args:
        model: a folder, a `.gguf` file, or `owner/name` on the Hub.
        revision: branch, tag or commit on the Hub.
        token: access token for the Hub.
        work: where a GGUF file is converted to; by default a folder in qexport's cache, which is used again next time.
        weights: False fetches no weights from the Hub: enough for `anatomy`.
        observer: is told what is fetched or converted.

    Raises:
        SourceError: there is no such model, or it can't be reached or read.
        PlanError: it is quantized already, or of a kind that can't be handled.
    """
    path = Path(model).expanduser()
    commit = None
    stored: mapping.Stored
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise SourceError(f"{model}: there is no such file.")
        folder = gguf.convert(path, work=work or cache_folder() / "gguf", observer=observer)
        stored = Reader(folder)
    elif path.is_dir():
        folder = path
        if not (path / "config.json").is_file():
            raise SourceError(f"{model}: expected config.json, found none. Pass a Hugging Face model folder.")
        check_weights([p.name for p in path.iterdir()], model)
        _check_config(read_json(path / "config.json"), model)
        stored = Reader(folder)
    elif path.exists():
        raise SourceError(f"{model}: is a file. Pass its folder, a .gguf file, or owner/name on the Hub.")
    else:
        folder, stored = _from_hub(model, revision, token, weights, observer)
        commit = folder.name
    _check_config(read_json(folder / "config.json"), model)
    return Source(folder, model, commit, _config(folder, model), stored)


def _from_hub(
    repo: str, revision: str | None, token: str | None, weights: bool, observer: Observer
) -> tuple[Path, mapping.Stored]:
    files = repo_files(repo, revision=revision, token=token)
    if files is not None:
        check_weights([f for f in files if "/" not in f], repo)
    folder = fetch(repo, revision=revision, token=token, weights=False)
    _check_config(read_json(folder / "config.json"), repo)
    if not weights and files is not None:
        return folder, Headers(repo, revision=revision, token=token)
    observer(Note(f"{repo}: fetching the weights from the Hub, or from its cache."))
    folder = fetch(repo, revision=revision, token=token, weights=True)
    check_weights([p.name for p in folder.iterdir()], repo)
    return folder, Reader(folder)


def _check_config(config: Mapping[str, Any], where: str) -> None:
    for part in (config, config.get("text_config") or {}):
        if not isinstance(part, Mapping):
            raise PlanError(f"{where}: expected a table under text_config in config.json, found {part!r:.50}.")
        quantization = part.get("quantization_config") or part.get("compression_config")
        if quantization:
            named = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
            method = named or "unknown method"
            raise PlanError(
                f"{where}: is quantized already ({method}). Quantizing it again would add its error to ours: "
                "start from the model that it was made from."
            )


def _config(folder: Path, where: str) -> PretrainedConfig:
    try:
        return read_config(folder, local_files_only=True)
    except (ValueError, OSError) as error:
        raise PlanError(
            f"{where}: transformers can't read config.json ({reason(error)}). A newer transformers may know this "
            "model; code from a checkpoint is never run."
        ) from error


def load_dense(source: Source, *, dtype: torch.dtype, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The whole unquantized model in memory, in eval mode.

    Raises:
        SourceError: transformers can't load it.
    """
    known = set(source.origins)  # refuses what would be initialised at random
    try:
        with quiet():
            model, report = model_class(source.config).from_pretrained(
                source.folder,
                config=copy.deepcopy(source.config),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise SourceError(f"{source.name}: transformers can't load it: {error}") from error
    lost = sorted(set(report["missing_keys"]) & known)
    if lost:
        raise CheckpointError(f"{source.name}: {lost[0]} was not loaded. Compare config.json with the checkpoint.")
    return model.to(device).eval().requires_grad_(False)
