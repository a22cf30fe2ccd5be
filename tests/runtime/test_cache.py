"""Quantized caches on tiny models: what transformers asks of a cache, and what a sequence's storage is made of."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from qexport.errors import UsageError
from qexport.formats.kv.base import PRESETS, chunk_of, make_kv, packed_after, predicted_nbytes
from qexport.formats.kv.kivi import Kivi
from qexport.runtime._store import Rope, Rows, Side
from qexport.runtime.cache import QuantCache, cache_of, forgo, keep, kept, kv_cache
from tests import tiny

MODELS = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "opt", "gpt_neox", "mixtral")
EVERYTHING = 4096  # a window that nothing leaves


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    @cache
    def loaded(name: str) -> Any:
        folder: Path = tiny.save(name, tmp_path_factory.mktemp("tiny") / name)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    return loaded


def batch(lengths: tuple[int, ...] = (40, 35, 23), longest: int = 40) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded at the left."""
    ids = torch.randint(2, 250, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : longest - length] = 0
    return ids, mask


def greedy(model: Any, ids: Tensor, mask: Tensor, cache_: Any, tokens: int = 24, **options: Any) -> Tensor:
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache_, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=1, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_with_nothing_packed_tokens_are_those_of_the_models_own_cache(load: Any, name: str) -> None:
    model, (ids, mask) = load(name), batch()
    own = greedy(model, ids, mask, None)
    assert torch.equal(greedy(model, ids, mask, kv_cache(model, "kivi-4bit", residual_window=EVERYTHING)), own)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2}, {"prefill_chunk_size": 16}])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_beams_returned_sequences_and_prefill_in_chunks(load: Any, name: str, options: dict[str, Any]) -> None:
    model, (ids, mask) = load(name), batch()
    if "num_return_sequences" in options:
        options = {**options, "num_beams": 2}
    own = greedy(model, ids, mask, None, **options)
    window = kv_cache(model, "kivi-4bit", residual_window=EVERYTHING)
    assert torch.equal(greedy(model, ids, mask, window, **options), own)


@pytest.mark.parametrize("window", [0, 32])
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_stores_what_its_sequences_store_alone(load: Any, name: str, window: int) -> None:
    model, (ids, mask) = load(name), batch()
    together = kv_cache(model, "kivi-2bit", residual_window=window)
    model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0), past_key_values=together)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = kv_cache(model, "kivi-2bit", residual_window=window)
        model(input_ids=ids[row : row + 1, -length:], past_key_values=alone)
        first, second = alone.layers[0].cohorts[0], _cohort_of(together.layers[0], row)
        place = second.rows.index(row)
        for side in ("keys", "values"):
            ours, theirs = getattr(second, side), getattr(first, side)
            assert ours.tokens == theirs.tokens == length
            for field, tensor in theirs.packed.view().items():
                found = ours.packed.view()[field][place]
                if tensor.dtype == torch.int32:
                    assert (found == tensor[0]).float().mean() > 0.99  # a tie may round the other way
                else:
                    assert torch.allclose(found.float(), tensor[0].float(), atol=2e-3)


def _cohort_of(layer: Any, row: int) -> Any:
    return next(cohort for cohort in layer.cohorts if row in cohort.rows)


