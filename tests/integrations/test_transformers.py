"""Packed checkpoints through transformers' own doors: equal logits, and nothing random, ever."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from qexport import QExportConfig, checkpoint, container
from qexport.checkpoint import Reader
from qexport.container import FORGOTTEN_IMPORT
from qexport.errors import BackendError, CheckpointError, LayoutError, QExportError
from qexport.load import load
from qexport.runtime.linear import QuantLinear
from qexport.runtime.packed import quantized
from tests import packing, tiny

TOKENS = torch.randint(2, 200, (2, 9), generator=torch.Generator().manual_seed(1))
CASES = {
    "untied, dense head": (False, packing.usual, 1, torch.float32),
    "tied, dense head": (True, packing.usual, 1, torch.float32),
    "tied, packed head, shards, bfloat16": (True, packing.with_head, 3, torch.bfloat16),
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@cache
def tiny_model(name: str, tied: bool) -> Any:
    return tiny.make(name, tied=tied)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


def plainly(folder: Path, backend: str = "reference", **options: Any) -> Any:
    """Load as a user of transformers would."""
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=QExportConfig(backend=backend), **options)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A packed Llama with an untied packed head."""
    packing.pack_model(tiny_model("llama", tied=False), tmp_path / "packed", choose=packing.with_head)
    return tmp_path / "packed"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_logits_equal_those_of_the_decoded_weights(name: str, case: tuple[Any, ...], tmp_path: Path) -> None:
    tied, choose, shards, dtype = case
    packing.pack_model(
        tiny_model(name, tied), tmp_path / "packed", choose=choose, shards=shards, dense=tmp_path / "dense"
    )
    eager = {"experts_implementation": "eager"} if name in tiny.MOE else {}
    want = logits(load(str(tmp_path / "dense"), dtype=dtype, **eager))
    model: Any = load(str(tmp_path / "packed"), backend="reference", dtype=dtype)
    assert len(quantized(model)) >= 8
    assert torch.equal(logits(model), want)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(str(tmp_path / "again"), backend="reference", dtype=dtype)), want)


def test_a_model_that_multiplies_by_the_weight_of_a_linear_runs(tmp_path: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=tiny.VOCAB, hidden_size=40, num_hidden_layers=2, state_size=8, time_step_rank=8, use_mambapy=False
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    packing.pack_model(model, tmp_path / "packed", choose=packing.with_head, dense=tmp_path / "dense")
    dense: Any = load(str(tmp_path / "dense"))
    found: Any = load(str(tmp_path / "packed"), backend="reference")
    projection = found.get_submodule("backbone.layers.0.mixer.dt_proj")
    assert isinstance(projection, QuantLinear)
    assert torch.equal(projection.weight, dense.get_submodule("backbone.layers.0.mixer.dt_proj").weight)
    torch.testing.assert_close(logits(found), logits(dense))  # once unequal for a cause not found, see decision 0009
    found.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(str(tmp_path / "again"), backend="reference")), logits(dense))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_linear_that_rounds_in_its_own_way_still_does_when_packed(dtype: torch.dtype, tmp_path: Path) -> None:
    config = transformers.FalconConfig(
        vocab_size=tiny.VOCAB, hidden_size=40, num_hidden_layers=2, num_attention_heads=5, bias=True, alibi=True
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    packing.pack_model(model, tmp_path / "packed", dense=tmp_path / "dense")
    want = logits(load(str(tmp_path / "dense"), dtype=dtype))
    found: Any = load(str(tmp_path / "packed"), backend="reference", dtype=dtype)
    assert len(quantized(found)) == 8
    assert torch.equal(logits(found), want)
    assert torch.equal(logits(found.dequantize()), want)


def test_a_weight_that_the_class_keeps_in_float32_is_handed_out_so(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"o_proj"})
    packing.pack_model(tiny_model("llama", tied=False), tmp_path / "packed", choose=packing.usual)
    model = plainly(tmp_path / "packed", dtype=torch.bfloat16)
    block = model.model.layers[0]
    assert block.self_attn.o_proj.weight.dtype == torch.float32
    assert block.self_attn.q_proj.weight.dtype == torch.bfloat16


def test_from_pretrained_equals_load_and_shows_its_paths(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed)
    head = model.lm_head
    assert isinstance(head, QuantLinear)
    assert head.choice.path in ("cpu", "reference")
    assert packing.near(logits(model), logits(plainly(packed)))


