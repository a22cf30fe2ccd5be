"""Triton's path in graphs: operators of tensors that stay where they are. Kernels run in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qexport import plugins
from qexport.formats.specs import InputSpec, LinearSpec, refuse_input
from qexport.runtime import ops
from tests.rounding import QUANTS
from tests.runtime.interpreted import SPECS


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-m", "tests.runtime.interpreted"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", SPECS)
def test_a_linear_is_one_operator_of_the_same_bits(found: dict[str, Any], name: str) -> None:
    got = found[name]
    assert got["operators"] == ["qexport.product_that_waits" if name == "outliers" else "qexport.product"]
    assert got["same"]
    assert got["lowered"]
    assert got["follows"], "new contents are not seen"


@pytest.mark.parametrize("name", SPECS)
def test_a_recorded_graph_reads_tensors_that_stay_and_makes_none_that_does(found: dict[str, Any], name: str) -> None:
    assert found[name]["moving"] == ["l_x_"]
    assert found[name]["matrices"] == 0


def test_gradients_go_through_the_decoded_weight(found: dict[str, Any]) -> None:
    assert found["gradient"]


def test_graphs_of_linears_that_differ_in_their_format_alone_are_not_mixed_up(found: dict[str, Any]) -> None:
    assert found["shared"] == [True, True]


def test_operators_are_for_gpus_too_and_what_waits_is_not_recorded() -> None:
    ops._library()
    for name in ("product", "product_that_waits"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qexport::{name}", "CUDA")
    tags = torch.ops.qexport.product_that_waits.default.tags
    assert torch.Tag.cudagraph_unsafe in tags
    assert torch.Tag.cudagraph_unsafe not in torch.ops.qexport.product.default.tags


@pytest.mark.parametrize("name", plugins.names("formats"))
def test_words_mean_the_spec_in_every_process(name: str) -> None:
    for quant in (None, *QUANTS.values()):
        spec = LinearSpec(plugins.get("formats", name)(), InputSpec(scale=True, quant=quant))
        if refuse_input(spec) is None:
            assert ops._spec(ops.words(spec)) == spec
