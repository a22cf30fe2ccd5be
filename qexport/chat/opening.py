"""From a name to a conversation: load the model, settle its cache, find its template, make its loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qexport.chat.prompt import Prompt, template_of
from qexport.chat.sampling import changed, settings_of, unheeded
from qexport.chat.talk import Chat
from qexport.errors import UsageError
from qexport.events import Note, Observer, ignore
from qexport.load import load
from qexport.models import open_source
from qexport.models.auto import read_tokenizer
from qexport.models.decode import end_tokens
from qexport.models.fetch import fetch
from qexport.runtime.cache import chosen, forgo, keep, kv_cache
from qexport.runtime.loop import Loop, fastest_loop

_FIXED = 2048  # tokens of a compiled loop's cache, which attention reads whole for each token
_ENDLESS = 1 << 20  # tokens, for models that state no context


@dataclass(frozen=True)
class Setting:
    """How a conversation is opened.

    Attributes:
        device: where to compute.
        dtype: of activations; by default float32 on a CPU, as stored elsewhere.
        backend: of a packed model.
        kv: its cache; None for the checkpoint's own, `"none"` for transformers'.
        kv_options: of the cache's format.
        compiled: compile the loop, and take it where it is faster.
        context: tokens of prompt and answer together; by default what the model has, 2,048 at most if compiled.
        template: Jinja text in place of the tokenizer's; None for that, empty for none.
        values: settings by name, as typed, in place of the checkpoint's; see `sampling.Settings`.
        revision: of a Hub id.
        token: for the Hub.
    """

    device: str = "cpu"
    dtype: str | None = None
    backend: str = "auto"
    kv: str | None = None
    kv_options: Mapping[str, Any] = field(default_factory=dict)
    compiled: bool = False
    context: int | None = None
    template: str | None = None
    values: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    token: str | None = None


def open_chat(target: str, setting: Setting, *, observer: Observer = ignore) -> Chat:
    """A conversation with a model: a folder, packed or dense, a `.gguf` file or a Hub id.

    Raises:
        UsageError: an option that does not exist or does not fit the model.
        SourceError: there is no such model, or it has no tokenizer.
        CheckpointError: a file is missing, damaged or too new.
        BackendError: the backend can't run here.
    """
    folder = _folder(target, setting, observer)
    advice = "Copy the original's tokenizer files there."
    tokenizer = read_tokenizer(folder, name=target, advice=advice)
    cpu = setting.device == "cpu"
    model: Any = load(
        folder, backend=setting.backend, dtype=setting.dtype or ("float32" if cpu else None),
        device_map=None if cpu else setting.device,
    )  # fmt: skip
    settings = settings_of(model.generation_config)
    for name, value in setting.values.items():
        settings = changed(settings, name, value)
    for name in unheeded(model.generation_config):
        observer(Note(f"generation_config.json asks for {name}, which chat does not do.", "warning"))
    _settle_cache(model, setting)
    template = template_of(tokenizer) if setting.template is None else setting.template or None
    if template is None and setting.template is None:
        observer(
            Note(
                "There is no chat template here: this may be a base model. It goes on where your text ends, and does "
                "not answer. --template FILE gives it one; --no-template says that none is wanted."
            )
        )
    context = _context(model, setting)
    loop = _loop(model, context, setting.compiled, observer)
    return Chat(loop, Prompt(tokenizer, template), end_tokens(model, tokenizer), settings, context)


def _folder(target: str, setting: Setting, observer: Observer) -> Path:
    """Where the files of a model are, once they are."""
    path = Path(target).expanduser()
    if path.suffix.lower() == ".gguf":
        return open_source(target, observer=observer).folder
    if path.exists() and not path.is_dir():
        raise UsageError(f"{target}: expected a folder, a .gguf file or a Hub id.")
    return path if path.is_dir() else fetch(target, revision=setting.revision, token=setting.token, weights=True)


def _settle_cache(model: Any, setting: Setting) -> None:
    """Let the model's own loop use the cache that is wanted; raises `UsageError` where there is no such cache."""
    found = chosen(model, setting.kv, setting.kv_options)
    if found is None:
        forgo(model)
        return
    keep(model, found.fmt, found.statics)
    kv_cache(model)  # one that can't be made is an error now


def _context(model: Any, setting: Setting) -> int:
    """Tokens of prompt and answer together; raises `UsageError` where the model has fewer than are asked for."""
    own: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if own and setting.context and setting.context > own:
        raise UsageError(f"--context {setting.context}: the model's context has {own} tokens. Use at most so many.")
    return setting.context or min(own or _ENDLESS, _FIXED if setting.compiled else _ENDLESS)


def _loop(model: Any, context: int, compiled: bool, observer: Observer) -> Loop:
    if not compiled:
        loop = Loop.of(model, context, compiled=False)
        loop.path = "eager: compiling was not asked for"
        return loop
    observer(Note("Compiling a token's step, which takes up to a minute."))
    return fastest_loop(model, context)
