"""Rotating the hidden states in the weights leaves the whole model as it was, or is refused, in every architecture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qexport import load
from qexport.calibration import Calibration
from qexport.checkpoint import Reader, sha256
from qexport.errors import PlanError
from qexport.events import Event, LayerDone
from qexport.models import Turned, anatomy, find_stream, load_dense, open_source
from qexport.plan import Plan, make_plan
from qexport.predict import predict
from qexport.quantize import quantize
from qexport.recipe import load_recipe, with_options, with_transforms
from qexport.verify import verify
from tests import tiny

TURNS = ("llama", "mistral", "qwen2", "qwen3", "phi3")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", TURNS)
def test_a_turned_model_computes_the_same(name: str, tied: bool, tmp_path: Path) -> None:
    source = open_source(str(tiny.save(name, tmp_path / "model", tied=tied)))
    described = anatomy(source)
    stream = find_stream(source, described)
    turned = Turned.of(source, stream, torch.Generator().manual_seed(3))
    model = load_dense(source, dtype=torch.float32)
    ids = torch.arange(24).view(2, 12) * 5 % tiny.VOCAB
    before = model(input_ids=ids).logits
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # two of their own
    changed = 0
    for param, tensor in model.state_dict().items():
        new = turned.read(param)
        assert new.dtype == source.meta(param)[0]
        assert torch.equal(new, turned.read_as(param, new.dtype))
        assert b"".join(turned.chunks(param, 1000)) == new.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        changed += not torch.equal(new.float(), tensor)
        tensor.copy_(new)
    linears = 4 if name == "phi3" else 7
    assert changed >= (linears + 2) * len(described.blocks) + 3
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(tiny.NAMES) - set(TURNS)))
def test_other_models_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    source = open_source(str(tiny.save(name, tmp_path / "model")))
    with pytest.raises(PlanError, match=r"can't be rotated in the weights: .*Leave out transform.rotation.fold"):
        find_stream(source, anatomy(source))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A calibration text."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"the {i} quick brown foxes jump over {i * i} lazy dogs" for i in range(400)))
    return path


def planned(model: Path, text: Path, *, transforms: Sequence[str] = ("rotation",), **options: Any) -> tuple[Plan, Any]:
    """GPTQ with 8 bits after a folded rotation."""
    own = {"group_size": 16, "bits": 8, "transform.rotation.fold": True, **options}
    recipe = with_options(with_transforms(load_recipe("gptq"), transforms), list(own.items()))
    source = open_source(str(model))
    calibration = Calibration(str(text), samples=12, seqlen=32)
    return make_plan(source, anatomy(source), recipe, calibration=calibration), source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transforms", [("rotation",), ("awq", "rotation")])
@pytest.mark.parametrize("packed", [{}, {"lm_head": True, "embeddings": 8}])
def test_a_job_packs_the_turned_model(
    dtype: torch.dtype, transforms: tuple[str, ...], packed: dict[str, Any], tmp_path: Path, text: Path
) -> None:
    model = tiny.save("llama", tmp_path / "model", tied=True, dtype=dtype)
    plan, source = planned(model, text, transforms=transforms, **packed)
    assert plan.unties
    for name, module in plan.modules.items():
        assert module.spec.input.hadamard == name.endswith(("o_proj", "down_proj"))
        assert not module.spec.input.scale or name == "lm_head"
    quantize(plan, source, tmp_path / "out")
    found = verify(tmp_path / "out")
    assert found["bits_per_weight"] == predict(plan).bits_per_weight
    ids = torch.arange(24).view(2, 12) * 3 % tiny.VOCAB
    with torch.inference_mode():
        wanted = load_dense(source, dtype=torch.float32)(input_ids=ids).logits
        logits = load(tmp_path / "out", backend="reference", dtype=torch.float32)(input_ids=ids).logits
    assert (logits - wanted).abs().max() < 0.05 * wanted.abs().max()
    reader = Reader(tmp_path / "out")
    if "awq" not in transforms:
        assert torch.equal(reader.read("model.norm.weight"), torch.ones(40, dtype=dtype))
    if not packed:
        assert not torch.equal(reader.read("lm_head.weight"), reader.read("model.embed_tokens.weight"))


def test_an_interrupted_job_resumes_to_equal_bytes(tmp_path: Path, text: Path) -> None:
    model = tiny.save("qwen2", tmp_path / "model")
    plan, source = planned(model, text)
    quantize(plan, source, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def once(event: Event) -> None:
        if isinstance(event, LayerDone):
            raise Killed

    with pytest.raises(Killed):
        quantize(plan, source, tmp_path / "out", observer=once)
    quantize(plan, source, tmp_path / "out")
    files = [sorted((tmp_path / folder).glob("*.safetensors")) for folder in ("whole", "out")]
    assert [sha256(file) for file in files[0]] == [sha256(file) for file in files[1]]


def test_fold_is_off_by_default(tmp_path: Path, text: Path) -> None:
    model = tiny.save("gemma2", tmp_path / "model")
    plan, _ = planned(model, text, **{"transform.rotation.fold": False})
    assert plan.stream is None
    assert not plan.unties
    with pytest.raises(PlanError, match="can't be rotated in the weights"):
        planned(model, text)
