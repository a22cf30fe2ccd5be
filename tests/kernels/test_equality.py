"""Gate 1: every kernel agrees with the decoded matrix, on the GPU where there is one, else under Triton's interpreter.

The interpreter sees more: that kernels read and write nothing else, and, the part of gate 3 that runs, the bytes of
weights that the programs of a launch read.
"""

from dataclasses import astuple, replace

import pytest
import torch

from qexport.kernels._gemm import candidates
from tests.kernels.cases import TOLERANCE, Case, build

WIDTHS = range(2, 9)
GROUPS = (-1, 8, 16, 32, 64, 96, 128, 256, 12, 48, 1, 2, 100)
SMALL = [
    *(Case("uniform", {"bits": bits, "group_size": 128}, m=m) for bits in WIDTHS for m in (1, 3)),
    *(Case("spqr", {"bits": bits}, m=m, n=21, k=130) for bits in WIDTHS for m in (1, 3)),
    *(Case("bcq", {"bits": bits}, m=m, n=21, k=130) for bits in (1, 2, 3, 4, 8) for m in (1, 3)),
    *(Case("bcq", {"bits": 3, "group_size": 16, "offset": "none"}, m=m, n=21, k=130, perm=True) for m in (1, 3)),
    *(Case("bcq", {"bits": 2, "group_size": 12}, m=m, n=21, k=130) for m in (1, 3)),
    *(Case("fp_asym", {"code": code}, m=m, n=21, k=130) for code in ("fp4", "fp3", "nf4", "nf3") for m in (1, 3)),
    *(Case("fp_asym", {"group_size": 16, "two_scales": False}, m=m, n=21, k=130, perm=True) for m in (1, 3)),
    *(Case("fp_asym", {"code": "nf3", "group_size": 12}, m=m, n=21, k=130) for m in (1, 3)),
    # One group in fewer blocks than are added up at once: a quotient of sizes is 0 there.
    *(Case(name, {}, m=1, n=21, k=64) for name in ("uniform", "spqr", "bcq", "fp_asym", "sdr", "vector")),
    *(Case("sdr", {"bits": bits}, m=m, n=21, k=130) for bits in (2, 3, 4, 6, 8) for m in (1, 3)),
    Case("sdr", {"bits": 4, "base_bits": 16, "sign_magnitude": True}, m=1, n=21, k=130, perm=True),
    *(
        Case("vector", {"vector_length": v, "index_bits": bits}, m=m, n=21, k=130)
        for v, bits in ((1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12), (8, 9))
        for m in (1, 3)
    ),
    *(Case("vector", {"vector_length": 4, "residual_bits": 9, "outlier_columns": 5}, m=m, k=130) for m in (1, 3)),
    *(Case("vector", {"vector_length": 3, "group_size": 24, "normalize": False}, m=m, n=21, k=130) for m in (1, 3)),
    Case(
        "vector", {"vector_length": 6, "index_bits": 5, "group_size": 64}, m=1, dtype="float16", perm=True, scale=True
    ),
    Case("uniform", {"bits": 4, "group_size": 64}, m=3, dtype="float16", perm=True, scale=True),
    Case("uniform", {"bits": 4, "group_size": 64, "symmetric": True}, m=1, dtype="bfloat16", perm=True, scale=True),
    *(Case(name, {}, m=33, n=21, k=130, perm=True) for name in ("uniform", "spqr", "bcq", "fp_asym", "sdr", "vector")),
    Case("uniform", {"bits": 4}, m=40, dtype="float16", n=70, k=31, scale=True),
    Case("spqr", {"bits": 3}, m=33, dtype="bfloat16", n=17, k=65),
    Case("vector", {"vector_length": 3, "outlier_columns": 5}, m=33, n=20, k=130),
    Case("spqr", {"bits": 3}, m=1, dtype="float16", perm=True, scale=True),
    Case("spqr", {"bits": 3, "scale_dtype": "bfloat16"}, m=2, dtype="bfloat16", n=17, k=65, perm=True),
    # As many blocks as a launch covers, so that no load has a mask; and rows that share a second level.
    *(Case(name, {"group_size": 64}, m=m, n=21, k=512) for name in ("uniform", "bcq", "fp_asym") for m in (1, 3)),
    *(Case(name, {}, m=m, n=21, k=512) for name in ("spqr", "sdr", "vector") for m in (1, 3)),
    Case("spqr", {"bits": 3}, m=1, n=35, k=1024),
    *(Case("bcq", {"bits": 2, "group_size": 16}, m=m, n=21, k=130) for m in (1, 3)),
    Case("vector", {"vector_length": 4, "index_bits": 6, "residual_bits": 7}, m=3, n=21, k=130),  # over a word's end
]
FULL = [
    *(Case("uniform", {"bits": 3, "group_size": group}, m=m, k=261) for group in GROUPS for m in (1, 2)),
    *(
        Case("uniform", {"bits": bits, "group_size": group, "symmetric": bits != 5}, m=m, k=261, perm=True)
        for bits in (2, 5, 8)
        for group in (-1, 16, 12, 64)
        for m in (1, 2)
    ),
    *(
        Case("spqr", {"bits": 3, "group_size": group, "stats_group": rows}, m=m, n=35, k=135, scale=True)
        for group in (-1, 8, 16, 32, 64, 12)
        for rows in (16, 5)
        for m in (1, 2)
    ),
    *(
        Case("spqr", {"bits": 3, "scale_bits": scale, "zero_bits": zero}, n=19, k=70)
        for scale in (1, 2, 4, 5, 8)
        for zero in (1, 3, 6)
    ),
    *(
        Case(name, {"bits": 4, "group_size": 32}, n=n, k=k, m=m, dtype=dtype)
        for name in ("uniform", "spqr")
        for n, k in ((1, 1), (1, 33), (70, 31), (3, 1030))
        for m in (1, 17)
        for dtype in TOLERANCE
    ),
    *(
        Case("vector", {"vector_length": v, "index_bits": bits, "residual_bits": rest}, m=m, n=21, k=70)
        for v in (2, 3, 7)
        for bits in (1, 3, 8, 11, 16)
        for rest in (0, 5, 12)
        for m in (1, 2)
    ),
    *(
        Case("vector", {"vector_length": 4, "group_size": group, "outlier_columns": few}, m=m, n=35, k=261, perm=True)
        for group in (-1, 16, 32, 96, 100)
        for few in (0, 1, 40)
        for m in (1, 2)
    ),
    *(
        Case("vector", {"vector_length": 3, "residual_bits": 4, "scale_dtype": kind}, n=n, k=k, m=m, dtype=dtype)
        for kind in ("float16", "bfloat16")
        for n, k in ((1, 1), (1, 33), (70, 31), (4, 1030))
        for m in (1, 17)
        for dtype in TOLERANCE
    ),
    *(
        Case("uniform", {"bits": 3, "group_size": 64}, n=33, k=k, m=config[0] or 33, config=config)
        for k in (300, 1024)
        for config in (
            (1, 16, 32, 1, 64),
            (1, 16, 32, 2, 64),
            (1, 32, 16, 3, 64),
            (1, 128, 4, 5, 64),
            (16, 64, 16, 1, 128),
            (32, 64, 16, 2, 128),
            (64, 64, 16, 1, 128),
            (0, 16, 32, 1, 128),
            (0, 64, 4, 1, 64),
        )
    ),
]
WIDE = [  # large enough for padding not to count
    Case("uniform", {"bits": 4, "group_size": 128}, n=64, k=1024),
    Case("uniform", {"bits": 3, "group_size": 64}, n=64, k=1024, m=2),
    Case("uniform", {"bits": 2, "group_size": 16}, n=64, k=1024),
    Case("uniform", {"bits": 8, "group_size": -1}, n=64, k=1024),
    Case("spqr", {"bits": 3}, n=64, k=1024),
    Case("spqr", {"bits": 3}, n=64, k=1024, m=2),
    *(Case("vector", {"vector_length": 4, "index_bits": 8}, n=64, k=1024, m=m) for m in (1, 2)),
    Case("vector", {"vector_length": 3, "index_bits": 6, "residual_bits": 7, "outlier_columns": 9}, n=96, k=1024),
]
LARGE = [  # too slow to interpret; 4096 x 4096 needs no masks, 4133 x 4141 is ragged
    *(
        Case(name, options, n=n, k=k, m=m, dtype="float16")
        for name, options in (
            ("uniform", {"bits": 4}),
            ("uniform", {"bits": 3, "symmetric": True}),
            ("uniform", {"bits": 2, "group_size": 16}),
            ("spqr", {"bits": 3}),
            ("bcq", {"bits": 3}),
            ("fp_asym", {}),
            ("sdr", {}),
            ("vector", {"vector_length": 6, "index_bits": 12}),
        )
        for n, k in ((4096, 4096), (4133, 4141))
        for m in (1, 19, 300)
    ),
    *(
        Case(name, {"bits": 4, "group_size": 64}, n=n, k=k, m=m, dtype=dtype, perm=True, scale=True)
        for name in ("uniform", "bcq")
        for n, k, dtype in ((1024, 14336, "bfloat16"), (4099, 4111, "float32"))
        for m in (1, 70)
    ),
    *(
        Case(
            "vector",
            {"vector_length": 3, "residual_bits": 9, "outlier_columns": 41},
            n=4100,
            k=4111,
            m=m,
            dtype="float16",
        )
        for m in (1, 64)
    ),
]