def test_generation_works(packed: Path) -> None:
    out = plainly(packed).generate(TOKENS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (2, 13)


def test_a_base_model_loads_alone(tmp_path: Path) -> None:
    packing.pack_model(tiny_model("gpt2", tied=True), tmp_path / "p", choose=packing.with_head, dense=tmp_path / "d")
    a, b = (AutoModel.from_pretrained(tmp_path / folder) for folder in ("p", "d"))
    with torch.no_grad():
        assert packing.near(a(TOKENS).last_hidden_state, b(TOKENS).last_hidden_state)


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_layers_may_lie_on_disk(name: str, offload_buffers: bool, tmp_path: Path) -> None:
    packing.pack_model(tiny_model(name, tied=False), tmp_path / "packed", choose=packing.with_head)
    want = logits(load(str(tmp_path / "packed"), backend="reference"))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    options: dict[str, Any] = {"offload_folder": str(tmp_path / "offload"), "offload_buffers": offload_buffers}
    model: Any = load(str(tmp_path / "packed"), device_map=places, cache_gb=1.0, **options)
    assert packing.near(logits(model), want)
    assert packing.near(logits(model), want)


def test_dequantize_gives_the_decoded_dense_model(tmp_path: Path) -> None:
    for name in ("gpt2", "mixtral"):
        folder = tmp_path / name
        packing.pack_model(tiny_model(name, tied=True), folder, choose=packing.with_head)
        model = plainly(folder)
        want = logits(model)
        model = model.dequantize()
        assert not quantized(model)
        assert torch.equal(logits(model), want)
        model.save_pretrained(tmp_path / "plain")
        config = json.loads((tmp_path / "plain/config.json").read_text())
        assert "quantization_config" not in config
        assert "transformers_weights" not in config
        assert torch.equal(logits(load(str(tmp_path / "plain"), experts_implementation="eager")), want)


def test_decoded_weights_are_cached_within_the_given_budget(packed: Path) -> None:
    config = QExportConfig(backend="reference", cache_gb=20_000 / 1e9)
    model = AutoModelForCausalLM.from_pretrained(packed, quantization_config=config)
    want = logits(plainly(packed))
    assert torch.equal(logits(model), want)
    kept = [m._kept.nbytes for m in quantized(model).values() if isinstance(m, QuantLinear) and m._kept is not None]
    assert 0 < sum(kept) <= 20_000
    assert torch.equal(logits(model), want)


def test_a_saved_copy_carries_note_metadata_and_no_loading_options(packed: Path, tmp_path: Path) -> None:
    plainly(packed).save_pretrained(tmp_path / "again", max_shard_size="10KB")
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["transformers_weights"] == FORGOTTEN_IMPORT
    assert config["quantization_config"] == json.loads((packed / "config.json").read_text())["quantization_config"]
    reader = Reader(tmp_path / "again")
    assert len(reader.files) > 1
    for file, metadata in reader.metadata.items():
        spec, n, k = container.read_shard_metadata(metadata, file)["lm_head"]
        assert (spec, n, k) == (packing.UNIFORM, tiny.VOCAB, 40)


def test_pushing_from_save_pretrained_uploads_the_note(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = plainly(packed), []
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, *a, **k: calls.append((a, k)))
    model.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="me/it", private=True)
    assert calls == [(("me/it",), {"private": True})]


# ---- refusals ----------------------------------------------------------------------------------


def test_a_dense_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "dense")
    with pytest.raises(CheckpointError, match="qexport quantize"):
        plainly(tmp_path / "dense")


def test_backends_that_can_not_run_are_refused(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError):
        plainly(packed, "triton")
    with pytest.raises(BackendError, match="there is no backend"):
        QExportConfig(backend="gpu")


def test_a_checkpoint_has_no_say_in_how_it_is_loaded(packed: Path) -> None:
    edit(packed, lambda c: c["quantization_config"].update(backend="gpu", cache_gb=1e9))
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert model.config.quantization_config.backend == "auto"
    assert model.config.quantization_config.cache_gb == 0


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    reader = Reader(folder)
    tensors = {name: reader.read(name) for name in reader.names}
    change(tensors)
    packing.write_shards(folder, tensors)


