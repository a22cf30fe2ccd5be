"""What targets that know nothing but integers in groups have in common."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from qexport.errors import LayoutError
from qexport.export.base import Module
from qexport.formats import _bits
from qexport.formats.uniform import Uniform


def floats_only(module: Module) -> str | None:
    """Why a module's input can't be told where inputs stay floats; None if it does."""
    if module.spec.input.quant is None:
        return None
    return (
        "its input is rounded to integers when it runs, which cannot be said there. Quantize again with --input none, "
        "or use --to compressed-tensors, which takes --input token and tensor"
    )


def rounded_always(module: Module) -> str | None:
    """Why a module's input can't be told where inputs are rounded in every call; None if it is."""
    quant = module.spec.input.quant
    if quant is None or quant.decode_input == "integer":
        return None
    return (
        "its input stays a float while text is generated, and is always rounded there. Quantize again with "
        "-s input.decode_input=integer"
    )


def uniform_only(module: Module, *, embeddings: bool = False, inputs: bool = False) -> str | None:
    """Why a module is not an ordinary linear in format `uniform`; None if it is.

    Args:
        module: to look at.
        embeddings: they will do too.
        inputs: they may be rounded to integers.
    """
    if module.kind == "embedding" and not embeddings:
        return "it is an embedding, and only linears can be quantized there. Leave out --embeddings"
    if module.kind == "expert":
        return "it is one expert of a stack, which has no place of its own there. Leave experts dense with --ignore"
    if not isinstance(module.spec.weight, Uniform):
        return (
            f'format "{module.spec.weight.name}" has no counterpart there. Use --method rtn, gptq or awq, whose '
            "format is uniform, or --to dense"
        )
    steps = module.spec.input
    done = [
        word for word, on in (("scaled", steps.scale), ("rotated", steps.hadamard), ("sorted", steps.permute)) if on
    ]
    if done:
        return (
            f"its input is {' and '.join(done)} when it runs, which cannot be said there. Leave out -t, "
            "and order=act, or use --to dense"
        )
    return None if inputs else floats_only(module)


def fitting_group(k: int) -> str:
    """A usual group size that divides k, as the option that asks for it."""
    return f"--group-size {next((g for g in (128, 64, 32) if k % g == 0), -1)}"


def uniform_of(module: Module) -> Uniform:
    """The format of a module that `uniform_only` has nothing against."""
    fmt = module.spec.weight
    assert isinstance(fmt, Uniform)
    return fmt


def patterns(names: Sequence[str], linears: Sequence[str]) -> list[str]:
    """Few regular expressions that fit these linears and no others among `linears`.

    Those that are alike in all layers share one; others are spelt out.
    """
    own, out = set(names), []
    for name in names:
        family = re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
        pattern = re.escape(family).replace(re.escape("#"), r"\d+")
        alike = [other for other in linears if re.fullmatch(pattern, other)]
        out.append(f"^{pattern if own.issuperset(alike) else re.escape(name)}$")
    return list(dict.fromkeys(out))


def stream(words: Tensor, bits: int, shape: tuple[int, int], where: str) -> Tensor:
    """Codes uint8 [rows, columns] from rows of a bit stream that ends with the last code's word, or is padded to 32.

    Raises:
        LayoutError: the words are not as many as that takes; of an old release with unused bits they are more.
    """
    rows, columns = shape
    wanted = -(-columns * bits // 32)
    if words.dtype != torch.int32 or tuple(words.shape) != (rows, wanted):
        gaps = " Releases before 0.18 left gaps there: save it with a newer one." if 32 % bits else ""
        raise LayoutError(
            f"{where}: expected int32 {[rows, wanted]} for {columns} codes of {bits} bits, found {words.dtype} "
            f"{list(words.shape)}.{gaps}"
        )
    padded = torch.zeros(rows, _bits.words_for(columns, bits), dtype=torch.int32)
    padded[:, :wanted] = words
    return _bits.unpack_bits(padded, bits, columns)


def expect(tensor: Tensor | None, dtypes: Sequence[torch.dtype], shape: Sequence[int], where: str) -> Tensor:
    """A tensor of one of these dtypes and this shape; raises `LayoutError` for any other, and for none."""
    if tensor is None:
        raise LayoutError(f"{where}: is missing.")
    if tensor.dtype not in dtypes or list(tensor.shape) != list(shape):
        raise LayoutError(
            f"{where}: expected {' or '.join(map(str, dtypes))} {list(shape)}, found {tensor.dtype} "
            f"{list(tensor.shape)}."
        )
    return tensor


def sorted_by_group(codes: Tensor, index: Tensor | None, groups: int, where: str) -> tuple[Tensor, Tensor | None]:
    """Codes [n, k] with the columns of each group together, and the permutation, None if they were so already.

    Args:
        codes: uint8 [n, k].
        index: group of each column, int32 or int64 [k]; None: groups are in order.
        groups: how many.
        where: for the error.

    Raises:
        LayoutError: the groups are not of one size.
    """
    k = codes.shape[1]
    if index is None:
        return codes, None
    index = expect(index, [torch.int32, torch.int64], [k], where).long()
    if torch.equal(index, torch.arange(k) // (k // groups)):
        return codes, None
    order = torch.argsort(index, stable=True)
    if not torch.equal(index[order], torch.arange(k) // (k // groups)):
        raise LayoutError(f"{where}: expected {groups} groups of {k // groups} columns each.")
    return codes[:, order].contiguous(), order


def sixteen_bits(scales: Tensor, where: str) -> str:
    """The 16-bit dtype that holds scales exactly; raises `LayoutError` if none does."""
    wide = scales.to(torch.float32)
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        if torch.equal(wide.to(dtype).to(torch.float32), wide):
            return name
    raise LayoutError(
        f"{where}: expected scales that fit float16 or bfloat16, found {scales.dtype} ones that fit neither."
    )


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""What scales of other libraries come in."""
