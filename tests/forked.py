"""Runs the script that proves exports as they run it: in a process without ours, but with its libraries loaded already.

`Forked.run` takes the place of `subprocess.run`: the first call starts the process, and every call forks it.
"""

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from typing import Any

_LIBRARIES = ("transformers.models.llama.modeling_llama", "transformers.quantizers.auto", "compressed_tensors")


class Forked:
    """The process that is forked."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        """What `subprocess.run` gives for `python -P SCRIPT ARGUMENTS`; the first command's environment is kept."""
        if self.process is None:
            server = [*command[: command.index("-P") + 1], __file__]
            self.process = subprocess.Popen(
                server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command[command.index("-P") + 1 :]) + "\n")
        self.process.stdin.flush()
        code, said = json.loads(self.process.stdout.readline())
        return subprocess.CompletedProcess(command, code, "", said)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.communicate(timeout=30)


def _child(script: str, arguments: list[str], writing: int) -> None:
    """Call the script's `main`; whatever is written goes where errors go. Does not return."""
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    spec = importlib.util.spec_from_file_location("script", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        module.main(*arguments)
        code = 0
    except BaseException:  # noqa: BLE001 - the process ends, as that of a script does
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    """Answer requests, one JSON document a line: the exit code, and what was written."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not end up among the answers
    for name in _LIBRARIES:
        if importlib.util.find_spec(name.split(".")[0]) is not None:
            importlib.import_module(name)
    for line in sys.stdin:
        script, *arguments = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _child(script, arguments, writing)
        os.close(writing)
        with os.fdopen(reading, errors="replace") as file:
            said = file.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.write(json.dumps([code, said]) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
