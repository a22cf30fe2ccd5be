"""Recipes: the user's choice of method, format and options for each module, as data.

A recipe is a TOML file (`schema = 1`), one of ours or the user's; the command line's `--bits`, `-s`, `--set` and
`--ignore` change it by the same rules. Everything here is pure but `load_recipe`, which reads one file.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

from qexport import plugins
from qexport.errors import UsageError
from qexport.formats.kv._presets import NONE, PRESETS

RECIPE_KEYS = ("lm_head", "embeddings")
_TABLES = ("method", "format", "input", "transforms", "block", "kv", "modules", "ignore")
TIERS = ("recommended", "paper", "experimental")
SHORT = (
    "bits",
    "group_size",
    "symmetric",
)  # options that are the format's, whoever else has such
_PARTS = ("method", "format", "input")  # what `--set` can exchange for some modules
_LEAST_GROUP, _USUAL_GROUP = 32, 64  # of an embedding: at 16 scales and zeros would take more than a bit a weight


@dataclass(frozen=True)
class Change:
    """One option for the modules that a pattern matches; the pattern is a shell pattern over module paths."""

    pattern: str
    key: str
    value: Any


@dataclass(frozen=True)
class Recipe:
    """What to do with every linear of a model.

    Attributes:
        name: what `--method` calls it.
        summary: one line.
        source: paper and table that it follows.
        method: name of the method; `method_options` are those that differ from its defaults.
        format: name of the format; `format_options` likewise.
        input: name of what rounds the linears' inputs, "" if they stay floats; `input_options` likewise.
        lm_head: bits of the output head, True for those of the recipe, 0 if it stays dense.
        embeddings: bits of the token embedding, 0 if it stays dense.
        transforms: name and options of each transform, in the order in which they are applied.
        block: name of the method that works on whole layers afterwards; `block_options` as for the method.
        kv: name of the cache of keys and values, "none" for the model's own, "" for what lies there already;
            `kv_options` are those that differ from the name's.
        tier: `"recommended"`, `"paper"` for a paper's setting, or `"experimental"`.
        changes: options for some modules, later ones win.
        ignore: patterns of modules that stay dense.
    """

    name: str
    summary: str
    source: str
    method: str
    format: str
    method_options: Mapping[str, Any] = field(default_factory=dict)
    format_options: Mapping[str, Any] = field(default_factory=dict)
    input: str = ""
    input_options: Mapping[str, Any] = field(default_factory=dict)
    lm_head: int = 0
    embeddings: int = 0
    transforms: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    block: str = "tune"
    block_options: Mapping[str, Any] = field(default_factory=dict)
    kv: str = ""
    kv_options: Mapping[str, Any] = field(default_factory=dict)
    tier: str = "experimental"
    changes: tuple[Change, ...] = ()
    ignore: tuple[str, ...] = ()


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that ship."""
    folder = resources.files("qexport.recipes")
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a path that ends in `.toml`; raises `UsageError`."""
    if name.endswith(".toml"):
        try:
            text = Path(name).read_text()
        except OSError as error:
            raise UsageError(f"recipe {name}: can't be read: {error.strerror}.") from error
        return parse_recipe(text, name)
    if name not in recipe_names():
        raise UsageError(
            f"there is no method {name!r}; there are {', '.join(recipe_names())}.{_close(name, recipe_names())}"
        )
    return parse_recipe((resources.files("qexport.recipes") / f"{name}.toml").read_text(), name)


def chosen(
    name: str,
    *,
    format: str | None = None,  # noqa: A002
    input: str | None = None,  # noqa: A002
    transforms: Sequence[str] = (),
    kv: str | None = None,
    options: Sequence[tuple[str, Any]] = (),
) -> Recipe:
    """A recipe by name or path, changed as `--format`, `--input`, `-t`, `--kv` and `-s` of the command line do it."""
    recipe = with_parts(load_recipe(name), format=format, input=input)
    return with_options(with_kv(with_transforms(recipe, transforms), kv), options)


def parse_recipe(text: str, where: str) -> Recipe:
    """A recipe from TOML text; raises `UsageError` that names the key in the way."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {where}: {error}.") from error
    known = {"schema", "name", "summary", "source", "tier", *_TABLES, *RECIPE_KEYS}
    for key in data:
        if key not in known:
            raise UsageError(
                f"recipe {where}: unknown key {key!r}; known: {', '.join(sorted(known))}.{_close(key, known)}"
            )
    if data.get("schema") != 1:
        raise UsageError(f"recipe {where}: expected schema = 1, found {data.get('schema')!r}.")
    for kind in ("method", "format", "input", "block", "kv"):
        if not isinstance(data.get(kind, {}), Mapping):
            raise UsageError(f'recipe {where}: [{kind}] must be a table, such as [{kind}] with name = "...".')
    tables = {kind: dict(data.get(kind) or {}) for kind in ("method", "format")}
    chosen = {kind: table.pop("name", None) for kind, table in tables.items()}
    for kind, value in chosen.items():
        if not isinstance(value, str):
            raise UsageError(f"recipe {where}: [{kind}] needs a name.")
    recipe = Recipe(
        name=str(data.get("name") or Path(where).stem),
        summary=str(data.get("summary", "")),
        source=str(data.get("source", "")),
        tier=str(data.get("tier", TIERS[-1])),
        method=chosen["method"],
        format=chosen["format"],
        ignore=tuple(data.get("ignore", ())),
    )
    if recipe.tier not in TIERS:
        raise UsageError(f"recipe {where}: tier must be {', '.join(TIERS)}, found {recipe.tier!r}.")
    options = [(f"{kind}.{key}", value) for kind in ("method", "format") for key, value in tables[kind].items()]
    options += [(f"recipe.{key}", data[key]) for key in RECIPE_KEYS if key in data]
    recipe = with_options(recipe, options)
    return _with_tables(recipe, data, where)


