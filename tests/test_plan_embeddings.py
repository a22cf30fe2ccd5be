"""Plans with a packed head or embedding: what they say, what is chosen, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from qexport.calibration import Calibration
from qexport.cli.request import _notes
from qexport.errors import PlanError, UsageError
from qexport.models import WeightView, anatomy, open_source
from qexport.models.embeddings import obstacle
from qexport.models.structure import _further_users
from qexport.plan import make_plan
from qexport.predict import predict
from qexport.recipe import Change, load_recipe, with_options
from tests import tiny
from tests.test_embeddings import OUTER, job, plan_for, recipe


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tied Llama."""
    return tiny.save("llama", tmp_path_factory.mktemp("plans") / "model", tied=True)


def test_untying_is_said_with_the_bytes(tied: Path) -> None:
    whole = 4 * tiny.VOCAB * 40
    notes = {case: _notes(plan_for(tied, recipe("rtn", lm_head=h, embeddings=e))) for case, (h, e) in OUTER.items()}
    start = f"lm_head shares its weight with model.embed_tokens, {whole:,} bytes; they are stored apart: "
    assert all(len(found) == 1 and found[0].startswith(start) for found in notes.values())
    assert f"model.embed_tokens dense, {whole:,} bytes; lm_head packed, " in notes["head"][0]
    assert notes["embedding"][0].endswith(f"lm_head dense, {whole:,} bytes.")
    assert notes["both"][0].count("packed") == 2
    assert _notes(plan_for(tied, recipe("rtn"))) == []


@pytest.mark.parametrize(
    ("name", "options", "group"),
    [
        ("rtn", {}, 128),
        ("rtn", {"group_size": 32}, 32),
        ("rtn", {"group_size": -1}, 64),
        ("spqr", {}, 64),
        ("bcq", {"group_size": 96}, 96),
    ],
)
def test_groups_of_the_embedding_follow_the_recipe_unless_they_are_small(
    name: str, options: dict[str, Any], group: int, tied: Path
) -> None:
    own = with_options(load_recipe(name), [("embeddings", 5), *options.items()])
    planned = plan_for(tied, own).embedding
    assert planned is not None
    assert planned.method_name == "rtn"
    assert (planned.spec.weight.name, planned.spec.weight.bits, planned.spec.weight.group_size) == ("uniform", 5, group)  # type: ignore[attr-defined]


def test_the_head_has_the_method_of_the_recipe_and_bits_of_its_own(tied: Path) -> None:
    for bits, expected in ((6, 6), (True, 4), ("true", 4)):
        planned = plan_for(tied, recipe("gptq", lm_head=bits)).head
        assert planned is not None
        assert (planned.method_name, planned.spec.weight.bits) == ("gptq", expected)  # type: ignore[attr-defined]
    own = replace(recipe("gptq", lm_head=True), changes=(Change("lm_head", "bits", 3),))
    planned = plan_for(tied, own).head
    assert planned is not None
    assert planned.spec.weight.bits == 3  # type: ignore[attr-defined]
    assert plan_for(tied, recipe("gptq", lm_head=0)).head is None


