"""Loops over packed keys and values give the attention to what is decoded."""

import numpy as np
import pytest
import torch

from tests.kernels.kv import TOLERANCE, Case, build, error_of, existing

cpu = pytest.importorskip("qexport.kernels.kv._cpu", reason="numba is not installed", exc_type=ImportError)

BITS = {"kivi": range(2, 9), "sdr": range(2, 8), "nuq": range(2, 5)}
CASES = [
    *(Case(name, {"bits": b}, dim=d) for name, bits in BITS.items() for b in bits for d in (64, 20)),
    *(Case("kivi", {"bits": b}, dim=d, heads=h, queries=g, tokens=(96, 100))
      for b in (2, 3, 4) for d in (8, 80, 256) for h, g in ((1, 1), (3, 4), (1, 3))),
    *(Case("kivi", {"bits": b, "group_size": g, "residual_window": 0}, heads=3, tokens=(2 * g, 70), room=3)
      for b in (2, 4) for g in (6, 16, 48, 128)),
    *(Case(name, {"bits": 4}, tokens=t, recent=r, sinks=s)
      for name in ("sdr", "nuq") for t, r, s in (((1, 1), 0, 0), ((1, 1), 0, 1), ((1300, 1300), 2, 3))),
    *(Case(name, {"bits": 2}, tokens=(1056, 1100), skip=k, batch=2, room=5) for name in ("kivi", "sdr", "nuq")
      for k in (0, 1, 37, 1055)),
    *(Case("nuq", {"bits": b, "qnorm": b == 2, "outlier_rate": r}, turned=t, neighbours=n, heads=3, sinks=1, dim=d)
      for b in (2, 3, 4) for r in (0, 0.01, 0.3) for t, n, d in ((64, False, 64), (16, True, 20), (8, False, 80))),
    *(Case("nuq", {"per_channel": p, "outlier_rate": r}, heads=h, dim=8, batch=2) for p in (True, False)
      for r in (0, 0.1) for h in (1, 3)),
    *(Case("sdr", {"group_size": g}, dim=d) for g in (2, 8, 16, 40) for d in (64, 20)),
    *(Case(name, {}, dtype=dtype, tokens=(128, 133)) for name in BITS for dtype in ("bfloat16", "float16")),
]  # fmt: skip


@pytest.mark.parametrize("case", existing(CASES), ids=str)
def test_attention_is_that_of_what_is_decoded(case: Case) -> None:
    q, (keys, values), expected = build(case)
    found = cpu.attend(q, keys, values, scaling=0.3)
    assert found.dtype == torch.float32
    assert error_of(found, expected) <= TOLERANCE


def test_threads_do_not_change_the_result() -> None:
    q, (keys, values), expected = build(Case("kivi", {"bits": 4}, tokens=(2080, 2100), heads=3))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append((cpu._many(100, _Wide(), 64), cpu.attend(q, keys, values, scaling=0.3)))
    finally:
        torch.set_num_threads(threads)
    assert not found[0][0]
    assert torch.equal(found[0][1], found[1][1])
    assert error_of(found[0][1], expected) <= TOLERANCE


class _Wide:
    """Sizes of a long past."""

    split, first, stop = 512, 0, 8192


def test_what_is_no_number_stays_none() -> None:
    q, (keys, values), _ = build(Case("kivi", {"bits": 4}, tokens=(32, 40)))
    keys.packed["scales"][0, 0, 3] = torch.nan
    assert cpu.attend(q, keys, values, scaling=0.3)[:, :3].isnan().all()


@pytest.mark.parametrize("feature", ["f16c", "none"])
def test_halves_become_what_they_are_with_and_without_an_instruction(
    feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numba import njit

    from qexport.kernels.kv import _vector

    known = _vector.has
    monkeypatch.setattr(_vector, "has", lambda name: known(name) and name == feature)

    @njit
    def all_of_them(bits, out):
        for i in range(bits.size):
            out[i] = _vector.number(bits, i)

    bits = np.arange(1 << 16).astype(np.uint16)
    found = np.empty(bits.size, np.float32)
    all_of_them(bits, found)
    np.testing.assert_array_equal(found, bits.view(np.float16).astype(np.float32))
