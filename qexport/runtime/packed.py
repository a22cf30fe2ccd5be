"""Packed weights as modules: what linears, embeddings and experts have in common.

`linear.py` holds what multiplies, `embedding.py` what looks rows up, `experts.py` what stands in place of a 3-D
parameter. Buffers carry the names, dtypes and shapes of the format's layout, so a state dict is a checkpoint.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qexport import schema
from qexport.formats.specs import LinearSpec
from qexport.runtime import ops
from qexport.runtime.decoding import decoded
from qexport.schema import Extents


class Budget:
    """Bytes that decoded weights may take, shared by the linears of one model: first come, first served."""

    def __init__(self, nbytes: int = 0) -> None:
        self.left = nbytes

    def take(self, nbytes: int) -> bool:
        """Reserve bytes; False, and nothing reserved, when they are not there."""
        if nbytes > self.left:
            return False
        self.left -= nbytes
        return True

    def give(self, nbytes: int) -> None:
        """Return reserved bytes."""
        self.left += nbytes


class Packed(nn.Module):
    """The stored tensors of one [n, k] weight as buffers.

    A change of the model's dtype never reaches them: what a format stores means something only in its stored dtype.

    Args:
        spec: what is stored.
        n: out features.
        k: in features.
        extents: data-dependent extents.
        device: where the empty buffers are made; the meta device by default, as loading wants it.
    """

    backend = "auto"

    def __init__(
        self, spec: LinearSpec, n: int, k: int, *, extents: Extents | None = None, device: torch.device | str = "meta"
    ) -> None:
        super().__init__()
        self.spec, self.n, self.k = spec, n, k
        self._fields = tuple(spec.layout(n, k))
        for name, tensor in schema.empty(spec.layout(n, k), extents, device).items():
            self.register_buffer(name, tensor)
        self._number = ops.number_of(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which derive anew what is derived, and are modules of their own to operators."""
        return {name: value for name, value in vars(self).items() if name != "_number"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = ops.number_of(self)

    @property
    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by field name."""
        return {name: getattr(self, name) for name in self._fields}

    @property
    def place(self) -> torch.device:
        """The device of the stored tensors."""
        device: torch.device = getattr(self, self._fields[0]).device
        return device

    def decoded(self, dtype: torch.dtype = torch.float32, *, transposed: bool = False) -> Tensor:
        """The weight, contiguous, [n, k] or transposed [k, n], columns in the order of the input features."""
        return decoded(self.spec, self.packed, self.n, self.k, dtype, transposed=transposed, backend=self.backend)

    def check(self, where: str, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Compare structure and contents with the layout; raises `LayoutError` naming `where` and the tensor."""
        self.spec.check(self.packed if tensors is None else tensors, self.n, self.k, where)

    def pin(self) -> None:
        """Undo casts of float buffers by a loader that widened them (which loses nothing)."""
        for name, field in self.spec.layout(self.n, self.k).items():
            tensor = getattr(self, name)
            if tensor.dtype != field.dtype:
                setattr(self, name, tensor.to(field.dtype))

    def forget(self) -> None:
        """Drop whatever was derived from the stored tensors."""

    def extra_repr(self) -> str:
        """Shape and format."""
        return f"n={self.n}, k={self.k}, {self.spec.weight}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        self.forget()
        stored = {name: self._buffers.pop(name) for name in self._fields}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(stored)
        for name, tensor in self.packed.items():
            moved = fn(tensor)
            self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)


class PackedWeight(Packed):
    """A packed weight that the model's code may read, in the model's dtype, and that may be kept decoded.

    Args:
        spec: what is stored.
        n: out features.
        k: in features.
        dtype: the model's dtype, in which `weight` is handed out.
        extents: data-dependent extents.
        device: where the empty tensors are made.
        transposed: `weight` is [k, n].
        budget: where to ask before keeping the decoded weight; by default nothing is kept.
    """

    def __init__(
        self,
        spec: LinearSpec,
        n: int,
        k: int,
        *,
        dtype: torch.dtype | None = None,
        extents: Extents | None = None,
        device: torch.device | str = "meta",
        transposed: bool = False,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(spec, n, k, extents=extents, device=device)
        self.transposed = transposed
        self.budget = Budget() if budget is None else budget
        self.dtype = dtype or torch.get_default_dtype()
        self._kept: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """The decoded weight under the name `weight`, [n, k] or for a Conv1D [k, n], for models that multiply by it.

        It is made anew at each reading, unless the budget keeps it, and no state dict has it: it is no parameter.
        A format that itself stores a tensor `weight` hands out that one. On the meta device there is only its shape.
        """
        if name != "weight" or name in self.__dict__.get("_fields", (name,)):
            return super().__getattr__(name)
        if self.place.type == "meta":
            shape = (self.k, self.n) if self.transposed else (self.n, self.k)
            return torch.empty(shape, dtype=self.dtype, device="meta")
        return self._decoded_in(self.dtype)

    def forget(self) -> None:
        """Drop the decoded weight."""
        if self._kept is not None:
            self.budget.give(self._kept.nbytes)
        self._kept = None

    def _decoded_in(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight in a dtype, contiguous, [n, k] or for a Conv1D [k, n]."""
        if self._kept is not None and self._kept.dtype == dtype:
            return self._kept
        with torch.inference_mode(False), torch.no_grad():  # what is kept may meet an input that learns later
            weight = self.decoded(dtype, transposed=self.transposed)
        if self._kept is None and not self._visiting and self.budget.take(weight.nbytes):
            self._kept = weight
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # follows model.to(dtype), as the parameter would
        return self

    @property
    def _visiting(self) -> bool:
        """Whether accelerate brings the buffers in for each call only: then nothing may be kept beside them."""
        hook = getattr(self, "_hf_hook", None)
        return bool(getattr(hook, "offload", False) and getattr(hook, "offload_buffers", False))


def quantized(model: nn.Module) -> dict[str, Packed]:
    """Packed weights of a model by module path, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