Q, DOWN, OUT = (f"model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.down_proj", "self_attn.o_proj"))


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def poke(name: str, index: int, value: float) -> Callable[[dict[str, Tensor]], Any]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[index] = value
        return tensor

    return replace(name, change)


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[QExportError], str]] = {
    "a packed tensor is missing": (lambda t: t.pop(f"{Q}.scales"), LayoutError, f"{Q}.scales: is missing"),
    "a packed module is missing": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{Q}.")],
        LayoutError,
        f"{Q}.input_perm: is missing",
    ),
    "a dense tensor is missing": (lambda t: t.pop("model.norm.weight"), CheckpointError, "model.norm.weight: missing"),
    "a packed tensor too many": (
        lambda t: t.update({f"{Q}.zeros": torch.zeros(3)}),
        LayoutError,
        f"{Q}.zeros: does not belong",
    ),
    "another dtype": (replace(f"{Q}.scales", Tensor.float), LayoutError, f"{Q}.scales: expected float16"),
    "another dtype of the same width": (
        replace(f"{Q}.scales", Tensor.bfloat16),
        LayoutError,
        f"{Q}.scales: expected float16",
    ),
    "another shape": (replace(f"{Q}.qweight", lambda t: t[:-1]), LayoutError, f"{Q}.qweight: expected int32"),
    "another shape of a dense tensor": (
        replace("model.norm.weight", lambda t: t[:-1]),
        CheckpointError,
        "model.norm.weight: expected",
    ),
    "integers for a dense tensor": (
        replace("model.norm.weight", Tensor.int),
        CheckpointError,
        "model.norm.weight: expected",
    ),
    "fewer outliers than announced": (
        replace(f"{DOWN}.outlier_values", lambda t: t[:-1]),
        LayoutError,
        f"{DOWN}.outlier_values: expected",
    ),
    "a module that the model lacks": (
        lambda t: t.update({"model.layers.9.self_attn.q_proj.qweight": torch.zeros(1)}),
        CheckpointError,
        "model.layers.9.self_attn.q_proj",
    ),
    "an impossible shape": (
        lambda t: t.update({f"{Q}.scales": torch.zeros(0, 2**40, dtype=torch.float16)}),
        LayoutError,
        f"{Q}.scales: expected",
    ),
    "a row pointer out of range": (poke(f"{DOWN}.outlier_rows", -1, 10**6), LayoutError, f"{DOWN}.outlier_rows"),
    "row pointers that fall": (poke(f"{DOWN}.outlier_rows", 3, -5), LayoutError, f"{DOWN}.outlier_rows"),
    "a column out of range": (poke(f"{DOWN}.outlier_columns", 0, 60_000), LayoutError, f"{DOWN}.outlier_columns"),
    "a permutation that is none": (
        replace(f"{Q}.input_perm", torch.zeros_like),
        LayoutError,
        f"{Q}.input_perm: expected a permutation",
    ),
    "an input scale of NaN": (poke(f"{OUT}.input_scale", 0, float("nan")), LayoutError, f"{OUT}.input_scale"),
    "a scale of infinity": (poke(f"{Q}.scales", 0, float("inf")), LayoutError, f"{Q}.scales"),
}


@pytest.mark.parametrize("bad", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_hostile_tensors_are_refused(bad: tuple[Any, type[QExportError], str], packed: Path) -> None:
    change, kind, text = bad
    rewrite(packed, change)
    with pytest.raises(kind, match=re.escape(text)):
        plainly(packed)


def quantization(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda config: change(config["quantization_config"])


BAD_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[QExportError], str]] = {
    "a newer container": (quantization(lambda q: q.update(schema=2)), CheckpointError, "needs a newer qexport"),
    "a newer format": (
        quantization(lambda q: q["specs"][0].update(version=99)),
        CheckpointError,
        "needs a newer qexport",
    ),
    "an unknown format": (
        quantization(lambda q: q["specs"][0].update(format="os.system")),
        CheckpointError,
        "unknown format",
    ),
    "an impossible option": (
        quantization(lambda q: q["specs"][0]["options"].update(bits=77)),
        CheckpointError,
        "does not take these options",
    ),
    "a feature it requires": (quantization(lambda q: q.update(required=["magic"])), CheckpointError, "newer"),
    "a packed norm": (
        quantization(lambda q: q["modules"].update({"model.norm": 0})),
        CheckpointError,
        "model.norm has a spec, but is a LlamaRMSNorm",
    ),
    "no extents": (quantization(lambda q: q.update(extents={})), LayoutError, "extent 'nnz' is not known"),
    "other extents": (
        quantization(lambda q: q["extents"][DOWN].update(nnz=10**15)),
        LayoutError,
        f"{DOWN}.outlier_columns: expected",
    ),
    "fewer packed modules": (
        quantization(lambda q: q["modules"].pop("model.layers.*.mlp.down_proj")),
        CheckpointError,
        "model.layers.0.mlp.down_proj.weight: missing",
    ),
    "another width of the model": (lambda c: c.update(intermediate_size=80), LayoutError, "expected"),
}