def _with_tables(recipe: Recipe, data: Mapping[str, Any], where: str) -> Recipe:
    """The recipe with what a file has of `[input]`, `[[transforms]]`, `[block]`, `[kv]` and `[[modules]]`."""
    rounding = dict(data.get("input", {}))
    if "input" in data and not isinstance(rounding.get("name"), str):
        raise UsageError(f"recipe {where}: [input] needs a name.")
    recipe = with_parts(recipe, input=str(rounding.pop("name", recipe.input)))
    recipe = with_options(recipe, [(f"input.{key}", value) for key, value in rounding.items()])
    for entry in data.get("transforms", ()):
        table = dict(entry) if isinstance(entry, Mapping) else {}
        named = table.pop("name", None)
        if not isinstance(named, str):
            raise UsageError(f"recipe {where}: every [[transforms]] needs a name.")
        recipe = with_transforms(recipe, [named])
        recipe = with_options(recipe, [(f"transform.{named}.{key}", value) for key, value in table.items()])
    block = dict(data.get("block") or {})
    recipe = replace(recipe, block=str(block.pop("name", recipe.block)))
    plugins.get("blocks", recipe.block)
    recipe = with_options(recipe, [(f"{recipe.block}.{key}", value) for key, value in block.items()])
    if "kv" in data:
        cache = dict(data["kv"])
        if not isinstance(cache.get("name"), str):
            raise UsageError(f"recipe {where}: [kv] needs a name.")
        recipe = with_kv(recipe, cache.pop("name"), [(f"kv.{key}", value) for key, value in cache.items()])
    for entry in data.get("modules", ()):
        pattern = entry.get("pattern")
        if not isinstance(pattern, str):
            raise UsageError(f"recipe {where}: every [[modules]] needs a pattern.")
        changes = tuple(Change(pattern, k, v) for k, v in entry.items() if k != "pattern")
        recipe = replace(recipe, changes=recipe.changes + changes)
    return recipe


