"""Changes of decoders that tests must find: see `mutate`. One for each place where numbers are cut or found."""

from tests.kernels.mutate import Mutant

EQUALITY, ATTENTION = "tests/kernels/test_equality.py", "tests/kernels/test_kv_decode.py"
INTEGERS, CPU_ATTENTION = "tests/kernels/test_integers.py", "tests/kernels/test_kv_cpu.py"


def _product(file: str, old: str, new: str, only: str, equivalent: str = "") -> Mutant:
    """Of a weight's Triton decoder; `only` are names of cases."""
    only = f"test_kernel_equals_decoded_matrix and ({only})"
    return Mutant(f"qexport/kernels/{file}.py", old, new, (EQUALITY,), only, equivalent)


def _attention(file: str, old: str, new: str, only: str, equivalent: str = "") -> Mutant:
    """Of a cache's Triton decoder."""
    only = f"attention_is_that and ({only})"
    return Mutant(f"qexport/kernels/kv/{file}.py", old, new, (ATTENTION,), only, equivalent)


def _integer(file: str, old: str, new: str, only: str = "", equivalent: str = "") -> Mutant:
    """Of kernels whose input is rounded."""
    only = f"(bit_for_bit or product_of_integers) and ({only})" if only else "bit_for_bit"
    return Mutant(f"qexport/kernels/{file}.py", old, new, (INTEGERS,), only, equivalent)


