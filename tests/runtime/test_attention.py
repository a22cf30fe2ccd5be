"""The attention "qexport": from packed caches where it can, as "sdpa" in all other cases, and it says which."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qexport.runtime import attention
from qexport.runtime.cache import QuantCache, kv_cache
from tests import tiny

pytest.importorskip("numba", reason="numba is not installed", exc_type=ImportError)

FUSED = "fused (numba)"
SMALL: dict[str, Any] = {"residual_window": 0, "group_size": 4}
NAMES = ("llama", "mistral", "qwen3", "gemma3", "gemma3-wrapper", "gpt2", "opt", "gpt_neox", "mixtral")


def _prompt(pads: tuple[int, ...] = (0, 7, 1), tokens: int = 24) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(2, tiny.VOCAB, (len(pads), tokens), generator=rng)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return ids, mask


def _decoded(model: Any) -> Any:
    """The same model, which reads what a cache decodes."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("sdpa")
    return other


def _generate(model: Any, cache: QuantCache, pads: tuple[int, ...], **options: Any) -> Any:
    ids, mask = _prompt(pads)
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20, min_new_tokens=20, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip


def _both(name: str, pads: tuple[int, ...] = (0, 7, 1), dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Logits and tokens by both paths, and the path of the first."""
    model = tiny.make(name, dtype=dtype)
    cache = kv_cache(model, "kivi-4bit", **{**SMALL, **options})
    fused = _generate(model, cache, pads)
    plain = _decoded(model)
    other = kv_cache(plain, "kivi-4bit", **{**SMALL, **options})
    plain.set_attn_implementation("sdpa")
    decoded = _generate(plain, other, pads)
    assert other.path.startswith("decoded: the model's attention is 'sdpa'")
    return fused, decoded, cache.path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pads", [(0,), (0, 7, 1), (2, 2)])
def test_generate_gives_the_tokens_of_the_decoded_cache(name: str, pads: tuple[int, ...]) -> None:
    fused, decoded, path = _both(name, pads)
    assert path == FUSED
    assert torch.equal(fused.sequences, decoded.sequences)
    # Later, what differs by rounding may get another code.
    torch.testing.assert_close(torch.stack(fused.logits[:2]), torch.stack(decoded.logits[:2]), rtol=0, atol=2e-5)
    torch.testing.assert_close(torch.stack(fused.logits), torch.stack(decoded.logits), rtol=0, atol=5e-2)


@pytest.mark.parametrize("window", [0, 16, 128])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_residual_windows_of_all_sizes(name: str, window: int) -> None:
    fused, decoded, path = _both(name, residual_window=window)
    assert path == (FUSED if window < 128 else "decoded: nothing is packed yet")
    assert torch.equal(fused.sequences, decoded.sequences)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_its_rounding(dtype: torch.dtype) -> None:
    fused, decoded, path = _both("llama", dtype=dtype)
    assert path == FUSED
    assert fused.logits[0].dtype == decoded.logits[0].dtype
    # The second token is the first that the packed cache had a part in, and both had the same tokens before it.
    error = (fused.logits[1].float() - decoded.logits[1].float()).abs().max() / decoded.logits[1].float().abs().max()
    assert error < 8 * torch.finfo(dtype).eps


def test_beams_move_in_a_packed_cache() -> None:
    model = tiny.make("llama")
    cache = kv_cache(model, "kivi-2bit", **SMALL)
    fused = _generate(model, cache, (0, 3), num_beams=3)
    plain = _decoded(model)
    other = kv_cache(plain, "kivi-2bit", **SMALL)
    plain.set_attn_implementation("sdpa")
    assert cache.path == FUSED
    assert torch.equal(fused.sequences, _generate(plain, other, (0, 3), num_beams=3).sequences)


# ---- what is not done by a kernel --------------------------------------------------------------


def _filled(name: str = "llama", pads: tuple[int, ...] = (0, 0), **options: Any) -> tuple[Any, QuantCache, Tensor]:
    """A model, a cache that has seen a prompt, and the mask for one more token."""
    model = tiny.make(name, **options)
    cache = kv_cache(model, "kivi-4bit", **SMALL)
    ids, mask = _prompt(pads)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    assert cache.path == "decoded: 24 queries at once"
    return model, cache, torch.cat([mask, mask[:, -1:]], 1)


def _step(model: Any, cache: QuantCache, mask: Tensor | None, **options: Any) -> Tensor:
    batch = cache.quantized[0].pads
    ids = torch.full((len(batch or [0]), 1), 9)
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache, **options).logits


def _four(hidden: tuple[int, ...], *, added: bool, batch: int = 2, tokens: int = 25) -> Tensor:
    """A 4-D mask for one query that hides some tokens."""
    visible = torch.ones(batch, 1, 1, tokens, dtype=torch.bool)
    visible[..., list(hidden)] = False
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min) if added else visible


@pytest.mark.parametrize("added", [True, False])
def test_a_mask_of_ones_own_is_honoured(added: bool) -> None:
    found = []
    for hidden in ((), (3, 4, 11)):
        model, cache, _ = _filled()
        plain, other = _decoded(model), copy.deepcopy(cache)
        for layer in other.quantized:
            layer.config = plain.config
        mask = _four(hidden, added=added)
        found.append(_step(model, cache, mask))
        assert cache.path == ("decoded: a mask that hides more or less than pads" if hidden else FUSED)
        torch.testing.assert_close(found[-1], _step(plain, other, mask), rtol=0, atol=2e-5)
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_a_mask_with_a_bias_is_honoured() -> None:
    model, cache, _ = _filled()
    mask = _four((), added=True)
    mask[..., 2] = -0.5
    _step(model, cache, mask)
    assert cache.path == "decoded: a mask with other numbers than 0 and the least"


def test_a_mask_changed_in_place_is_read_again() -> None:
    _, cache, _ = _filled()
    mask = _four((), added=False)
    layer = cache.quantized[0]
    reading = attention.Reading(layer, 0)
    reading.seen = 25
    assert attention._mask_says_more(reading, mask) is None
    mask[..., 3] = False
    assert attention._mask_says_more(reading, mask) is not None


def test_pads_without_a_mask_are_seen_as_sdpa_sees_them() -> None:
    model, cache, _ = _filled(pads=(0, 5))
    _step(model, cache, None)
    assert cache.path == "decoded: there is no mask, and there are pads"


def test_pads_with_their_mask_are_left_out() -> None:
    model, cache, mask = _filled(pads=(0, 5))
    _step(model, cache, mask)
    assert cache.path == FUSED


def test_a_token_hidden_by_the_mask_of_tokens_is_left_out() -> None:
    model, cache, mask = _filled()
    mask[0, 6] = 0
    _step(model, cache, mask)
    assert cache.path == "decoded: a mask that hides more or less than pads"


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"softcap": 30.0}, "attention was given softcap"),
        ({"s_aux": torch.zeros(4)}, "attention was given s_aux"),
        ({"output_attentions": True}, "attention was given output_attentions"),
        ({"sliding_window": 5}, "sliding_window 5 is not the cache's"),
        ({"softcap": None, "output_attentions": False, "position_ids": torch.zeros(1), "scaling": 0.5}, None),
    ],
)
def test_what_else_is_asked_for_is_not_overlooked(kwargs: dict[str, Any], why: str | None) -> None:
    _, cache, _ = _filled()
    assert attention._unusual(attention.Reading(cache.quantized[0], 0), torch.zeros(2, 4, 1, 8), kwargs) == why


def test_output_attentions_is_for_sdpa_to_answer() -> None:
    model, cache, mask = _filled()
    _step(model, cache, mask, output_attentions=True)
    assert cache.path != FUSED


def test_several_queries_are_decoded() -> None:
    model, cache, mask = _filled()
    with torch.no_grad():
        model(torch.full((2, 2), 9), attention_mask=torch.cat([mask, mask[:, :1]], 1), past_key_values=cache)
    assert cache.path == "decoded: 2 queries at once"


def test_gradients_flow_as_before() -> None:
    model, cache, mask = _filled()
    out = model(torch.full((2, 1), 9), attention_mask=mask, past_key_values=cache)
    assert cache.path == "decoded: gradients are wanted"
    out.logits.sum().backward()


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_other_attentions_get_decoded_tensors(name: str) -> None:
    model = tiny.make("llama")
    if name == "eager":
        model.set_attn_implementation("eager")
    cache = kv_cache(model, "kivi-4bit", **SMALL)
    assert model.config._attn_implementation == ("eager" if name == "eager" else "qexport")
    model.set_attn_implementation(name)
    _generate(model, cache, (0,))
    assert cache.path == f"decoded: the model's attention is {name!r}"


def test_without_a_kernel_everything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_loops", lambda: None)
    model, cache, mask = _filled()
    _step(model, cache, mask)
    assert cache.path == "decoded: numba is not installed; pip install 'qexport[cpu]'"


# ---- handles -----------------------------------------------------------------------------------


def test_the_same_model_without_our_cache_is_sdpa() -> None:
    model = tiny.make("llama")
    ids, mask = _prompt()
    before = model(ids, attention_mask=mask).logits
    kv_cache(model, "kivi-4bit")
    assert model.config._attn_implementation == "qexport"
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert "qexport" not in model.config.to_json_string()


def test_a_handle_is_a_tensor_for_everyone_else() -> None:
    _, cache, _ = _filled()
    layer = cache.quantized[0]
    k, v = torch.randn(2, 2, 2, 1, 8)
    keys, values = layer.update(k, v)
    assert isinstance(keys, attention.Packed)
    assert keys.shape == values.shape == (2, 2, 25, 8)
    assert "keys" in repr(keys)
    found = keys.transpose(2, 3) * 2
    assert type(found) is Tensor
    assert torch.equal(found, layer.read(0)[0].transpose(2, 3) * 2)
    assert torch.equal(torch.cat([values, values]), torch.cat([layer.read(0)[1]] * 2))


def test_a_handle_that_comes_late_is_refused() -> None:
    _, cache, _ = _filled()
    layer = cache.quantized[0]
    keys, _ = layer.update(*torch.randn(2, 2, 2, 1, 8))
    layer.update(*torch.randn(2, 2, 2, 1, 8))
    with pytest.raises(RuntimeError, match="after the cache had changed"):
        keys.sum()


def test_a_sliding_window_sees_its_first_token_until_the_next_one() -> None:
    model = tiny.make("mistral")
    cache = kv_cache(model, "kivi-4bit", **SMALL)
    fused = _generate(model, cache, (0,))
    assert cache.path == FUSED
    layer = cache.quantized[0]
    assert layer.cohorts[0].keys.gone > 0
    assert fused.sequences.shape[1] == 44


def test_a_format_without_a_reader_is_decoded() -> None:
    layer = SimpleNamespace(fmt=SimpleNamespace(name="bcq"), device=torch.device("cpu"))
    assert "no kernel reads format 'bcq'" in str(attention.obstacle(layer, 64))
