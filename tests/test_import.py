"""Checkpoints of other libraries become ours without a single number changing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qexport import load
from qexport.checkpoint import Reader, dump_json, read_json
from qexport.errors import CheckpointError, LayoutError, PlanError, QExportError, ResumeError
from qexport.export import adopt, export
from qexport.hub import push
from qexport.recipe import Change
from qexport.report import inspect
from qexport.verify import verify
from tests import tiny, wide
from tests.test_export import CASES, packed


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    reader = Reader(folder)
    return {name: reader.read(name) for name in reader.names}


@pytest.mark.parametrize("options", CASES, ids=str)
def test_export_import_export_gives_equal_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    folder = packed(tmp_path, **options)
    export(folder, "compressed-tensors", tmp_path / "one", check=False)
    found = adopt(tmp_path / "one", tmp_path / "ours")
    export(tmp_path / "ours", "compressed-tensors", tmp_path / "two", check=False)
    one, two, ours = tensors(tmp_path / "one"), tensors(tmp_path / "two"), tensors(tmp_path / "ours")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)
    before = tensors(folder)
    assert all(torch.equal(before[name], ours[name]) for name in before)
    checked = verify(tmp_path / "ours")
    assert checked["modules"] == found["modules"]
    assert checked["bits_per_weight"] == found["bits_per_weight"]
    assert inspect(tmp_path / "ours")["bits_per_weight"] == found["bits_per_weight"]
    ids = torch.arange(24).view(2, 12) * 3 % tiny.VOCAB
    with torch.inference_mode():
        logits = [
            load(f, backend="reference", dtype=torch.float32)(input_ids=ids).logits for f in (folder, tmp_path / "ours")
        ]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "scheme",
    [
        {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 8},
        {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 8},
        {"num_bits": 3, "symmetric": False, "strategy": "channel"},
        {"num_bits": 8, "symmetric": True, "strategy": "channel"},
    ],
    ids=str,
)
def test_what_the_library_itself_packed_means_the_same_here(scheme: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    source = tiny.save("llama", tmp_path / "theirs")
    weights = tensors(source)
    args = QuantizationArgs(type="int", **scheme)
    own = QuantizationScheme(targets=["Linear"], weights=args)
    rng, stored, meant = torch.Generator().manual_seed(0), {}, {}
    half = 2 ** (scheme["num_bits"] - 1)
    for name, w in weights.items():
        if not name.endswith("_proj.weight"):
            stored[name] = w
            continue
        groups = 1 if scheme["strategy"] == "channel" else w.shape[1] // scheme["group_size"]
        state = {"weight": w, "weight_scale": w.abs().amax(1, keepdim=True).expand(-1, groups).div(half).half().float()}
        if not scheme["symmetric"]:
            shape = (w.shape[0], groups)
            state["weight_zero_point"] = torch.randint(-half, half, shape, generator=rng).to(torch.int8)
        made = PackedQuantizationCompressor.compress(state, own)
        meant[name] = PackedQuantizationCompressor.decompress(made, own)["weight"]
        stored |= {f"{name.removesuffix('.weight')}.{field}": t.contiguous() for field, t in made.items()}
    save(stored, tmp_path / "theirs", own.model_dump(mode="json"))
    adopt(tmp_path / "theirs", tmp_path / "ours")
    model = load(tmp_path / "ours", backend="reference", dtype=torch.float32)
    for name, w in meant.items():
        assert torch.equal(model.get_submodule(name.removesuffix(".weight")).weight, w), name


def save(stored: dict[str, torch.Tensor], folder: Path, group: dict[str, Any], **changes: Any) -> None:
    """Write tensors and config as the library would."""
    from safetensors.torch import save_file

    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": None, "config_groups": {"group_0": group}, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(dump_json(config))


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """An exported folder."""
    export(packed(tmp_path, bits=3), "compressed-tensors", tmp_path / "theirs", check=False)
    return tmp_path / "theirs"


def test_a_folder_that_is_not_packed_is_refused(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    with pytest.raises(
        PlanError, match=r"quantization_config of compressed-tensors or gptq.*found none. A dense model"
    ):
        adopt(model, tmp_path / "out")
    with pytest.raises(PlanError, match="found qexport"):
        adopt(packed(tmp_path / "other"), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_status": "frozen"}, "expected quantization_status compressed"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "it has a kv_cache_scheme"),
        ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "it has a transform_config"),
        ({"sparsity_config": {"format": "sparse-24"}}, "it has a sparsity_config"),
        ({"config_groups": []}, "expected config_groups"),
        ({"format": "float-quantized"}, "expected integers of 2 to 8 bits in groups or channels"),
    ],
)
def test_configs_that_say_more_than_we_can_are_refused(changes: dict[str, Any], message: str, theirs: Path) -> None:
    config = read_json(theirs / "config.json")
    config["quantization_config"] |= changes
    (theirs / "config.json").write_text(dump_json(config))
    with pytest.raises(PlanError, match=message):
        adopt(theirs, theirs.parent / "out")
    assert not (theirs.parent / "out").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), CheckpointError, "model.norm.weight is missing"),
        (
            lambda t: t.update({"model.extra": torch.ones(3)}),
            PlanError,
            "model.extra: has no place in LlamaForCausalLM",
        ),
        (
            lambda t: t.update({"model.norm.weight_scale": torch.ones(3)}),
            PlanError,
            "model.norm: is packed, and is no linear",
        ),
        (lambda t: t.update({Q: t[Q][:, :-1].contiguous()}), LayoutError, "Releases before 0.18 left gaps"),
        (lambda t: t.update({S: t[S] / 3}), LayoutError, "expected scales that fit float16 or bfloat16"),
        (lambda t: t.update({S: t[S] * float("nan")}), LayoutError, "expected scales|expected finite"),
        (lambda t: t.update({S: t[S].T.contiguous()}), LayoutError, r"weight_scale: expected .* \[40, 4\], found"),
        (lambda t: t.update({S: t[S] > 0}), LayoutError, "weight_scale: expected .* found torch.bool"),
        (lambda t: t.pop(Q), LayoutError, "weight: is missing"),
        (lambda t: t.pop(Z), LayoutError, "weight_zero_point: is missing"),
        (lambda t: t.update({Z: t[Z].float()}), LayoutError, "weight_zero_point: expected torch.int8"),
        (lambda t: t.update({W: torch.ones(40, 32)}), LayoutError, "has both weight_packed and weight"),
        (lambda t: t.update({N: torch.ones(39)}), LayoutError, r"expected floats \[40\], found torch.float32 \[39\]"),
        (lambda t: t.update({N: torch.ones(40).int()}), LayoutError, r"expected floats \[40\], found torch.int32"),
        (lambda t: t.update({P: torch.tensor([40, 33])}), LayoutError, r"weight_shape: expected \[40, 32\], found"),
    ],
)
def test_damaged_folders_are_refused_and_leave_nothing(change: Any, error: Any, message: str, theirs: Path) -> None:
    from safetensors.torch import save_file

    stored = tensors(theirs)
    change(stored)
    for path in theirs.glob("model*"):
        path.unlink()
    save_file(stored, theirs / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=message):
        adopt(theirs, theirs.parent / "out")
    assert not (theirs.parent / "out").exists()


Q = "model.layers.1.self_attn.o_proj.weight_packed"
S = "model.layers.1.self_attn.o_proj.weight_scale"
Z = "model.layers.1.self_attn.o_proj.weight_zero_point"
W = "model.layers.1.self_attn.o_proj.weight"
P = "model.layers.1.self_attn.o_proj.weight_shape"
N = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "change",
    [
        {"targets": 5}, {"targets": ["re:("]}, {"weights": 3},
        {"weights": {"num_bits": 3, "type": "int", "strategy": "group"}},
        {"weights": {"num_bits": 3, "type": "int", "strategy": "group", "group_size": "x"}},
        {"weights": {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 0}},
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_in_a_config_is_a_stated_error(change: dict[str, Any], theirs: Path) -> None:
    config = read_json(theirs / "config.json")
    config["quantization_config"]["config_groups"]["group_0"] |= change
    (theirs / "config.json").write_text(dump_json(config))
    with pytest.raises(QExportError):
        adopt(theirs, theirs.parent / "out")
    assert not (theirs.parent / "out").exists()


def test_weights_that_are_called_symmetric_and_have_zeros_are_refused(theirs: Path) -> None:
    config = read_json(theirs / "config.json")
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True
    (theirs / "config.json").write_text(dump_json(config))
    with pytest.raises(LayoutError, match="is there, and the config calls these weights symmetric"):
        adopt(theirs, theirs.parent / "out")


def test_the_card_of_an_import_says_so(theirs: Path) -> None:
    adopt(theirs, theirs.parent / "out")
    card = push(theirs.parent / "out", "me/it", dry_run=True)["card"]["text"]
    assert "quantized by another library, imported with qexport" in card
    assert "| calibration | not recorded |" in card


# ---- GPTQ --------------------------------------------------------------------------------------

GPTQ: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"bits": 4, "group_size": 32, "symmetric": True}, {"version": "v1"}),
    ({"bits": 4, "group_size": 32, "symmetric": True}, {}),
    ({"bits": 3, "group_size": 32, "symmetric": False}, {}),
    ({"bits": 8, "group_size": -1, "symmetric": True}, {}),
    ({"bits": 2, "group_size": 16, "symmetric": False, "changes": [Change("*.o_proj", "bits", 8)]}, {}),
]


@pytest.mark.parametrize(("options", "target"), GPTQ, ids=str)
def test_gptq_comes_back_and_goes_out_again_with_equal_bytes(
    options: dict[str, Any], target: dict[str, Any], tmp_path: Path
) -> None:
    folder = wide.packed(tmp_path, **options)
    export(folder, "gptq", tmp_path / "one", check=False, options=target)
    adopt(tmp_path / "one", tmp_path / "ours")
    export(tmp_path / "ours", "gptq", tmp_path / "two", check=False, options=target)
    before, ours = tensors(folder), tensors(tmp_path / "ours")
    assert before.keys() == ours.keys()
    assert all(torch.equal(before[name], ours[name]) for name in before)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    verify(tmp_path / "ours")


def gptq_folder(folder: Path, change: Any) -> Path:
    """A GPTQ export with one linear's tensors changed."""
    from safetensors.torch import save_file

    export(wide.packed(folder, bits=4, group_size=32, symmetric=True), "gptq", folder / "theirs", check=False)
    stored = tensors(folder / "theirs")
    change(stored)
    for path in (folder / "theirs").glob("model*"):
        path.unlink()
    save_file(stored, folder / "theirs" / "model.safetensors", metadata={"format": "pt"})
    return folder / "theirs"


