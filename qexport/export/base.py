"""A packed checkpoint as exports see it, and the contract of what they export to."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from qexport.checkpoint import Reader, read_json
from qexport.container import parse, read_shard_metadata
from qexport.errors import CheckpointError
from qexport.formats.base import Format
from qexport.formats.specs import LinearSpec
from qexport.inputs.base import InputQuant
from qexport.models import hollow, place, read_config
from qexport.models.auto import reason
from qexport.schema import Tensors
from qexport.verify import MANIFEST


@dataclass(frozen=True)
class Module:
    """A packed module.

    Attributes:
        name: module path; of an expert, path of the stacked parameter, a dot, and its index.
        spec: how it is stored.
        n: out features, or tokens of an embedding.
        k: in features, or width of an embedding.
        kind: `"linear"`, `"embedding"` or `"expert"`.
        transposed: the model holds it as [k, n].
    """

    name: str
    spec: LinearSpec
    n: int
    k: int
    kind: str
    transposed: bool

    def tensors(self, reader: Reader) -> dict[str, Tensor]:
        """Its stored tensors by field."""
        return {field: reader.read(f"{self.name}.{field}") for field in self.spec.layout(self.n, self.k)}

    def decoded(self, packed: Tensors) -> Tensor:
        """The weight with all that happens to the input worked into it, float32 [n, k]."""
        return self.spec.decoded(packed, self.n, self.k)


class Packed:
    """A folder that `qexport quantize` wrote.

    Raises:
        CheckpointError: it is something else, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        parse(self.config.get("quantization_config"), str(folder / "config.json"))
        self.reader = Reader(folder)
        self.manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}

    @cached_property
    def model(self) -> Any:
        """The model, without weights."""
        try:
            return hollow(read_config(self.folder, local_files_only=True))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder}/config.json: {reason(error)}.") from error

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @cached_property
    def shards(self) -> Mapping[str, tuple[Module, ...]]:
        """Packed modules by the file that holds them."""
        out = {}
        for file in self.reader.files:
            found = read_shard_metadata(self.reader.metadata[file], file)
            out[file] = tuple(Module(name, spec, n, k, *self._place(name)) for name, (spec, n, k) in found.items())
        if not any(out.values()):
            raise CheckpointError(f"{self.folder}: holds no packed module.")
        return out

    def _place(self, name: str) -> tuple[str, bool]:
        try:
            return place(self.model, name)
        except AttributeError as error:
            raise CheckpointError(f"{name}: is packed, and {type(self.model).__name__} has no such module.") from error

    @property
    def modules(self) -> tuple[Module, ...]:
        """All packed modules."""
        return tuple(module for shard in self.shards.values() for module in shard)

    def dense(self, file: str) -> list[str]:
        """Names of a file's tensors that belong to no packed weight."""
        packed = {f"{m.name}.{field}" for m in self.shards[file] for field in m.spec.layout(m.n, m.k)}
        return [n for n in self.reader.names if self.reader.meta(n).file.name == file and n not in packed]

    def linears(self, transposed: bool = False) -> list[str]:
        """Paths of everything that other libraries take for a linear, packed or not.

        Args:
            transposed: those of GPT-2 too, which hold their weight as [k, n].
        """
        found = [(name, isinstance(module, nn.Linear)) for name, module in self.model.named_modules() if name]
        return [name for name, linear in found if linear or (transposed and place(self.model, name)[1])]

    @property
    def head(self) -> str | None:
        """Path of the output layer."""
        head = self.model.get_output_embeddings()
        return next((name for name, module in self.model.named_modules() if module is head), None)

    def plain_config(self) -> dict[str, Any]:
        """The model's config without a word of how it was packed."""
        gone = ("quantization_config", "transformers_weights")
        return {key: value for key, value in self.config.items() if key not in gone}


