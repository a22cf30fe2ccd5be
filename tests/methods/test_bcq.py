"""BCQ: each of its three additions lowers the error at the layer's output, and the papers' own fit is there."""

from typing import Any

import pytest
import torch

from qexport.errors import UsageError
from qexport.formats.bcq import Bcq as BcqFormat
from qexport.formats.uniform import Uniform
from qexport.methods.bcq import Bcq
from qexport.methods.gptq import Gptq
from qexport.methods.rtn import Rtn
from qexport.statistics import Hessian
from tests.methods.test_columns import loss, problem

PLAIN = {"weighted": False, "feedback": False, "evenly": False}


def output_error(fmt: BcqFormat | Uniform, method: Any) -> float:
    """tr(D H D^T) of a random layer."""
    w, hessian = problem(64, 128)
    found = method.quantize(w, {Hessian: hessian}, fmt, torch.Generator())
    assert found.perm is None
    return loss(w, fmt.decode(fmt.unpack(fmt.pack(found.fields), 64, 128)), hessian)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_addition_lowers_the_error_at_the_output(bits: int) -> None:
    without, fmt = BcqFormat(bits, 32, offset="none"), BcqFormat(bits, 32)
    errors = [
        output_error(without, Bcq(rounds=0, **PLAIN)),
        output_error(without, Bcq(**PLAIN)),
        output_error(fmt, Bcq(weighted=False, feedback=False)),
        output_error(fmt, Bcq(feedback=False)),
        output_error(fmt, Bcq()),
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[1]


@pytest.mark.parametrize("bits", [2, 3])
def test_it_beats_evenly_spaced_levels_with_the_same_groups(bits: int) -> None:
    assert output_error(BcqFormat(bits, 32), Bcq()) < output_error(Uniform(bits, 32), Gptq(clip=12))
    assert output_error(BcqFormat(bits, 32), Bcq(feedback=False)) < output_error(Uniform(bits, 32), Rtn())


def test_without_rounds_planes_are_signs_and_mean_magnitudes() -> None:
    w, _ = problem(4, 32)
    fmt = BcqFormat(2, -1, offset="none", scale_dtype="float32")
    found = Bcq(rounds=0, **PLAIN).quantize(w, {}, fmt, torch.Generator()).fields
    first = w.abs().mean(1)
    second = (w.abs() - first[:, None]).abs().mean(1)
    torch.testing.assert_close(found["alpha"][:, 0], torch.stack([first, second], 1))


def test_gptq_with_this_format_is_the_same_thing() -> None:
    w, hessian = problem(32, 64)
    fmt = BcqFormat(3, 16)
    a = Bcq().quantize(w, {Hessian: hessian}, fmt, torch.Generator()).fields
    b = Gptq(clip=12).quantize(w, {Hessian: hessian}, fmt, torch.Generator()).fields
    assert all(a[name].equal(b[name]) for name in a)


def test_it_asks_for_data_only_if_it_uses_any() -> None:
    assert Bcq().needs == Bcq(feedback=False).needs == {Hessian}
    assert Bcq(weighted=False, feedback=False).needs == set()
    assert "bit planes" in str(Bcq().reject(Uniform()))
    with pytest.raises(UsageError, match="order act sorts columns for feedback"):
        Bcq(feedback=False, order="act")


def test_weights_of_dead_inputs_do_not_spoil_a_fit() -> None:
    w, hessian = problem(8, 32)
    hessian[:16], hessian[:, :16] = 0.0, 0.0
    for method in (Bcq(), Bcq(feedback=False)):
        found = method.quantize(w, {Hessian: hessian}, BcqFormat(3, 16), torch.Generator()).fields
        assert all(torch.isfinite(t).all() for t in found.values())
