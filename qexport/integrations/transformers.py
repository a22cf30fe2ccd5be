"""`from_pretrained` for packed checkpoints: our quantizer, as transformers knows such things.

    import qexport
    model = AutoModelForCausalLM.from_pretrained("folder")

transformers builds the model on the meta device, `QExportQuantizer` swaps the linears and compares the headers of the
checkpoint with the layouts, transformers fills the buffers, and the quantizer checks what came. Nothing is ever left to
random initialisation: whatever is missing or foreign is an error here, where transformers would warn.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qexport import checkpoint, container, kvfile
from qexport.checkpoint import Reader, read_json
from qexport.container import FORGOTTEN_IMPORT, METADATA_KEY
from qexport.errors import BackendError, CheckpointError, SourceError, UsageError
from qexport.formats.kv.base import KVFormat
from qexport.integrations import _cache, _modules
from qexport.runtime.dispatch import BACKENDS
from qexport.runtime.linear import QuantLinear
from qexport.runtime.packed import Budget, quantized

METHOD = "qexport"
_HOW_TO_LOAD = ("backend", "cache_gb", "own_cache")
_OTHER_FILES = {"variant", "gguf_file"}  # arguments of `from_pretrained` that name other weights of the same folder


class QExportConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How to load a packed checkpoint, and, once it comes from one, what is packed.

        AutoModelForCausalLM.from_pretrained("folder", quantization_config=QExportConfig(backend="reference"))

    Args:
        backend: `"auto"`, `"triton"`, `"cpu"` or `"reference"`.
        cache_gb: how much decoded weights may take under the reference path, in 1e9 bytes; 0 keeps everything packed.
        own_cache: let `generate` use the quantized cache that the checkpoint names, if it names one.
        description: the checkpoint's own `quantization_config`; never given by hand.

    Raises:
        BackendError: there is no such backend.
    """

    def __init__(
        self, *, backend: str = "auto", cache_gb: float = 0.0, own_cache: bool = True, **description: Any
    ) -> None:
        if backend not in BACKENDS:
            raise BackendError(f"there is no backend {backend!r}; there are {', '.join(BACKENDS)}.")
        if not 0 <= cache_gb < 1e9:
            raise BackendError(f"cache_gb: expected 0 or more, in 1e9 bytes, found {cache_gb}.")
        self.quant_method = METHOD
        self.backend, self.cache_gb, self.own_cache = backend, cache_gb, own_cache
        self.description = {**description, "quant_method": METHOD}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the checkpoint's dictionary, which has no say in how it is loaded."""
        config = cls(**{key: value for key, value in config_dict.items() if key not in _HOW_TO_LOAD})
        for key in _HOW_TO_LOAD:
            if key in kwargs:
                setattr(config, key, kwargs.pop(key))
        return (config, kwargs) if return_unused_kwargs else config

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an argument of `from_pretrained` may change about a checkpoint's own config."""
        return {key: getattr(self, key) for key in _HOW_TO_LOAD}

    def to_dict(self) -> dict[str, Any]:
        """What belongs into `config.json`."""
        return dict(json.loads(json.dumps(self.description)))


class QExportQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads, saves and unpacks; quantizing is the business of `qexport quantize`.

    Raises:
        CheckpointError: the checkpoint is dense, or its config is malformed or too new.
    """

    def __init__(self, quantization_config: QExportConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise CheckpointError(
                "this checkpoint is not packed: expected a quantization_config of quant_method 'qexport' in its "
                "config.json, found none. Pack it with `qexport quantize MODEL`, or load it without QExportConfig."
            )
        self.quantization = container.parse(quantization_config.description)
        self._reader: Reader | None = None
        self._names = _modules.Names()
        self._folder = Path()
        self._fetching: Any = None

    def update_attn_implementation(self, config: Any) -> Any:
        """Runs before files are looked up: take away the note that stops readers who lack this plugin.

        Without a dtype in the config transformers would take that of the first float tensor: here a scale's.
        """
        note = getattr(config, "transformers_weights", None)
        if isinstance(note, str) and not note.endswith((".safetensors", ".safetensors.index.json")):
            config.transformers_weights = None
        if getattr(config, "dtype", None) is None:
            config.dtype = torch.float32
        if self.cache is not None and kvfile.calibrates(self.cache):
            _cache.fetch_too(config)
            self._fetching = config
        return config

    @property
    def cache(self) -> KVFormat | None:
        """The cache to use: the checkpoint's, unless it is not wanted."""
        return self.quantization.kv if self.quantization_config.own_cache else None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Runs once files were looked up."""
        if self._fetching is not None:
            _cache.fetched(self._fetching)
            self._fetching = None
        return dtype

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        """None: our tensors have the names of the model in memory, whatever its original files were called."""
        return []

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        _cache.leave_out(files)
        _cache.fetched(model.config)
        self._reader = _reader(files)
        self._folder = self._reader.folder
        self._names = _modules.Names.of(model, self.quantization.patterns)
        config = self.quantization_config
        budget = Budget(int(config.cache_gb * 1e9))
        _modules.swap(model, self.quantization, self._names, config.backend, budget)
        _modules.untie(model)
        _modules.check_structure(model, self._reader, self.quantization, self._names)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _modules.check_contents(model, self._reader, self._names)
        self._reader = None
        for module in model.modules():
            if isinstance(module, QuantLinear) and module.place.type != "meta":
                _ = module.choice  # a backend that can't run here is an error now, not at the first token
        if self.cache is not None:
            _cache.attach(model, self.cache, self._folder)
        model.save_pretrained = MethodType(save_pretrained, model)
        return model

    def is_serializable(self) -> bool:
        """Packed models save themselves."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Not yet."""
        return False

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """The metadata of every shard: format, version, options, n and k of the packed modules."""
        modules = {
            self._names.stored(name): (module.spec, module.n, module.k) for name, module in quantized(model).items()
        }
        return None, {METADATA_KEY: checkpoint.dump_json(container.shard_metadata(modules))}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        _modules.unpack(model, kind)
        vars(model).pop("save_pretrained", None)
        return model


