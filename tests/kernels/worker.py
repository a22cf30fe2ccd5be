"""Runs kernels in a process of its own: under Triton's interpreter, which is chosen when Triton is first imported, or
on a GPU, which is lost to a process whose kernel went astray.

    worker = Worker()                  starts the process; Worker("cuda") takes the GPU
    worker.ask(case.to_json())         -> {"error", "nan", "same", "stored_bits"} of one product,
                                          and "outside", "read_bits" under the interpreter

Outputs and buffers are poisoned with NaN before kernels run. The interpreter watches every load and store: addresses
outside the tensors that were handed over are counted, and so are the bytes of the weights that each program reads.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Worker:
    """The process that runs kernels on tensors of a device: `"cpu"`, where they are interpreted, or `"cuda"`."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        here = Path(__file__).resolve()
        path = os.pathsep.join([str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        if self.device != "cpu":
            del env["TRITON_INTERPRET"]
        return subprocess.Popen(
            [sys.executable, str(here), self.device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def ask(self, case: dict[str, Any]) -> dict[str, Any]:
        """Run one case; an exception in the kernel comes back as a RuntimeError with its text.

        After a failure on a GPU the next case gets a new process: nothing runs any more in one that went astray.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"failed": f"the process ended with {self.process.wait(timeout=30)}"}
        if "failed" in answer:
            if self.device != "cpu":
                self.close()
                self.process = self._start()
            raise RuntimeError(answer["failed"])
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def _poison(make):
    """A tensor factory whose float results are NaN and whose integer results are huge."""

    def made(*args, **kwargs):
        out = make(*args, **kwargs)
        if out.device.type != "meta" and not kwargs.get("pin_memory"):
            out.fill_(float("nan")) if out.is_floating_point() else out.fill_(127)
        return out

    return made


class Watch:
    """Counts what interpreted kernels read and write."""

    def __init__(self, weights, known, cached=()) -> None:
        self.weights = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in weights if t.numel()]
        self.known = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in known if t is not None and t.numel()]
        self.cached = {weights[i].data_ptr() for i in cached}
        self.read: dict = {}
        self.outside = 0
        self.launch = 0

    def see(self, builder, pointers, mask, size: int, store: bool) -> None:
        """Note the live addresses of one access."""
        import numpy as np

        live = np.unique(np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))[mask != 0])
        inside = np.zeros(live.shape, bool)
        for low, high in self.known:
            inside |= (live >= low) & (live + np.uint64(size) <= high)
        self.outside += int((~inside).sum())
        if not store:
            for low, high in self.weights:
                own = live[(live >= low) & (live < high)]
                program = None if low in self.cached else tuple(builder.grid_idx)
                self.read.setdefault((self.launch, program, low), []).append((own, size))

    def weight_bytes(self) -> int:
        """Bytes of weights that each program read, repeats within a program not counted, summed over programs.

        Of tensors that a cache holds repeats within a launch are not counted.
        """
        import numpy as np

        total = 0
        for pieces in self.read.values():
            for size in {s for _, s in pieces}:
                total += size * np.unique(np.concatenate([a for a, s in pieces if s == size])).size
        return total


def _watched(run, watch: Watch):
    """Run a function while all loads and stores of the interpreter are watched."""
    import numpy as np
    from triton.runtime import interpreter

    kind = interpreter.InterpreterBuilder
    load, store = kind.create_masked_load, kind.create_masked_store

    def seen_load(self, ptrs, mask, *rest):
        watch.see(self, ptrs.data, mask.data, interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize, False)
        return load(self, ptrs, mask, *rest)

    def seen_store(self, ptrs, value, mask, *rest):
        watch.see(self, ptrs.data, mask.data, np.dtype(value.data.dtype).itemsize, True)
        return store(self, ptrs, value, mask, *rest)

    kind.create_masked_load, kind.create_masked_store = seen_load, seen_store
    try:
        return run()
    finally:
        kind.create_masked_load, kind.create_masked_store = load, store


def answer(request: dict[str, Any], device: str) -> dict[str, Any]:
    """Run one case in this process. What is expected is computed on the CPU, whatever the device."""
    if "kv" in request:
        from tests.kernels import kv

        return kv.answer(request["kv"], device)
    if "input" in request:
        from tests.kernels import integers

        return integers.answer(request)
    import torch

    from qexport.kernels import _gemm
    from tests.kernels.cases import Case, build, expected, stored_bits

    case = Case(**request)
    p = build(case)
    ref = expected(p, case.n, case.k)
    out = {"stored_bits": stored_bits(p, case.n, case.k)}
    p = p.to(device)
    weights = p.kernel.repack(p.fmt, p.packed, case.n, case.k)
    made: list = []
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def keep(make):
        return lambda *a, **kw: (made.append(make(*a, **kw)), made[-1])[1]

    torch.empty, torch.Tensor.new_empty = keep(_poison(empty)), keep(_poison(new_empty))
    try:
        d = p.kernel.decoder(p.fmt, case.n, case.k)
        c = p.config or _gemm.choose(case.m, case.n, case.k, p.x.dtype, d.vector)
        y = torch.empty((case.m, case.n), dtype=p.x.dtype, device=device)
        launches = _gemm.launches(d, c, p.x, tuple(weights), y, p.perm, p.scale)
    finally:
        torch.empty, torch.Tensor.new_empty = empty, new_empty
    launches = getattr(p.kernel, "launches", list)(launches)
    if device == "cpu":
        watch = Watch(weights, [*weights, p.x, p.perm, p.scale, *made], d.cached)
        for watch.launch, launch in enumerate(launches):
            _watched(launch.run, watch)
        out |= {"outside": watch.outside, "read_bits": 8 * watch.weight_bytes() / (case.n * case.k)}
    else:
        for launch in launches:
            launch.run()
    again = _gemm.linear(p.kernel, p.fmt, p.x, weights, case.n, case.k, perm=p.perm, scale=p.scale, config=p.config)
    error = (y.cpu().double() - ref).abs().max() / ref.abs().max().clamp(min=1e-30)
    finite = torch.isfinite(y)
    return {
        **out,
        "error": float(error) if finite.all() else None,
        "nan": int((~finite).sum()),
        "same": bool(torch.equal(again, y)),
    }


def main(device: str = "cpu") -> None:
    """Answer requests, one JSON document a line."""
    import numpy as np
    import torch

    np.seterr(divide="raise")  # the interpreter's integers: x // 0 is 0 there, and anything on a GPU
    torch.set_num_threads(1)
    out = sys.stdout
    sys.stdout = sys.stderr  # whatever libraries print must not end up among the answers
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), device)
        except Exception as error:  # noqa: BLE001 - it is raised again on the other side
            reply = {"failed": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(reply) + "\n")
        out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