STREAM = [
    _product("_stream", "row[:, None] * (BITS * KB) + kb", "row[:, None] * (BITS * KB + 1) + kb", "uniform-bits3"),
    _product("_stream", "tl.load(at + j * KB, eviction", "tl.load(at + (j ^ 1) * KB, eviction", "k512"),
    _product("_stream", "mask=kb[None, :] < KB", "mask=kb[None, :] <= KB", "uniform-bits4"),
    _product("_stream", "BIT: tl.constexpr = V * CW * BITS % 32", "BIT: tl.constexpr = V * CW * BITS % 31",
             "uniform-bits3"),
    _product("_stream", "J: tl.constexpr = V * CW * BITS // 32", "J: tl.constexpr = V * CW * BITS // 33",
             "uniform-bits8"),
    _product("_stream", "(words[J + 1] << (32 - BIT))", "(words[J + 1] << (31 - BIT))", "uniform-bits6"),
    _product("_stream", "if BIT + COUNT * BITS > 32:", "if BIT + COUNT * BITS > 33:", "uniform", "a window of "
             "whole codes never ends one bit into a word: the widths leave remainders of 0 or of 2 and more"),
    _product("_stream", "COUNT: tl.constexpr = CW if", "COUNT: tl.constexpr = CW - 1 if", "uniform-bits6"),
    _product("_stream", ">> (INDEX % CW * BITS)) & ((1 << BITS) - 1)", ">> (INDEX % CW * BITS)) & ((2 << BITS) - 1)",
             "uniform-bits5"),
    _product("_stream", "(word & (((1 << BITS) - 1) << PLACE))", "(word & (((1 << BITS) - 2) << PLACE))",
             "uniform-bits8"),
    _product("_stream", "word = word | (words[J + 1] << 16)", "word = word | (words[J + 1] << 15)", "uniform-bits3"),
    _product("_stream", "if (J + 1) * 32 % BITS > 0:", "if (J + 1) * 32 % BITS > 1:", "uniform-bits3"),
    _product("_stream", "if place + bits <= 23", "if place + bits <= 22", "uniform-bits3"),
    _product("_gemm", "tl.where(place + BITS > 23,", "tl.where(place + BITS > 24,", "uniform-bits8"),
    _product("_gemm", "per_sum *= 2.0 ** (EXPONENT - 149)", "per_sum *= 2.0 ** (EXPONENT - 148)", "uniform-bits3"),
    _product("_affine", "axis=2) - less", "axis=2) + less", "uniform-bits4"),
    _product("_stream", "tl.load(x_ptr + i * KBP)[None, :], part)", "tl.load(x_ptr + (i ^ 1) * KBP)[None, :], part)",
             "uniform-bits2"),
]  # fmt: skip
AFFINE = [
    _product("_affine", "else 4 if bits <= 4 else 8", "else 4 if bits <= 5 else 8", "uniform-bits5"),
    _product("_affine", "BYTES: tl.constexpr = (COLUMNS + PER - 1) // PER", "BYTES: tl.constexpr = COLUMNS // PER",
             "uniform-bits4"),
    _product("_affine", "column % PER * (8 // PER)", "column % PER * (4 // PER)", "uniform-bits2"),
    _product("_affine", "& ((1 << (8 // PER)) - 1)", "& ((1 << (8 // PER)) - 2)", "uniform"),
    _product("_affine", "row * A[2] + sub if", "row * A[2] if", "spqr"),
    _product("_affine", "tl.load(s_ptr + h * (KBP // RED) + quad)", "tl.load(s_ptr + quad)", "spqr"),
    _product("_affine", "        out = quad // (A[3] // A[5])\n", "        out = quad // A[3]\n", "k512"),
    _product("_affine", "tl.minimum(quad // (A[3] // A[5]), A[6] - 1)", "tl.minimum(quad // (A[3] // A[5]), A[6] - 2)",
             "uniform-bits4"),
    _product("_affine", "column = tl.minimum(kb // A[3], A[6] - 1)", "column = tl.minimum(kb // (A[3] + 1), A[6] - 1)",
             "uniform-bits4"),
    _product("_affine", "scale = scales[INDEX * A[2] // 32]", "scale = scales[INDEX * A[2] // 64]", "spqr"),
    _product("_affine", "zero = zeros[INDEX * A[2] // 32]", "zero = zeros[0]", "spqr"),
    _product("_affine", "unflatten(1, (-1, self.sub)).transpose(1, 2)", "unflatten(1, (self.sub, -1))", "spqr"),
    _product("uniform", "unpack_bits(packed[\"qzeros\"], fmt.bits, n).T, k), fmt.bits)",
             "unpack_bits(packed[\"qzeros\"], fmt.bits, n).T, k), fmt.bits - 1)", "uniform-bits3"),
]  # fmt: skip
WEIGHTS = [
    _product("spqr", "place = (column % PER", "place = (column % 3", "spqr"),
    _product("spqr", "(A[6] + PER - 1) // PER", "A[6] // PER", "spqr"),
    _product("spqr", "(CODE << (place + SLOT))", "(CODE << place)", "spqr"),
    _product("spqr", "(0, 0, 0, -codes.shape[-2] % per)", "(0, 0, -codes.shape[-2] % per, 0)", "spqr"),
    _product("spqr", "tl.load(at + EACH)", "tl.load(at + 3 * EACH)", "spqr"),
    _product("spqr", "n0 // A[8], tl.int64) if", "n0 // (A[8] * 2), tl.int64) if", "spqr"),
    _product("spqr", "else row // A[8]", "else row // (A[8] + 1)", "spqr"),
    _product("spqr", "row_of(block, sub, A)[:, None] * A[6]", "row_of(block, sub, A)[:, None] * (A[6] + 1)", "spqr"),
    _product("spqr", "at = column[:, :, None] * M + m", "at = column[:, :, None] * (M + 1) + m", "spqr"),
    _product("spqr", "column % 32 * KBP + column // 32", "column % 32 * KBP + column // 33", "spqr"),
    _product("sdr", "((flag + 127) << 23)", "((flag + 127) << 22)", "sdr"),
    _product("sdr", "1 << (A[0] - 1), tl.float32)", "1 << A[0], tl.float32)", "sdr"),
    _product("bcq", "row[:, None] * (PLANES * KB) + P * KB", "row[:, None] * (PLANES * KB) + P", "bcq"),
    _product("bcq", "A[9] * A[2] * A[6] if A[2] > 1", "A[9] * A[2] * A[6] if A[2] > 2", "bcq"),
    _product("bcq", "(h + 1) * (32 // SUB), KBP, 1)", "(h + 1) * (32 // SUB), KBP, 2)", "bcq"),
    _product("bcq", "((word >> i) & 1)", "((word >> i) & 3)", "bcq"),
    _product("bcq", "else numbers[H * EACH + A[7]]", "else numbers[A[7]]", "bcq"),
    _product("bcq", "(words[p] >> INDEX) & 1", "(words[p] >> (INDEX ^ 1)) & 1", "bcq"),
    _product("fp_asym", "(INDEX % A[1] * A[0])) & ((1 << A[0]) - 1)", "(INDEX % A[1] * A[0])) & ((1 << A[0]) - 2)",
             "fp_asym"),
    _product("fp_asym", "[:, None] * A[6] + column[None, :]", "[:, None] * (A[6] - 1) + column[None, :]", "fp_asym"),
    _product("fp_asym", "pos, neg = scales[INDEX * A[2] // 32]", "pos, neg = scales[0]", "fp_asym"),
    _product("vector", "index = index | (above << 8)", "index = index | (above << 7)", "vector"),
    _product("vector", "BIT: tl.constexpr = INDEX * BITS % 32", "BIT: tl.constexpr = INDEX * BITS % 31", "vector"),
    _product("vector", "(INDEX * BITS // 32 * KB + kb)", "(INDEX * BITS // 33 * KB + kb)", "vector"),
    _product("vector", "<< (32 - BIT))", "<< (31 - BIT))", "vector"),
    _product("vector", "(index * A[1])[:, :, None]", "(index * A[0])[:, :, None]", "vector"),
    _product("vector", "A[3] - 1) << A[BOOK])", "A[3] - 1) << (A[BOOK] - 1))", "vector"),
    _product("vector", "(WHICH * 32 + INDEX) * KB", "(WHICH * 31 + INDEX) * KB", "vector"),
    _product("vector", "column % 32 * KBP + column // 32", "column % 31 * KBP + column // 32", "vector"),
]  # fmt: skip
CACHES = [
    _attention("_tiles", "units >> (BITS * (PER // 2))", "units >> (BITS * (PER // 2) + 1)", "kivi-bits4"),
    _attention("_tiles", "unit = (head * HEAD + c0) * BITS // 32 +", "unit = head * HEAD * BITS // 32 +", "nuq"),
    _attention("_tiles", "(head * HEAD + c0) // PER", "(head * HEAD + c0) // (PER + 1)", "kivi-bits3"),
    _attention("_tiles", "HALF: tl.constexpr = SIGNED * (1 << (BITS - 1))", "HALF: tl.constexpr = SIGNED * (1 << BITS)",
               "sdr"),
    _attention("_tiles", "(code | 0x6400)", "(code | 0x6000)", "kivi-bits4"),
    _attention("_tiles", "(tl.arange(0, BT // SIZE) * WIDTH)", "(tl.arange(0, BT // SIZE) * HEAD)", "kivi-bits4"),
    _attention("_tiles", "(head * GROUPS + tl.arange(0, GROUPS))", "(head + tl.arange(0, GROUPS))", "kivi-bits4"),
    _attention("_tiles", "word, shift = place // 32, place % 32", "word, shift = place // 32, place % 31", "sdr"),
    _attention("_tiles", "more << ((32 - shift) % 32)", "more << ((31 - shift) % 32)", "sdr"),
    _attention("_tiles", ".to(tl.int32) + 127) << 23", ".to(tl.int32) + 127) << 22", "sdr"),
    _attention("_tiles", "(tl.arange(0, BT) * slots + i)", "(tl.arange(0, BT) + i)", "nuq"),
    _attention("_numbers", "word, shift = at // 32, at % 32", "word, shift = at // 32, at % 31", "kivi-bits5"),
    _attention("_numbers", "over = (shift + BITS > 32)", "over = (shift + BITS > 33)", "kivi-bits5 or kivi-bits7"),
    _attention("_numbers", "more << ((32 - shift) % 32)", "more << ((31 - shift) % 32)", "kivi-bits6"),
    _attention("_numbers", "(head * (A[3] // PER) + word)", "(head + word)", "kivi-bits4"),
    _attention("_numbers", "p // A[4]).to(tl.int64) * (A[2] * A[3])", "p // (A[4] + 1)).to(tl.int64) * (A[2] * A[3])",
               "kivi-bits4"),
    _attention("_numbers", "[:, None] + (c // A[4])", "[:, None] + (c // (2 * A[4]))", "kivi-bits4"),
    _attention("_numbers", "head * GROUPS + c // A[4]", "head * GROUPS + c // (A[4] + 1)", "sdr"),
    _attention("_numbers", "((flag + 127) << 23)", "((flag + 126) << 23)", "sdr"),
    _attention("_numbers", "HALF: tl.constexpr = 1 << (A[0] - 1)", "HALF: tl.constexpr = 1 << A[0]", "sdr"),
]  # fmt: skip
ROUNDED = [
    _integer("_int_product", "codes << 4, codes & -16", "codes << 3, codes & -16"),
    _integer("_int_product", "codes << 4, codes & -16", "codes << 4, codes & -8"),
    _integer("_int_product", "a >> 4, a2 >> 4", "a >> 4, a2 >> 3", "sdr"),
    _integer("_int_product", "(M + own) * PARTS + p", "own * PARTS + p"),
    _integer("_int_product", "p * (2 * SIZE) + s * BYTES if PAIR", "p * SIZE + s * BYTES if PAIR"),
    _integer("_int_product", "SPAN: tl.constexpr = SIZE if PAIR else BYTES", "SPAN: tl.constexpr = BYTES"),
    _integer("_int_gemm", "(low & 15) | (high << 4)", "(low & 7) | (high << 4)"),
    _integer("_int_gemm", "(half >> 1) * span + wanted", "half * span + wanted", "outliers"),
    _integer("_int_encode", "upper = (whole + 128) >> 8", "upper = whole >> 8", "sdr"),
    _integer("_int_encode", "(largest >> 23) - 126", "(largest >> 23) - 127", "sdr"),
    _integer("_int_encode", "k = group[:, None] * SIZE + i[None, :]", "k = group[:, None] * PART + i[None, :]"),
]  # fmt: skip
BITS = [
    Mutant("qexport/formats/_bits.py", old, new, ("tests/formats/test_bits.py",))
    for old, new in (
        ("for at in range(0, 64, 2 * lane))", "for at in range(0, 32, 2 * lane))"),
        ("yield stay, stay << lane, lane - width", "yield stay, stay << lane, lane - width + 1"),
        ("width = bits * lane // 8", "width = bits * (lane // 8 + 1) - bits % 2"),
        ("moved.bitwise_right_shift_(shift)", "moved.bitwise_right_shift_(shift - 1)"),
        ("moved.bitwise_left_shift_(shift)", "moved.bitwise_left_shift_(shift + 1)"),
        ("torch.bitwise_and(wide, move >> shift, out=moved)", "torch.bitwise_and(wide, move, out=moved)"),
        ("axis=2, count=bits, bitorder=\"little\"", "axis=2, count=bits, bitorder=\"big\""),
        ("return -(-count // 32) * bits", "return -(-count // 31) * bits"),
    )
] + [
    Mutant("qexport/formats/_bits.py", "words[..., start // 32 * bits :", "words[..., start // 64 * bits :",
           ("tests/formats/test_contract.py",), "slice"),
]  # fmt: skip
LOOPS = [
    *(
        Mutant("qexport/kernels/_loops.py", old, new, ("tests/kernels/test_loops.py",))
        for old, new in (
            ("above = (cut + 128) >> 8", "above = cut >> 8"),
            ("np.int8(cut - (above << 8))", "np.int8(cut - (above << 7))"),
            ("top - np.float32(1))) << shift", "top - np.float32(1))) << (shift + 1)"),
            ("bits[j] & np.int32(0x7FFFFFFF)", "bits[j] & np.int32(0x3FFFFFFF)"),
            ("lengths[ones & np.int32(32767)]", "lengths[ones & np.int32(16383)]"),
        )
    ),
    *(
        Mutant("qexport/kernels/_tile_loops.py", old, new, ("tests/kernels/test_tiles.py",))
        for old, new in (
            ("_ints(-128)) for t in tiles", "_ints(-127)) for t in tiles"),
            ("x[plane, i, q] ^ np.int32(-2139062144) if", "x[plane, i, q] ^ np.int32(-2139062272) if"),
            ("_WIDE(4 * lines))", "_WIDE(4 * lines + 4))"),
            ("(stop - 4 * bounds[p])", "(stop - bounds[p])"),
            ("scales.ctypes.data + 4 * (group[p] * scales.shape[1] + lane)", "scales.ctypes.data + 4 * lane"),
        )
    ),
    *(
        Mutant(f"qexport/kernels/kv/{file}.py", old, new, (CPU_ATTENTION,), f"attention_is_that and ({only})")
        for file, old, new, only in (
            ("_loops", "(np.int64(codes[at + 2]) << 16)", "(np.int64(codes[at + 2]) << 15)", "kivi-bits3"),
            ("_loops", "((three >> (6 * i)) & 63)", "((three >> (6 * i)) & 31)", "kivi-bits3"),
            ("_loops", "np.int64(codes[byte + 1]) << 8", "np.int64(codes[byte + 1]) << 7", "kivi-bits5"),
            ("_loops", "look_up_3(codes, at + 6 * j", "look_up_3(codes, at + 5 * j", "nuq-bits3"),
            ("_loops", "number(offsets, at + order[c])", "number(offsets, at + c)", "kivi-bits4"),
            ("_loops", "& ((1 << s.flag) - 1)", "& ((1 << s.flag) - 2)", "sdr-bits4"),
            ("_loops", "(b * s.room + t) * s.flag_row", "(b * s.room + t) * (s.flag_row - 1)", "sdr-bits4"),
            ("_vector", "[*range(8), *range(24, 32)]", "[*range(24, 32), *range(8)]", "sdr-bits4"),
            ("_vector", "for more in (0, 16) for lane", "for more in (16, 0) for lane", "kivi-bits4"),
            ("_codebooks", "(word(2), ir.Constant(WORD, 8))", "(word(2), ir.Constant(WORD, 7))", "nuq-bits3"),
            ("_codebooks", "(wide, ir.Constant(kind, [4] * 16))", "(wide, ir.Constant(kind, [3] * 16))", "nuq-bits4"),
            ("_vector", "[2**bits - 1] * lanes", "[2**bits - 2] * lanes", "kivi-bits2"),
            ("_codebooks", "j // 2 + 16 * (j % 2)", "j // 2 + 16 * (1 - j % 2)", "nuq-bits4"),
            ("_codebooks", "(start, bytes_of_half)", "(start, half)", "nuq-bits3"),
            ("_codebooks", "builder.fmul(b, s, flags", "builder.fmul(b, c, flags", "nuq-bits4"),
            ("_loops", "a.sin[turn] * np.float32(1 - 2 * second)", "a.sin[turn]", "nuq-bits4"),
            ("_loops", "shares, r * BLOCK + i)", "shares, r * BLOCK)", "nuq-bits4"),
            ("_vector", "list(range(half, 2 * half))", "list(range(half))", "nuq-bits4"),
            ("base", ">> shifts) & (2**bits - 1)", ">> shifts) & (2**bits - 2)", "kivi-bits3"),
        )
    ),
    Mutant("qexport/kernels/kv/_vector.py", "0x8000)), same(16)", "0x8000)), same(15)", (CPU_ATTENTION,), "halves"),
]  # fmt: skip
# How weights are laid out for a CPU; the loops that read them have tests that compile for seconds.
LAYOUTS = [
    Mutant(f"qexport/kernels/cpu/{file}.py", old, new, ("tests/kernels/test_cpu.py",), f"decoded_matrix and ({only})")
    for file, old, new, only in (
        ("_codes", "own >> low & 2**width - 1", "own >> low & 2**width - 2", "uniform-bits4"),
        ("bcq", "wide >> p & 1", "wide >> (p ^ 1) & 1", "bcq-bits3-group_size64"),
        ("_groups", "else 4 if size > 8 else 2", "else 4 if size > 9 else 2", "uniform-bits4-group_size9"),
        ("_groups", "width = -(-size // 32) * 32", "width = size // 32 * 32 + 32", "uniform-bits4-group_size128"),
        ("_tables", "low | high << 4", "low | high << 3", "fp_asym-codefp4-group_size64"),
    )
]  # fmt: skip
# How many rows are decoded there.
DECODED = [
    Mutant(f"qexport/kernels/decode/{file}.py", old, new, ("tests/kernels/test_decode.py",), f"are_those_of and {only}")
    for file, old, new, only in (
        ("_loops", "_full_word(raw, at + u * bits)", "_full_word(raw, at + u * bits + 1)", "fp_asym"),
        ("_loops", "if shift + bits > 8", "if shift + bits > 9", "uniform"),
        ("_lanes", "builder.shl(begun, _WORD(3))", "builder.shl(begun, _WORD(2))", "uniform"),
        ("_lanes", "31 - LANES * part - lane", "30 - LANES * part - lane", "bcq"),
        ("_lanes", "LANES + i - near", "LANES + i", "vector"),
    )
] + [
    Mutant("qexport/kernels/decode/_loops.py", old, new, ("tests/kernels/test_cpu_portable.py",), only)
    for old, new, only in (
        ("dots_2(w, at, width, x, i * width + begin", "dots_2(w, at, width, x, i * width", "is_that_of and k1030"),
        ("r // ROWS * m + i", "r // ROWS + i", "is_that_of and vector_length12"),
    )
]  # fmt: skip
MUTANTS = (*BITS, *STREAM, *AFFINE, *WEIGHTS, *CACHES, *ROUNDED, *LOOPS, *LAYOUTS, *DECODED)