def test_patterns_for_all_modules_leave_the_embedding_alone(tied: Path) -> None:
    own = replace(recipe("rtn", embeddings=8), changes=(Change("*", "bits", 3),))
    planned = plan_for(tied, own).embedding
    assert planned is not None
    assert planned.spec.weight.bits == 8  # type: ignore[attr-defined]
    ignored = replace(recipe("rtn", embeddings=8), ignore=("model.embed_tokens",))
    assert plan_for(tied, ignored).embedding is None
    alone = plan_for(tied, replace(recipe("rtn", embeddings=8), ignore=("*_proj",)))
    assert list(alone.modules) == ["model.embed_tokens"]


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"embeddings": 9}, {}, "option 'embeddings': expected 2 to 8 bits, or 0 to leave it dense, found 9"),
        ({"embeddings": 1}, {}, "expected 2 to 8 bits"),
        ({"embeddings": "true"}, {}, "option 'embeddings': expected int, found 'true'"),
        ({"lm_head": -1}, {}, "option 'lm_head': expected the bits of a code"),
        ({"lm_head": "six"}, {}, "option 'lm_head': expected int, found 'six'"),
        ({"lm_head": 9}, {}, "lm_head = 9: format 'uniform': bits must be a whole number from 2 to 8, found '9'"),
        ({"lm_head": 6}, {"changes": (Change("lm_head", "bits", 4),)}, "--lm-head says its bits already"),
        ({"lm_head": 6}, {"format": "fp_asym", "format_options": {}}, "format 'fp_asym' of lm_head has no bits"),
        ({}, {"changes": (Change("*embed_tokens", "bits", 4),)}, r"takes no option but --embeddings BITS"),
        ({"embeddings": 4}, {"changes": (Change("*embed_tokens", "bits", 4),)}, "takes no option but --embeddings"),
        ({}, {"ignore": ("*embed_tokens",)}, "stays dense without"),
    ],
)
def test_options_that_can_not_be_are_usage_errors(
    options: dict[str, Any], changes: dict[str, Any], message: str, tied: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        plan_for(tied, replace(recipe("rtn", **options), **changes))


class Normed(nn.Embedding):
    """Looks like an embedding, and is none that can be packed."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Rows of length 1."""
        return nn.functional.normalize(super().forward(input), dim=-1)


class Counted(nn.Embedding):
    """Stores a buffer beside its weight."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("seen", torch.zeros(1))


def test_what_an_embedding_computes_decides_whether_it_can_be_packed() -> None:
    m = transformers.models
    for fit in (
        nn.Embedding(9, 4, padding_idx=8),
        m.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding(9, 4, 8, embed_scale=2.0),
        m.xglm.modeling_xglm.XGLMScaledWordEmbedding(9, 4, 8, embed_scale=2.0),
    ):
        assert obstacle(fit) is None
        assert obstacle(fit.to("meta")) is None
    for unfit, reason in (
        (nn.Linear(4, 9), "it is a Linear"),
        (nn.Embedding(9, 4, max_norm=1.0), "rescales rows"),
        (Normed(9, 4), "Normed computes something else"),
        (Counted(9, 4), "Counted stores more than a weight: seen"),
        (m.muse_glimmer.modeling_muse_glimmer.MuseGlimmerTextNormedEmbedding(9, 4, 8), "something else"),
        (m.opt.modeling_opt.OPTLearnedPositionalEmbedding(9, 4), "something else"),
        (m.idefics.modeling_idefics.IdeficsDecoupledEmbedding(9, 2, 4), "more than a weight: additional_embedding"),
    ):
        assert reason in (obstacle(unfit) or "")


def test_a_model_whose_embedding_can_not_be_packed_is_refused_only_when_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modeling = transformers.models.llama.modeling_llama
    monkeypatch.setattr(modeling, "nn", SimpleNamespace(**{**vars(nn), "Embedding": Normed}))
    tiny.save("llama", tmp_path / "model")
    reason = "model.embed_tokens: the token embedding can't be quantized: Normed computes something else"
    with pytest.raises(PlanError, match=reason):
        plan_for(tmp_path / "model", recipe("rtn", embeddings=4))
    job(tmp_path / "model", tmp_path / "out", recipe("rtn"))


def test_a_weight_with_further_users_is_found() -> None:
    head = WeightView("head", 9, 4, "table.weight")
    home = {"table.weight": "table.weight", "head.weight": "table.weight", "other.weight": "other.weight"}
    assert _further_users("table.weight", head, home) is None
    home["extra.weight"] = "table.weight"
    assert _further_users("table.weight", head, home) == "its weight is also extra.weight"
    assert _further_users("table.weight", None, home) == "its weight is also head.weight, extra.weight"


def test_an_embedding_that_others_use_and_a_missing_head_are_refused(tied: Path) -> None:
    source = open_source(str(tied))
    found = anatomy(source)
    calibration = Calibration("builtin", 4, 32)
    shared = replace(found, embedding_view=None, embedding_obstacle="its weight is also a.weight")
    with pytest.raises(PlanError, match="its weight is also a.weight. Leave out --embeddings"):
        make_plan(source, shared, recipe("rtn", embeddings=4), calibration=calibration)
    for bits in (4, True):
        with pytest.raises(PlanError, match="has no output layer that is a linear. Leave out --lm-head"):
            make_plan(source, replace(found, head=None), recipe("rtn", lm_head=bits), calibration=calibration)


def test_memory_and_time_of_a_plan_count_the_embedding(tied: Path) -> None:
    plain, packed = (predict(plan_for(tied, recipe("rtn", embeddings=bits))) for bits in (0, 8))
    assert packed.nbytes != plain.nbytes
    assert math.isfinite(packed.seconds)
    assert packed.peak_rss_bytes > 0
