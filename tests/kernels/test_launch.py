"""What happens before a kernel runs: the import, the choice of a launch, and repacking."""

import subprocess
import sys

import pytest
import torch

from qexport import plugins
from qexport.errors import BackendError
from qexport.formats._bits import pack_bits
from qexport.kernels._affine import Groups, slot_bits, slots
from qexport.kernels._gemm import blocks, choose, linear, too_old
from qexport.kernels._stream import EXPONENT, place_of, split_words
from tests.kernels.cases import Case, build


def test_package_does_not_import_triton():
    code = "import sys, qexport.kernels, qexport.plugins as p; p.names('kernels'); sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_kernel_has_a_format_of_its_name():
    assert set(plugins.names("kernels")) <= set(plugins.names("formats"))


def test_cpu_tensors_without_interpreter_are_refused():
    p = build(Case("uniform", {"bits": 4}, n=4, k=64))
    with pytest.raises(BackendError, match="choose backend 'reference'"):
        linear(p.kernel, p.fmt, p.x, p.kernel.repack(p.fmt, p.packed, 4, 64), 4, 64)


def test_old_triton_is_refused_with_a_reason():
    assert too_old("3.4.0") == "Triton 3.4.0 is too old; 3.7 or newer is needed"
    assert too_old("3.10.1+git1a2b") is None
    p = build(Case("spqr", {"bits": 3}, n=4, k=64))
    assert p.kernel.supports(p.fmt, 4, 64) is None


@pytest.mark.parametrize("m", [1, 2, 16, 17, 64, 4096])
@pytest.mark.parametrize("k", [1, 31, 33, 128, 300, 576, 4096, 11008, 14336, 29568])
@pytest.mark.parametrize("n", [1, 37, 4096, 151936])
def test_chosen_launch_covers_the_matrix_with_no_empty_part(m, n, k):
    for dtype in (torch.float16, torch.float32):
        c = choose(m, n, k, dtype)
        covered = c.steps(k) * c.bkb
        assert c.padded(k) >= blocks(k) > covered * (c.split - 1)
        assert c.bn * c.bkb % c.threads == 0
        assert (c.bm == 0) == (m >= 32)
        assert c.bm in (0, 16, 32) or c.bm == m == 1


@pytest.mark.parametrize("vector", [2, 3, 7, 8])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 4096), (16, 4096, 4096), (1, 1, 31), (64, 37, 300), (1, 50000, 576)]
)
def test_chosen_tiles_hold_whole_vectors_and_load_16_bytes_a_thread(m, n, k, vector):
    c, padded = choose(m, n, k, torch.float16, vector), 2 if vector == 2 else 4 if vector == 3 else 8
    assert c.bn % padded == 0
    assert c.bn // padded * c.bkb == 4 * c.threads
    assert c.padded(k) >= blocks(k) > c.steps(k) * c.bkb * (c.split - 1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"vector_length": 9, "index_bits": 9}, "vectors of 9 rows; up to 8 are read"),
        ({"vector_length": 8, "index_bits": 16, "group_size": 1}, "codebooks of 2^31 numbers or more"),
        ({"vector_length": 8, "index_bits": 16, "residual_bits": 16, "outlier_columns": 5}, None),
        ({}, None),
    ],
)
def test_vectors_that_the_kernel_does_not_read_are_refused_with_a_reason(options, reason):
    fmt = plugins.get("formats", "vector")(**options)
    assert plugins.get("kernels", "vector").supports(fmt, 4096, 4096) == reason


def test_scales_of_outlier_columns_are_0():
    p = build(
        Case("vector", {"vector_length": 2, "index_bits": 3, "outlier_columns": 4, "normalize": False}, n=6, k=70)
    )
    listed, values, *_, columns = p.kernel.repack(p.fmt, p.packed, 6, 70)
    outliers = listed[1:].tolist()
    assert listed[0] == len(outliers) == values.shape[1] == 4
    scales, offsets = columns.transpose(1, 2).reshape(2, -1)
    assert scales.nonzero()[:, 0].tolist() == [j for j in range(70) if j not in outliers]
    assert not offsets.any()


@pytest.mark.parametrize(("m", "k"), [(1, 4096), (1, 14336), (1, 8192), (16, 4096), (4096, 4096)])
def test_usual_shapes_need_no_masks(m, k):
    assert choose(m, 4096, k).even(k)


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_of_a_block_lie_a_row_of_blocks_apart(bits):
    codes = torch.randint(0, 2**bits, (3, 100), dtype=torch.uint8)
    words = split_words(pack_bits(codes, bits), bits)
    assert words.shape == (3, bits, 4)
    for i in (0, 7, 31, 32, 63, 99):
        stream = sum((int(words[1, j, i // 32]) & 0xFFFFFFFF) << (32 * j) for j in range(bits))
        assert stream >> (i % 32 * bits) & (2**bits - 1) == codes[1, i]


@pytest.mark.parametrize("bits", range(1, 9))
def test_slots_hold_every_code(bits):
    codes = torch.randint(0, 2**bits, (2, 7), dtype=torch.uint8)
    packed, slot = slots(codes, bits), slot_bits(bits)
    per = 8 // slot
    got = [[int(row[i // per]) >> (i % per * slot) & (2**slot - 1) for i in range(7)] for row in packed]
    assert torch.equal(torch.tensor(got, dtype=torch.uint8), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_code_in_place_times_plane_is_exact(bits):
    for place in {place_of(i, bits) for i in range(32)}:
        code = torch.tensor([(2**bits - 1) << place], dtype=torch.int32).view(torch.float32).double()
        for x in (1.0, 65504.0, 2.0**-24):
            plane = torch.tensor([x * 2.0 ** (EXPONENT - place)], dtype=torch.float32).double()
            assert float(code * plane * 2.0 ** (149 - EXPONENT)) == (2**bits - 1) * x


@pytest.mark.parametrize(("group", "k"), [(16, 100), (8, 64), (32, 100), (96, 300), (-1, 77), (500, 77), (12, 77)])
def test_columns_put_each_group_where_its_blocks_are(group, k):
    g = Groups.of(group, k)
    values = torch.arange(1.0, 1 + 2 * g.count).view(2, g.count)
    columns = g.columns(values, k)
    for j in range(k):
        own = values[1, 0 if group == -1 else j // group]
        if g.sub > 1:
            assert columns[1, j % 32 // (32 // g.sub), j // 32] == own
        elif g.sub == 1:
            assert columns[1, j // 32 // g.wide] == own
        else:
            assert columns[1, j // g.wide] == own
