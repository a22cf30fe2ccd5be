"""Exports are loaded by the other library, in a process without ours, before they count as done."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qexport import load
from qexport.calibration import Calibration
from qexport.card import is_generated
from qexport.checkpoint import Reader, read_json
from qexport.errors import BackendError, CheckpointError, PlanError, ResumeError, UsageError
from qexport.events import Note
from qexport.export import _proof, adopt, compressed_tensors, export, targets
from qexport.export.base import Module
from qexport.models import anatomy, load_dense, open_source
from qexport.plan import make_plan
from qexport.quantize import quantize
from qexport.recipe import Change, load_recipe, with_options, with_parts, with_transforms
from qexport.schema import Tensors
from tests import tiny


def packed(folder: Path, name: str = "llama", recipe: str = "rtn", *, transforms: Any = (), **options: Any) -> Path:
    """A tiny model quantized into `folder / "packed"`."""
    fmt, rounding = options.pop("format", None), options.pop("input", None)
    changes = options.pop("changes", ())
    own = with_transforms(with_parts(load_recipe(recipe), format=fmt, input=rounding), transforms)
    own = with_options(own, list({"group_size": 8, **options}.items()))
    own = type(own)(**{**vars(own), "changes": tuple(changes)})
    source = open_source(str(tiny.save(name, folder / "model")))
    text = folder / "text.txt"
    text.write_text(" ".join(f"{i} bottles and {i * i} glasses" for i in range(400)))
    plan = make_plan(source, anatomy(source), own, calibration=Calibration(str(text), samples=4, seqlen=32))
    quantize(plan, source, folder / "packed")
    return folder / "packed"


# ---- compressed-tensors ------------------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    {"bits": 4, "symmetric": True},
    {"bits": 4, "symmetric": False},
    {"bits": 3, "symmetric": True},
    {"bits": 3, "symmetric": False},
    {"bits": 8, "symmetric": True, "group_size": -1},
    {"bits": 5, "symmetric": True, "changes": [Change("*.1.mlp.down_proj", "bits", 8), Change("*.o_proj", "bits", 2)]},
    {"bits": 4, "symmetric": True, "lm_head": 8},
]


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("options", CASES, ids=str)
def test_compressed_tensors_computes_the_same_without_us(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    found = export(packed(tmp_path, **options), "compressed-tensors", tmp_path / "out")
    assert found["check"]["max_difference"] < 1e-5
    assert found["check"]["top1"] == 1.0
    config = read_json(tmp_path / "out" / "config.json")
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "transformers_weights" not in config
    assert is_generated((tmp_path / "out" / "README.md").read_text())
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("options", [{"symmetric": True, "group_size": -1}, {"symmetric": False}], ids=str)
def test_a_byte_a_code_computes_the_same_and_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = packed(tmp_path, bits=8, **options)
    export(folder, "compressed-tensors", tmp_path / "out", options={"form": "int-quantized"})
    assert Reader(tmp_path / "out").meta("model.layers.0.mlp.up_proj.weight").dtype == torch.int8
    adopt(tmp_path / "out", tmp_path / "back")
    one, two = Reader(folder), Reader(tmp_path / "back")
    assert set(one.names) == set(two.names)
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.names)


def test_groups_of_a_config_name_each_linear_once(tmp_path: Path) -> None:
    folder = packed(tmp_path, **CASES[5])
    export(folder, "compressed-tensors", tmp_path / "out", check=False)
    groups = read_json(tmp_path / "out" / "config.json")["quantization_config"]["config_groups"]
    targets = {group["weights"]["num_bits"]: group["targets"] for group in groups.values()}
    assert targets[2] == [r"re:^model\.layers\.\d+\.self_attn\.o_proj$"]
    assert targets[8] == [r"re:^model\.layers\.1\.mlp\.down_proj$"]
    assert r"re:^model\.layers\.0\.mlp\.down_proj$" in targets[5]


# ---- faults ------------------------------------------------------------------------------------


def _swap_nibbles(found: dict[str, Tensor], name: str) -> None:
    words = found[f"{name}.weight_packed"].view(torch.uint8)
    found[f"{name}.weight_packed"] = (words >> 4 | words << 4).view(torch.int32)


def _shift_zeros(found: dict[str, Tensor], name: str) -> None:
    found[f"{name}.weight_zero_point"] = found[f"{name}.weight_zero_point"] + 0x11111111


def _turn_scales(found: dict[str, Tensor], name: str) -> None:
    scales = found[f"{name}.weight_scale"]
    found[f"{name}.weight_scale"] = scales.T.reshape(scales.shape).contiguous()


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("damage", [_swap_nibbles, _shift_zeros, _turn_scales])
def test_a_wrong_conversion_fails_the_check_and_leaves_nothing(
    damage: Callable[[dict[str, Tensor], str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors")
    folder = packed(tmp_path, bits=4)
    right = compressed_tensors.convert

    def wrong(module: Module, tensors: Tensors) -> Mapping[str, Tensor]:
        found = dict(right(module, tensors))
        if module.name.endswith("0.mlp.up_proj"):
            damage(found, module.name)
        return found

    monkeypatch.setattr(compressed_tensors, "convert", wrong)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"logits differ from ours by .* of the largest"):
        export(folder, "compressed-tensors", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_folder_that_the_library_refuses_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    folder = packed(tmp_path, bits=4)
    config = compressed_tensors.quantization
    monkeypatch.setattr(compressed_tensors, "quantization", lambda p, forms: {**config(p, forms), "format": "nonsense"})
    with pytest.raises(CheckpointError, match="the exported model can't be loaded"):
        export(folder, "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- dense -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "recipe", "transforms", "options"),
    [
        ("llama", "bcq", (), {"bits": 2, "group_size": 16}),
        ("gpt2", "rtn", ("awq", "rotation"), {"embeddings": 8}),
        ("mixtral", "rtn", (), {}),
        ("gemma3", "gptq", (), {"order": "act", "lm_head": 4}),
    ],
)
def test_dense_exports_compute_what_the_packed_model_computes(
    name: str, recipe: str, transforms: tuple[str, ...], options: dict[str, Any], tmp_path: Path
) -> None:
    folder = packed(tmp_path, name, recipe, transforms=transforms, **options)
    export(folder, "dense", tmp_path / "out", check=False)
    ids = torch.arange(24).view(2, 12) * 3 % tiny.VOCAB
    with torch.inference_mode():
        wanted = load(folder, backend="reference", dtype=torch.float32)(input_ids=ids).logits
        found = load_dense(open_source(str(tmp_path / "out")), dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("forked")
def test_a_dense_export_is_proven_and_takes_a_dtype(tmp_path: Path) -> None:
    folder = packed(tmp_path)
    found = export(folder, "dense", tmp_path / "out", options={"dtype": "bfloat16"})
    assert 1e-4 < found["check"]["max_difference"] < 1e-1
    reader = Reader(tmp_path / "out")
    assert {reader.meta(n).dtype for n in reader.names} == {torch.bfloat16}
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "recipe", "transforms", "options", "reason"),
    [
        ("llama", "bcq", (), {"bits": 2, "group_size": 16},
         r'layers.0.mlp.down_proj and 13 more: format "bcq" has no counterpart there. Use --method rtn, gptq or'),
        ("llama", "rtn", ("rotation",), {}, "its input is rotated when it runs, which cannot be said there"),
        ("llama", "gptq", (), {"order": "act"}, "its input is sorted when it runs, .* Leave out -t, and order=act"),
        ("llama", "rtn", (), {"embeddings": 8}, "model.embed_tokens: it is an embedding, .* Leave out --embeddings"),
        ("llama", "rtn", (), {"group_size": 32}, "groups of 32 do not divide its 40 columns; --group-size -1 would do"),
        ("llama", "rtn", (), {"lm_head": 8}, "4 bits with zeros and 8 bits with zeros, .* Use --sym, or the same"),
        ("gpt2", "rtn", (), {}, "it is a Conv1D, .* Use --to gptq, bitsandbytes or dense"),
        ("mixtral", "rtn", (), {}, r"experts\..*: it is one expert of a stack, .* Leave experts dense with --ignore"),
    ],
)  # fmt: skip
def test_refusals_name_modules_reason_and_what_works(
    name: str, recipe: str, transforms: tuple[str, ...], options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = packed(tmp_path, name, recipe, transforms=transforms, **options)
    with pytest.raises(PlanError, match=reason) as refusal:
        export(folder, "compressed-tensors", tmp_path / "out", check=False)
    assert "nothing was written" in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_mistakes_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packed(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ResumeError, match="is there already"):
        export(folder, "dense", tmp_path / "full")
    with pytest.raises(ResumeError, match="lies in the checkpoint itself"):
        export(folder, "dense", folder / "inside")
    with pytest.raises(UsageError, match="Did you mean 'dense'"):
        export(folder, "dens", tmp_path / "out")
    with pytest.raises(PlanError, match="int-quantized takes 8 bits, and it has 4. Leave out -s form"):
        export(folder, "compressed-tensors", tmp_path / "out", check=False, options={"form": "int-quantized"})
    with pytest.raises(UsageError, match="form 'bytes': expected auto, pack-quantized, int-quantized"):
        export(folder, "compressed-tensors", tmp_path / "out", options={"form": "bytes"})
    with pytest.raises(UsageError, match="has no option dtype"):
        export(folder, "compressed-tensors", tmp_path / "out", options={"dtype": "float16"})
    with pytest.raises(PlanError, match=r"is not quantized. `qexport quantize .*model` first"):
        export(tmp_path / "model", "dense", tmp_path / "out")
    export(folder, "vllm", tmp_path / "theirs", check=False)
    with pytest.raises(PlanError, match="is a compressed-tensors checkpoint already. `qexport import`"):
        export(tmp_path / "theirs", "dense", tmp_path / "out")
    with pytest.raises(CheckpointError, match="found no folder"):
        export(tmp_path / "nowhere", "dense", tmp_path / "out")
    monkeypatch.setattr(_proof.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"compressed_tensors must be installed.*pip install 'qexport\[export\]'"):
        export(folder, "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert targets() == ["bitsandbytes", "compressed-tensors", "dense", "gguf", "gptq"]


def test_the_command_prints_the_check_as_json(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from qexport.cli import app

    folder = packed(tmp_path)
    done = CliRunner().invoke(app, ["export", str(folder), "--to", "dense", "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["to"] == "dense"
    assert found["check"]["max_difference"] < 1e-5


# ---- before the quantization -------------------------------------------------------------------


def plan_for(folder: Path, reader: str, *options: str) -> Any:
    """What `qexport plan --for` prints as JSON of it."""
    from typer.testing import CliRunner

    from qexport.cli import app

    model = tiny.save("llama", folder / "model")
    done = CliRunner().invoke(app, ["plan", str(model), "--for", reader, "--json", *options])
    assert done.exit_code in (0, 2), done.output
    return json.loads(done.stdout)["export"] if done.exit_code == 0 else done.stderr


def test_plan_says_what_an_export_will_say(tmp_path: Path) -> None:
    found = plan_for(tmp_path / "a", "vllm", "--method", "rtn", "--group-size", "8")
    assert found == {"for": "vllm", "to": "compressed-tensors", "refused": [], "notes": []}
    found = plan_for(tmp_path / "b", "compressed-tensors", "--method", "bcq", "--seqlen", "64")
    assert found["refused"][0].startswith(
        'model.layers.0.self_attn.q_proj and 13 more: format "bcq" has no counterpart'
    )
    mixed = ("--method", "rtn", "--group-size", "8", "--sym", "--set", "*.k_proj:bits=8")
    found = plan_for(tmp_path / "c", "vllm", *mixed)
    assert len(found["notes"]) == 2
    assert "self_attn.k_proj, model.layers.0.self_attn.v_proj are not stored alike, and vLLM makes" in found["notes"][0]
    assert "--to sglang: expected bitsandbytes, compressed-tensors, dense, gguf, gptq, vllm (reads" in plan_for(
        tmp_path / "d", "sglang"
    )


def test_an_export_warns_of_what_vllm_fuses(tmp_path: Path) -> None:
    folder = packed(tmp_path, symmetric=True, changes=[Change("*.0.mlp.up_proj", "bits", 8)])
    notes: list[Any] = []
    export(folder, "compressed-tensors", tmp_path / "out", check=False, observer=notes.append)
    texts = [note.text for note in notes if isinstance(note, Note)]
    assert len(texts) == 1
    assert "mlp.gate_proj, model.layers.0.mlp.up_proj are not stored alike" in texts[0]


def test_a_config_that_does_not_belong_to_the_files_is_a_stated_error(tmp_path: Path) -> None:
    folder = packed(tmp_path)
    config = read_json(folder / "config.json")
    for change, message in (
        ({"num_hidden_layers": 1}, "has no such module"),
        ({"model_type": "nobody"}, "config.json:"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            export(folder, "dense", tmp_path / "out", check=False)
        assert not (tmp_path / "out").exists()
