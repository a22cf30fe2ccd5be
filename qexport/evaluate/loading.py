"""The models of one evaluation: what they are, and how they are loaded when they are needed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qexport.errors import SourceError, UsageError
from qexport.evaluate.original import Original, Store
from qexport.evaluate.record import is_packed, versions, weights_id
from qexport.events import Observer
from qexport.folders import cache_folder
from qexport.models import Source, load_dense, open_source
from qexport.models.auto import read_config, read_tokenizer, reason
from qexport.models.fetch import fetch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Loader = Callable[..., Any]


@dataclass(frozen=True)
class Load:
    """How models are loaded.

    Attributes:
        loader: `qexport.load`, or another function with its signature.
        device: where.
        dtype: of all models; None for that of each config.
        backend: of packed models.
        cache_gb: memory for decoded weights, in 1e9 bytes.
        token: for the Hub.
    """

    loader: Loader
    device: torch.device
    dtype: torch.dtype | None
    backend: str
    cache_gb: float
    token: str | None

    @property
    def place(self) -> str:
        """The device's name, as it stands in results."""
        return self.device.type if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)

    def folder(self, folder: Path) -> Any:
        """The model of a directory, packed or dense."""
        place = None if self.device.type == "cpu" else str(self.device)
        return self.loader(
            str(folder), backend=self.backend, dtype=self.dtype, device_map=place, cache_gb=self.cache_gb
        ).eval()

    def dtype_name(self, config: Any) -> str:
        """What a model with this config computes in."""
        dtype = self.dtype or getattr(config, "dtype", None) or torch.float32
        return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Reference:
    """The model to compare with: its name for others, the hash of its weights, and its logits."""

    name: str
    weights: str
    original: Original


def reference(name: str | Path, load: Load, *, batch: int, keep: bool, observer: Observer) -> Reference:
    """Find the model to compare with: dense from anywhere, or another packed directory; it is loaded when needed.

    Args:
        name: directory, Hub id or `.gguf` file.
        load: how.
        batch: windows that run together.
        keep: whether its logits are kept on disk, and taken from there.
        observer: is told of progress.
    """
    source = None if is_packed(Path(name)) else open_source(str(name), token=load.token, observer=observer)
    folder = Path(name) if source is None else source.folder
    weights, config = weights_id(folder), config_of(folder)
    dtype = load.dtype_name(config)
    key = {
        "weights": weights, "dtype": dtype, "device": load.place, "backend": load.backend if source is None else None,
        "batch": batch, "versions": versions(),
    }  # fmt: skip
    store = Store(cache_folder() / "logits", key, observer=observer) if keep else None
    return Reference(public_name(str(name)), weights, Original(lambda: _reference_model(folder, source, load), store))


def is_same_model(target: str | Path, original: str | Path) -> bool:
    """Whether two names mean the same weights."""
    path = Path(original)
    other = path if path.is_dir() else open_source(str(original)).folder
    return weights_id(find_folder(target)[0]) == weights_id(other)


def _reference_model(folder: Path, source: Source | None, load: Load) -> Any:
    if source is None:
        return load.folder(folder)
    dtype = load.dtype or getattr(source.config, "dtype", None) or torch.float32
    return load_dense(source, dtype=dtype, device=load.device).eval()


def load_of(
    loader: Loader | None, *, device: str | None, dtype: str | None, backend: str, cache_gb: float, token: str | None
) -> Load:
    """What options mean: a GPU if there is one; float32 on a CPU, the dtype of the config elsewhere."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = DTYPES[dtype] if dtype is not None else torch.float32 if where.type == "cpu" else None
    return Load(loader or _usual_loader, where, kind, backend, cache_gb, token)


def _usual_loader(path: str, **options: Any) -> Any:
    """`qexport.load`, which lies beside this package."""
    from qexport.integrations.transformers import load_model

    return load_model(path, **options)


def find_folder(target: str | Path, revision: str | None = None, token: str | None = None) -> tuple[Path, bool]:
    """The directory that a target means, of a `.gguf` file what was made of it, and whether it is the user's own."""
    if not str(target):
        raise UsageError("expected a directory, a .gguf file or a Hub id to evaluate, found an empty name.")
    if Path(target).is_dir():
        return Path(target), True
    if Path(target).exists():
        if Path(target).suffix.lower() != ".gguf":
            raise UsageError(f"{target}: expected a directory, a .gguf file or a Hub id, found another file.")
        return open_source(str(target)).folder, False
    return fetch(str(target), revision=revision, token=token, weights=True), False


def config_of(folder: Path) -> Any:
    """The config of a directory; raises `SourceError`."""
    try:
        return read_config(folder, local_files_only=True)
    except (ValueError, OSError) as error:
        raise SourceError(f"{folder}: transformers can't read config.json ({reason(error)}).") from error


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a directory; raises `SourceError`."""
    return read_tokenizer(folder, name=str(folder), advice="Copy the original's tokenizer files there.")


def public_name(name: str) -> str:
    """A model's name without the folders of this machine."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def spelled(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line has them; what is None, False or empty is left out."""
    words = []
    for key, value in options.items():
        if isinstance(value, list | tuple):
            words += [word for item in value for word in (f"--{key}", str(item))]
        elif value is not None and value is not False and value != "":
            words += [f"--{key}"] + ([] if value is True else [str(value)])
    return words