def _tried(case: Case, rows: int) -> list[Case]:
    """A case with each launch that is timed on a GPU beside the usual one."""
    p = build(case)
    vector = p.kernel.decoder(p.fmt, case.n, case.k).vector
    return [replace(case, config=astuple(c)) for c in candidates(rows, case.n, case.k, torch.float16, vector)[1:]]


TRIED = [
    case
    for name in ("uniform", "spqr", "bcq", "fp_asym", "sdr", "vector")
    for m, rows in ((1, 1), (3, 4))
    for case in _tried(Case(name, {}, m=m, n=21, k=1024, dtype="float16"), rows)
]
PRODUCTS = SMALL + LARGE if torch.cuda.is_available() else SMALL


def _check(worker, case: Case) -> None:
    got = worker.ask(case.to_json())
    assert got["nan"] == 0, f"{got['nan']} outputs were not written"
    assert got["error"] <= TOLERANCE[case.dtype]
    assert got.get("outside", 0) == 0, f"{got['outside']} addresses outside the tensors"
    assert got["same"], "two runs differ"


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_kernel_equals_decoded_matrix(worker, case):
    _check(worker, case)


@pytest.mark.gates
@pytest.mark.parametrize("case", FULL, ids=str)
def test_kernel_equals_decoded_matrix_in_every_configuration(worker, case):
    _check(worker, case)


