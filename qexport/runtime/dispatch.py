"""Which path multiplies by a packed weight, and why."""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from qexport import plugins
from qexport.errors import BackendError
from qexport.formats.specs import LinearSpec
from qexport.kernels.cpu.base import FEW, Weight
from qexport.schema import Tensors

BACKENDS = ("auto", "triton", "cpu", "reference")


@dataclass(frozen=True)
class Choice:
    """The path of one linear and the reason for it, in words for `qexport inspect`."""

    path: Literal["triton", "cpu", "reference"]
    reason: str


def choose(spec: LinearSpec, n: int, k: int, device: torch.device | str, backend: str = "auto") -> Choice:
    """Pick the path for an [n, k] linear on a device.

    Args:
        spec: what the linear stores.
        n: out features.
        k: in features.
        device: where the packed tensors lie.
        backend: `"auto"`, or the path that the user insists on.

    Raises:
        BackendError: the user insists on a path that can't run here; the message says what can.
    """
    kind = torch.device(device).type
    if backend not in BACKENDS:
        raise BackendError(f"there is no backend {backend!r}; there are {', '.join(BACKENDS)}.")
    if spec.input.quant is not None:
        return _choose_integers(spec, n, k, kind, backend)
    if backend == "reference":
        return Choice("reference", "backend 'reference' was asked for")
    if spec.weight.name == "dense":
        return Choice("reference", "dense weights need no kernel of ours")
    if backend == "cpu" or (backend == "auto" and kind == "cpu"):
        obstacle, what = _no_cpu_kernel(spec, n, k, kind), f"the CPU's kernel of {spec.weight.name!r}"
        if obstacle is not None and kind == "cpu" and decoder_of(spec.weight.name) is not None:
            obstacle, what = None, f"rows of {spec.weight.name!r} decoded one after the other, because {obstacle},"
        if obstacle is None:
            return Choice("cpu", f"{what} for up to {FEW} tokens at once; more meet the decoded weight")
        if backend == "auto":
            return Choice("reference", obstacle)
        raise BackendError(f"backend 'cpu' can't run here: {obstacle}. Use backend='auto' or 'reference'.")
    obstacle = _obstacle(spec, n, k, kind, forced=backend == "triton")
    if obstacle is None:
        where = f"the Triton kernel of {spec.weight.name!r}"
        return Choice("triton", f"{where} in the interpreter" if kind == "cpu" else f"{where} on {kind}")
    if backend == "triton":
        raise BackendError(f"backend 'triton' can't run here: {obstacle}. Use backend='auto' or 'reference'.")
    return Choice("reference", obstacle)


def _choose_integers(spec: LinearSpec, n: int, k: int, kind: str, backend: str) -> Choice:
    """The path of a linear whose input is rounded to integers; raises `BackendError`."""
    if backend == "reference":
        return Choice("reference", f"{_SIMULATED}: backend 'reference' was asked for")
    obstacles = {"cpu": _no_cpu(kind), "triton": _no_triton(spec, n, k, kind, forced=backend == "triton")}
    if backend == "auto":
        backend = "cpu" if kind == "cpu" else "triton"
        if obstacles[backend]:
            return Choice("reference", f"{_SIMULATED}: {obstacles[backend]}")
    if obstacles[backend]:
        raise BackendError(
            f"backend {backend!r} can't run here: {obstacles[backend]}. Use backend='auto' or 'reference'."
        )
    if backend == "cpu":
        return Choice("cpu", "products of 8-bit integers on the CPU")
    where = "in the interpreter" if kind == "cpu" else f"on {kind}"
    return Choice("triton", f"the Triton kernel of 8-bit integers {where}")


def _no_cpu(kind: str) -> str | None:
    """Why 8-bit integers can't be multiplied on the CPU, or None."""
    if kind != "cpu":
        return f"the weights are on a {kind!r} device"
    from qexport.kernels import _integers

    return _integers.obstacle()


def _no_triton(spec: LinearSpec, n: int, k: int, kind: str, *, forced: bool) -> str | None:
    """Why Triton can't multiply a rounded input by this weight, or None."""
    obstacle = _no_launch(kind, forced=forced)
    if obstacle is not None:
        return obstacle
    try:
        from qexport.kernels import _int_gemm
    except ImportError as error:
        return f"its kernel can't be imported ({error})"
    return _int_gemm.supports(spec, n, k)


def _no_cpu_kernel(spec: LinearSpec, n: int, k: int, kind: str) -> str | None:
    """Why no kernel of this processor multiplies by this weight, or None."""
    if kind != "cpu":
        return f"the weights are on a {kind!r} device"
    if spec.weight.name not in plugins.names("kernels.cpu"):
        return f"format {spec.weight.name!r} has no kernel for CPUs"
    try:
        kernel = cpu_kernel_of(spec)
    except ImportError:
        return "numba is not installed; pip install 'qexport[cpu]'"
    reason: str | None = kernel.supports(spec.weight, n, k)
    return reason


_SIMULATED = "integers are multiplied as floats that hold them exactly"


def _obstacle(spec: LinearSpec, n: int, k: int, kind: str, *, forced: bool) -> str | None:
    """Why Triton can't multiply by this weight, or None."""
    obstacle = _no_launch(kind, forced=forced)
    if obstacle is not None:
        return obstacle
    if spec.weight.name not in plugins.names("kernels"):
        return f"format {spec.weight.name!r} has no kernel"
    try:
        kernel = kernel_of(spec)
    except ImportError as error:
        return f"its kernel can't be imported ({error})"
    reason: str | None = kernel.supports(spec.weight, n, k)
    return reason


def _no_launch(kind: str, *, forced: bool) -> str | None:
    """Why Triton can't launch anything on a device, or None."""
    if kind == "cpu" and not (forced and os.environ.get("TRITON_INTERPRET") == "1"):
        return "the weights are on the CPU, and Triton runs on a GPU (there only under TRITON_INTERPRET=1, for tests)"
    if kind not in ("cpu", "cuda"):
        return f"no kernel was written for {kind!r} devices"
    return None


def cpu_kernel_of(spec: LinearSpec) -> Any:
    """The kernel for CPUs of a spec's format; imports numba."""
    return plugins.get("kernels.cpu", spec.weight.name)


def cpu_weight_of(spec: LinearSpec, packed: Tensors, n: int, k: int) -> Weight:
    """What few rows of x meet on a CPU: the kernel's layout, or what decodes rows where it can't run."""
    runs = _no_cpu_kernel(spec, n, k, "cpu") is None
    make = cpu_kernel_of(spec).prepare if runs else decoder_of(spec.weight.name).rows
    weight: Weight = make(spec.weight, packed, n, k)
    return weight


@cache
def decoder_of(name: str) -> Any:
    """What decodes rows of a format on a CPU, or None: for formats without it, and without numba."""
    if name not in plugins.names("kernels.decode"):
        return None
    try:
        return plugins.get("kernels.decode", name)
    except ImportError:  # numba is an option
        return None


def kernel_of(spec: LinearSpec) -> Any:
    """The kernel of a spec's format; imports Triton."""
    return plugins.get("kernels", spec.weight.name)
