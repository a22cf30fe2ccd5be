"""The contract of a cache format: how keys and values of past tokens are stored in few bits.

A format has two coders, one for keys and one for values. A coder works on whole *groups* of tokens: what one group
stores is its layout, and a cache of t tokens is t / group times that. Nothing here knows of models, pads or devices.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from qexport import plugins, schema
from qexport.errors import CheckpointError, UsageError
from qexport.formats.kv._presets import NONE as NONE
from qexport.formats.kv._presets import PRESETS as PRESETS
from qexport.schema import Layout, Tensors


class Coder(Protocol):
    """Keys or values of whole groups of tokens to stored tensors, and back."""

    @property
    def group(self) -> int:
        """Tokens that are coded together."""
        ...

    @property
    def fifo(self) -> bool:
        """Whether tokens leave the window oldest first, or all of a full window together."""
        ...

    @property
    def batch(self) -> int:
        """Groups that leave a window together, where there is one: coding many at once costs little more than one."""
        ...

    def layout(self, heads: int, dim: int) -> Layout:
        """What one group of tokens stores; no extent is left open."""
        ...

    def encode(self, x: Tensor, static: Tensors) -> dict[str, Tensor]:
        """Code groups of tokens.

        Args:
            x: float32 [batch, groups, group, heads, dim].
            static: of the layer; see `KVFormat.static`.

        Returns:
            For each name of the layout a tensor [batch, groups, *its shape].
        """
        ...

    def decode(self, packed: Tensors, static: Tensors, heads: int, dim: int) -> Tensor:
        """What `encode`'s result stands for, float32 [batch, groups, group, heads, dim]. This defines the format."""
        ...


@runtime_checkable
class KVFormat(Protocol):
    """A frozen dataclass whose fields are the format's options."""

    name: ClassVar[str]
    version: ClassVar[int]
    source: ClassVar[str]

    @property
    def residual_window(self) -> int:
        """Tokens that may stay in full precision before they are coded."""
        ...

    @property
    def sink_tokens(self) -> int:
        """First tokens of a sequence, which stay in full precision for good."""
        ...

    @property
    def pre_rope(self) -> bool:
        """Whether keys are coded as they were before their rotation by position, and rotated when they are read."""
        ...

    @property
    def keys(self) -> Coder:
        """Of keys."""
        ...

    @property
    def values(self) -> Coder:
        """Of values."""
        ...

    def static(self, heads: int, dim: int) -> Layout:
        """What calibration finds for a layer and a checkpoint stores as `cache.<layer>.<name>`; may be empty."""
        ...

    def check_static(self, tensors: Tensors, heads: int, dim: int, where: str) -> None:
        """Read the contents of such tensors for what could mislead a reader; raises `LayoutError`."""
        ...


