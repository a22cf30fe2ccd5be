"""Packed embeddings and heads, tied or not: what the job writes, what loads, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

from qexport import report
from qexport.calibration import Calibration
from qexport.card import render
from qexport.checkpoint import Reader, read_json, sha256
from qexport.cli import app
from qexport.container import read_shard_metadata
from qexport.errors import QExportError
from qexport.evaluate.size import measure
from qexport.events import Event, LayerDone, ignore
from qexport.facts import card_facts
from qexport.formats.specs import InputSpec
from qexport.load import load
from qexport.models import anatomy, load_dense, open_source
from qexport.plan import Plan, make_plan
from qexport.predict import predict
from qexport.quantize import quantize
from qexport.recipe import Recipe, load_recipe, with_options, with_transforms
from qexport.runtime.embedding import QuantEmbedding
from qexport.runtime.linear import QuantLinear
from qexport.verify import verify
from tests import tiny
from tests.packing import near

TEXT = " ".join(f"the {i} quick brown foxes jump over {i * i} lazy dogs" for i in range(400))
IDS = torch.arange(24).view(2, 12) * 3 % tiny.VOCAB
OUTER = {"both": (8, 6), "embedding": (0, 6), "head": (8, 0)}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A calibration text."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def recipe(name: str, **options: Any) -> Recipe:
    return with_options(load_recipe(name), [("group_size", 32), *options.items()])


def plan_for(model: Path, own: Recipe, text: Path | str = "builtin") -> Plan:
    source = open_source(str(model))
    return make_plan(source, anatomy(source), own, calibration=Calibration(str(text), 4, 32))


def job(model: Path, out: Path, own: Recipe, text: Path | str = "builtin", observer: Any = ignore) -> Plan:
    plan = plan_for(model, own, text)
    quantize(plan, open_source(str(model)), out, observer=observer)
    return plan


def decoded(out: Path) -> dict[str, Tensor]:
    """The weights that a checkpoint's packed tensors mean, by module."""
    reader, found = Reader(out), {}
    for file in reader.files:
        for module, (spec, n, k) in read_shard_metadata(reader.metadata[file], file).items():
            found[module] = spec.decoded({f: reader.read(f"{module}.{f}") for f in spec.layout(n, k)}, n, k)
    return found


def dense_twin(model: Path, plan: Plan, out: Path, dtype: torch.dtype) -> nn.Module:
    """The unquantized model with the decoded weights in it, untied where the job unties."""
    found: Any = load_dense(open_source(str(model)), dtype=dtype)
    if plan.unties:
        found.get_output_embeddings().weight = nn.Parameter(found.get_output_embeddings().weight.clone())
    for module, weight in decoded(out).items():
        target = found.get_submodule(module).weight.data
        target.copy_(weight.T if plan.modules[module].view.transposed else weight)
    return found  # type: ignore[no-any-return]


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma3-wrapper", "gpt2", "opt", "phi3"])
def test_logits_are_those_of_the_decoded_weights(
    name: str, tied: bool, outer: tuple[int, int], tmp_path: Path, text: Path
) -> None:
    method = "gptq" if name in ("llama", "gemma3") else "rtn"
    model = tiny.save(name, tmp_path / "model", tied=tied)
    head, embeddings = outer
    plan = job(model, tmp_path / "out", recipe(method, lm_head=head, embeddings=embeddings), text)
    assert [plan.head is not None, plan.embedding is not None] == [head > 0, embeddings > 0]
    for dtype in (torch.float32, torch.bfloat16):
        want = logits(dense_twin(model, plan, tmp_path / "out", dtype))
        packed: Any = load(tmp_path / "out", backend="reference", dtype=dtype)
        assert isinstance(packed.get_input_embeddings(), QuantEmbedding) is (embeddings > 0)
        assert isinstance(packed.get_output_embeddings(), QuantLinear) is (head > 0)
        assert torch.equal(logits(packed), want)
        packed.save_pretrained(tmp_path / f"again-{dtype}")
        again: Any = load(tmp_path / f"again-{dtype}", backend="reference", dtype=dtype)
        assert torch.equal(logits(again), want)
        assert torch.equal(logits(again.dequantize()), want)


