"""SmoothQuant: the paper's scale, a model that stays what it is, and the search for alpha."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qexport.errors import PlanError, UsageError
from qexport.formats.base import rounded
from qexport.formats.specs import make_format
from qexport.formats.uniform import Uniform
from qexport.inputs.base import make_input
from qexport.layer import Layer, no_loss
from qexport.models import skeleton
from qexport.quantize import quantize
from qexport.recipe import load_recipe, with_options, with_parts, with_transforms
from qexport.statistics import FeatureRange
from qexport.transforms.base import Change, Site
from qexport.transforms.smoothquant import SmoothQuant
from qexport.verify import verify
from tests import tiny
from tests.test_quantize import plan_for, with_transforms_of
from tests.test_quantize import text as text  # a fixture

ALPHAS = [a / 100 for a in range(35, 95, 5)]
FORMAT = Uniform(bits=8, group_size=-1, symmetric=True)
TOKEN = make_input("token", {})


def example() -> tuple[Tensor, list[Tensor]]:
    """Inputs [64, 48], of which a few features are large, and two weights that meet them."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(64, 48, generator=rng)
    x[:, ::12] *= 40
    return x, [torch.randn(n, 48, generator=rng) for n in (24, 8)]


def site(x: Tensor, ws: Sequence[Tensor], *, ties: Tensor | None = None, seen: list[float] | None = None) -> Site:
    found = FeatureRange(x.shape[1])
    for part in x.split(10):
        found.update(part)

    def loss(weights: Sequence[Tensor], change: Change) -> float:
        given = x / change.scale
        given = TOKEN.encode(given, {}).values(given)
        out = sum(float((given @ new.T - x @ w.T).square().mean()) for new, w in zip(weights, ws, strict=True))
        if seen is not None:
            seen.append(out)
        return out

    return Site(ws, [FORMAT] * len(ws), {FeatureRange: found.result()}, ties, loss, torch.Generator())


def formula(x: Tensor, ws: Sequence[Tensor], alpha: float) -> Tensor:
    """s_j = max |X_j|^alpha / max |W_j|^(1 - alpha), equation 4 of the paper, feature by feature."""
    out = []
    for j in range(x.shape[1]):
        large = max(abs(float(v)) for v in x[:, j])
        weight = max(abs(float(v)) for w in ws for v in w[:, j])
        out.append(large**alpha / weight ** (1 - alpha))
    return torch.tensor(out)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1, 1.0])
def test_the_scale_is_the_papers(alpha: float) -> None:
    x, ws = example()
    scale = SmoothQuant(alpha).decide(site(x, ws)).scale
    assert scale is not None
    torch.testing.assert_close(scale, formula(x, ws, alpha))


def test_tied_features_get_the_scale_of_their_largest_numbers() -> None:
    x, ws = example()
    ties = torch.arange(48) // 4
    scale = SmoothQuant(0.5).decide(site(x, ws, ties=ties)).scale
    assert scale is not None
    largest = torch.stack([x[:, ties == t].abs().max() for t in range(12)])[ties]
    weight = torch.stack([torch.cat(ws)[:, ties == t].abs().max() for t in range(12)])[ties]
    torch.testing.assert_close(scale, (largest / weight).sqrt())


def test_features_and_columns_of_zeros_get_finite_scales() -> None:
    x, ws = example()
    x[:, 3] = 0
    ws = [w.index_fill(1, torch.tensor([5]), 0.0) for w in ws]
    for alpha in (0.0, 0.5, 1.0):
        scale = SmoothQuant(alpha).decide(site(x, ws)).scale
        assert scale is not None
        assert (torch.isfinite(scale) & (scale > 0)).all()


