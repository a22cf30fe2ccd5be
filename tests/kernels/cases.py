"""Random matrices for kernels, and what a kernel's result is held against: `formats.base.dequantize`."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qexport import plugins, schema
from qexport.formats._bits import groups_in
from qexport.formats.base import dequantize
from qexport.kernels._gemm import Config

TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}  # largest error over largest value


@dataclass(frozen=True)
class Case:
    """One product to try."""

    format: str
    options: dict[str, Any]
    n: int = 37
    k: int = 300
    m: int = 1
    dtype: str = "float32"
    perm: bool = False
    scale: bool = False
    config: tuple[int, ...] | None = None
    kernel: str = ""  # a function of broken that spoils the plugin

    def __str__(self) -> str:
        options = "-".join(f"{key}{value}" for key, value in self.options.items())
        flags = "".join(f"-{name}" for name in ("perm", "scale") if getattr(self, name))
        config = "" if self.config is None else "-" + "x".join(map(str, self.config))
        return f"{self.format}-{options}-n{self.n}-k{self.k}-m{self.m}-{self.dtype}{flags}{config}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Problem:
    """A case with its tensors."""

    fmt: Any
    kernel: Any
    packed: dict[str, Tensor]
    x: Tensor
    perm: Tensor | None
    scale: Tensor | None
    config: Config | None = field(default=None)

    def to(self, device: str) -> "Problem":
        """The same problem with its tensors on a device."""
        moved = {
            name: t if t is None else t.to(device) for name in ("x", "perm", "scale") for t in (getattr(self, name),)
        }
        return replace(self, packed={name: t.to(device) for name, t in self.packed.items()}, **moved)


def fields_of(fmt: Any, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Random fields that use every code; of outliers the first row has many and the second none."""
    codes = lambda bits, *shape: torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=rng)  # noqa: E731
    groups = groups_in(k, fmt.group_size)
    if fmt.name == "vector":
        return _vectors(fmt.sized(n, k), n, k, rng)
    out = {"codes": codes(fmt.bits, n, k)}
    if fmt.name == "sdr":
        out["flags"] = torch.randint(0, fmt.base_bits - fmt.bits + 1, (n, groups), generator=rng).float()
        out["scales"] = (torch.rand(n, 1, generator=rng) + 0.5).expand(n, groups)
        return out
    dtype = getattr(torch, fmt.scale_dtype)
    if fmt.name == "bcq":
        out["alpha"] = torch.randn(n, groups, fmt.bits, generator=rng).to(dtype).float()
        if fmt.offset != "none":
            out["offset"] = torch.randn(n, groups, generator=rng).to(dtype).float()
        return out
    if fmt.name == "fp_asym":
        names = ("scales_pos", "scales_neg")[: 1 + fmt.two_scales]
        return out | {name: (torch.rand(n, groups, generator=rng) + 0.5).to(dtype).float() for name in names}
    if fmt.name == "uniform":
        out["scales"] = (torch.rand(n, groups, generator=rng) + 0.5).to(dtype).float()
        if not fmt.symmetric:
            out["zeros"] = codes(fmt.bits, n, groups).float()
        return out
    out["scale_codes"], out["zero_codes"] = codes(fmt.scale_bits, n, groups), codes(fmt.zero_bits, n, groups)
    out["stats"] = torch.randn(-(-n // fmt.stats_group), groups, 4, generator=rng).to(dtype).float()
    live = torch.rand(n, k, generator=rng) < 0.01
    live[0, :64], live[1:2] = True, False
    out["outlier_rows"] = torch.cat((torch.zeros(1), live.sum(1).cumsum(0))).int()
    out["outlier_columns"] = live.nonzero()[:, 1].int()
    out["outlier_values"] = torch.randn(int(live.sum()), generator=rng).to(dtype).float()
    return out


def _vectors(fmt: Any, n: int, k: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Random fields of the format `vector`."""
    out = {"rows": torch.tensor(n)}
    widths = {name: width for name, _, width in fmt.indexed}
    for name, f in fmt.layout(n, k).items():
        if name in widths:
            out[name] = torch.randint(0, 2 ** widths[name], (f.shape[0], k), dtype=torch.int32, generator=rng)
        elif name == "outlier_index":
            out[name] = torch.randperm(k, generator=rng)[: fmt.outlier_columns].sort().values.int()
        elif not name.endswith("_high"):
            out[name] = torch.randn(f.shape, generator=rng).to(f.dtype).float()
    return out


def build(case: Case) -> Problem:
    """Random tensors of a case, the same ones every time."""
    rng = torch.Generator().manual_seed(0)
    fmt = plugins.get("formats", case.format)(**case.options)
    kernel = plugins.get("kernels", case.format)
    if case.kernel:
        from tests.kernels import broken

        kernel = getattr(broken, case.kernel)(kernel)
    packed = fmt.pack(fields_of(fmt, case.n, case.k, rng))
    perm = torch.randperm(case.k, generator=rng) if case.perm else None
    return Problem(
        fmt=fmt,
        kernel=kernel,
        packed=packed,
        x=torch.randn(case.m, case.k, generator=rng).to(getattr(torch, case.dtype)),
        perm=None if perm is None else perm.to(torch.uint16 if case.k % 2 else torch.int32),
        scale=torch.rand(case.k, generator=rng) + 0.5 if case.scale else None,
        config=None if case.config is None else Config(*case.config),
    )


def expected(p: Problem, n: int, k: int) -> Tensor:
    """The product in float64 with decoded weights in full precision."""
    x = p.x.double()
    if p.scale is not None:
        x = x * p.scale.double()
    if p.perm is not None:
        x = x[:, p.perm.long()]
    return x @ dequantize(p.fmt, p.packed, n, k).double().T


def stored_bits(p: Problem, n: int, k: int) -> float:
    """Bits per weight of the stored tensors."""
    layout = p.fmt.layout(n, k)
    return 8 * schema.nbytes(layout, schema.extents_of(p.packed, layout)) / (n * k)
