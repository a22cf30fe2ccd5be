"""Formats, methods, transforms and kernels by name: a file's name is its id, and it is imported on first use.

Each such file ends with `plugin = <its class>`. Installed packages may add to a kind through the entry point group
`qexport.<kind>`; a checkpoint can name what is installed and can never cause any other import.
"""

import importlib
import importlib.metadata
import pkgutil
from difflib import get_close_matches
from functools import cache
from typing import Any

from qexport.errors import UsageError

_HELPERS = {"base", "specs"}


@cache
def names(kind: str) -> tuple[str, ...]:
    """All names of a kind (`"formats"`, `"methods"`, `"transforms"`, `"kernels"`), sorted, without importing them."""
    package = importlib.import_module(f"qexport.{kind}")
    own = {
        m.name
        for m in pkgutil.iter_modules(package.__path__)
        if not (m.ispkg or m.name.startswith("_") or m.name in _HELPERS)
    }
    return tuple(sorted(own | set(_installed(kind))))


def get(kind: str, name: str) -> Any:
    """The class behind a name; raises `UsageError` with the closest names when there is none."""
    if name not in names(kind):
        close = get_close_matches(name, names(kind), 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"there is no {kind.removesuffix('s')} {name!r}; there are {', '.join(names(kind))}.{hint}")
    installed = _installed(kind)
    if name in installed:
        return installed[name].load()
    return importlib.import_module(f"qexport.{kind}.{name}").plugin


@cache
def _installed(kind: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {e.name: e for e in importlib.metadata.entry_points(group=f"qexport.{kind}")}