def test_smoothed_inputs_and_weights_lose_less_by_rounding() -> None:
    x, ws = example()
    place = site(x, ws)
    scale = SmoothQuant(0.5).decide(place).scale
    assert scale is not None
    smooth = place.loss([rounded(FORMAT, w * scale) for w in ws], Change(scale=scale))
    assert smooth < 0.3 * place.loss([rounded(FORMAT, w) for w in ws], Change(scale=torch.ones(48)))


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "gpt2", "phi3", "gpt_neox"])
def test_a_model_stays_what_it_is_before_anything_is_rounded(name: str, tmp_path: Path, text: Path) -> None:
    plan, source = plan_for(tiny.save(name, tmp_path / "model"), load_recipe("smoothquant-w8a8"), text)
    bones = skeleton(source, plan.anatomy, dtype=torch.float32, seqlen=32)
    hidden = bones.embed(torch.arange(96).view(3, 32) * 5 % tiny.VOCAB)
    folded = 0
    for index, block in enumerate(plan.anatomy.blocks):
        module = bones.block(index)
        stats = {group: FeatureRange(group.members[0].k) for group in block.groups}
        for group, found in stats.items():
            linear = bones.submodule(index, module, group.members[0])
            linear.register_forward_pre_hook(lambda _, args, found=found: found.update(args[0]))
        wanted = bones.run(index, module, hidden)
        own, changed = Layer(plan, source, torch.device("cpu")), bones.block(index)
        changes = {}
        for group, found in stats.items():
            members = [plan.modules[v.name] for v in group.members]
            ranges = {FeatureRange: found.result()}
            after, changes[group] = own.transform(members, ranges, no_loss, torch.Generator())
            moved = (after[FeatureRange] - ranges[FeatureRange]).abs().max()
            assert (moved > 0) == (group.members[0].name in plan.folds)
            folded += bool(moved > 0)
        for group, change in changes.items():
            for view in group.members:
                bones.put(index, changed, view, change.weight(own.weight(view)))
                _divide(bones.submodule(index, changed, view), change)
        for tensor, value in own.dense.items():
            bones.put_tensor(index, changed, tensor, value)
        torch.testing.assert_close(bones.run(index, changed, hidden), wanted, rtol=1e-4, atol=1e-4)
        hidden = wanted
    assert folded > 0


def _divide(linear: nn.Module, change: Change) -> None:
    if change.scale is not None:
        linear.register_forward_pre_hook(lambda _, args: (args[0] * change.stored["scale"],))


@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_smoothing_goes_before_a_rotation(alpha: float | str, tmp_path: Path, text: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    own = with_options(load_recipe("smoothquant-w8a8"), [("alpha", alpha), ("format.group_size", 16)])
    plan, source = plan_for(model, with_transforms(own, ["rotation"]), text)
    quantize(plan, source, tmp_path / "out")
    assert list(plan.transforms) == ["smoothquant", "rotation"]
    assert verify(tmp_path / "out")["modules"] == len(plan.modules)


# ---- options and refusals ----


@pytest.mark.parametrize(("given", "found"), [("auto", "auto"), ("0.75", 0.75), (0.75, 0.75), ("1", 1.0), (0, 0.0)])
def test_alpha_is_a_number_or_auto(given: Any, found: float | str) -> None:
    recipe = with_options(load_recipe("smoothquant-w8a8"), [("alpha", given)])
    assert dict(recipe.transforms)["smoothquant"] == {"alpha": found}
    assert SmoothQuant(**dict(recipe.transforms)["smoothquant"]).alpha == found


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), float("inf"), "much", "", True, None])
def test_another_alpha_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="transform 'smoothquant': alpha must be 0 to 1 or auto, got"):
        SmoothQuant(wrong)


def test_another_alpha_is_refused_from_the_command_line_too(tmp_path: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="alpha must be 0 to 1 or auto, got 'much'"):
        plan_for(
            tiny.save("llama", tmp_path / "model"),
            with_options(load_recipe("smoothquant-w8a8"), [("alpha", "much")]),
            text,
        )
    for wrong in (True, [0.5], None):
        with pytest.raises(UsageError, match="option 'alpha': expected "):
            with_options(load_recipe("smoothquant-w8a8"), [("alpha", wrong)])


def test_the_search_rounds_weights_one_by_one() -> None:
    vector = make_format("vector", {})
    assert SmoothQuant("auto").reject(vector) == "its search rounds weights one by one, and this codes vectors"
    assert SmoothQuant(0.5).reject(vector) is None
    assert SmoothQuant("auto").reject(FORMAT) is None


def test_experts_and_rotated_features_are_refused(tmp_path: Path, text: Path) -> None:
    own = with_parts(load_recipe("smoothquant-w8a8"), input="none")
    with pytest.raises(PlanError, match='transform "smoothquant" calibrates, and experts of a mixture are not calib'):
        plan_for(tiny.save("mixtral", tmp_path / "mixtral"), own, text)
    with pytest.raises(PlanError, match="Put it first: -t smoothquant -t rotation"):
        plan_for(tiny.save("llama", tmp_path / "llama"), with_transforms_of("rtn", ["rotation", "smoothquant"]), text)
