"""Files that the first version of each format wrote are read to the same bits by every later one."""

import hashlib
import runpy
import sys
from pathlib import Path

import pytest

from qexport.checkpoint import Reader, read_header
from qexport.container import read_shard_metadata

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHA256 = {
    "bcq/v1.safetensors": "9b4b92d6807505042608cfa76614120b2d77d52ed1367288366b55ad09d2a211",
    "fp_asym/v1.safetensors": "924908bc93401973e0552b6063748768f81e188809cabe26000136a3d93a211d",
    "sdr/v1.safetensors": "9b6abc99c06bf4e1c733b95cb3b6a623f092d62fbf1aebac92e0c536396d247e",
    "spqr/v1.safetensors": "3f5d0a346e85a5863dfa02642f3f10d19fe9c47c092cfaa17a73d60031fd8214",
    "uniform/v1.safetensors": "5c5922c2ea0d8edeb4cc7bc8c878a704a6b5baa32eda095d4aec2e379f12eb60",
    "vector/v1.safetensors": "c68e5d412f64f2857a503580008535308a251ff47b3c7341f88d1afb9a428470",
}


def fixtures():
    return sorted(FIXTURES.glob("*/v*[0-9].safetensors"))


def test_there_is_one_for_each_version_of_each_coded_format():
    assert {f"{path.parent.name}/{path.name}" for path in fixtures()} == set(SHA256)


@pytest.mark.parametrize("path", fixtures(), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_fixtures_are_never_rewritten(path):
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[f"{path.parent.name}/{path.name}"]


@pytest.mark.parametrize("path", fixtures(), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_fixtures_decode_to_the_bits_that_they_had(path):
    expected_path = path.with_suffix(".expected.safetensors")
    stored, expected = Reader(path.parent, [path.name]), Reader(path.parent, [expected_path.name])
    modules = read_shard_metadata(read_header(path)[1], path.name)
    assert {f"{module}.decoded" for module in modules} == set(expected.names)
    for module, (spec, n, k) in modules.items():
        tensors = {t: stored.read(f"{module}.{t}") for t in spec.layout(n, k)}
        spec.check(tensors, n, k, module)
        assert spec.decoded(tensors, n, k).equal(expected.read(f"{module}.decoded"))
        fields = spec.weight.unpack(tensors, n, k)
        assert all(t.equal(tensors[name]) for name, t in spec.weight.pack(fields).items())


@pytest.mark.parametrize("name", ["bcq", "fp_asym", "sdr", "spqr", "uniform", "vector"])
def test_the_script_refuses_to_overwrite(name, monkeypatch):
    before = {path: path.read_bytes() for path in FIXTURES.glob("*/*.safetensors")}
    monkeypatch.setattr(sys, "argv", ["make.py", name])
    with pytest.raises(SystemExit, match="exists and stays as it is"):
        runpy.run_path(str(FIXTURES / "make.py"), run_name="__main__")
    assert before == {path: path.read_bytes() for path in FIXTURES.glob("*/*.safetensors")}
