"""Which modules are linears: what they compute decides, not what they inherit from."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

_PLAIN: tuple[Any, ...] = (nn.Linear.forward, Conv1D.forward)


def is_linear(module: nn.Module) -> bool:
    """Whether a module does nothing but multiply by its weight and add its bias.

    A subclass may compute something else: PhiMoE's router chooses experts, a BitNet linear rounds its input. One with a
    `forward` of its own counts only if that needs no more than `weight` and `bias`, and gives the product.
    """
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    return type(module).forward in _PLAIN or _multiplies(type(module))


def own_class(module: nn.Module) -> type[nn.Module] | None:
    """The class of a linear that multiplies in its own way (Falcon's rounds before it adds the bias), else None."""
    return None if type(module).forward in _PLAIN else type(module)


def _multiplies(kind: type[nn.Module]) -> bool:
    """Whether a class's `forward`, run on a stand-in that has nothing but a linear's tensors, is the linear map."""
    rng = torch.Generator().manual_seed(0)
    for biased in (True, False):
        w, b, x = (torch.randn(s, generator=rng, dtype=torch.float64, device="cpu") for s in ((5, 7), (5,), (2, 3, 7)))
        standin = nn.Module()
        standin.weight = nn.Parameter((w.T if issubclass(kind, Conv1D) else w).contiguous(), requires_grad=False)
        standin.register_parameter("bias", nn.Parameter(b, requires_grad=False) if biased else None)
        want = F.linear(x, w, b if biased else None)
        try:
            found: Any = kind.forward(standin.eval(), x.clone())
        except Exception:  # noqa: BLE001  it asks for something that a linear does not have
            return False
        if not isinstance(found, Tensor) or found.shape != want.shape or not torch.allclose(found, want, atol=1e-12):
            return False
    return True


def place(model: nn.Module, name: str) -> tuple[str, bool]:
    """What a packed module is in a model, and whether the model holds its weight as [k, n].

    Returns:
        `"linear"`, `"embedding"` or `"expert"` (whose name is that of a stack, a dot, and its number), and the flag.

    Raises:
        AttributeError: the model has no such module.
    """
    stack, _, _ = name.rpartition(".")
    owner, _, field = stack.rpartition(".")
    parent = model.get_submodule(owner)
    if isinstance(parent._parameters.get(field), nn.Parameter):
        return "expert", bool(getattr(parent, "is_transposed", False))
    module = model.get_submodule(name)
    return ("embedding" if isinstance(module, nn.Embedding) else "linear"), isinstance(module, Conv1D)