@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_sizes_agree_wherever_they_are_said(tied: bool, outer: tuple[int, int], tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model", tied=tied)
    head, embeddings = outer
    plan = job(model, tmp_path / "out", recipe("rtn", lm_head=head, embeddings=embeddings))
    manifest, found, seen = read_json(tmp_path / "out/qexport.json"), predict(plan), measure(tmp_path / "out")
    reader, shown = Reader(tmp_path / "out"), report.inspect(tmp_path / "out", device="cpu")
    names = {m for m, bits in (("lm_head", head), ("model.embed_tokens", embeddings)) if bits}
    assert names == {name for name in manifest["modules"] if not name.startswith("model.layers.")}
    assert manifest["embeddings"] == (["model.embed_tokens"] if embeddings else [])
    assert found.nbytes == sum(reader.meta(name).nbytes for name in reader.names)
    for key in ("bits_per_weight", "bits_per_parameter"):
        value = getattr(found, key)
        assert [manifest[key], getattr(seen, key), shown[key]] == [value] * 3
    assert verify(tmp_path / "out")["bits_per_weight"] == found.bits_per_weight
    facts = card_facts(tmp_path / "out", "me/it")
    assert facts.bits_per_parameter == found.bits_per_parameter
    assert ("quantized modules, model.embed_tokens among them" in render(facts)) is (embeddings > 0)
    assert sum(path["modules"] for path in shown["paths"]) == 14 + len(names)
    assert any("rows" in path["reason"] for path in shown["paths"]) is (embeddings > 0)
    assert shown["bytes"] == seen.nbytes == sum((tmp_path / "out" / file).stat().st_size for file in reader.files)


def test_who_stays_dense_of_a_tied_pair_has_a_tensor_of_its_own(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model", tied=True)
    table = Reader(model).read("model.embed_tokens.weight")
    for case, (head, embeddings) in OUTER.items():
        job(model, tmp_path / case, recipe("rtn", lm_head=head, embeddings=embeddings))
        reader = Reader(tmp_path / case)
        outer = {"model.embed_tokens", "lm_head"}
        dense = {name for name in reader.names if name.removesuffix(".weight") in outer}
        assert dense == {"both": set(), "embedding": {"lm_head.weight"}, "head": {"model.embed_tokens.weight"}}[case]
        assert all(torch.equal(reader.read(name), table) for name in dense)
        assert read_json(tmp_path / case / "config.json")["tie_word_embeddings"] is False


def test_a_shared_bias_gets_a_copy_when_the_embedding_is_packed(tmp_path: Path) -> None:
    config = transformers.BertGenerationConfig(
        vocab_size=tiny.VOCAB, hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1, is_decoder=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "model")
    plan = job(tmp_path / "model", tmp_path / "out", recipe("rtn", embeddings=4))
    packed: Any = load(tmp_path / "out", backend="reference")
    assert torch.equal(packed.lm_head.decoder.bias, model.lm_head.bias)
    assert torch.equal(logits(packed), logits(dense_twin(tmp_path / "model", plan, tmp_path / "out", torch.float32)))


def test_an_embedding_narrower_than_the_hidden_state_is_packed(tmp_path: Path) -> None:
    config = tiny.config("opt", tied=True)
    config.word_embed_proj_dim = 24
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    plan = job(tmp_path / "model", tmp_path / "out", recipe("rtn", embeddings=4, lm_head=4))
    assert plan.embedding is not None
    assert (plan.embedding.view.n, plan.embedding.view.k) == (tiny.VOCAB, 24)
    want = logits(dense_twin(tmp_path / "model", plan, tmp_path / "out", torch.float32))
    assert torch.equal(logits(load(tmp_path / "out", backend="reference")), want)


def test_an_embedding_scaled_by_a_number_is_packed(tmp_path: Path) -> None:
    config = transformers.XGLMConfig(
        vocab_size=tiny.VOCAB, d_model=40, ffn_dim=72, num_layers=2, attention_heads=4, max_position_embeddings=64,
        scale_embedding=True, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    plan = job(tmp_path / "model", tmp_path / "out", recipe("rtn", embeddings=4))
    want = logits(dense_twin(tmp_path / "model", plan, tmp_path / "out", torch.float32))
    assert torch.equal(logits(load(tmp_path / "out", backend="reference")), want)


# ---- loading -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tied GPT-2 with head and embedding packed."""
    folder = tmp_path_factory.mktemp("packed")
    job(tiny.save("gpt2", folder / "model", tied=True), folder / "out", recipe("rtn", lm_head=4, embeddings=4))
    return folder / "out"


def test_a_base_model_loads_alone_and_position_embeddings_stay_dense(packed: Path) -> None:
    alone: Any = AutoModel.from_pretrained(packed)
    whole: Any = load(packed, backend="reference")
    assert isinstance(alone.wte, QuantEmbedding)
    assert type(alone.wpe) is nn.Embedding
    with torch.inference_mode():
        assert near(alone(IDS).last_hidden_state, whole.transformer(IDS).last_hidden_state)
    assert torch.equal(whole.transformer.wte.weight, decoded(packed)["transformer.wte"])


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_an_embedding_may_lie_on_disk(offload_buffers: bool, tmp_path: Path) -> None:
    model = tiny.save("gemma3", tmp_path / "model", tied=True)
    job(model, tmp_path / "out", recipe("rtn", lm_head=4, embeddings=4))
    want = logits(load(tmp_path / "out", backend="reference"))
    names = [name for name, _ in tiny.make("gemma3").model.named_children()]
    places = {f"model.{name}": "disk" if name == "embed_tokens" else "cpu" for name in names} | {"lm_head": "cpu"}
    for cache in (0.0, 1.0):
        found = load(
            tmp_path / "out", device_map=places, cache_gb=cache, offload_folder=str(tmp_path / "offload"),
            offload_buffers=offload_buffers,
        )  # fmt: skip
        assert near(logits(found), want)
        assert near(logits(found), want)


def test_generation_and_the_budget_work(packed: Path) -> None:
    want = logits(load(packed, backend="reference"))
    model: Any = load(packed, cache_gb=1.0)
    assert near(logits(model), want)
    assert model.transformer.wte._kept is not None
    assert near(logits(model), want)
    assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 15)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("scales", None, "transformer.wte.scales: is missing"),
        ("scales", Tensor.float, "transformer.wte.scales: expected float16"),
        ("qweight", lambda t: t[:-1].clone(), "transformer.wte.qweight: expected int32"),
        ("scales", lambda t: t * float("inf"), "transformer.wte.scales: expected finite"),
    ],
)
def test_damaged_embeddings_are_refused(field: str, change: Any, message: str, packed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    shard = sorted(copy.glob("model-*.safetensors"))[-1]
    tensors = load_file(shard)
    old = tensors.pop(f"transformer.wte.{field}")
    if change is not None:
        tensors[f"transformer.wte.{field}"] = change(old)
    save_file(tensors, shard)
    with pytest.raises(QExportError, match=message):
        load(copy)


# ---- the stream --------------------------------------------------------------------------------


def test_calibration_sees_the_embedding_as_it_is_packed(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    job(model, tmp_path / "out", recipe("gptq", embeddings=2), text)
    twin = tmp_path / "twin"  # whose dense embedding is the decoded one
    tiny.save("llama", twin)
    weights = load_file(twin / "model.safetensors")
    weights["model.embed_tokens.weight"] = decoded(tmp_path / "out")["model.embed_tokens"]
    save_file(weights, twin / "model.safetensors", metadata={"format": "pt"})
    job(twin, tmp_path / "dense", recipe("gptq"), text)
    files = [sorted((tmp_path / folder).glob("model-0000[12]-*")) for folder in ("out", "dense")]
    assert [sha256(file) for file in files[0]] == [sha256(file) for file in files[1]]


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_transforms_are_for_linears_and_leave_the_embedding_alone(name: str, tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model", tied=True)
    own = with_transforms(recipe(name, lm_head=6, embeddings=4), ["awq", "rotation"])
    plan = job(model, tmp_path / "out", own, text)
    assert plan.embedding is not None
    assert plan.head is not None
    assert plan.embedding.spec.input == InputSpec()
    assert plan.head.spec.input.hadamard
    job(model, tmp_path / "plain", recipe("rtn", embeddings=4))
    tables = [decoded(tmp_path / folder)["model.embed_tokens"] for folder in ("out", "plain")]
    assert torch.equal(*tables)
    assert verify(tmp_path / "out")["bits_per_weight"] == predict(plan).bits_per_weight
    assert torch.isfinite(logits(load(tmp_path / "out", backend="reference"))).all()


@pytest.mark.parametrize("when", [0, 1])
def test_an_interrupted_job_resumes_to_equal_bytes(when: int, tmp_path: Path, text: Path) -> None:
    model = tiny.save("gemma3", tmp_path / "model", tied=True)
    own = recipe("gptq", embeddings=4, lm_head=6)
    job(model, tmp_path / "whole", own, text)

    class Killed(BaseException):
        pass

    def once(event: Event) -> None:
        if isinstance(event, LayerDone) and event.index == when:
            raise Killed

    with pytest.raises(Killed):
        job(model, tmp_path / "cut", own, text, once)
    job(model, tmp_path / "cut", own, text)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir() if path.name != "run.json")
    assert [sha256(tmp_path / "cut" / name) for name in names] == [sha256(tmp_path / "whole" / name) for name in names]


def test_an_embedding_with_nan_is_refused_by_name(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][3, 1] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for name in ("rtn", "gptq"):
        with pytest.raises(QExportError, match="model.embed_tokens: the weight holds NaN"):
            job(model, tmp_path / name, recipe(name, embeddings=4), text)


def test_the_manifest_is_checked_for_bits_of_all_parameters(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    job(model, tmp_path / "out", recipe("rtn", embeddings=4))
    path = tmp_path / "out/qexport.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bits_per_parameter": 1.0}))
    with pytest.raises(QExportError, match="says bits_per_parameter 1.0, the files hold"):
        verify(tmp_path / "out")


