"""Reading, writing, the journal and the codec of the config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qexport.checkpoint import Journal, Meta, Reader, ShardWriter, Written, read_header, write_tensors
from qexport.container import describe, parse, read_shard_metadata, shard_metadata
from qexport.errors import CheckpointError, ResumeError
from qexport.formats.specs import InputSpec, LinearSpec
from qexport.formats.spqr import Spqr
from qexport.formats.uniform import Uniform

TENSORS = {
    "b.half": torch.randn(3, 5).half(),
    "a.odd": torch.arange(7, dtype=torch.uint8),
    "c.word": torch.arange(6, dtype=torch.int32).view(2, 3),
    "d.scalar": torch.tensor(2.5),
    "e.none": torch.empty(0, 4, dtype=torch.bfloat16),
    "f.perm": torch.arange(9).to(torch.uint16),
}
FOUR, THREE = LinearSpec(Uniform(bits=4)), LinearSpec(Spqr(), InputSpec(permute=True))


# ---- files ----


def test_written_file_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    written = write_tensors(tmp_path / "model.safetensors", TENSORS, {"z": 1, "a": [2]})
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in TENSORS.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"qexport": '{"a":[2],"z":1}'}
    assert written.nbytes == (tmp_path / "model.safetensors").stat().st_size
    assert not list(tmp_path.glob("*.tmp"))


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    a = write_tensors(tmp_path / "a.safetensors", TENSORS)
    b = write_tensors(tmp_path / "b.safetensors", dict(reversed(TENSORS.items())))
    assert a.sha256 == b.sha256


def test_reader_reads_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    reader = Reader(tmp_path)
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name), tensor)
        assert b"".join(reader.chunks(name, 3)) == tensor.flatten().view(torch.uint8).numpy().tobytes()
    assert torch.equal(reader.read_rows("b.half", 1, 3), TENSORS["b.half"][1:3])
    with pytest.raises(CheckpointError, match="nothing.here: missing from model.safetensors"):
        reader.meta("nothing.here")


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    entries = {"x": (torch.float32, (2,)), "y": (torch.float32, (2,))}
    with pytest.raises(ValueError, match="announced"), ShardWriter(tmp_path / "a.safetensors", entries) as writer:
        writer.write("x", torch.zeros(3))
    with pytest.raises(ValueError, match="never written"), ShardWriter(tmp_path / "a.safetensors", entries) as writer:
        writer.write("x", torch.zeros(2))
    with (
        pytest.raises(CheckpointError, match="gave 3 bytes"),
        ShardWriter(tmp_path / "a.safetensors", entries) as writer,
    ):
        writer.write("x", [b"abc"])
    assert not list(tmp_path.iterdir())


def header(tmp_path: Path, table: Any, body: bytes = b"") -> Path:
    """A file with a header of one's own."""
    data = table if isinstance(table, bytes) else json.dumps(table).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data + body)
    return path


@pytest.mark.parametrize(
    ("table", "body"),
    [
        (b"not json", b""),
        (b"[1]", b""),
        (b"[" * 100_000, b""),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"abc"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"abcde"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"abcd"),
        ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"abcd"),
        ({"x": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"abcd"),
        ({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"abcd"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"abcd"),
        ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"abcdabcd"),
        ({"x": 5}, b""),
        (
            {
                "x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                "y": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
            },
            b"abcdef",
        ),
        ({"__metadata__": {"a": 1}}, b""),
        ({"__metadata__": []}, b""),
    ],
)
def test_malformed_header_is_refused_by_name(tmp_path: Path, table: Any, body: bytes) -> None:
    with pytest.raises(CheckpointError, match="^bad.safetensors: "):
        read_header(header(tmp_path, table, body))


def test_header_length_is_bounded_by_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    for data in (b"", b"1234567", (2**63).to_bytes(8, "little") + b"{}", (3).to_bytes(8, "little") + b"{}"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="expected a safetensors header"):
            read_header(path)


def test_index_can_name_only_safetensors_files_of_its_folder(tmp_path: Path) -> None:
    for file in ("../x.safetensors", "/etc/passwd", "x.bin", ""):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(CheckpointError, match="not a safetensors file of this folder"):
            Reader(tmp_path)


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tensors(tmp_path / f"{name}.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="x: stored in a.safetensors and in b.safetensors"):
        Reader(tmp_path, ["a.safetensors", "b.safetensors"])


# ---- journal ----


def test_journal_survives_a_last_line_cut_short(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "digest")
    journal.add(Written("a", "1", 2), error=0.5)
    path = tmp_path / Journal.NAME
    path.write_text(path.read_text() + '{"file": "b", "sha')
    again = Journal(tmp_path, "digest")
    assert set(again.done) == {"a"}
    again.add(Written("c", "1", 2))
    assert [line.get("file") for line in Journal.lines(tmp_path)] == [None, "a", "c"]


def test_journal_of_another_plan_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, "digest")
    with pytest.raises(ResumeError, match="another plan"):
        Journal(tmp_path, "other")


