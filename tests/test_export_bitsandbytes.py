"""bitsandbytes exports: their bytes by a reader written from the layout, and the library where it is installed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qexport.checkpoint import Reader, read_json
from qexport.errors import CheckpointError, PlanError, UsageError
from qexport.export import bitsandbytes, export
from qexport.export.base import Module, Packed
from qexport.formats.specs import LinearSpec
from qexport.formats.uniform import Uniform
from qexport.schema import Tensors
from tests import wide

RIGHT: dict[str, Any] = {"bits": 8, "group_size": -1, "symmetric": True}
UP = "model.layers.0.mlp.up_proj"

# ---- bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_a_reader_written_from_the_layout_decodes_the_same_weights(scale_dtype: str, tmp_path: Path) -> None:
    folder = wide.packed(tmp_path, scale_dtype=scale_dtype, **RIGHT)
    export(folder, "bitsandbytes", tmp_path / "out", check=False)
    packed, reader = Packed(folder), Reader(tmp_path / "out")
    for module in packed.modules:
        weight, scales, form = (reader.read(f"{module.name}.{f}").numpy() for f in ("weight", "SCB", "weight_format"))
        assert (weight.dtype, scales.dtype, form.dtype) == (np.int8, np.float32, np.uint8)
        assert (weight.shape, scales.shape, form.shape) == ((module.n, module.k), (module.n,), ())
        assert form == 0
        assert np.abs(weight.astype(int)).max(1).tolist() == [127] * module.n
        found = weight.astype(np.float64) * scales[:, None].astype(np.float64) / 127
        np.testing.assert_array_equal(found, module.decoded(module.tensors(packed.reader)).numpy())
    name = "model.layers.1.self_attn.k_proj.bias"
    torch.testing.assert_close(reader.read(name), packed.reader.read(name), rtol=0, atol=0)


def test_the_config_leaves_out_dense_linears(tmp_path: Path) -> None:
    folder = wide.packed(tmp_path, ignore=["*.0.mlp.up_proj"], **RIGHT)
    export(folder, "bitsandbytes", tmp_path / "out", check=False, options={"threshold": 3.5})
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": 3.5,
        "llm_int8_skip_modules": [UP, "lm_head"],
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


# ---- the library -------------------------------------------------------------------------------


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    "options",
    [{"ignore": ["*.0.mlp.up_proj"]}, {"lm_head": 8, "threshold": 0}, {"dtype": torch.float16}],
    ids=["dense linear", "head, no outliers", "float16, which the library keeps"],
)
def test_bitsandbytes_computes_the_same_without_us(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    own = {"threshold": options.pop("threshold", 6.0)}
    found = export(wide.packed(tmp_path, **RIGHT, **options), "bitsandbytes", tmp_path / "out", options=own)
    assert found["check"]["max_difference"] < 1e-5
    assert found["check"]["weights"] < 1e-6
    assert found["check"]["top1"] == 1.0
    assert "Products of its decoded weights differ by at most" in (tmp_path / "out" / "README.md").read_text()


def _shift_one_code(found: dict[str, Tensor], name: str) -> None:
    weight = found[f"{name}.weight"].clone()
    weight[3, 5] += 1 if weight[3, 5] < 127 else -1
    found[f"{name}.weight"] = weight


def _turn_scales(found: dict[str, Tensor], name: str) -> None:
    scales = found[f"{name}.SCB"]
    found[f"{name}.SCB"] = scales.view(4, -1).T.reshape(scales.shape).contiguous()


def _take_scales_for_steps(found: dict[str, Tensor], name: str) -> None:
    found[f"{name}.SCB"] = found[f"{name}.SCB"] * (128 / 127)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("damage", [_shift_one_code, _turn_scales, _take_scales_for_steps])
def test_a_wrong_conversion_fails_the_check_and_leaves_nothing(
    damage: Callable[[dict[str, Tensor], str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = wide.packed(tmp_path, **RIGHT)
    right = bitsandbytes.convert

    def wrong(module: Module, tensors: Tensors) -> Mapping[str, Tensor]:
        found = dict(right(module, tensors))
        if module.name == UP:
            damage(found, module.name)
        return found

    monkeypatch.setattr(bitsandbytes, "convert", wrong)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=f"{UP}: the exported weight differs from ours by"):
        export(folder, "bitsandbytes", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# ---- refusals ----------------------------------------------------------------------------------

WORKS = "Use --method rtn --bits 8 --group-size -1 --sym"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 4}, f"and 13 more: 4 bits have no counterpart there, which has 8. {WORKS}"),
        ({"symmetric": False}, f"it has zeros, and 0 is always in the middle there. {WORKS}"),
        ({"group_size": 32}, f"it has groups of 32, and a row has one scale there. {WORKS}"),
        ({"transforms": ["rotation"]}, "its input is rotated when it runs"),
        ({"embeddings": 8}, "model.embed_tokens: it is an embedding, .* Leave out --embeddings"),
    ],
    ids=str,
)
def test_refusals_name_modules_reason_and_what_works(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = wide.packed(tmp_path, **{**RIGHT, **options})
    with pytest.raises(PlanError, match=reason):
        export(folder, "bitsandbytes", tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_the_code_that_has_no_counterpart_is_refused() -> None:
    fmt = Uniform(**RIGHT)
    module = Module("layer", LinearSpec(fmt), 2, 32, "linear", False)
    codes = torch.full((2, 32), 9, dtype=torch.uint8)
    codes[1, 7] = 0
    with pytest.raises(PlanError, match=f"layer: has the code -128, one step beyond .* {WORKS}"):
        bitsandbytes.convert(module, fmt.pack({"codes": codes, "scales": torch.ones(2, 1)}))


def test_a_negative_threshold_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="threshold -1.0: expected a number, 0 or more"):
        bitsandbytes.Bitsandbytes(-1.0)
    with pytest.raises(UsageError, match="threshold inf: expected a number"):
        bitsandbytes.Bitsandbytes(float("inf"))


def test_the_command_takes_options_as_text(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from qexport.cli import app

    command = ["export", str(wide.packed(tmp_path, **RIGHT)), "--to", "bitsandbytes", "--no-check", "--json"]
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out"), "-s", "threshold=2.5"])
    assert done.exit_code == 0, done.output
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["llm_int8_threshold"] == 2.5
    with pytest.raises(UsageError, match="threshold 'much': expected a number"):
        export(tmp_path / "packed", "bitsandbytes", tmp_path / "other", options={"threshold": "much"})