def test_the_command_line_goes_the_whole_way(tmp_path: Path, text: Path) -> None:
    model, out = tiny.save("llama", tmp_path / "model", tied=True), tmp_path / "out"
    options = ["--method", "rtn", "--group-size", "32", "--lm-head", "6", "--embeddings", "4"]
    planned = CliRunner().invoke(app, ["plan", str(model), *options])
    assert planned.exit_code == 0, planned.stderr
    assert "model.embed_tokens" in planned.stdout
    assert "they are stored apart" in planned.stdout
    done = CliRunner().invoke(app, ["quantize", str(model), *options, "-o", str(out)])
    assert done.exit_code == 0, done.stderr
    assert "they are stored apart" in done.stderr
    assert "bits per parameter, whole model" in done.stdout
    again = CliRunner().invoke(app, ["quantize", str(model), *options, "-o", str(out), "--json"])
    assert json.loads(again.stdout)["bits_per_parameter"] == measure(out).bits_per_parameter
    for command in (["inspect", str(out), "--device", "cpu"], ["verify", str(out)]):
        assert CliRunner().invoke(app, command).exit_code == 0
    seen = ["eval", str(out), "--text", str(text), "--seqlen", "32", "--windows", "2", "--json"]
    assert json.loads(CliRunner().invoke(app, seen).stdout)["bits_per_weight"] == measure(out).bits_per_weight
    wrong = CliRunner().invoke(app, ["plan", str(model), "--method", "rtn", "--embeddings", "9"])
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "expected 2 to 8 bits" in wrong.stderr
