"""GGUF, the file of llama.cpp: blocks of 32 weights that hold the very numbers of a packed checkpoint."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType

from qexport.errors import PlanError, SourceError, UsageError
from qexport.export import _ggml
from qexport.export._gguf_model import ARCHITECTURES, ELSEWHERE, Outline
from qexport.export._gguf_vocabulary import read_vocabulary
from qexport.export._uniform import floats_only, uniform_of, uniform_only
from qexport.export.base import Module, Packed

FILE = "model.gguf"
_TOLERANCES = {"refuse": 1e-5, "F16": 1e-2, "Q8_0": 5e-2}
_RECIPE = "Quantize with --method gptq --bits 4 --group-size 32 --sym, or export with -s others=Q8_0"
_EITHER = "Quantize with --method gptq --group-size 32 --sym and --bits 4 or 8, or export with -s others=Q8_0"
_BARE = "Leave out --embeddings"


@dataclass(frozen=True)
class Gguf:
    """Integers in groups of 32 as blocks Q4_0, Q4_1 and Q8_0; all else as it is, in 16 bits where they are enough.

    Both readers get the same float32 weights from a block as we do, one product and for Q4_1 one sum that is exact. So
    transformers, which decodes the file and then computes as ever, differs by the order of sums and by the epsilon of
    the norms, which a GGUF file has in float32. llama.cpp itself rounds activations to 8 bits before each product.

    Attributes:
        others: what becomes of a weight that no block holds exactly: `"refuse"`, or it is decoded and rounded again to
            `"F16"` or `"Q8_0"`, which card and tags then say.
    """

    source: ClassVar[str] = "GGUF of llama.cpp, read by transformers 5"
    needs: ClassVar[tuple[str, ...]] = ("gguf", "accelerate")
    loading: ClassVar[Mapping[str, Any]] = {"dtype": "float32", "gguf_file": FILE}

    others: str = "refuse"

    def __post_init__(self) -> None:
        if self.others not in _TOLERANCES:
            raise UsageError(f"others {self.others!r}: expected {', '.join(_TOLERANCES)}.")

    @property
    def tags(self) -> tuple[str, ...]:
        """Whether anything may have been rounded again."""
        return ("gguf",) if self.others == "refuse" else ("gguf", "requantized")

    @property
    def tolerance(self) -> float:
        """As exact as the weights are."""
        return _TOLERANCES[self.others]

    def how(self, name: str) -> str:
        """With llama.cpp, or decoded with transformers."""
        again = f"Weights that no block holds exactly were **rounded again, to {self.others}**."
        return f"""## How to load

```
llama-cli -m {name}/{FILE}
```

transformers decodes the same file: `AutoModelForCausalLM.from_pretrained("{name}", gguf_file="{FILE}")`.

{"" if self.others == "refuse" else again}"""

    def refuse(self, module: Module) -> str | None:
        """What no block holds, unless it is to be rounded again."""
        again = self.others != "refuse" and module.kind != "expert" and module.k % _ggml.BLOCK == 0
        return floats_only(module) if again else misfit(module)

    def refuse_together(self, modules: Sequence[Module]) -> list[tuple[str, str]]:
        """Nothing."""
        return []

    def notes(self, modules: Sequence[Module]) -> list[str]:
        """What is seen only once weights and tokenizer are there."""
        out = ["architecture and tokenizer are looked at by the export itself."]
        if self.others != "refuse":
            return [*out, f"weights that no block holds exactly are decoded and rounded to {self.others}."]
        zeros = [m.name for m in modules if not uniform_of(m).symmetric]
        if zeros:
            out.append(f"{zeros[0]}: with zeros, zero x scale must fit float16 exactly, and few do; --sym always fits.")
        return out

    def refuse_checkpoint(self, packed: Packed) -> Iterator[tuple[str, str]]:
        """Other architectures and tokenizers, tensors without a place, scales and offsets that float16 can't hold."""
        config = packed.model.config
        if config.model_type not in ARCHITECTURES:
            kinds = ", ".join(ARCHITECTURES)
            yield "model", f"{config.model_type} is not written, only {kinds}. {ELSEWHERE}"
            return
        outline = Outline(config)
        found = [("model", reason) for reason in outline.reasons()]
        found += [(name, reason) for name in _tensors(packed) for reason in outline.refuses(name)]
        try:
            read_vocabulary(packed.folder, packed.vocab)
        except (PlanError, SourceError) as error:
            found.append(("tokenizer", str(error).rstrip(".")))
        yield from found
        for module in packed.modules if self.others == "refuse" else ():
            if self.refuse(module) is None:
                yield from ((module.name, reason) for reason in inexact(module, packed))

    def loading_of(self, packed: Packed) -> Mapping[str, Any]:
        """Scaled rotary frequencies: transformers passes over the tensor that holds them."""
        outline = Outline(packed.model.config)
        return {} if outline.rope_factors() is None else {"rope_parameters": outline.rope}

    def write(self, packed: Packed, out: Path) -> None:
        """Metadata, then tensor by tensor."""
        outline = Outline(packed.model.config)
        writer = GGUFWriter(out / FILE, outline.architecture)
        writer.add_name(Path(str((packed.manifest.get("plan") or {}).get("model") or "model")).name)
        outline.add_to(writer)
        kinds = Counter(block(module, packed) or self.others for module in packed.modules)
        writer.add_file_type(LlamaFileType[f"MOSTLY_{kinds.most_common(1)[0][0]}"])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        read_vocabulary(packed.folder, packed.vocab).add_to(writer)
        for name, kind, data in stored(packed, outline, self.others):
            writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, data in stored(packed, outline, self.others):  # made a second time, so that memory holds one of them
            writer.write_tensor_data(data)
        writer.close()