def test_pads_that_fill_whole_chunks_are_known_when_the_first_token_comes(load: Any) -> None:
    model, (ids, mask) = load("llama"), batch((40, 7))
    chunks = kv_cache(model, "kivi-2bit", residual_window=0)
    positions = (mask.cumsum(1) - 1).clamp(0)
    for start in range(0, 40, 8):
        part = slice(start, start + 8)
        model(
            input_ids=ids[:, part], attention_mask=mask[:, : start + 8], position_ids=positions[:, part],
            past_key_values=chunks,
        )  # fmt: skip
    layer = chunks.layers[0]
    assert layer.pads == [0, 33]
    assert sorted(cohort.tokens for cohort in layer.cohorts) == [7, 40]
    assert all(row in cohort.rows for cohort, row in zip(layer.cohorts, (0, 1), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(load: Any, dtype: torch.dtype) -> None:
    model = copy.deepcopy(load("qwen3")).to(dtype)
    ids, mask = batch()
    used = kv_cache(model, "kivi-4bit", residual_window=0)
    assert greedy(model, ids, mask, used).shape == (3, 64)
    keys, _ = used.layers[0].read(0)
    assert keys.dtype == dtype


def test_eight_bits_come_close_to_none(load: Any) -> None:
    model, (ids, _) = load("llama"), batch((40,))
    exact = model(input_ids=ids).logits
    used = kv_cache(model, "kivi-4bit", bits=8, residual_window=0)
    found = model(input_ids=ids, past_key_values=used).logits
    assert used.quantized_read_fraction == pytest.approx((32 * 33 / 2 + 8 * 32) / (40 * 41 / 2))
    assert 0 < (found - exact).abs().max() < 0.02 * exact.abs().max()


def test_a_sliding_window_gives_back_what_it_left_behind(load: Any) -> None:
    model, (ids, mask) = load("mistral"), batch((40, 40))
    used = kv_cache(model, "kivi-4bit", residual_window=0, group_size=4, bits=8)
    greedy(model, ids, mask, used, tokens=40)
    cohort = used.layers[0].cohorts[0]
    assert cohort.tokens == 79
    assert cohort.keys.gone >= 79 - 16 - 3 - 6
    assert cohort.keys.packed.count * 4 <= 16 + 4 + 6
    assert used.nbytes < 2 * used.fp16_bytes


# ---- going back, and other sequences ------------------------------------------------------------------


@pytest.mark.parametrize("left", [3, 31, 32, 33, 50, 63])
@pytest.mark.parametrize("window", [0, 32, EVERYTHING])
def test_crop_keeps_what_was_stored(load: Any, window: int, left: int) -> None:
    model, (ids, _) = load("llama"), batch((64,), 64)
    used = kv_cache(model, "kivi-4bit", residual_window=window)
    model(input_ids=ids, past_key_values=used)
    before = used.layers[1].read(0)
    used.crop(left - 64)
    assert used.get_seq_length() == left
    for old, new in zip(before, used.layers[1].read(0), strict=True):
        assert torch.allclose(old[:, :, :left], new, atol=1e-6)
    model(input_ids=ids[:, left:], past_key_values=used)
    assert used.get_seq_length() == 64


def test_crop_behind_a_sliding_window_needs_the_past(load: Any) -> None:
    model, (ids, _) = load("mistral"), batch((64,), 64)
    used = kv_cache(model, "kivi-4bit", residual_window=0, group_size=4)
    model(input_ids=ids, past_key_values=used)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        used.crop(-40)


def test_reset_and_use_again(load: Any) -> None:
    model, (ids, _) = load("llama"), batch((40,))
    used = kv_cache(model, "kivi-2bit")
    first = model(input_ids=ids, past_key_values=used).logits
    used.reset()
    assert used.get_seq_length() == 0
    assert used.nbytes == 0
    assert torch.equal(model(input_ids=ids, past_key_values=used).logits, first)


def test_sequences_can_be_chosen_and_repeated(load: Any) -> None:
    model, (ids, mask) = load("llama"), batch()
    used = kv_cache(model, "kivi-2bit", residual_window=0)
    model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0), past_key_values=used)
    before = used.layers[0].read(0)[0]
    used.batch_repeat_interleave(2)
    used.reorder_cache(torch.tensor([5, 0, 2, 4]))
    assert torch.equal(used.layers[0].read(0)[0], before[[2, 0, 1, 2]])
    used.batch_select_indices(torch.tensor([True, False, True, False]))
    assert torch.equal(used.layers[0].read(0)[0], before[[2, 1]])
    with pytest.raises(UsageError, match="expected a batch of 2 sequences, as before, found 3"):
        model(input_ids=ids, past_key_values=used)


# ---- size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 128])
@pytest.mark.parametrize("tokens", [1, 33, 200, 2048])
def test_bytes_are_the_layouts(tokens: int, window: int) -> None:
    fmt = Kivi(2, 32, window)
    sides = [Side(coder, {}, fmt, torch.zeros(1, 3, 1, 64)) for coder in (fmt.keys, fmt.values)]
    states = torch.randn(1, 3, tokens, 64)
    for side in sides:
        for part in states[:, :, : tokens - 3].split(100, 2):
            side.append(part, None)
        for part in states[:, :, max(tokens - 3, 0) :].split(1, 2):
            side.append(part, None)
    expected = predicted_nbytes(fmt, tokens, 3, 64, 4)
    assert sum(side.nbytes for side in sides) == expected
    block = sum(sum(t[:, :1].nbytes for t in side.packed.buffers.values()) for side in sides)
    assert sum(side.capacity_bytes for side in sides) <= 1.25 * expected + block


def test_memory_grows_by_a_quarter_and_not_for_each_row() -> None:
    rows, moves = Rows(), 0
    for _ in range(400):
        before = rows.capacity
        rows.append({"x": torch.zeros(1, 1, 5)})
        moves += rows.capacity != before
    assert rows.count == 400
    assert moves < 30
    assert rows.capacity <= 1.25 * 400 + 1


@pytest.mark.parametrize(
    ("tokens", "window", "keys", "values"), [(31, 0, 0, 31), (100, 0, 96, 100), (300, 128, 256, 172)]
)
def test_what_leaves_the_window(tokens: int, window: int, keys: int, values: int) -> None:
    fmt = Kivi(2, 32, window)
    assert packed_after(fmt.keys, tokens, window) == keys
    assert packed_after(fmt.values, tokens, window) == values


