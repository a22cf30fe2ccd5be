"""Keys, values and gradients of live models, against plain autograd."""

import pytest
import torch
from torch.nn import functional as F

from qexport.caches.kvquant import KvQuant
from qexport.caching import finish, start, step
from qexport.errors import CalibrationError, PlanError
from qexport.formats.kv.base import make_kv
from qexport.plan import refuse_other_layers
from qexport.runtime.cache import cache_of
from qexport.runtime.linear import QuantLinear
from qexport.runtime.record import record, shapes
from tests import packing, tiny

UNROTATED = ["gpt2", "opt"]
ROTATED = [name for name in tiny.NAMES if name not in UNROTATED]
MODELS = pytest.mark.parametrize("name", tiny.NAMES)
IDS = torch.randint(2, tiny.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


def recorded(model, ids=IDS, **options):
    found = {}
    record(model, ids, found.__setitem__, **options)
    return found


def by_autograd(model, ids):
    """Values with their gradients, by layer, from hooks on the projections and the whole graph."""
    found = {}

    def keep(layer, name):
        def hook(module, args, out):
            out.retain_grad()
            found[layer, name] = out

        return hook

    layers = model.get_decoder().layers
    handles = [
        getattr(own.self_attn, f"{side}_proj").register_forward_hook(keep(i, side))
        for i, own in enumerate(layers)
        for side in "kv"
    ]
    logits = model(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_gradients_are_those_of_plain_autograd(name):
    model = tiny.make(name)
    found, expected = recorded(model, gradients=True), by_autograd(model, IDS)
    assert list(found) == [1, 0]
    for layer, data in found.items():
        want = expected[layer, "v"].unflatten(-1, (2, 8))
        torch.testing.assert_close(data["values"], want.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(data["value_grads"], expected[layer, "v"].grad.view_as(want), rtol=1e-4, atol=1e-6)
        keys = expected[layer, "k"].unflatten(-1, (2, 8))
        own = data["key_grads"]
        if name == "qwen3":  # keys are normalised between projection and rotation
            norm = model.get_decoder().layers[layer].self_attn.k_norm
            raw = keys.detach().requires_grad_()
            keys = norm(raw)
            keys.backward(own)
            own = raw.grad
        torch.testing.assert_close(data["keys"], keys.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own, expected[layer, "k"].grad.view_as(own), rtol=1e-4, atol=1e-5)


def test_gradients_pass_through_packed_linears():
    packed, dense = tiny.make("llama"), tiny.make("llama")
    for side in ("k_proj", "o_proj"):
        n, k = getattr(packed.model.layers[1].self_attn, side).weight.shape
        found = packing.pack_weight(getattr(packed.model.layers[1].self_attn, side).weight.detach(), packing.UNIFORM)
        own = QuantLinear(
            packing.UNIFORM, n, k, dtype=torch.float32, extents=found.extents, device="cpu", backend="reference"
        )
        own.load_state_dict(dict(found.tensors))
        setattr(packed.model.layers[1].self_attn, side, own)
        getattr(dense.model.layers[1].self_attn, side).weight.data = found.decoded
    ours, theirs = recorded(packed, gradients=True), recorded(dense, gradients=True)
    for layer, data in ours.items():
        assert all(t.equal(theirs[layer][key]) for key, t in data.items())


@pytest.mark.parametrize("pre_rope", [False, True])
@MODELS
def test_every_architecture_shows_keys_and_values_with_gradients(name, pre_rope):
    found = recorded(tiny.make(name), gradients=True, pre_rope=pre_rope)
    assert set(found) == {0, 1}
    for data in found.values():
        assert set(data) == {"keys", "values", "key_grads", "value_grads"}
        assert {t.shape for t in data.values()} == {data["keys"].shape}
        assert all(t.dtype == torch.float32 and t.any() for t in data.values())


@pytest.mark.parametrize("name", ROTATED)
def test_a_rotation_changes_no_product_of_a_key_and_its_gradient(name):
    model = tiny.make(name)
    before, after = (recorded(model, gradients=True, pre_rope=pre) for pre in (True, False))
    for layer, data in before.items():
        products = [(own[layer]["keys"] * own[layer]["key_grads"]).sum(-1) for own in (before, after)]
        torch.testing.assert_close(*products, rtol=1e-3, atol=1e-4)
        assert not data["keys"].allclose(after[layer]["keys"])


@MODELS
def test_a_pass_without_gradients_sees_the_same_in_order(name):
    model = tiny.make(name)
    plain, full = recorded(model), recorded(model, gradients=True)
    assert list(plain) == [0, 1]
    for layer, data in plain.items():
        assert set(data) == {"keys", "values"}
        assert all(t.equal(full[layer][key]) for key, t in data.items())


@MODELS
def test_the_model_is_left_as_it_was(name):
    model = tiny.make(name).train()
    model.get_input_embeddings().weight.requires_grad_(False)

    def state():
        modules = [(m.training, sorted(m.__dict__), len(m._forward_pre_hooks), len(m._forward_hooks)) for m in
                   model.modules()]  # fmt: skip
        return modules, [(p.requires_grad, p.grad is None) for p in model.parameters()]

    before = state()
    recorded(model, gradients=True)
    assert state() == before
    with pytest.raises(ZeroDivisionError):
        record(model, IDS, lambda layer, data: 1 / 0, gradients=True)
    assert state() == before


def test_numbers_that_are_not_finite_are_refused():
    model = tiny.make("llama")
    model.get_decoder().layers[1].self_attn.v_proj.weight.data.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="layer 1: values hold NaN or infinity"):
        recorded(model)


@pytest.mark.parametrize("bits", [2, 4])
@MODELS
def test_a_calibrated_cache_works_and_steps_may_be_saved_in_between(name, bits):
    model, fmt, method = tiny.make(name), make_kv(f"kvquant-{bits}bit", {"residual_window": 0}), KvQuant(bins=64)
    state = start(model, fmt, method, tokens=IDS.numel())
    sizes = {key: t.shape for key, t in state.items()}
    for part in method.passes:
        for ids in IDS.split(1):
            state = step(model, fmt, method, state, name=part, ids=ids)
            assert {key: t.shape for key, t in state.items()} == sizes
            state = {key: t.clone() for key, t in state.items()}
    statics = finish(fmt, method, state)
    cache = cache_of(model, fmt, statics)
    with torch.no_grad():
        exact = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)
        coded = model(input_ids=IDS, past_key_values=cache, use_cache=True).logits.log_softmax(-1)
    assert (len(cache.ropes) > 0) == (name in ROTATED)
    divergence = float((exact.exp() * (exact - coded)).sum(-1).mean())
    assert divergence < {2: 1.0, 4: 0.1}[bits]
    assert cache.quantized_read_fraction > 0.5


def test_a_method_that_does_not_fit_is_refused():
    with pytest.raises(PlanError, match="cache 'kivi-4bit': KvQuant can't calibrate it"):
        start(tiny.make("llama"), make_kv("kivi-4bit"), KvQuant(), tokens=8)


def test_shapes_are_those_of_keys_and_values():
    assert shapes(tiny.make("llama")) == {0: (2, 8), 1: (2, 8)}
    assert shapes(tiny.make("gpt2")) == {0: (4, 10), 1: (4, 10)}


def test_layers_with_another_state_are_refused_with_what_to_use():
    model = tiny.make("llama")
    model.config.layer_types = ["conv", "full_attention"]
    with pytest.raises(
        CalibrationError, match="layer 0: conv has no keys .* no calibration: kivi-4bit, kivi-2bit, sdr-4bit"
    ):
        shapes(model)


def test_a_plan_refuses_such_layers_before_anything_is_packed():
    config = tiny.make("llama").config
    refuse_other_layers(config, make_kv("kvquant-3bit"))
    config.layer_types = ["conv", "full_attention"]
    with pytest.raises(PlanError, match="layer 0 keeps another state than keys and values .conv."):
        refuse_other_layers(config, make_kv("kvquant-3bit"))