def with_transformers(name: str, packages: str, more: str = "") -> str:
    """How a folder is loaded that transformers reads."""
    return f"""## How to load

```
pip install {packages}
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})
```

{more}"""


class Target(Protocol):
    """What a checkpoint is exported to: a frozen dataclass whose fields are its options."""

    source: ClassVar[str]
    """The library and version that it is written for."""

    needs: ClassVar[tuple[str, ...]]
    """Packages that load it: what the proof needs. They are in the extra `export`, or in one that `extra` names."""

    tolerance: ClassVar[float]
    """The most that its logits may differ from ours, relative to the largest."""

    tags: ClassVar[tuple[str, ...]]
    """For the Hub."""

    def how(self, name: str) -> str:
        """A section of the card: how the result is loaded, `name` being its repository or folder."""
        ...

    @property
    def loading(self) -> Mapping[str, Any]:
        """Arguments for the other library's loader; `dtype` among them."""
        ...

    def refuse(self, module: Module) -> str | None:
        """Why a module can't be told in this format, and what would work; None if it can."""
        ...

    def refuse_together(self, modules: Sequence[Module]) -> list[tuple[str, str]]:
        """Modules that can be told one by one and not beside each other, with why and what would work."""
        ...

    def notes(self, modules: Sequence[Module]) -> list[str]:
        """What a user should know of modules that can be told, but not used everywhere."""
        ...

    def write(self, packed: Packed, out: Path) -> None:
        """Write everything but tokenizer and card into an empty folder."""
        ...


@runtime_checkable
class WholeTarget(Protocol):
    """A target to which more matters than single modules: the model, its tokenizer, stored numbers."""

    def refuse_checkpoint(self, packed: Packed) -> Iterable[tuple[str, str]]:
        """What can't be told in this format, by its name, with why and what would work."""
        ...

    def loading_of(self, packed: Packed) -> Mapping[str, Any]:
        """Arguments for the loader that this checkpoint needs beside `Target.loading`."""
        ...


@runtime_checkable
class Decodes(Protocol):
    """A target whose library can be asked for the weights that it decodes: the proof compares them too.

    For libraries that round more than weights, so that logits say too little about these.
    """

    weights: ClassVar[float]
    """The most that products of such a weight may differ from ours, relative to the largest of that linear."""


@runtime_checkable
class Rounds(Protocol):
    """A target whose library rounds inputs of linears as a checkpoint asks: the proof compares that too."""

    carried: ClassVar[float]
    """The most that logits with rounded inputs may differ, in the unit of `rounding`."""

    def rounding(self, module: Module) -> float:
        """The most that a product with a rounded input may differ from ours, in units of what rounding it costs.

        Next to 0 where the library's step is ours. Two roundings of the same numbers with different steps differ by
        1.4 of what one of them costs.
        """
        ...


@dataclass(frozen=True)
class Found:
    """A linear of another library in our terms.

    Attributes:
        fmt: that its numbers fit exactly.
        fields: of the format, columns in stored order.
        perm: input feature that each stored column meets, int64 [k]; None: in their own order.
        quant: how its input is rounded.
        inputs: values of `quant`, see `InputSpec.pack`.
    """

    fmt: Format
    fields: Tensors
    perm: Tensor | None = None
    quant: InputQuant | None = None
    inputs: Tensors = field(default_factory=dict)


class Reading(Protocol):
    """How checkpoints of another library are read, made from their `quantization_config`.

    Raises:
        PlanError: they say something that has no counterpart here.
    """

    quant_method: ClassVar[str]
    """What the config calls it."""

    suffixes: ClassVar[tuple[str, ...]]
    """Fields that may stand for a weight; a linear that has the first one is packed."""

    def __init__(self, config: Mapping[str, Any]) -> None: ...

    def found(self, name: str, tensors: Tensors, n: int, k: int) -> Found:
        """One linear [n, k] from its fields; raises `LayoutError` where they are not what the config promises."""
        ...
