"""Static figures: what is read off machine code, the bounds that follow, and the page that shows them."""

import json

import pytest

from benchmarks import static
from tests.kernels.chips import CHIPS, bound_of, lanes, resident
from tests.kernels.machine import counted, instructions
from tests.kernels.offline import STORED

NVIDIA = """
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/                   LDG.E.EF.128 R4, [R2.64] ;
.L_x_0:
        /*0020*/                   LOP3.LUT R8, R4, 0xf, RZ, 0xc0, !PT ;
        /*0030*/                   I2FP.F32.U32 R8, R8 ;
        /*0040*/                   FFMA R9, R8, R7, R9 ;
        /*0050*/               @P0 HMMA.16816.F32 R12, R4, R6, R12 ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
        /*0070*/                   STG.E [R2.64], R9 ;
        /*0080*/                   EXIT ;
.L_x_1:
        /*0090*/                   BRA `(.L_x_1);
        /*00a0*/                   NOP;
"""
AMD = """
kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[0:3], v4, s[0:1] nt
	s_waitcnt vmcnt(0)
	v_and_b32_e32 v5, 15, v0
	v_cvt_f32_ubyte0_e32 v5, v5
	v_pk_fma_f32 v[6:7], v[4:5], v[2:3], v[6:7]
	v_mfma_f32_16x16x16_f16 v[8:11], v[0:1], v[2:3], v[8:11]
	v_mov_b32_dpp v6, v7 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf
	s_cbranch_scc1 .LBB0_1
	s_nop 0
	s_endpgm
"""


@pytest.mark.parametrize(
    ("text", "whole", "loop"),
    [
        (NVIDIA, {"load": 2, "integer": 2, "convert": 1, "float": 1, "matrix": 1, "other": 3},
         {"load": 0, "integer": 1, "convert": 1, "float": 1, "matrix": 1, "other": 1}),
        (AMD, {"load": 1, "integer": 1, "convert": 1, "float": 1, "matrix": 1, "other": 5},
         {"load": 1, "integer": 1, "convert": 1, "float": 1, "matrix": 1, "other": 3}),
    ],
    ids=["nvidia", "amd"],
)  # fmt: skip
def test_instructions_are_counted_by_class(text, whole, loop):
    ops, repeated = instructions(text)
    assert counted(ops) == whole
    assert counted(repeated) == loop


def _found(threads=64, registers=128, shared=0, programs=10**6, turns=1, numbers=16384, **classes):
    each = dict.fromkeys(("load", "integer", "convert", "float", "matrix", "other"), 0) | classes
    work = {"threads": threads, "programs": programs, "turns": turns, "numbers": numbers, "ahead": 1}
    loop = each if turns > 1 else dict.fromkeys(each, 0)
    return {
        "registers": registers, "shared": shared, "work": work, "classes": each, "loop_classes": loop,
        "loop": sum(loop.values()), "instructions": sum(each.values()),
    }  # fmt: skip


def test_programs_that_fit_a_unit_follow_from_registers_shared_memory_threads_and_the_grid():
    a100, mi300x = CHIPS["sm_80"], CHIPS["gfx942"]
    assert resident(a100, _found()) == 8  # 512 // 128 warps a quarter, two a program
    assert resident(a100, _found(registers=129)) == 6  # handed out as 136
    assert resident(a100, _found(shared=48 * 1024)) == 3  # 164 // 49
    assert resident(a100, _found(registers=16)) == 32  # warps
    assert resident(a100, _found(programs=108)) == 1
    assert resident(mi300x, _found(registers=315)) == 4  # one wave a SIMD


def test_bound_is_the_larger_of_bytes_and_instructions():
    moved = {"weights": 4.0, "other": 0.25, "stored": 4.0}
    # 256 weights a thread: 1,024 instructions are 4 each, and an A100 can issue 5.07 while it reads 4.25 bits.
    few = bound_of("sm_80", _found(float=512, other=512), moved)
    assert (few.by, few.roof) == ("memory", 1.0)
    many = bound_of("sm_80", _found(float=640, load=128, other=1280), moved)
    assert many.by == "issue"
    assert many.roof == pytest.approx(108 * 128 * 1.41e9 / 8 * 4.25 / 8 / 2.039e12)
    assert bound_of("sm_90", _found(load=1000), moved).by == "loads"
    assert bound_of("gfx942", _found(load=9000, float=64), moved).by == "memory"


def test_a_loop_counts_as_often_as_it_runs():
    found = _found(turns=4, float=100)
    assert lanes(found)["float"] == pytest.approx(400 * 64 / 16384)
    assert lanes(found, steady=True)["float"] == pytest.approx(100 * 64 / (16384 / 4))


def test_bytes_in_flight_are_those_of_a_turn_of_all_programs_that_fit():
    bound = bound_of("sm_80", _found(float=1), {"weights": 4.0, "other": 0.0})
    assert bound.flight == 8 * 16384 / 2
    assert bound.covers == pytest.approx(8 * 8192 * 108 / 2.039e12)


def test_page_shows_the_stored_figures():
    text = static.PAGE.read_text()
    assert static.page(text, json.loads(STORED.read_text())) == text, "run python -m benchmarks.static --write"


def test_every_kernel_that_does_the_work_is_in_the_tables():
    stored = json.loads(STORED.read_text())
    names = {row[0].split("-")[0] for target in CHIPS for row in static.rows(stored, target)}
    assert names == {"uniform", "spqr", "bcq", "sdr", "fp_asym", "vector", "integers", "kv"}
