"""The pages in docs/formats suffice to write a reader: this one knows nothing else, and nothing of qexport."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FIXTURES, PAGES = ROOT / "tests" / "fixtures", ROOT / "docs" / "formats"
KINDS = {"I32": "<i4", "F16": "<f2", "U16": "<u2", "BF16": "<u2", "F32": "<f4"}


def read(path):
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    meta = json.loads(header.pop("__metadata__", {"qexport": "{}"})["qexport"])
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = np.frombuffer(raw[start + begin : start + end], KINDS[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            data = (data.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = data.astype(np.float32) if entry["dtype"] == "F16" else data
    return tensors, meta


def unpack(words, bits, count):
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    return (stream.reshape(len(words), -1, bits)[:, :count] << np.arange(bits)).sum(-1).astype(np.float32)


def uniform(t, options, n, k):
    bits, group = options["bits"], np.arange(k) // (k if options["group_size"] == -1 else options["group_size"])
    zeros = np.float32(2 ** (bits - 1)) if options["symmetric"] else unpack(t["qzeros"], bits, n).T[:, group]
    return (unpack(t["qweight"], bits, k) - zeros) * t["scales"][:, group]


def spqr(t, options, n, k):
    group = np.arange(k) // (k if options["group_size"] == -1 else options["group_size"])
    step, origin, zero_step, zero_origin = np.moveaxis(t["stats"][np.arange(n) // options["stats_group"]], -1, 0)
    scales = step * (unpack(t["qscales"], options["scale_bits"], n).T - origin)
    zeros = zero_step * (unpack(t["qzeros"], options["zero_bits"], n).T - zero_origin)
    w = scales[:, group] * (unpack(t["qweight"], options["bits"], k) - zeros[:, group])
    row = np.repeat(np.arange(n), np.diff(t["outlier_rows"]))
    w[row, t["outlier_columns"]] += t["outlier_values"]
    return w


def bcq(t, options, n, k):
    group = np.arange(k) // (k if options["group_size"] == -1 else options["group_size"])
    w = np.zeros((n, k), np.float32) if options["offset"] == "none" else t["offset"][:, group]
    for p in range(options["bits"]):
        alpha = t["alpha"][:, group, p]
        w = np.where(unpack(t["binary"][p], 1, k) == 1, w + alpha, w - alpha)
    return w


def sdr(t, options, n, k):
    group, width = np.arange(k) // (k if options["group_size"] == -1 else options["group_size"]), options["bits"]
    c, h, f = unpack(t["nibbles"], width, k), 2 ** (width - 1), (options["base_bits"] - width).bit_length()
    signed = np.where(c < h, c, h - c if options["sign_magnitude"] else c - 2 * h)
    flags = unpack(t["flags"], f, n).T[:, group] if f else np.float32(0)
    return (signed * 2**flags).astype(np.float32) * t["scales"][:, None]


def fp_asym(t, options, n, k):
    group = np.arange(k) // (k if options["group_size"] == -1 else options["group_size"])
    rows = (PAGES / "fp_asym.md").read_text().split("| code | levels |")[1].splitlines()
    listed = next(r for r in rows if r.startswith(f"| `{options['code']}` |")).split("|")[2].split("then")[0]
    levels = np.array([float(x) for x in listed.strip(" ,").split(",")], np.float32)
    levels = np.concatenate([levels, -levels]) if options["code"].startswith("fp") else levels
    level = levels[unpack(t["qweight"], len(levels).bit_length() - 1, k).astype(int)]
    neg = t["scales_neg"] if options["two_scales"] else t["scales_pos"]
    return level * np.where(level > 0, t["scales_pos"][:, group], neg[:, group])


def vector(t, options, n, k):
    v, size = options["vector_length"], k if options["group_size"] == -1 else options["group_size"]
    row, group = np.arange(n)[:, None], np.arange(k) // size

    def entries(indices, codebook, bits):
        index = unpack(t[indices], min(bits, 8), k)
        if bits > 8:
            index = index + 256 * unpack(t[f"{indices}_high"], bits - 8, k)
        return t[codebook][group, index[row // v, np.arange(k)].astype(int), row % v]

    w = entries("indices", "codebook", options["index_bits"])
    if options["residual_bits"]:
        w = w + entries("residual_indices", "residual_codebook", options["residual_bits"])
    if options["normalize"]:
        w = w * t["column_scales"] + t["column_offsets"]
    if options["outlier_columns"]:
        w[:, t["outlier_index"]] = t["outlier_values"]
    return w


def treatment(t, steps, w):
    """Undo what happens to the input, so that w meets it as it comes; from "Where a weight lies" of uniform.md."""
    k = w.shape[1]
    if steps.get("permute"):
        placed = np.empty_like(w)
        placed[:, t["input_perm"]] = w
        w = placed
    if steps.get("hadamard"):
        power = (k & -k).bit_length() - 1
        m, i, j = k >> power, np.arange(2**power), np.arange(k >> power)
        ones = np.array([[bin(a & b).count("1") for b in i] for a in i])
        c = np.sqrt(2 / m) * np.cos(np.pi * j[:, None] * (j + 0.5) / m)
        c[0] = 1 / np.sqrt(m)
        signs = 1 - 2 * unpack(t["input_signs"][None], 1, k)[0]
        w = w @ np.kron(c, (-1.0) ** ones / 2 ** (power / 2)) * signs
    return w * t["input_scale"] if steps.get("scale") else w


def test_a_reader_written_from_the_page_treats_the_input_alike():
    tensors, meta = read(FIXTURES / "input" / "treated-1.safetensors")
    expected, _ = read(FIXTURES / "input" / "treated-1.expected.safetensors")
    seen = set()
    for module, (index, n, k) in meta["modules"].items():
        spec = meta["specs"][index]
        own = {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}
        decoded = treatment(own, spec["input"], uniform(own, spec["options"], n, k))
        np.testing.assert_allclose(decoded, expected[f"{module}.decoded"], atol=2e-6)
        seen |= set(spec["input"])
    assert seen == {"scale", "hadamard", "permute"}


def test_a_fixture_with_treated_inputs_is_still_read():
    from qexport.checkpoint import Reader, read_header
    from qexport.container import read_shard_metadata

    path = FIXTURES / "input" / "treated-1.safetensors"
    stored, expected = Reader(path.parent, [path.name]), Reader(path.parent, ["treated-1.expected.safetensors"])
    for module, (spec, n, k) in read_shard_metadata(read_header(path)[1], path.name).items():
        tensors = {t: stored.read(f"{module}.{t}") for t in spec.layout(n, k)}
        spec.check(tensors, n, k, module)
        wanted = expected.read(f"{module}.decoded")
        np.testing.assert_allclose(spec.decoded(tensors, n, k).numpy(), wanted.numpy(), atol=2e-6)


@pytest.mark.parametrize("reader", [uniform, spqr, bcq, sdr, fp_asym, vector], ids=lambda f: f.__name__)
def test_a_reader_written_from_the_page_gets_the_same_bits(reader):
    tensors, meta = read(FIXTURES / reader.__name__ / "v1.safetensors")
    expected, _ = read(FIXTURES / reader.__name__ / "v1.expected.safetensors")
    assert len(meta["modules"]) == len(expected) == 2
    for module, (index, n, k) in meta["modules"].items():
        own = {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}
        decoded = reader(own, meta["specs"][index]["options"], n, k)
        assert decoded.dtype == np.float32
        assert decoded.tobytes() == expected[f"{module}.decoded"].tobytes()


@pytest.mark.parametrize("name", ["uniform", "spqr", "dense", "bcq", "sdr", "fp_asym", "vector"])
def test_the_table_in_the_page_is_the_layout(name):
    from qexport import schema
    from qexport.formats.specs import make_format

    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert schema.markdown_table(make_format(name, {}).layout(4096, 4096)) in page


@pytest.mark.parametrize("name", ["uniform", "spqr", "dense", "bcq", "sdr", "fp_asym", "vector"])
def test_the_page_names_every_option_with_its_default(name):
    from qexport.formats.specs import format_options, make_format

    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    for option, default in format_options(make_format(name, {})).items():
        assert f"| `{option}` | {json.dumps(default)} |" in page
