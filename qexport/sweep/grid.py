"""What a grid's file says: the settings that it spans, and what they share. `docs/sweep.md` states the format."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, Literal

from qexport.calibration import Calibration
from qexport.errors import QExportError, UsageError
from qexport.formats.specs import make_format
from qexport.recipe import RECIPE_KEYS, SHORT, Recipe, chosen, convert
from qexport.sweep.names import folder_name

_PARTS = ("format", "input", "kv")
_TABLES = ("model", "output", "quantize", "setting", "eval")
_QUANTIZE: Mapping[str, type] = {
    "calibration": str, "samples": int, "seqlen": int, "bos": str, "seed": int, "dtype": str,
}  # fmt: skip
_EVAL: Mapping[str, type] = {
    "seqlen": int, "stride": int, "windows": int, "bos": str, "include_path": str, "limit": int, "fewshot": int,
    "batch": int, "dtype": str,
}  # fmt: skip
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Setting:
    """One checkpoint of a grid.

    Attributes:
        name: of its folder.
        number: of the `[[setting]]` that it is from, beginning with 1.
        options: as that table has them, one value of each list.
        recipe: what they come to.
    """

    name: str
    number: int
    options: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Grid:
    """A grid's file.

    Attributes:
        file: its name.
        model: Hub id, folder or `.gguf` file; None is the demo model.
        output: folder of the settings' folders.
        settings: all of them, in the order of the file.
        calibration: of every setting.
        dtype: what jobs compute in.
        evaluation: keyword arguments of `evaluate`.
        against: what is compared with: True is the model itself, None is nothing.
    """

    file: str
    model: str | None
    output: Path
    settings: Sequence[Setting]
    calibration: Calibration
    dtype: str
    evaluation: Mapping[str, Any]
    against: str | Literal[True] | None


@contextmanager
def within(where: str) -> Iterator[None]:
    """Say where in a file the cause of an error is."""
    try:
        yield
    except QExportError as error:
        raise type(error)(f"{where}: {error}") from error


def read_grid(file: Path) -> Grid:
    """A grid from its file; raises `UsageError` that names the file, the table and the key in the way."""
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"grid {file}: can't be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"grid {file}: {error}.") from error
    with within(f"grid {file}"):
        _refuse_unknown(data, _TABLES)
        model, output = data.get("model"), data.get("output")
        if model is not None and not (isinstance(model, str) and model.strip()):
            raise UsageError(
                f"model = {model!r}: expected a Hub id, a folder or a .gguf file; left out it is the demo."
            )
        if not (isinstance(output, str) and output.strip()):
            raise UsageError(f'output = {output!r}: expected the name of a folder, output = "FOLDER".')
        shared, evaluation = _table(data, "quantize"), _table(data, "eval")
        everywhere = {key: shared.pop(key) for key in RECIPE_KEYS if key in shared}
        with within("[quantize]"):
            given = _values(shared, _QUANTIZE)
            dtype = given.pop("dtype", _DTYPES[0])
            if dtype not in _DTYPES:
                raise UsageError(f"dtype = {dtype!r}: expected {', '.join(_DTYPES)}.")
            calibration = Calibration(given.pop("calibration", "self"), **given)
        against = _against(evaluation)
        return Grid(
            str(file), model, Path(output), _settings(data.get("setting"), everywhere), calibration, dtype,
            _evaluation(evaluation), against,
        )  # fmt: skip


def selected(grid: Grid, pattern: str | None) -> list[Setting]:
    """The settings whose names a shell pattern matches, all without one; raises `UsageError` if there are none."""
    found = [s for s in grid.settings if pattern is None or fnmatchcase(s.name, pattern)]
    if not found:
        names = [s.name for s in grid.settings]
        raise UsageError(f"--only {pattern!r}: matches none of {', '.join(names)}.{_close(str(pattern), names)}")
    return found


# ---- tables ------------------------------------------------------------------------------------


def _table(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = data.get(name, {})
    if not isinstance(found, dict):
        raise UsageError(f"{name}: expected a table, [{name}].")
    return dict(found)


def _values(table: Mapping[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    """The table's values in the types that its keys have."""
    _refuse_unknown(table, list(kinds))
    return {key: convert(value, kinds[key], key) for key, value in table.items()}


def _refuse_unknown(table: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in table:
        if key not in known:
            raise UsageError(f"unknown key {key!r}; known: {', '.join(known)}.{_close(key, known)}")


def _close(name: str, names: Sequence[str]) -> str:
    found = get_close_matches(name, names, 1)
    return f" Did you mean {found[0]!r}?" if found else ""


def _against(table: dict[str, Any]) -> str | Literal[True] | None:
    found = table.pop("against", True)
    if not (isinstance(found, bool) or (isinstance(found, str) and found.strip())):
        raise UsageError(f"[eval]: against = {found!r}: expected true for the model itself, false, or another model.")
    return None if found is False else found


def _evaluation(table: dict[str, Any]) -> dict[str, Any]:
    with within("[eval]"):
        lists: dict[str, Any] = {key: _words(table.pop(key), key) for key in ("texts", "tasks") if key in table}
        _refuse_unknown(table, ["texts", "tasks", "against", *_EVAL])
        return {**lists, **_values(table, _EVAL)}


def _words(value: Any, key: str) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not (isinstance(found, list) and all(isinstance(word, str) and word for word in found)):
        raise UsageError(f"{key} = {value!r}: expected a name, or a list of names.")
    return found


# ---- settings ----------------------------------------------------------------------------------


def _settings(tables: Any, everywhere: Mapping[str, Any]) -> list[Setting]:
    if not (isinstance(tables, list) and tables and all(isinstance(table, dict) for table in tables)):
        raise UsageError("expected one or more tables [[setting]], each with a method.")
    found: dict[str, Setting] = {}
    for number, table in enumerate(tables, 1):
        with within(f"setting {number}"):
            for options in _product(table):
                setting = _setting(number, options, everywhere)
                known = found.get(setting.name)
                if known is not None:
                    raise UsageError(
                        f"{setting.name} is in setting {known.number} already. Leave one of them out; where they "
                        "differ, give the recipe of one another name."
                    )
                found[setting.name] = setting
    return list(found.values())


def _product(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One value of each list, in every combination; the last list changes first."""
    spans = {key: value if isinstance(value, list) else [value] for key, value in _flat(table)}
    for key, values in spans.items():
        if not values:
            raise UsageError(f"{key} = []: an empty list spans no setting. Give it a value, or leave it out.")
    for combination in product(*spans.values()):
        yield dict(zip(spans, combination, strict=True))


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values; TOML reads `tune.steps = 64` as a table within the table."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _setting(number: int, options: Mapping[str, Any], everywhere: Mapping[str, Any]) -> Setting:
    left = {**everywhere, **options}
    method = left.pop("method", None)
    if not (isinstance(method, str) and method.strip()):
        raise UsageError(f'needs a method, such as method = "rtn".{_close("method", list(left))}')
    transforms = _words(left.pop("transforms", []), "transforms")
    parts = {key: left.pop(key) for key in _PARTS if key in left}
    for key, value in parts.items():
        if not isinstance(value, str):
            raise UsageError(f"{key} = {value!r}: expected a name.")
    pairs = [(f"format.{key}" if key in SHORT else key, value) for key, value in left.items()]
    recipe = chosen(method, transforms=transforms, options=pairs, **parts)
    make_format(recipe.format, recipe.format_options)  # refuses bits and groups that the format does not have
    return Setting(folder_name({**options, "method": recipe.name, "transforms": transforms}), number, options, recipe)