# ---- config ----


def names(spec: LinearSpec | None, count: int = 3) -> dict[str, LinearSpec | None]:
    """A linear in each of some layers."""
    return {f"model.layers.{i}.mlp.up_proj": spec for i in range(count)}


def test_config_round_trips_with_patterns_exceptions_and_extents() -> None:
    modules = {**names(FOUR), "model.layers.1.mlp.up_proj": None, "model.layers.2.mlp.up_proj": THREE, "lm_head": None}
    extents = {"model.layers.2.mlp.up_proj": {"nnz": 12}}
    config = json.loads(json.dumps(describe(modules, extents)))
    found = parse(config)
    assert {name: found.spec_for(name) for name in modules} == modules
    assert found.extents_of("model.layers.2.mlp.up_proj") == {"nnz": 12}
    assert found.spec_for("model.layers.0.mlp.down_proj") is None


def test_config_stays_small_however_many_modules_there_are() -> None:
    modules = {f"model.layers.{i}.mlp.experts.gate_up_proj.{e}": FOUR for i in range(50) for e in range(128)}
    assert len(json.dumps(describe(modules, {}))) < 1000


def test_a_module_between_packed_ones_costs_one_pattern_for_all_layers() -> None:
    modules = {
        f"h.{layer}.{part}": FOUR if part != "ffn.1" else None
        for layer in range(30)
        for part in ("ffn.0", "ffn.1", "ffn.2")
    }
    modules |= {"h.3.ffn.2": None, "h.norm.ffn.2": None}
    found = parse(describe(modules, {}))
    assert {name: found.spec_for(name) for name in modules} == modules
    assert set(found.patterns) == {"h.*.ffn.*", "h.*.ffn.1", "h.3.ffn.2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "needs a newer qexport"),
        ({"schema": None}, "needs a newer qexport"),
        ({"quant_method": "gptq"}, "expected a quantization_config"),
        ({"required": ["x"]}, "required features"),
        ({"transforms": ["rotation"]}, "required features"),
        ({"specs": {}}, "expected specs"),
        ({"modules": {"a": 7}}, "names spec 7 of 1"),
        ({"modules": {"a": True}}, "names spec True of 1"),
        ({"extents": {"a": {"nnz": -1}}}, "not counts"),
        ({"specs": [{"format": "uniform", "version": 2, "options": {}}]}, "needs a newer qexport"),
        ({"specs": [{"format": "os", "version": 1, "options": {}}]}, "unknown format 'os'"),
        ({"specs": [{"format": "uniform", "version": 1, "options": {"bits": "4; rm"}}]}, "does not take these options"),
        ({"specs": [{"format": "uniform", "version": 1, "options": {"colour": 1}}]}, "does not take these options"),
        ({"specs": [{"format": "uniform", "version": 1, "options": {}, "input": {"fold": True}}]}, "unknown treatment"),
        ({"specs": [5]}, "a spec needs"),
    ],
)
def test_config_that_is_malformed_or_newer_is_refused(change: dict[str, Any], message: str) -> None:
    config = {**describe(names(FOUR), {}), **change}
    with pytest.raises(CheckpointError, match=message):
        parse(config)


def test_unknown_optional_keys_are_ignored() -> None:
    assert parse({**describe(names(FOUR), {}), "colour": "green"}).spec_for("model.layers.0.mlp.up_proj") == FOUR


def test_shard_metadata_explains_a_lone_shard() -> None:
    table = {"a": (FOUR, 3, 5), "b": (THREE, 7, 9), "c": (FOUR, 1, 2)}
    assert read_shard_metadata({"qexport": json.dumps(shard_metadata(table))}, "x") == table
    for bad in (
        {},
        {"qexport": "[]"},
        {"qexport": "{}"},
        {"qexport": '{"schema":1,"specs":[],"modules":{"a":[0,1,1]}}'},
    ):
        with pytest.raises(CheckpointError, match="^x: "):
            read_shard_metadata(bad, "x")


def test_meta_is_plain_data() -> None:
    assert Meta(torch.float32, (1,), Path("x"), 8, 4) == Meta(torch.float32, (1,), Path("x"), 8, 4)


def test_journal_lines_may_hold_what_unicode_calls_line_ends(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "digest")
    journal.add(Written("a", "0", 1), origin="x\u2028y")
    assert Journal(tmp_path, "digest").done["a"]["origin"] == "x\u2028y"
