"""Timing of calls and of one linear: what is called when, what is refused, and what the figures are made of."""

from functools import partial

import pytest
import torch

from qexport import plugins
from qexport.errors import BackendError, UsageError
from qexport.evaluate import kernel, latency
from qexport.evaluate.kernel import Setting, bench_kernel, measure
from qexport.evaluate.latency import Clock, Roofs, error_of, in_turn, on_device, roofs, use_threads
from qexport.formats.specs import InputSpec, LinearSpec, make_format
from qexport.inputs.token import Token

BEST = Roofs(10.0, {"fp32": 100.0})


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    monkeypatch.setattr(latency, "_TRYING", 0.01)
    monkeypatch.setattr(kernel, "_MOST", 3)


def test_sides_take_turns_and_use_all_their_copies() -> None:
    called: list[str] = []
    sides = [
        [partial(called.append, f"{side}{copy}") for copy in range(copies)] for side, copies in (("a", 2), ("b", 3))
    ]
    assert all(us > 0 for us in in_turn(sides))
    assert called[:6] == ["a0", "b0", "a1", "b1", "a0", "b2"]
    assert len(called) == 2 * latency.LEAST


def test_the_clock_measures_calls_in_order() -> None:
    clock = Clock(cuda=False)
    start = clock.now()
    inner = clock.seconds(lambda: torch.randn(200, 200) @ torch.randn(200, 200))
    assert 0 < inner <= clock.between(start, clock.now())


def test_threads_are_those_asked_for_and_given_back() -> None:
    before = torch.get_num_threads()
    with use_threads(2) as count:
        assert count == torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), use_threads(2):
        _ = 1 / 0
    with use_threads(None) as count:
        assert count == torch.get_num_threads() == before


def test_a_machine_has_roofs() -> None:
    found = roofs("cpu")
    assert 0.1 < found.read_gbps < 1e4
    assert set(found.gflops) == {"fp32", "bf16"}
    assert all(rate > 0.1 for rate in found.gflops.values())
    assert BEST.fraction(nbytes=5e6, microseconds=1000) == pytest.approx(0.5)


def test_other_devices_are_not_measured() -> None:
    with pytest.raises(UsageError, match="--device mps: times are measured on cpu and cuda"), on_device("mps"):
        pass


def test_errors_are_relative_and_nothing_that_is_not_finite_passes() -> None:
    wanted = torch.tensor([1.0, -4.0])
    assert error_of(torch.tensor([1.5, -4.0]), wanted.double()) == pytest.approx(0.125)
    assert error_of(torch.tensor([1.0, float("nan")]), wanted.double()) == float("inf")


@pytest.mark.parametrize("name", plugins.names("formats"))
def test_every_format_can_be_timed(name: str) -> None:
    spec = LinearSpec(make_format(name, {}))
    lines = list(measure(spec, (48, 70), Setting("cpu", "float32", "auto", (1, 3)), BEST))
    assert [line["m"] for line in lines] == [1, 3]
    for line in lines:
        assert line["error"] <= kernel.TOLERANCE["float32"]
        assert set(line["dense_us"]) == set(line["ratio"]) == {"fp32", "bf16", "fp16"}
        assert line["ratio"]["bf16"] == pytest.approx(line["dense_us"]["bf16"] / line["packed_us"])
        assert line["bytes"] == pytest.approx(line["bits_per_weight"] * 48 * 70 / 8)
        assert line["bandwidth_fraction"] == pytest.approx(line["gbps"] / BEST.read_gbps)


def test_rounded_inputs_can_be_timed_in_half_precision() -> None:
    spec = LinearSpec(make_format("uniform", {"bits": 8, "symmetric": True}), InputSpec(quant=Token()))
    (line,) = measure(spec, (32, 64), Setting("cpu", "bfloat16", "reference", (2,), ("bf16",)), BEST)
    assert line["path"] == "reference"
    assert line["input"]["quant"]["name"] == "token"
    assert list(line["dense_us"]) == ["bf16"]


def test_what_the_reference_does_not_confirm_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        kernel.QuantLinear, "forward", lambda self, x: x.new_ones(*x.shape[:-1], self.n) * len(self.backend)
    )
    monkeypatch.setattr(kernel, "in_turn", lambda _sides: pytest.fail("timed"))
    (line,) = measure(LinearSpec(make_format("uniform", {})), (32, 64), Setting("cpu", "float32", "auto", (1,)), BEST)
    assert "packed_us" not in line
    with pytest.raises(BackendError, match=r"uniform, 32 x 64, m = 1, .* not that of the reference.*: error \d"):
        bench_kernel(make_format("uniform", {}), (32, 64))


def test_a_linear_is_timed_with_its_conditions() -> None:
    found = bench_kernel(make_format("bcq", {"bits": 3}), (40, 64), m=2, threads=1, backend="reference")
    assert (found["format"], found["options"]["bits"], found["n"], found["k"], found["m"]) == ("bcq", 3, 40, 64, 2)
    assert (found["threads"], found["path"], found["dtype"]) == (1, "reference", "float32")
    assert found["bandwidth_fraction"] == pytest.approx(found["gbps"] / found["roofs"]["read_gbps"])
    with pytest.raises(UsageError, match="--dtype 'int8': expected float32"):
        bench_kernel(make_format("bcq", {}), (40, 64), dtype="int8")
