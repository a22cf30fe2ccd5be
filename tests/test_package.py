"""The public surface of `import qexport`, and what it costs."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import qexport

PUBLIC = ["QExportConfig", "QExportError", "__version__", "kv_cache", "load", "make_plan", "quantize"]


def test_the_public_names_are_these() -> None:
    assert qexport.__all__ == PUBLIC
    assert dir(qexport) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(qexport, name) is not None


def test_other_names_are_refused_with_what_there_is() -> None:
    with pytest.raises(AttributeError, match="'laod'; it has QExportConfig"):
        _ = qexport.laod


def test_a_function_is_not_hidden_by_its_module() -> None:
    module = importlib.import_module("qexport.load")
    assert qexport.load is module.load
    assert callable(qexport.load)


def test_importing_it_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, qexport; print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    folder = Path(qexport.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("[]")


def test_looking_for_the_registry_without_importing_it_loses_nothing() -> None:
    code = (
        "import sys, importlib.util, qexport\n"
        "importlib.util.find_spec('transformers.quantizers.auto')\n"
        "from transformers.quantizers import auto\n"
        "print('qexport' in auto.AUTO_QUANTIZER_MAPPING, any('_Watcher' in repr(f) for f in sys.meta_path))\n"
        "print(type(auto.__spec__.loader).__name__)"
    )
    folder = Path(qexport.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "False", "SourceFileLoader"]


def test_a_broken_registration_warns_and_breaks_nothing() -> None:
    code = (
        "import sys, warnings, qexport\n"
        "sys.modules['qexport.integrations.transformers'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    qexport._register()\n"
        "print([str(w.message) for w in caught])"
    )
    folder = Path(qexport.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert "could not register with transformers" in run.stdout