def packed_after(coder: Coder, tokens: int, window: int) -> int:
    """How many of a sequence's first `tokens` tokens, sink aside, are packed."""
    if coder.fifo:
        step = coder.group * (coder.batch if window else 1)
        return max(tokens - window, 0) // step * step
    step = max(-(-window // coder.group), 1) * coder.group
    return tokens // step * step


def chunk_of(fmt: KVFormat) -> int:
    """Tokens to feed at a time so that a query sees the cache as decoding would."""
    return max(fmt.keys.group, fmt.values.group, 32 if fmt.keys.group == fmt.values.group == 1 else 1)


def predicted_nbytes(fmt: KVFormat, tokens: int, heads: int, dim: int, itemsize: int) -> int:
    """Bytes of one layer's keys and values of a sequence; what stays in full precision has `itemsize` bytes."""
    rest, total = max(tokens - fmt.sink_tokens, 0), 0
    for coder in (fmt.keys, fmt.values):
        packed = packed_after(coder, rest, fmt.residual_window)
        total += packed // coder.group * schema.nbytes(coder.layout(heads, dim))
        total += (tokens - packed) * heads * dim * itemsize
    return total


# ---- names and JSON ----------------------------------------------------------------------------


def make_kv(name: str, options: Mapping[str, Any] | None = None) -> KVFormat | None:
    """A cache format by the name of its preset, with some options changed; `"none"` is None.

    Raises:
        UsageError: there is no such name or option, or an option can't have this value.
    """
    if name == NONE:
        if options:
            raise UsageError(f"kv {NONE!r} takes no options, found {', '.join(options)}.")
        return None
    if name not in PRESETS:
        raise UsageError(f"there is no cache {name!r}; there are {', '.join([*PRESETS, NONE])}.")
    fmt, preset = PRESETS[name]
    return _make(fmt, {**preset, **_typed(fmt, options or {})})


def uncalibrated() -> str:
    """Names of presets that need no calibration, for errors."""
    made = {name: make_kv(name) for name in PRESETS}
    return ", ".join(name for name, fmt in made.items() if fmt is not None and not fmt.static(1, 32))


def changed(fmt: KVFormat, options: Mapping[str, Any]) -> KVFormat:
    """A format with some options changed; raises `UsageError`."""
    return _make(fmt.name, {**asdict(fmt), **_typed(fmt.name, options)})  # type: ignore[call-overload]


def calibrated_alike(fmt: KVFormat, other: KVFormat) -> bool:
    """Whether what was calibrated for one serves the other: they differ in what stays in full precision at most."""
    if fmt.name != other.name:
        return False
    known = {f.name for f in fields(fmt)}  # type: ignore[arg-type]
    free: dict[str, Any] = {name: getattr(fmt, name) for name in ("residual_window", "sink_tokens") if name in known}
    return changed(other, free) == fmt


def kv_name(fmt: KVFormat | None) -> str:
    """The preset that a format started from, or its own name where its bits fit none."""
    if fmt is None:
        return NONE
    bits = getattr(fmt, "bits", None)
    found = [name for name, (own, preset) in PRESETS.items() if own == fmt.name and preset.get("bits") == bits]
    return found[0] if found else fmt.name


def kv_options(name: str) -> Mapping[str, type]:
    """Names and types of the options of a preset's format."""
    cls = plugins.get("formats.kv", PRESETS[name][0])
    return {f.name: type(getattr(cls(), f.name)) for f in fields(cls)}


def kv_json(fmt: KVFormat) -> dict[str, Any]:
    """A cache format as it stands in `config.json`."""
    return {"format": fmt.name, "version": fmt.version, "options": asdict(fmt)}  # type: ignore[call-overload]


def kv_from_json(data: Any, where: str) -> KVFormat:
    """A cache format from untrusted JSON; raises `CheckpointError` when it is malformed, unknown or too new."""
    try:
        name, version, options = data["format"], data["version"], dict(data["options"])
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{where}: kv needs format, version and options; found {str(data)[:200]}.") from error
    if name not in plugins.names("formats.kv"):
        raise CheckpointError(
            f"{where}: unknown cache format {str(name)[:80]!r}; this qexport reads "
            f"{', '.join(plugins.names('formats.kv'))}. The checkpoint may need a newer qexport."
        )
    newest = plugins.get("formats.kv", name).version
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where}: kv: expected a version, 1 or more, found {str(version)[:20]!r}.")
    if version > newest:
        raise CheckpointError(
            f"{where}: cache format {name!r} version {str(version)[:20]} needs a newer qexport; this one reads up to "
            f"{newest}."
        )
    try:
        return _make(name, options)
    except (TypeError, ValueError, UsageError) as error:
        raise CheckpointError(f"{where}: cache format {name!r} does not take these options: {error}") from error


def _make(name: str, options: Mapping[str, Any]) -> KVFormat:
    cls = plugins.get("formats.kv", name)
    known = {f.name for f in fields(cls)}
    for key in options:
        if key not in known:
            raise UsageError(f"cache format {name!r} has no option {key!r}; it has {', '.join(sorted(known))}.")
    made: KVFormat = cls(**options)
    return made


def _typed(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with what was typed as text made what the default is; what does not exist stays as it is."""
    kinds = {f.name: type(f.default) for f in fields(plugins.get("formats.kv", name))}
    return {
        key: _read(key, value, kinds[key]) if isinstance(value, str) and key in kinds else value
        for key, value in options.items()
    }


def _read(key: str, text: str, kind: Any) -> Any:
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        wanted = {bool: "true or false", int: "a whole number"}.get(kind, "a number")
        raise UsageError(f"kv.{key}: expected {wanted}, found {text!r}.") from error