@pytest.mark.parametrize("case", [TRIED[0]], ids=str)
def test_launches_that_are_timed_give_the_same(worker, case):
    _check(worker, case)


@pytest.mark.gates
@pytest.mark.parametrize("case", TRIED[1:], ids=str)
def test_launches_that_are_timed_give_the_same_for_every_format(worker, case):
    _check(worker, case)


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_programs_read_about_the_stored_bytes(interpreter, case):
    got = interpreter.ask(case.to_json())
    assert got["read_bits"] <= 1.1 * got["stored_bits"]
    assert got["read_bits"] >= 0.9 * got["stored_bits"], "the count misses loads"


@pytest.mark.parametrize(("kernel", "m"), [("wrong_sums", 1), ("wrong_code", 2)])
def test_equality_gate_catches_a_broken_decoder(worker, kernel, m):
    got = worker.ask(Case("uniform", {"bits": 3, "group_size": 64}, m=m, kernel=kernel).to_json())
    assert got["error"] is None or got["error"] > 100 * TOLERANCE["float32"]


def test_equality_gate_catches_a_read_outside_the_matrix(interpreter):
    got = interpreter.ask(Case("uniform", {"bits": 3, "group_size": 64}, kernel="wrong_rows").to_json())
    assert got["outside"] > 0


def test_equality_gate_catches_rows_that_are_not_written(worker):
    got = worker.ask(Case("uniform", {"bits": 3, "group_size": 64}, kernel="short_grid").to_json())
    assert got["nan"] > 0


def test_traffic_gate_catches_a_fat_layout(interpreter):
    got = interpreter.ask(Case("uniform", {"bits": 2, "group_size": 32}, n=64, k=1024, kernel="fat_layout").to_json())
    assert got["error"] <= TOLERANCE["float32"]
    assert got["read_bits"] > 1.1 * got["stored_bits"]
