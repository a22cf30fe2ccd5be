"""Which embeddings can be packed: what they compute decides, not what they inherit from."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def obstacle(module: nn.Module) -> str | None:
    """Why a module is not a table of rows, given out as they are or times one constant; None if it is that.

    Gemma's scaled word embedding is one. An embedding that normalises its rows, or looks some tokens up elsewhere, is
    none.
    """
    kind = type(module).__name__
    if not isinstance(module, nn.Embedding):
        return f"it is a {kind}, not an nn.Embedding"
    if module.max_norm is not None:
        return "it rescales rows that are longer than its max_norm"
    others = [name for name in module.state_dict() if name != "weight"]
    if others:
        return f"{kind} stores more than a weight: {', '.join(others)}"
    if type(module).forward is not nn.Embedding.forward and not _scales(module):
        return f"{kind} computes something else than rows times a constant"
    return None


def _scales(module: nn.Embedding) -> bool:
    """Whether a class's `forward`, run on a copy with a small table, gives the rows times one constant."""
    rng = torch.Generator().manual_seed(0)
    table = torch.randn(7, module.embedding_dim, generator=rng, dtype=torch.float64, device="cpu")
    ids = torch.tensor([[3, 0, 6, 1], [2, 5, 4, 3]], device="cpu")
    standin = copy.copy(module)
    constants = {name: _known(buffer, rng) for name, buffer in module.named_buffers(recurse=False)}
    vars(standin).update(_parameters={}, _buffers=constants, weight=table, padding_idx=None, num_embeddings=7)
    try:
        found: Any = type(module).forward(standin, ids)
    except Exception:  # noqa: BLE001  the code of any model, on a stand-in that it was not written for
        return False
    rows = table[ids]
    if not isinstance(found, Tensor) or found.shape != rows.shape:
        return False
    scale = (found * rows).sum() / rows.square().sum()
    return bool(scale != 0) and torch.allclose(found.double(), scale * rows, rtol=1e-6, atol=1e-9)


def _known(buffer: Tensor, rng: torch.Generator) -> Tensor:
    """A buffer, or some value for one on the meta device: which one does not matter here."""
    if not buffer.is_meta:
        return buffer
    return (torch.rand(buffer.shape, generator=rng, device="cpu") + 0.5).to(buffer.dtype)