# ---- rotations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbours", [False, True])
def test_rotations_are_undone_and_done_again(neighbours: bool) -> None:
    angles = torch.randn(9, 6)
    angles = angles.repeat_interleave(2, 1) if neighbours else torch.cat([angles, angles], 1)
    cos, sin = 1.3 * angles.cos(), 1.3 * angles.sin()  # scaled, as yarn does
    rope = Rope.of(cos)
    assert rope is not None
    assert rope.neighbours == neighbours
    rope.extend(0, cos[:4], sin[:4])
    rope.extend(2, cos[2:], sin[2:])
    x = torch.randn(2, 5, 3, 16)  # its last four channels are not rotated
    turned = rope.redo(x, 3)
    a, b = (x[..., 0:12:2], x[..., 1:12:2]) if neighbours else (x[..., :6], x[..., 6:12])
    half = torch.cat([-b, a], -1) if not neighbours else torch.stack([-b, a], -1).flatten(-2)
    c, s = (t[3:8].unsqueeze(1) for t in (cos, sin))
    assert torch.allclose(turned[..., :12], x[..., :12] * c + half * s, atol=1e-6)
    assert torch.equal(turned[..., 12:], x[..., 12:])
    assert torch.allclose(rope.undo(turned, 3), x, atol=1e-6)


def test_rotations_of_another_order_are_not_touched() -> None:
    assert Rope.of(torch.randn(4, 6)) is None


# ---- a model's own cache, and mistakes ------------------------------------------------------------------


def test_generate_takes_the_cache_that_is_kept(load: Any) -> None:
    model, (ids, mask) = copy.deepcopy(load("llama")), batch()
    fmt = make_kv("kivi-2bit", {"residual_window": 0})
    assert fmt is not None
    assert kept(model) is None
    keep(model, fmt, {})
    wanted = greedy(model, ids, mask, kv_cache(model))
    result = greedy(model, ids, mask, None, return_dict_in_generate=True)
    assert isinstance(result.past_key_values, QuantCache)
    assert torch.equal(result.sequences, wanted)
    other = greedy(model, ids, mask, DynamicCache(config=model.config), return_dict_in_generate=True)
    assert not isinstance(other.past_key_values, QuantCache)
    forgo(model)
    assert not isinstance(greedy(model, ids, mask, None, return_dict_in_generate=True).past_key_values, QuantCache)


def test_names_and_options_that_do_not_exist(load: Any) -> None:
    model = load("llama")
    with pytest.raises(UsageError, match="no cache 'kivi-3bit'; there are kivi-4bit"):
        kv_cache(model, "kivi-3bit")
    with pytest.raises(UsageError, match="no option 'window'; it has bits, group_size, residual_window"):
        kv_cache(model, "kivi-4bit", window=3)
    with pytest.raises(UsageError, match="0 or a multiple of the group size 32, at most 1048576, found '33'"):
        kv_cache(model, "kivi-4bit", residual_window=33)
    with pytest.raises(UsageError, match="names no cache; say which"):
        kv_cache(model)
    with pytest.raises(UsageError, match="leave out past_key_values"):
        kv_cache(model, "none")


def test_every_preset_that_has_a_format_makes_one() -> None:
    for name in PRESETS:
        fmt = make_kv(name)
        assert fmt is not None
        assert chunk_of(fmt) >= 1


def test_a_model_without_attention_is_refused(load: Any) -> None:
    model = copy.deepcopy(load("llama"))
    model.config.layer_types = ["linear_attention"] * model.config.num_hidden_layers
    with pytest.raises(UsageError, match="no attention layer whose cache could be quantized"):
        cache_of(model, Kivi(), {})


def test_a_config_that_is_given_first_counts_as_one_by_name(load: Any) -> None:
    model, (ids, _) = copy.deepcopy(load("llama")), batch((40,))
    keep(model, make_kv("kivi-2bit", {"residual_window": 0}), {})
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    without = GenerationConfig(use_cache=False, **options)
    assert torch.equal(model.generate(ids, without), model.generate(ids, generation_config=without))
    other = GenerationConfig(cache_implementation="static", return_dict_in_generate=True, **options)
    assert not isinstance(model.generate(ids, other).past_key_values, QuantCache)


def test_what_the_models_own_config_says_of_caches_is_replaced(load: Any) -> None:
    model, (ids, mask) = copy.deepcopy(load("gemma3")), batch((40,))
    model.generation_config.cache_implementation = "hybrid"
    keep(model, make_kv("sdr-4bit"), {})
    result = greedy(model, ids, mask, None, tokens=4, return_dict_in_generate=True)
    assert isinstance(result.past_key_values, QuantCache)


@pytest.mark.parametrize("name", ["kivi-2bit", "sdr-4bit"])
def test_packed_tokens_pass_no_gradient_and_do_no_harm(load: Any, name: str) -> None:
    model, (ids, _) = copy.deepcopy(load("llama")).train(), batch((40,))
    model(input_ids=ids, past_key_values=kv_cache(model, name, residual_window=0)).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
