"""The job end to end on tiny models: what it writes, that it resumes byte for byte, and what it refuses."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qexport.calibration import Calibration
from qexport.checkpoint import Reader, read_json, sha256
from qexport.cli import app
from qexport.container import read_shard_metadata
from qexport.errors import CalibrationError, PlanError, QExportError, ResumeError
from qexport.events import Event, LayerDone, Note, ignore
from qexport.finish import Outcome
from qexport.load import load
from qexport.models import anatomy, load_dense, open_source
from qexport.plan import Plan, make_plan
from qexport.predict import predict
from qexport.quantize import quantize
from qexport.recipe import Change, Recipe, load_recipe, with_options, with_transforms
from qexport.runtime.linear import QuantLinear
from tests import tiny

RECORDS = {"run.json", "results.jsonl", "README.md"}
TEXT = " ".join(f"the {i} quick brown foxes jump over {i * i} lazy dogs" for i in range(400))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A calibration text."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def plan_for(model: Path, recipe: Recipe, text: Path | str, *, seed: int = 0) -> tuple[Plan, Any]:
    """A plan with 12 sequences of 32 tokens, and the source."""
    source = open_source(str(model))
    calibration = Calibration(str(text), samples=12, seqlen=32)
    return make_plan(source, anatomy(source), recipe, calibration=calibration, seed=seed), source


def job(
    model: Path, out: Path, text: Path | str, name: str = "gptq", observer: Any = ignore, **options: Any
) -> Outcome:
    """Quantize with a recipe and options."""
    plan, source = plan_for(model, with_options(load_recipe(name), list(options.items())), text)
    return quantize(plan, source, out, observer=observer)


def contents(out: Path) -> dict[str, str]:
    """Hashes of all files that are promised to be deterministic."""
    return {p.name: sha256(p) for p in out.iterdir() if p.name not in RECORDS}


@pytest.mark.parametrize("name", tiny.DENSE)
@pytest.mark.parametrize("recipe", ["gptq", "spqr"])
def test_every_architecture_loads_back_with_the_logits_of_its_decoded_weights(
    name: str, recipe: str, tmp_path: Path, text: Path
) -> None:
    model = tiny.save(name, tmp_path / "model", tied=recipe == "spqr", shards=2 if recipe == "gptq" else 1)
    out = tmp_path / "out"
    outcome = job(model, out, text, recipe, group_size=16)
    plan, source = plan_for(model, load_recipe(recipe), text)
    packed = load(out, backend="reference", dtype=torch.float32)
    dense = load_dense(source, dtype=torch.float32, device="cpu")
    state, reader = dict(dense.named_parameters()), Reader(out)
    for file in reader.files:
        for module, (spec, n, k) in read_shard_metadata(reader.metadata[file], file).items():
            view = plan.modules[module].view
            tensors = {field: reader.read(f"{module}.{field}") for field in spec.layout(n, k)}
            decoded = spec.decoded(tensors, n, k)
            state[view.param].data.copy_(decoded.T if view.transposed else decoded)
    ids = torch.arange(24).view(2, 12) * 3 % tiny.VOCAB
    with torch.inference_mode():
        assert torch.equal(packed(input_ids=ids).logits, dense(input_ids=ids).logits)
    same, _ = plan_for(model, with_options(load_recipe(recipe), [("group_size", 16)]), text)
    assert outcome.bits_per_weight == pytest.approx(predict(same).bits_per_weight, rel=0.1)


def with_transforms_of(recipe: str, names: list[str], **options: Any) -> Recipe:
    """A recipe with transforms and options."""
    return with_options(with_transforms(load_recipe(recipe), names), list(options.items()))


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "gpt2", "phi3"])
@pytest.mark.parametrize("transforms", [["awq"], ["rotation"], ["awq", "rotation"]])
def test_transformed_weights_load_back_and_come_close_to_the_model(
    name: str, transforms: list[str], tmp_path: Path, text: Path
) -> None:
    model = tiny.save(name, tmp_path / "model")
    plan, source = plan_for(model, with_transforms_of("gptq", transforms, group_size=16, bits=8), text)
    outcome = quantize(plan, source, tmp_path / "out")
    assert outcome.bits_per_weight == pytest.approx(predict(plan).bits_per_weight, rel=1e-9)
    packed = load(tmp_path / "out", backend="reference", dtype=torch.float32)
    dense = load_dense(source, dtype=torch.float32, device="cpu")
    ids = torch.arange(24).view(2, 12) * 3 % tiny.VOCAB
    with torch.inference_mode():
        wanted, found = dense(input_ids=ids).logits, packed(input_ids=ids).logits
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    steps = {(m.spec.input.scale, m.spec.input.hadamard) for m in plan.modules.values()}
    assert all(rotated == ("rotation" in transforms) for _, rotated in steps)
    # What has no producer to be folded into scales its own input.
    assert any(scaled for scaled, _ in steps) == (name in ("gpt2", "phi3"))
    norms = [n for n in plan.anatomy.parameters if "norm" in n or "ln_" in n]
    changed = [n for n in norms if not torch.equal(Reader(tmp_path / "out").read(n), source.read(n))]
    assert changed


def test_a_scale_can_not_follow_a_rotation(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    with pytest.raises(PlanError, match="Put it first: -t awq -t rotation"):
        plan_for(model, with_transforms_of("rtn", ["rotation", "awq"]), text)


def test_scales_are_not_folded_into_what_stays_dense(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    plan, source = plan_for(model, replace(with_transforms_of("rtn", ["awq"]), ignore=("*.up_proj", "*.k_proj")), text)
    scaled = {name.rpartition(".")[2] for name, m in plan.modules.items() if m.spec.input.scale}
    assert scaled == {"q_proj", "v_proj", "gate_proj", "down_proj"}
    quantize(plan, source, tmp_path / "out")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(Reader(tmp_path / "out").read(name), source.read(name))
    load(tmp_path / "out", backend="reference")


def test_a_quantized_head_is_transformed_too(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    plan, source = plan_for(model, with_transforms_of("rtn", ["awq", "rotation"], lm_head=True, bits=8), text)
    quantize(plan, source, tmp_path / "out")
    names = Reader(tmp_path / "out").names
    assert {"lm_head.input_scale", "lm_head.input_signs"} <= set(names)
    packed = load(tmp_path / "out", backend="reference", dtype=torch.float32)
    dense = load_dense(source, dtype=torch.float32, device="cpu")
    ids = torch.arange(12).view(1, 12)
    with torch.inference_mode():
        wanted, found = dense(input_ids=ids).logits, packed(input_ids=ids).logits
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_mixture_of_experts_goes_through_rtn_and_generates(tmp_path: Path, text: Path) -> None:
    model = tiny.save(tiny.MOE[0], tmp_path / "model")
    job(model, tmp_path / "out", text, "rtn", group_size=16, bits=8)
    packed = load(tmp_path / "out", backend="reference")
    ids = torch.arange(10).unsqueeze(0) + 40
    dense = load_dense(open_source(str(model)), dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        difference = (packed(input_ids=ids).logits - dense(input_ids=ids).logits).abs().max()
        assert difference < 0.1 * dense(input_ids=ids).logits.abs().max()
        assert packed.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 14)


def test_an_activation_between_two_packed_linears_stays_what_it_is(tmp_path: Path, text: Path) -> None:
    config = transformers.CTRLConfig(vocab_size=tiny.VOCAB, n_embd=40, dff=72, n_layer=12, n_head=4, n_positions=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    job(tmp_path / "model", tmp_path / "out", text, "rtn", group_size=16)
    modules = read_json(tmp_path / "out" / "config.json")["quantization_config"]["modules"]
    assert modules["transformer.h.*.ffn.*"] == 0
    assert modules["transformer.h.*.ffn.1"] is None
    assert len(modules) == 6  # for q, k, v, the output and the two of the feed-forward
    model = load(tmp_path / "out", backend="reference")
    assert isinstance(model.get_submodule("transformer.h.1.ffn.1"), torch.nn.ReLU)
    assert isinstance(model.get_submodule("transformer.h.1.ffn.2"), QuantLinear)


def test_calibrated_experts_are_refused_with_the_way_out(tmp_path: Path, text: Path) -> None:
    model = tiny.save(tiny.MOE[0], tmp_path / "model")
    with pytest.raises(PlanError, match="experts of a mixture are not calibrated yet. Use --method rtn"):
        plan_for(model, load_recipe("gptq"), text)


def test_part_of_a_stack_of_experts_cannot_stay_dense(tmp_path: Path, text: Path) -> None:
    model = tiny.save(tiny.MOE[0], tmp_path / "model")
    with pytest.raises(PlanError, match="stays dense while .* of the same stacked parameter is packed"):
        plan_for(model, replace(load_recipe("rtn"), ignore=("*.experts.*.1",)), text)


def test_quantized_head_is_untied_and_the_embedding_stays(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model", tied=True)
    for recipe in ("rtn", "gptq"):
        out = tmp_path / recipe
        job(model, out, text, recipe, lm_head=True, group_size=16)
        config = read_json(out / "config.json")
        assert config["tie_word_embeddings"] is False
        assert "lm_head.qweight" in Reader(out).names
        packed = load(out, backend="reference")
        with torch.inference_mode():
            assert torch.isfinite(packed(input_ids=torch.arange(8).unsqueeze(0)).logits).all()


def test_quantized_head_has_its_shared_bias_too(tmp_path: Path, text: Path) -> None:
    config = transformers.BertGenerationConfig(
        vocab_size=tiny.VOCAB, hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1, is_decoder=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "model")
    for lm_head in (True, False):
        out = tmp_path / str(lm_head)
        job(tmp_path / "model", out, text, "rtn", lm_head=lm_head, group_size=16)
        assert ("lm_head.decoder.bias" in Reader(out).names) is lm_head
        packed = load(out, backend="reference")
        assert torch.equal(packed.get_submodule("lm_head.decoder").bias, model.lm_head.bias)


# ---- resuming ----


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "spqr", "awq"])
def test_interrupted_job_resumes_to_equal_bytes(recipe: str, tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    job(model, tmp_path / "whole", text, recipe, group_size=16)

    class Killed(BaseException):
        pass

    def once(event: Event) -> None:
        if isinstance(event, LayerDone) and event.index == 0:
            raise Killed

    with pytest.raises(Killed):
        job(model, tmp_path / "cut", text, recipe, observer=once, group_size=16)
    assert not (tmp_path / "cut" / "qexport.json").exists()
    outcome = job(model, tmp_path / "cut", text, recipe, group_size=16)
    assert outcome.resumed_layers == 1
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("after", [0.0, 1.2])
def test_killed_process_resumes_to_equal_bytes(after: float, tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    command = [
        "quantize", str(model), "--method", "gptq", "--group-size", "16", "--calibration", str(text), "--samples", "12",
        "--seqlen", "32", "--device", "cpu", "-o",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "cut"
    begun = [sys.executable, "-m", "qexport", *command, str(out)]
    process = subprocess.Popen(begun, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "qexport.journal").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(after * 0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for folder in (out, tmp_path / "whole"):
        done = CliRunner().invoke(app, [*command, str(folder)])
        assert done.exit_code == 0, done.stderr
    assert contents(out) == contents(tmp_path / "whole")


def test_complete_output_is_left_alone(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    job(model, tmp_path / "out", text)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    seen: list[Event] = []
    outcome = job(model, tmp_path / "out", text, observer=seen.append)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    assert any(isinstance(e, Note) and "complete" in e.text for e in seen)
    assert outcome.nbytes > 0


def test_another_plan_is_refused_and_restart_deletes_only_ours(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    out = tmp_path / "out"
    job(model, out, text)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ResumeError, match="started with another plan.*--restart"):
        job(model, out, text, "rtn")
    plan, source = plan_for(model, load_recipe("rtn"), text)
    quantize(plan, source, out, restart=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "calibration.safetensors").exists()
    job(model, tmp_path / "fresh", text, "rtn")
    assert {n: h for n, h in contents(out).items() if n != "notes.txt"} == contents(tmp_path / "fresh")


def test_foreign_folder_is_refused(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(ResumeError, match="not empty and not ours"):
        job(model, tmp_path / "out", text)


def test_two_runs_are_byte_equal_and_self_calibration_is_seeded(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    for name in ("a", "b"):
        job(model, tmp_path / name, "self", group_size=16)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    ids = load_file(tmp_path / "a" / "calibration.safetensors")["input_ids"]
    assert ids.shape == (12, 32)


# ---- data ----


def test_gptq_has_less_output_error_than_rtn_in_its_own_report(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    errors = {}
    for order in ("group", "act"):
        job(model, tmp_path / order, text, bits=3, group_size=16, order=order)
        manifest = read_json(tmp_path / order / "qexport.json")
        errors[order] = [m["error"] for m in manifest["modules"].values()]
    assert all(0 < e < 0.2 for found in errors.values() for e in found)
    config = read_json(tmp_path / "act" / "config.json")["quantization_config"]
    assert config["specs"][0]["input"] == {"permute": True}


def test_changes_and_ignores_reach_single_modules(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    changes = (Change("*.down_proj", "bits", 8), Change("*.0.*.k_proj", "method", "rtn"))
    recipe = replace(load_recipe("gptq"), changes=changes, ignore=("*.1.*.o_proj",))
    plan, source = plan_for(model, recipe, text)
    quantize(plan, source, tmp_path / "out")
    manifest = read_json(tmp_path / "out" / "qexport.json")
    bits = {name: m["bits_per_weight"] for name, m in manifest["modules"].items()}
    assert bits["model.layers.0.mlp.down_proj"] > 8
    assert bits["model.layers.0.mlp.up_proj"] < 8
    assert manifest["dense"] == ["model.layers.1.self_attn.o_proj", "lm_head"]
    load(tmp_path / "out")


def test_rows_that_are_not_finite_are_dropped_and_too_many_are_an_error(tmp_path: Path, text: Path) -> None:
    for spoilt, message in ((1, None), (256, "more than 10 %")):
        model = tiny.save("llama", tmp_path / f"model{spoilt}")
        weights = load_file(model / "model.safetensors")
        # One row of the embedding, or all: tokens that use it have NaN inputs everywhere after.
        rows = [3] if spoilt == 1 else range(2, 258)
        weights["model.embed_tokens.weight"][list(rows), :] = float("nan")
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        if message is None:
            job(model, tmp_path / f"out{spoilt}", text)
        else:
            with pytest.raises(CalibrationError, match=message):
                job(model, tmp_path / f"out{spoilt}", text)


def test_weight_with_nan_is_refused_by_name(tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QExportError, match="model.layers.1.mlp.up_proj: the weight holds NaN"):
        job(model, tmp_path / "out", text, "rtn")


def test_too_little_text_is_an_error_before_any_layer(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(CalibrationError):
        job(model, tmp_path / "out", short)