def with_parts(
    recipe: Recipe,
    *,
    method: str | None = None,
    format: str | None = None,  # noqa: A002
    input: str | None = None,  # noqa: A002
) -> Recipe:
    """The recipe with another method, format or rounding of inputs; options that the new one does not have are dropped.

    So is the group size of a format: 128 is usual for `uniform` and none for `sdr`, which has its own default. The
    input "none" is none.
    """
    if input is not None and input != recipe.input:
        if input != "none":
            plugins.get("inputs", input)
        recipe = replace(recipe, input="" if input == "none" else input, input_options={})
    if method and method != recipe.method:
        recipe = replace(recipe, method=method, method_options={})
    if format and format != recipe.format:
        cls = plugins.get("formats", format)
        kept = {k: v for k, v in recipe.format_options.items() if k in _types(cls) and k != "group_size"}
        recipe = replace(recipe, format=format, format_options=kept)
    return recipe


def with_transforms(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe with more transforms, after its own; one that it has already stays where it is."""
    for name in names:
        plugins.get("transforms", name)
        if name not in dict(recipe.transforms):
            recipe = replace(recipe, transforms=(*recipe.transforms, (name, {})))
    return recipe


def with_kv(recipe: Recipe, name: str | None, options: Sequence[tuple[str, Any]] = ()) -> Recipe:
    """The recipe with another cache, unless `name` is None, and with options `kv.key` of it.

    Raises:
        UsageError: there is no such cache or option, or the option can't have this value.
    """
    if name is not None and name != recipe.kv:
        recipe = replace(recipe, kv=name, kv_options={})
    return replace(recipe, kv_options={**recipe.kv_options, **kv_settings(recipe.kv, options)})


def kv_settings(name: str, options: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Options `kv.key` of a cache, by their bare names and types; raises `UsageError` as `with_kv` does."""
    from qexport.formats.kv.base import kv_options  # brings torch, for which `--help` should not wait

    if name not in ("", NONE, *PRESETS):
        known = [*PRESETS, NONE]
        raise UsageError(f"there is no cache {name!r}; --kv takes {', '.join(known)}.{_close(name, known)}")
    types = kv_options(name) if name in PRESETS else {}
    found = {}
    for key, value in options:
        bare = key.removeprefix("kv.")
        if not types:
            there = ", ".join(PRESETS)
            raise UsageError(f"option {key!r}: the cache stays as it is here; --kv NAME quantizes it: {there}.")
        if bare not in types:
            there = ", ".join(f"kv.{option}" for option in types)
            raise UsageError(f"no option {key!r} for cache {name!r}; there are {there}.{_close(bare, list(types))}")
        found[bare] = convert(value, types[bare], key)
    return found


def format_settings(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a format in the types that it declares; those that it does not have stay as they are.

    Raises:
        UsageError: there is no such format, or an option can't have this value.
    """
    types = _types(plugins.get("formats", name))
    return {key: convert(value, types[key], key) if key in types else value for key, value in options.items()}


def split_kv(options: Sequence[tuple[str, Any]]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """Options apart: those of the cache, whose keys begin with `kv.`, and the others."""
    return [o for o in options if o[0].startswith("kv.")], [o for o in options if not o[0].startswith("kv.")]


def with_options(recipe: Recipe, options: Sequence[tuple[str, Any]]) -> Recipe:
    """The recipe with `-s key=value` options; raises `UsageError` unless a key belongs to exactly one part."""
    cache, options = split_kv(options)
    recipe = with_kv(recipe, None, cache) if cache else recipe
    for key, value in options:
        part, name = route(key, recipe)
        if part == "recipe":
            recipe = replace(recipe, **{name: _bits(value, name, key)})  # type: ignore[arg-type]
            continue
        converted = {name: convert(value, _owners(recipe)[part][name], key)}
        if part == recipe.block:
            recipe = replace(recipe, block_options={**recipe.block_options, **converted})
        elif part.startswith("transform."):
            own = [(t, {**o, **converted} if part == f"transform.{t}" else o) for t, o in recipe.transforms]
            recipe = replace(recipe, transforms=tuple(own))
        elif part == "method":
            recipe = replace(recipe, method_options={**recipe.method_options, **converted})
        elif part == "input":
            recipe = replace(recipe, input_options={**recipe.input_options, **converted})
        else:
            recipe = replace(recipe, format_options={**recipe.format_options, **converted})
    return recipe


def route(key: str, recipe: Recipe) -> tuple[str, str]:
    """Which part of a recipe an option belongs to, and its bare name.

    Parts are `"method"`, `"format"`, `"input"`, `"recipe"`, `"transform.NAME"` for each transform, and the block
    method's name.
    """
    owners = _owners(recipe)
    prefix, _, bare = key.rpartition(".")
    parts = [part for part, names in owners.items() if bare in names and prefix in ("", part)]
    if len(parts) == 1:
        return parts[0], bare
    everything = [f"{part}.{name}" for part, names in owners.items() for name in names]
    if parts:
        raise UsageError(
            f"option {key!r} belongs to {' and '.join(parts)}; write {' or '.join(f'{p}.{bare}' for p in parts)}."
        )
    if prefix == "input" and not recipe.input:
        raise UsageError(
            f"option {key!r}: inputs stay floats here; --input NAME rounds them: {', '.join(plugins.names('inputs'))}."
        )
    used = "".join(f" after transform {name!r}" for name, _ in recipe.transforms)
    raise UsageError(
        f"no option {key!r} for method {recipe.method!r} with format {recipe.format!r}{used}; there are "
        f"{', '.join(everything)}.{_close(bare, [e.rpartition('.')[2] for e in everything])}"
    )


def _owners(recipe: Recipe) -> dict[str, Mapping[str, type]]:
    return {
        "method": _types(plugins.get("methods", recipe.method)),
        "format": _types(plugins.get("formats", recipe.format)),
        **({"input": _types(plugins.get("inputs", recipe.input))} if recipe.input else {}),
        "recipe": dict.fromkeys(RECIPE_KEYS, int),
        recipe.block: _types(plugins.get("blocks", recipe.block)),
        **{f"transform.{name}": _types(plugins.get("transforms", name)) for name, _ in recipe.transforms},
    }


def convert(value: Any, kind: type, key: str) -> Any:
    """An option's value as the type that its dataclass declares; command-line values come as text."""
    try:
        if get_args(kind):  # a number or a word
            return convert(value, _kind_of(value, get_args(kind)), key)
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
        if kind in (int, float):
            if isinstance(value, bool):
                raise ValueError(value)
            number = kind(value)
            if isinstance(value, float) and value != number:
                raise ValueError(value)
            return number
        if kind is str and isinstance(value, str):
            return value
        raise ValueError(value)
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"option {key!r}: expected {kind.__name__}, found {value!r}.") from error


def _kind_of(value: Any, kinds: Sequence[type]) -> type:
    """The first kind that a value can be read as, else the last."""
    for kind in kinds[:-1]:
        try:
            kind(value)
        except (TypeError, ValueError):
            continue
        return kind
    return kinds[-1]


def _bits(value: Any, name: str, key: str) -> int:
    """Bits of the head or the embedding from a recipe or the command line; of the head also true or false."""
    if name == "lm_head" and str(value).lower() in ("true", "yes", "false", "no"):
        return convert(value, bool, key) or 0
    bits: int = convert(value, int, key)
    if bits < 0 or (name == "embeddings" and bits not in (0, *range(2, 9))):
        most = "2 to 8 bits" if name == "embeddings" else "the bits of a code"
        raise UsageError(f"option {key!r}: expected {most}, or 0 to leave it dense, found {bits}.")
    return bits


@dataclass(frozen=True)
class Choice:
    """What a recipe says about one module."""

    method: str
    method_options: Mapping[str, Any]
    format: str
    format_options: Mapping[str, Any]
    input: str = ""
    input_options: Mapping[str, Any] = field(default_factory=dict)


def choose(recipe: Recipe, module: str) -> Choice | None:
    """Method, format and options of a module, or None if it stays dense."""
    if any(fnmatchcase(module, pattern) for pattern in recipe.ignore):
        return None
    own = [c for c in recipe.changes if fnmatchcase(module, c.pattern)]
    part = recipe
    for change in own:
        if change.key in _PARTS:
            part = with_parts(part, **{change.key: str(change.value)})
    left = any(c.key == "input" for c in own) and not part.input  # what rounds others' inputs has no options here
    options = [(c.key, c.value) for c in own if c.key not in _PARTS and not (left and c.key.startswith("input."))]
    part = with_options(part, options)
    return Choice(part.method, part.method_options, part.format, part.format_options, part.input, part.input_options)


def choose_head(recipe: Recipe, module: str) -> Choice | None:
    """As `choose`, for the output head, at the bits that `lm_head` says; raises `UsageError` if its format has none."""
    found = choose(recipe, module) if recipe.lm_head else None
    if found is None or recipe.lm_head is True:
        return found
    cls = plugins.get("formats", found.format)
    if "bits" not in _types(cls):
        raise UsageError(
            f"lm_head = {recipe.lm_head}: format {found.format!r} of {module} has no bits to choose; "
            "-s lm_head=true stores it by that format's own options."
        )
    options = {**found.format_options, "bits": recipe.lm_head}
    try:
        cls(**options)
    except UsageError as error:
        raise UsageError(f"lm_head = {recipe.lm_head}: {error}") from error
    return replace(found, format_options=options)


def choose_embedding(recipe: Recipe, module: str) -> Choice | None:
    """What a recipe says about the token embedding: to nearest, evenly spaced levels, or None if it stays dense.

    Its groups are those of the recipe where they hold 32 weights or more, else 64 weights: smaller ones are cheap only
    in formats that quantize their scales too. It has no zeros where the recipe's weights have none.
    """
    if not recipe.embeddings or any(fnmatchcase(module, pattern) for pattern in recipe.ignore):
        return None
    grid = plugins.get("formats", recipe.format)(**recipe.format_options)
    size = getattr(grid, "group_size", 0)
    group = size if size >= _LEAST_GROUP else _USUAL_GROUP
    symmetric = bool(getattr(grid, "symmetric", False))
    return Choice("rtn", {}, "uniform", {"bits": recipe.embeddings, "group_size": group, "symmetric": symmetric})


def refuse_idle_patterns(
    recipe: Recipe, modules: Sequence[str], head: str | None = None, embedding: str | None = None
) -> None:
    """Raise `UsageError` for a pattern that matches no module, with the closest names, and for one that does nothing.

    Args:
        recipe: with its patterns.
        modules: all linears.
        head: the output layer, which stays dense unless the recipe takes it in.
        embedding: the token embedding; it takes no options but its bits.
    """
    for change in recipe.changes:
        if change.key.rpartition(".")[2] in RECIPE_KEYS:
            raise UsageError(
                f"--set {change.pattern}:{change.key}: is an option of the whole recipe; -s {change.key}=..."
            )
        prefix, _, bare = change.key.rpartition(".")
        if prefix == "kv":
            raise UsageError(
                f"--set {change.pattern}:{change.key}: the cache is one for all layers; -s {change.key}=..."
            )
        for part, names in _owners(recipe).items():
            whole = part == recipe.block or part.startswith("transform.")
            if whole and bare in names and prefix in ("", part):
                raise UsageError(f"--set {change.pattern}:{change.key}: is for all modules; -s {change.key}=...")
        if head and [m for m in modules if fnmatchcase(m, change.pattern)] == [head]:
            if not recipe.lm_head:
                raise UsageError(f"--set {change.pattern}: {head} stays dense; --lm-head BITS quantizes it too.")
            if recipe.lm_head is not True and change.key.rpartition(".")[2] == "bits":
                raise UsageError(f"--set {change.pattern}:{change.key}: --lm-head says its bits already; drop one.")
    for pattern in [*recipe.ignore, *(c.pattern for c in recipe.changes)]:
        if not any(fnmatchcase(name, pattern) for name in modules):
            if embedding and fnmatchcase(embedding, pattern):
                if pattern in recipe.ignore and recipe.embeddings:
                    continue
                raise UsageError(
                    f"pattern {pattern!r} matches {embedding} alone, which takes no option but --embeddings BITS, "
                    "and stays dense without."
                )
            kinds = sorted({"*." + name.rpartition(".")[2] for name in modules})
            raise UsageError(
                f"pattern {pattern!r} matches no linear; try one of {', '.join(kinds)}, or {modules[0]!r}."
            )


def _types(cls: type) -> dict[str, type]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _close(name: str, names: Sequence[str] | set[str]) -> str:
    close = get_close_matches(name, list(names), 1)
    return f" Did you mean {close[0]!r}?" if close else ""
