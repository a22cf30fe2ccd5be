"""The quantized cache of a checkpoint: fetched with its weights, checked, given to the model, and saved with it."""

from pathlib import Path
from typing import Any

from qexport import kvfile
from qexport.errors import CheckpointError
from qexport.formats.kv.base import KVFormat, kv_json, kv_name


def fetch_too(config: Any) -> None:
    """Have transformers fetch the cache's file with the weights: same repository, revision, token and folder.

    It asks the config's class, and nothing that a `config.json` could change, for files to fetch beside weights. So
    this one config gets a class of its own until files were looked up; see `fetched`.
    """
    cls: Any = type(config)
    if not hasattr(cls, "extra_files"):
        return
    made: Any = type(cls)(cls.__name__, (cls,), {"__module__": cls.__module__})
    made.extra_files = (*cls.extra_files, kvfile.FILE)
    made._qexport_class = cls
    config.__class__ = made


def fetched(config: Any) -> None:
    """Give a config its class back."""
    config.__class__ = getattr(type(config), "_qexport_class", type(config))


def leave_out(files: list[str] | None) -> None:
    """Take the cache's file out of the list of weights, which transformers reads after us."""
    for file in [file for file in files or () if Path(file).name == kvfile.FILE]:
        files.remove(file)  # type: ignore[union-attr]


def attach(model: Any, fmt: KVFormat, folder: Path) -> None:
    """Read and check what was calibrated, and make the model's `generate` use the cache.

    Raises:
        CheckpointError: the cache's file is missing or damaged or another's, or the model has no such cache.
        LayoutError: a tensor in it is not what the format demands.
    """
    from qexport.models import attention_layers  # not at the top: transformers may be half imported then
    from qexport.runtime.cache import keep

    heads = {layer: (own.heads, own.dim) for layer, own in attention_layers(model.config).items()}
    if not heads:
        raise CheckpointError(
            f"config.json: names the cache {kv_name(fmt)!r}, and {type(model).__name__} has no attention layer whose "
            "cache could be quantized. Fetch or write it again."
        )
    keep(model, fmt, kvfile.read(folder, fmt, heads))
    if not hasattr(type(model), "generate"):  # a base model, which can be saved and can't generate
        del model.generate


def save(model: Any, folder: Path, config: dict[str, Any]) -> None:
    """Write the cache's file beside a saved model, and name the cache in its config, or none if it has none."""
    from qexport.runtime.cache import kept

    own = kept(model)
    described = config.get("quantization_config")
    if isinstance(described, dict):
        described["kv"] = None if own is None else kv_json(own.fmt)
    (folder / kvfile.PENDING).unlink(missing_ok=True)
    if own is not None and own.statics:
        kvfile.write(folder / kvfile.FILE, own.fmt, own.statics)