def test_groups_in_any_order_become_sorted_columns(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def sort(stored: dict[str, torch.Tensor]) -> None:
        stored[f"{name}.g_idx"] = (torch.arange(64) // 32)[order].to(torch.int32)

    theirs = gptq_folder(tmp_path, sort)
    adopt(theirs, tmp_path / "ours")
    own = load(tmp_path / "packed", backend="reference", dtype=torch.float32).get_submodule(name)
    found = load(tmp_path / "ours", backend="reference", dtype=torch.float32).get_submodule(name)
    fields = own.spec.weight.unpack(own.packed, own.n, own.k)
    codes, groups = fields["codes"].float() - 8, (torch.arange(64) // 32)[order]
    torch.testing.assert_close(found.weight, codes * fields["scales"][:, groups], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({f"{G}.g_idx": torch.zeros(64, dtype=torch.int32)}),
            "expected 2 groups of 32 columns each",
        ),
        (
            lambda t: t.update({f"{G}.qweight": t[f"{G}.qweight"][:-1].contiguous()}),
            "none of its layouts|qweight: expected",
        ),
        (lambda t: t.pop(f"{G}.qzeros"), "qzeros: is missing"),
        (lambda t: t.pop(f"{G}.scales"), "expected qweight, qzeros and scales"),
        (lambda t: t.update({f"{G}.g_idx": torch.full((64,), 2**31 - 1, dtype=torch.int32)}), "expected 2 groups of"),
        (lambda t: t.update({f"{G}.g_idx": torch.tensor(3)}), "g_idx: expected torch.int32 or torch.int64"),
        (lambda t: t.update({f"{G}.qweight": t[f"{G}.qweight"].float()}), "qweight: expected torch.int32"),
    ],
)
def test_damaged_gptq_folders_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=message):
        adopt(gptq_folder(tmp_path, change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


G = "model.layers.0.mlp.up_proj"


def test_gptq_of_another_kind_is_refused(tmp_path: Path) -> None:
    theirs = gptq_folder(tmp_path, lambda t: None)
    config = read_json(theirs / "config.json")
    config["quantization_config"]["checkpoint_format"] = "marlin"
    (theirs / "config.json").write_text(dump_json(config))
    with pytest.raises(PlanError, match="expected checkpoint_format gptq or gptq_v2 in int32, found marlin"):
        adopt(theirs, tmp_path / "out")


def test_a_folder_in_use_is_refused(theirs: Path) -> None:
    with pytest.raises(ResumeError, match="is there already"):
        adopt(theirs, theirs)


def test_the_command_prints_what_it_found(theirs: Path) -> None:
    from typer.testing import CliRunner

    from qexport.cli import app

    done = CliRunner().invoke(app, ["import", str(theirs), "-o", str(theirs.parent / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert '"from": "compressed-tensors"' in done.stdout
    assert '"modules": 14' in done.stdout