def block(module: Module, packed: Packed) -> str | None:
    """The block type that holds a module exactly; None if none does."""
    if misfit(module) is not None or any(inexact(module, packed)):
        return None
    return _ggml.kind(uniform_of(module))


def stored(packed: Packed, outline: Outline, others: str) -> Iterator[tuple[str, str, _ggml.Bytes]]:
    """Every tensor of the file: its name, its type, and uint8 [.., bytes of a row]."""
    factors = outline.rope_factors()
    if factors is not None:
        yield "rope_freqs.weight", *_ggml.dense(factors)
    for name, module in _tensors(packed).items():
        if module is None:
            kind, data = _ggml.dense(packed.reader.read(name))
        else:
            tensors, exact = module.tensors(packed.reader), block(module, packed)
            kind = exact or others
            if exact:
                data = _ggml.blocks(exact, uniform_of(module).unpack(tensors, module.n, module.k))
            else:
                data = _ggml.rounded(others, module.decoded(tensors))
        rows = outline.rows(name)
        yield str(outline.name(name)), kind, data if rows is None else np.ascontiguousarray(data[rows.numpy()])


def misfit(module: Module) -> str | None:
    """Why a module is no linear or embedding in `uniform` with the groups, bits and symmetry of a block type."""
    reason = uniform_only(module, embeddings=True)
    if reason is not None:
        return reason
    fmt = uniform_of(module)
    if fmt.group_size != _ggml.BLOCK:
        group = "are whole rows" if fmt.group_size == -1 else f"hold {fmt.group_size} weights"
        return f"its groups {group}, and a block holds {_ggml.BLOCK}. {_RECIPE}"
    if module.k % _ggml.BLOCK:
        return f"blocks of {_ggml.BLOCK} do not divide its {module.k} columns. Leave it dense with --ignore"
    if _ggml.kind(fmt) is None:
        zeros = "without" if fmt.symmetric else "with"
        what = f"no block holds {fmt.bits}-bit integers {zeros} zeros"
        return f"{what}. {_EITHER}" if module.kind == "linear" else f"{what}. {_BARE}"
    return None


def inexact(module: Module, packed: Packed) -> Iterator[str]:
    """Why scales or offsets of a module that `refuse` let pass would have to be rounded."""
    fields = uniform_of(module).unpack(module.tensors(packed.reader), module.n, module.k)
    advice = _RECIPE if module.kind == "linear" else _BARE
    if not _ggml.half(fields["scales"]):
        yield "its scales are bfloat16, blocks have float16, and some do not fit. Leave it dense with --ignore"
    elif "zeros" in fields and not _ggml.half(_ggml.offsets(fields)):
        yield f"blocks with zeros hold -zero * scale in float16, which would be rounded here. {advice}"


def _tensors(packed: Packed) -> dict[str, Module | None]:
    """Tensors of the state dict, and the packed module that one is the weight of."""
    out: dict[str, Module | None] = {}
    for file, modules in packed.shards.items():
        out |= {f"{module.name}.weight": module for module in modules}
        out |= dict.fromkeys(packed.dense(file))
    return dict(sorted(out.items()))


plugin = Gguf