@pytest.mark.parametrize("bad", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_hostile_configs_are_refused(bad: tuple[Any, type[QExportError], str], packed: Path) -> None:
    change, kind, text = bad
    edit(packed, change)
    with pytest.raises(kind, match=re.escape(text)):
        plainly(packed)


def test_a_stack_of_which_one_expert_is_dense_is_refused(tmp_path: Path) -> None:
    packing.pack_model(tiny_model("mixtral", tied=False), tmp_path / "packed")
    edit(
        tmp_path / "packed",
        quantization(lambda q: q["modules"].update({"model.layers.0.mlp.experts.down_proj.1": None})),
    )
    with pytest.raises(CheckpointError, match="expected a spec for each of 3 experts, found 2"):
        plainly(tmp_path / "packed")


def test_damaged_files_are_refused(packed: Path) -> None:
    path = packed / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\0", whole[:100], b"", b"\xff" * 8 + whole[8:], whole[:8] + b"x" + whole[9:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            plainly(packed)


def test_pickles_are_not_opened(packed: Path) -> None:
    (packed / "model.safetensors").unlink()
    (packed / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo bad'\ntR.")
    with pytest.raises(CheckpointError, match=r"safetensors files; found pytorch_model\.bin"):
        plainly(packed)


def test_one_tensor_in_two_shards_is_refused(packed: Path) -> None:
    tensors = {name: Reader(packed).read(name) for name in Reader(packed).names}
    (packed / "model.safetensors").unlink()
    packing.write_shards(packed, tensors, shards=2)
    checkpoint.write_tensors(packed / "model-00001-of-00002.safetensors", tensors, {})
    with pytest.raises(CheckpointError, match="stored in model-00001"):
        plainly(packed)


# ---- other processes ---------------------------------------------------------------------------

_LOAD = (
    "import sys\nfrom transformers import AutoModelForCausalLM\n"
    "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\nprint(type(model.lm_head).__name__)"
)
FRESH = {
    "no import": _LOAD,
    "before transformers": f"import qexport\n{_LOAD}",
    "after transformers": f"import transformers.quantizers.auto, qexport\n{_LOAD}",
}


@pytest.fixture(scope="module", autouse=True)
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.Popen[str]]:
    """Fresh processes that load a packed checkpoint; they run beside the other tests."""
    folder = tmp_path_factory.mktemp("fresh")
    packing.pack_model(tiny_model("llama", tied=False), folder, choose=packing.with_head)
    environment = os.environ | {"PYTHONPATH": str(Path(tiny.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return {
        name: subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], env=environment, stdout=pipe, stderr=pipe, text=True
        )
        for name, code in FRESH.items()
    }


def test_without_the_import_loading_raises_an_error_that_names_qexport(fresh: dict[str, subprocess.Popen[str]]) -> None:
    out, error = fresh["no import"].communicate()
    assert fresh["no import"].returncode == 1
    assert FORGOTTEN_IMPORT in error.splitlines()[-1]
    assert not out


@pytest.mark.parametrize("order", ["before transformers", "after transformers"])
def test_qexport_may_be_imported(order: str, fresh: dict[str, subprocess.Popen[str]]) -> None:
    out, error = fresh[order].communicate()
    assert out.split() == ["QuantLinear"], error


def test_extents_that_overflow_are_refused(tmp_path: Path) -> None:
    from tests import finished

    folder = finished.write(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    for found in config["quantization_config"]["extents"].values():
        found.update(dict.fromkeys(found, 2**63 - 1))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LayoutError, match="can't be: expected at most"):
        load(str(folder))
