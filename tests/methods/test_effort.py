"""What a method says of its effort against the operations that it really makes."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qexport import plugins
from qexport.formats.specs import make_format
from qexport.statistics import Hessian
from tests.methods.test_columns import problem


class Counter(TorchDispatchMode):
    """Counts operations, without views, and the elements that they yield."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.calls += 1
            self.elements += out.numel()
        return out


@pytest.mark.parametrize(
    ("method", "options", "fmt", "fmt_options"),
    [
        ("rtn", {}, "uniform", {"group_size": 32}),
        ("rtn", {"clip": 10}, "uniform", {"group_size": 32}),
        ("gptq", {}, "uniform", {"group_size": 32}),
        ("gptq", {"clip": 12}, "uniform", {"group_size": 32}),
        ("gptq", {"clip": 12}, "uniform", {"group_size": -1, "symmetric": True}),
        ("spqr", {}, "spqr", {}),
        ("bcq", {}, "bcq", {"bits": 3, "group_size": 32}),
        ("bcq", {"feedback": False, "evenly": False, "rounds": 3}, "bcq", {"bits": 4, "group_size": 32}),
        ("vptq", {"iterations": 4}, "vector", {"vector_length": 4, "index_bits": 8}),
        ("vptq", {"feedback": False, "rounds": 0}, "vector", {"vector_length": 4, "index_bits": 6}),
        ("vptq", {"passes": 2, "rounds": 2}, "vector", {"vector_length": 4, "index_bits": 7, "residual_bits": 4}),
        ("spqr", {"clip": 12, "outlier_rate": 0.01}, "spqr", {}),
    ],
)
def test_predicted_calls_and_touched_weights_are_about_the_real_ones(
    method: str, options: dict[str, Any], fmt: str, fmt_options: dict[str, Any]
) -> None:
    n, k = 512, 128
    w, hessian = problem(n, k)
    made, stored = plugins.get("methods", method)(**options), make_format(fmt, fmt_options)
    with Counter() as counted:
        made.quantize_group([w], {Hessian: hessian}, [stored], torch.Generator())
    effort = made.effort(stored, n, k)
    assert effort.calls == pytest.approx(counted.calls, rel=0.3)
    assert effort.touched == pytest.approx(counted.elements, rel=0.3)
