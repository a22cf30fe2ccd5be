"""GPTQ exports: their bytes by a reader written from the layout, and GPTQModel itself where it is installed."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qexport import load
from qexport.checkpoint import Reader, read_json
from qexport.errors import CheckpointError, PlanError, UsageError
from qexport.export import export, gptq
from qexport.export.base import Module, Packed
from qexport.formats.specs import LinearSpec
from qexport.formats.uniform import Uniform
from qexport.recipe import Change
from qexport.schema import Tensors
from tests import wide

Array = np.ndarray[Any, Any]

MIXED: dict[str, Any] = {
    "bits": 4,
    "group_size": 32,
    "symmetric": True,
    "lm_head": 8,
    "changes": [Change("*.1.mlp.down_proj", "bits", 8), Change("*.o_proj", "bits", 2)],
    "ignore": ["*.0.mlp.up_proj"],
}

# ---- bytes -------------------------------------------------------------------------------------


def _codes(words: Array, bits: int) -> Array:
    """Codes [count, columns] of words uint32 [count bits / 32, columns], lowest bits of the first word first."""
    if bits == 3:  # ten codes, two bits of the next; its third, ten codes, one bit; two bits, ten codes
        a, b, c = (words[i::3] for i in range(3))
        parts = [a >> 3 * i & 7 for i in range(10)] + [a >> 30 | (b & 1) << 2]
        parts += [b >> 3 * i + 1 & 7 for i in range(10)] + [b >> 31 | (c & 3) << 1]
        parts += [c >> 3 * i + 2 & 7 for i in range(10)]
    else:
        parts = [words >> bits * i & (1 << bits) - 1 for i in range(32 // bits)]
    return np.stack(parts, axis=1).reshape(-1, words.shape[1])


def _weight(reader: Reader, name: str, bits: int, version: str) -> Array:
    """The weight float32 [n, k] as the layout says."""
    raw = {field: reader.read(f"{name}.{field}").numpy() for field in ("qweight", "qzeros", "scales", "g_idx")}
    assert [str(raw[field].dtype) for field in raw] == ["int32", "int32", "float16", "int32"]
    codes = _codes(raw["qweight"].view(np.uint32), bits).astype(np.float32)
    zeros = _codes(np.ascontiguousarray(raw["qzeros"].view(np.uint32).T), bits).T.astype(np.float32)
    groups = raw["g_idx"]
    zeros = zeros + (version == "v1")
    return ((codes - zeros[groups]) * raw["scales"].astype(np.float32)[groups]).T  # type: ignore[no-any-return]


def _bits_of(module: Module) -> int:
    assert isinstance(module.spec.weight, Uniform)
    return module.spec.weight.bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "symmetric", "version"), [(32, True, "v2"), (16, False, "v2"), (-1, False, "v2"), (32, True, "v1")]
)
def test_a_reader_written_from_the_layout_decodes_the_same_weights(
    bits: int, group_size: int, symmetric: bool, version: str, tmp_path: Path
) -> None:
    folder = wide.packed(tmp_path, bits=bits, group_size=group_size, symmetric=symmetric)
    export(folder, "gptq", tmp_path / "out", check=False, options={"version": version})
    packed, reader = Packed(folder), Reader(tmp_path / "out")
    assert len(packed.modules) == 14
    for module in packed.modules:
        wanted = module.decoded(module.tensors(packed.reader)).numpy()
        np.testing.assert_array_equal(_weight(reader, module.name, bits, version), wanted)
    name = "model.layers.0.self_attn.q_proj"
    assert reader.meta(f"{name}.qweight").shape == (64 * bits // 32, 64)
    torch.testing.assert_close(reader.read(f"{name}.bias"), packed.reader.read(f"{name}.bias"), rtol=0, atol=0)


@pytest.mark.parametrize(("version", "zeros"), [("v1", 0x77777777), ("v2", 0x88888888)])
def test_zeros_of_symmetric_integers_are_stored_as_the_version_says(version: str, zeros: int, tmp_path: Path) -> None:
    folder = wide.packed(tmp_path, bits=4, group_size=32, symmetric=True)
    export(folder, "gptq", tmp_path / "out", check=False, options={"version": version})
    words = Reader(tmp_path / "out").read("model.layers.1.mlp.down_proj.qzeros").numpy().view(np.uint32)
    assert words.shape == (3, 8)
    assert (words == zeros).all()
    name = {"v1": "gptq", "v2": "gptq_v2"}[version]
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["checkpoint_format"] == name


def test_the_config_says_what_each_linear_is(tmp_path: Path) -> None:
    folder = wide.packed(tmp_path, **MIXED)
    export(folder, "gptq", tmp_path / "out", check=False)
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config == read_json(tmp_path / "out" / "quantize_config.json")
    usual = (config["quant_method"], config["bits"], config["group_size"], config["sym"], config["desc_act"])
    assert usual == ("gptq", 4, 32, True, False)
    assert config["lm_head"] is True
    packed = Packed(folder)
    bits = {module.name: _bits_of(module) for module in packed.modules}
    for name in packed.linears():
        rules = [(key[:2], own) for key, own in config["dynamic"].items() if re.match(key[2:], name)]
        wanted = bits.get(name)
        assert rules == ([("-:", {})] if wanted is None else [] if wanted == 4 else [("+:", {"bits": wanted})]), name
    (taken,) = config["modules_in_block_to_quantize"]
    assert "mlp.gate_proj" in taken
    assert {name for name in packed.linears() if any(name.endswith(end) for end in taken)} == set(bits)


def test_a_config_with_one_kind_of_linears_has_no_rules(tmp_path: Path) -> None:
    folder = wide.packed(tmp_path, bits=4, group_size=32, symmetric=True)
    export(folder, "gptq", tmp_path / "out", check=False)
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert not {"dynamic", "modules_in_block_to_quantize"} & set(config)
    assert config["lm_head"] is False


def test_bfloat16_scales_are_converted_exactly_or_not_at_all() -> None:
    fmt = Uniform(bits=4, group_size=32, symmetric=True, scale_dtype="bfloat16")
    module = Module("layer", LinearSpec(fmt), 32, 64, "linear", False)
    tensors = {
        "qweight": torch.zeros(32, 8, dtype=torch.int32),
        "scales": torch.full((32, 2), 0.3, dtype=torch.bfloat16),
    }
    found = gptq.convert(module, tensors)
    torch.testing.assert_close(found["layer.scales"].T.float(), tensors["scales"].float(), rtol=0, atol=0)
    for value in (1e-9, 1e6):
        tensors["scales"][3, 1] = value
        with pytest.raises(
            PlanError, match="layer: its bfloat16 scales do not fit float16, .* --to compressed-tensors"
        ):
            gptq.convert(module, tensors)


# ---- the library -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "version"), [({"bits": 3, "group_size": 32, "symmetric": False}, "v2"), (MIXED, "v1")], ids=str
)
def test_gptqmodel_computes_the_same_without_us(options: dict[str, Any], version: str, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    found = export(wide.packed(tmp_path, **options), "gptq", tmp_path / "out", options={"version": version})
    assert found["check"]["max_difference"] < 5e-3
    assert found["check"]["weights"] < 1e-6


def test_transformers_loads_it_where_all_packed_linears_are_alike(tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    from transformers import AutoModelForCausalLM, GPTQConfig

    folder = wide.packed(tmp_path, bits=4, group_size=32, symmetric=False, ignore=["*.0.mlp.up_proj"])
    export(folder, "gptq", tmp_path / "out", check=False)
    kernel = GPTQConfig(bits=4, backend="gptq_torch")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, device_map="cpu", quantization_config=kernel
    )
    assert sum(hasattr(module, "qweight") for module in model.modules()) == 13
    ids = torch.arange(24).view(2, 12) * 3
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        found = model(input_ids=ids).logits
        wanted = load(folder, backend="reference", dtype=torch.float32)(input_ids=ids).logits
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 5e-3


def _swap_nibbles(found: dict[str, Tensor], name: str) -> None:
    words = found[f"{name}.qweight"].view(torch.uint8)
    found[f"{name}.qweight"] = (words >> 4 | words << 4).view(torch.int32)


def _shift_zeros(found: dict[str, Tensor], name: str) -> None:
    found[f"{name}.qzeros"] = found[f"{name}.qzeros"] - 0x11111111


def _turn_scales(found: dict[str, Tensor], name: str) -> None:
    scales = found[f"{name}.scales"]
    found[f"{name}.scales"] = scales.T.reshape(scales.shape).contiguous()


@pytest.mark.parametrize("damage", [_swap_nibbles, _shift_zeros, _turn_scales])
def test_a_wrong_conversion_fails_the_check_and_leaves_nothing(
    damage: Callable[[dict[str, Tensor], str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gptqmodel")
    folder = wide.packed(tmp_path, bits=4, group_size=32, symmetric=True)
    right = gptq.convert

    def wrong(module: Module, tensors: Tensors, version: str) -> Mapping[str, Tensor]:
        found = dict(right(module, tensors, version))
        if module.name.endswith("0.mlp.up_proj"):
            damage(found, module.name)
        return found

    monkeypatch.setattr(gptq, "convert", wrong)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"0.mlp.up_proj: the exported weight differs from ours by"):
        export(folder, "gptq", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# ---- refusals ----------------------------------------------------------------------------------

WORKS = "Use --method gptq --bits 4 --group-size 64 --sym"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 5}, f"and 13 more: 5 bits are not among the 2, 3, 4, 8 that it has. {WORKS}"),
        ({"bits": 6}, f"6 bits are not among .* {WORKS}"),
        ({"bits": 7}, f"7 bits are not among .* {WORKS}"),
        ({"group_size": 128}, r"groups of 128 do not divide its 64 columns; --group-size 64 would do"),
        ({"group_size": 8}, f"groups of 8 are none of its -1, 16, 32, .*, 1024. {WORKS}"),
        ({"version": "v1", "symmetric": False}, "it has zeros of its own, .* Use -s version=v2, or --method gptq"),
        ({"format": "bcq", "group_size": 32, "bits": 2}, 'format "bcq" has no counterpart there'),
        ({"transforms": ["rotation"]}, "its input is rotated when it runs, which cannot be said there"),
        ({"embeddings": 8}, "model.embed_tokens: it is an embedding, .* Leave out --embeddings"),
    ],
    ids=str,
)
def test_refusals_name_modules_reason_and_what_works(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    own = {"group_size": 32, **options}
    version = own.pop("version", "v2")
    folder = wide.packed(tmp_path, **own)
    with pytest.raises(PlanError, match=reason):
        export(folder, "gptq", tmp_path / "out", check=False, options={"version": version})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("n", "k"), [(33, 64), (64, 40)])
def test_widths_that_are_no_multiple_of_32_are_refused(n: int, k: int) -> None:
    module = Module("layer", LinearSpec(Uniform(bits=4, group_size=-1, symmetric=True)), n, k, "linear", False)
    reason = gptq.Gptq().refuse(module)
    assert reason == (
        f"its {n} rows and {k} columns are not both multiples of 32, which is what its words hold. "
        "Leave it dense with --ignore, or use --to dense"
    )


def test_an_expert_is_refused_and_an_unknown_version_too(tmp_path: Path) -> None:
    expert = Module("stack.0", LinearSpec(Uniform()), 64, 128, "expert", False)
    assert "one expert of a stack" in str(gptq.Gptq().refuse(expert))
    with pytest.raises(UsageError, match="version 'v3': expected v1 or v2"):
        gptq.Gptq("v3")
