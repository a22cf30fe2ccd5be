"""Products by Triton's kernels: how a linear's weight is laid out for them, and what computes them.

Eager calls and the operator of graphs, `qexport::product`, both end here. An input that is rounded to integers goes
another way than one that stays a float, and a linear may have both.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from qexport.formats.specs import LinearSpec
from qexport.runtime.dispatch import kernel_of
from qexport.schema import Tensors


def laid_out(spec: LinearSpec, packed: Tensors, n: int, k: int, *, rounded: bool) -> tuple[Tensor, ...]:
    """The weight [n, k] as a kernel reads it, from the stored tensors; `rounded`: the kernel of integers."""
    if rounded:
        from qexport.kernels import _int_gemm

        return _int_gemm.repack(spec, packed, n, k)
    found: tuple[Tensor, ...] = kernel_of(spec).repack(
        spec.weight, {name: packed[name] for name in spec.weight.layout(n, k)}, n, k
    )
    return found


def product(
    spec: LinearSpec,
    x: Tensor,
    weights: Sequence[Tensor],
    inputs: Tensors,
    n: int,
    *,
    rounded: bool,
    timed: bool = True,
) -> Tensor:
    """What was laid out times x [..., k], without bias.

    Args:
        spec: of the linear.
        x: on a GPU, or on the CPU under Triton's interpreter.
        weights: what `laid_out` returned.
        inputs: stored tensors of the input's treatment.
        n: out features.
        rounded: x is rounded to integers, as the spec says.
        timed: launches may be timed, see `_gemm.linear`.

    Returns:
        [..., n] in x's dtype.
    """
    k = x.shape[-1]
    if rounded:
        from qexport.kernels import _int_gemm

        return _int_gemm.linear(spec, x, weights, inputs, n, k)
    from qexport.kernels import _gemm

    times = partial(_gemm.linear, kernel_of(spec), spec.weight, perm=inputs.get("input_perm"), timed=timed)
    if spec.input.hadamard:
        return times(spec.input.rotated(x, inputs).to(x.dtype), weights, n, k)
    return times(x, weights, n, k, scale=inputs.get("input_scale"))


def waits(spec: LinearSpec, *, rounded: bool) -> bool:
    """Whether the host has to wait for the device to multiply, which a recorded graph can't do."""
    if not rounded:
        return False
    from qexport.kernels import _int_gemm

    return _int_gemm.waits(spec.input.quant)
