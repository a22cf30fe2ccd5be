"""Load a model, packed or dense, ready to run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def load(
    path: str | Path,
    *,
    backend: str = "auto",
    dtype: "torch.dtype | str | None" = None,
    device_map: Any = None,
    cache_gb: float = 0.0,
    own_cache: bool = True,
    **options: Any,
) -> "nn.Module":
    """Load a packed checkpoint, or a dense one for comparison, in evaluation mode.

    The same as `from_pretrained` of the class that the config names, be it a causal language model or the wrapper of
    one with other towers, with `quantization_config=QExportConfig(backend=backend, cache_gb=cache_gb)`.

    Args:
        path: directory or Hub id.
        backend: `"auto"` takes a kernel where one can run; `"triton"`, `"cpu"` and `"reference"` insist.
        dtype: the model's dtype; by default that of the checkpoint.
        device_map: as transformers understands it, for example `"auto"`, `"cuda"`, or a table with `"disk"`.
        cache_gb: how much decoded weights may take under the reference path, in 1e9 bytes.
        own_cache: let `generate` use the quantized cache that the checkpoint names; False does not read it.
        **options: handed to `from_pretrained`, for example `revision` and `token`.

    Raises:
        SourceError: there is no such model.
        CheckpointError: a file is missing, damaged or too new.
        LayoutError: a tensor is not what its format demands.
        BackendError: the backend can't run here.
    """
    from qexport.integrations.transformers import load_model

    return load_model(
        str(path),
        backend=backend,
        dtype=dtype,
        device_map=device_map,
        cache_gb=cache_gb,
        own_cache=own_cache,
        **options,
    )