def _reader(files: Any) -> Reader:
    """A reader of the files that transformers found; raises `CheckpointError` unless all are safetensors files.

    transformers takes a model.safetensors before the shards of an index, and `Reader` refuses a folder with both.
    """
    paths = [Path(file) for file in files or ()]
    foreign = [path.name for path in paths if path.suffix != ".safetensors"]
    if not paths or foreign:
        raise CheckpointError(
            f"a packed checkpoint is made of safetensors files; found {', '.join(foreign) or 'none'}."
        )
    folder = paths[0].parent
    if len(paths) == 1 and paths[0].name == "model.safetensors":
        return Reader(folder)
    return Reader(folder, [str(path.relative_to(folder)) for path in paths])


def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """A packed model's `save_pretrained`: the class's own, and the note for readers without this plugin put back.

    transformers drops the note while it saves the config, and has no hook after that.
    """
    push, names = (
        kwargs.pop("push_to_hub", False),
        ("repo_id", "commit_message", "private", "token", "create_pr", "revision"),
    )
    upload = {key: kwargs.pop(key) for key in names if push and key in kwargs}
    kwargs |= {"token": upload["token"]} if "token" in upload else {}
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
    path = Path(save_directory) / "config.json"
    if path.is_file():
        config = {**checkpoint.read_json(path), "transformers_weights": FORGOTTEN_IMPORT}
        _cache.save(self, path.parent, config)
        checkpoint.write_text(path, checkpoint.dump_json(config, indent=2) + "\n")
    if push:  # only now: what goes up must carry the note too
        self.push_to_hub(upload.pop("repo_id", Path(save_directory).name), **upload)


def register() -> None:
    """Make the plugin known to transformers; harmless when repeated."""
    if auto.AUTO_QUANTIZER_MAPPING.get(METHOD) is QExportQuantizer:
        return
    if not hasattr(HfQuantizer, "update_attn_implementation"):
        warnings.warn(
            "this transformers is too old to load packed checkpoints; version 5.23 is known to work", stacklevel=2
        )
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QExportConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = QExportQuantizer
    merged = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", ())  # whose arguments may override a checkpoint's config
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*merged, QExportConfig)


def load_model(
    name: str,
    *,
    backend: str = "auto",
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    cache_gb: float = 0.0,
    own_cache: bool = True,
    **options: Any,
) -> nn.Module:
    """A packed or dense language model in evaluation mode; see `qexport.load`.

    `own_cache=False` leaves the checkpoint's quantized cache aside and does not read it.

    Raises:
        UsageError: code from the checkpoint is asked for.
        SourceError: there is no such model.
        CheckpointError: a file is missing, damaged or too new, or transformers can't make a model of it.
        LayoutError: a tensor is not what its format demands.
        BackendError: the backend can't run here.
    """
    from qexport.models.auto import reason  # only now: this file is imported while transformers still is

    if options.get("trust_remote_code"):
        raise UsageError("trust_remote_code=True: qexport runs no code from a checkpoint. Leave it out.")
    register()
    options["trust_remote_code"] = False  # or a terminal would be asked
    try:
        return _loaded(
            name, QExportConfig(backend=backend, cache_gb=cache_gb, own_cache=own_cache), dtype, device_map, options
        )
    except (
        OSError,
        ValueError,
        RuntimeError,
        StrictDataclassError,
    ) as error:  # how transformers says missing, foreign, malformed
        kind = CheckpointError if Path(name).is_dir() else SourceError
        raise kind(f"{name}: can't be loaded: {reason(error)}.") from error


def _loaded(name: str, how: QExportConfig, dtype: Any, device_map: Any, options: dict[str, Any]) -> nn.Module:
    from qexport.models.auto import read_config
    from qexport.models.build import hollow, model_class
    from qexport.models.fetch import check_weights

    options.setdefault("use_safetensors", True)
    if Path(name).is_dir() and not options.keys() & _OTHER_FILES:
        folder = Path(name) / options.get("subfolder", "")
        read_json(folder / "config.json")
        check_weights([path.name for path in folder.iterdir()], str(folder))
        Reader(folder)
    hub = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    config = read_config(name, **{key: options[key] for key in hub if key in options})
    hollow(config)  # on the meta device: a config that makes no model is a stated error
    with warnings.catch_warnings():
        if getattr(config, "quantization_config", None) is not None:
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # we mean it
            options["quantization_config"] = how
        model, report = model_class(config).from_pretrained(
            name, config=config, dtype=dtype or "auto", device_map=device_map, output_loading_info=True, **options
        )
    lost = sorted(report["missing_keys"])
    if lost:  # from a dense checkpoint: packed ones were checked before
        raise CheckpointError(
            f"{name}: {lost[0]} is missing; transformers would make up {len(lost)} tensors at random."
        )
    loaded: nn.Module = model.eval()
    return loaded


register()  # here and not in the package, whose watcher may come by while this file is only half imported
