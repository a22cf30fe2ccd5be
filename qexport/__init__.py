"""qexport: quantize language models into packed checkpoints that Hugging Face transformers loads.

Importing this package registers with transformers, now if it is there or whenever it comes, and imports neither it nor
torch. The public names are loaded when they are first used.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qexport.errors import QExportError as QExportError
    from qexport.integrations.transformers import QExportConfig as QExportConfig
    from qexport.load import load as load
    from qexport.plan import make_plan as make_plan
    from qexport.quantize import quantize as quantize
    from qexport.runtime.cache import kv_cache as kv_cache

    __version__: str

_HOMES = {
    "QExportConfig": "qexport.integrations.transformers",
    "QExportError": "qexport.errors",
    "kv_cache": "qexport.runtime.cache",
    "load": "qexport.load",
    "make_plan": "qexport.plan",
    "quantize": "qexport.quantize",
}

__all__ = ["QExportConfig", "QExportError", "__version__", "kv_cache", "load", "make_plan", "quantize"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("qexport")
    if name not in _HOMES:
        raise AttributeError(f"module 'qexport' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `qexport.load` the function: importing the module of that name would put itself there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if _HOMES.get(name) == f"qexport.{name}" and isinstance(value, ModuleType):
            value = getattr(value, name, value)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


# ---- registration with transformers ------------------------------------------------------------

_REGISTRY = "transformers.quantizers.auto"


def _register() -> None:
    try:
        importlib.import_module("qexport.integrations.transformers")  # which registers itself
    except Exception as error:  # noqa: BLE001  an error of ours must not break `import transformers` for everybody
        warnings.warn(f"qexport could not register with transformers: {type(error).__name__}: {error}", stacklevel=2)


class _Watcher(importlib.abc.MetaPathFinder):
    """Registers when transformers first imports its list of quantizers, then steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Watcher)]
        _register()


if _REGISTRY in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Watcher())
