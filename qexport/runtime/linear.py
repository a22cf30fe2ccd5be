"""One linear for every format: it takes the path that multiplies its input by what is packed.

Under the reference path it equals `nn.Linear` with the decoded weight, bit for bit. Model code that reaches past
`forward` for the `weight` finds the decoded one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qexport.formats.base import IntegerFormat
from qexport.formats.specs import InputSpec, LinearSpec
from qexport.kernels.cpu.base import DTYPES, FEW, Joinable, Weight
from qexport.runtime import ops, products
from qexport.runtime.dispatch import Choice, choose, cpu_weight_of
from qexport.runtime.packed import Budget, PackedWeight
from qexport.schema import Extents


class QuantLinear(PackedWeight):
    """A linear that multiplies by its packed weight, whatever the format.

    Args:
        spec: what is stored.
        n: out features.
        k: in features.
        bias: whether there is one; it is an ordinary parameter in the model's dtype.
        dtype: the model's dtype, in which `weight` is handed out.
        extents: data-dependent extents.
        device: where the empty tensors are made.
        transposed: stands for a GPT-2 `Conv1D`, which multiplies by a weight held as [k, n].
        backend: see `dispatch.choose`.
        budget: where to ask before keeping the decoded weight; by default nothing is kept.
        own: class that this stands for if it multiplies in its own way; its `forward` is the reference path.
    """

    def __init__(
        self,
        spec: LinearSpec,
        n: int,
        k: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        extents: Extents | None = None,
        device: torch.device | str = "meta",
        transposed: bool = False,
        backend: str = "auto",
        budget: Budget | None = None,
        own: type[nn.Module] | None = None,
    ) -> None:
        super().__init__(spec, n, k, dtype=dtype, extents=extents, device=device, transposed=transposed, budget=budget)
        self.in_features, self.out_features, self.backend = k, n, backend
        self.own = own
        self.bias = nn.Parameter(torch.empty(n, dtype=dtype, device=device), requires_grad=False) if bias else None
        self._choice: Choice | None = None
        self._float_choice: Choice | None = None
        self._weights: dict[str, Any] = {}  # in the layout of each path that reads them
        self._few: Callable[[Tensor], Tensor] | None = None  # the path of few rows, once it was used, for all inputs
        self._joint: _Joint | None = None  # with others that read the same input, this one first

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_weights": {}, "_few": None, "_joint": None}

    @property
    def choice(self) -> Choice:
        """The path in use on the present device and its reason; raises `BackendError` when none can run."""
        if self._choice is None:
            self._choice = choose(self.spec, self.n, self.k, self.place, self.backend)
        return self._choice

    @property
    def float_choice(self) -> Choice:
        """The path for inputs that stay floats; of a linear that rounds them only under `decode_input="float"`."""
        if self._float_choice is None:
            spec = replace(self.spec, input=replace(self.spec.input, quant=None))
            backend = "auto" if self.backend == "cpu" else self.backend  # 'cpu' was asked for what multiplies integers
            self._float_choice = choose(spec, self.n, self.k, self.place, backend)
        return self._float_choice

    def forward(self, x: Tensor) -> Tensor:
        """Decoded weight times x [..., k], plus the bias: [..., n] in x's dtype; on the meta device only its shape."""
        if self._few is not None and _few_rows(x) and not torch.compiler.is_compiling():
            return self._few(_autocast(x) if torch.is_autocast_enabled("cpu") else x)
        if x.is_meta or self.place.type == "meta":
            return x.new_empty(*x.shape[:-1], self.n)
        if self._rounds(x):
            y = self._by_integers(x.detach())
            return self._with_gradient(y, x) if _learns(x) else y
        path = _path(self, False)
        if path == "triton" and not _learns(x):
            return self._by_triton(_autocast(x), rounded=False)
        if path == "cpu" and _few_rows(x):
            return self._by_cpu(x)
        if self.own is not None:
            return self.own.forward(self, x)  # sees `weight` and `bias`
        weight = self._decoded_in(x.dtype)
        if not self.transposed:
            return F.linear(x, weight, self.bias)
        flat = x.reshape(-1, self.k)  # the very call of Conv1D: another would round otherwise
        y = flat @ weight if self.bias is None else torch.addmm(self.bias, flat, weight)
        return y.reshape(*x.shape[:-1], self.n)

    def forget(self) -> None:
        """Drop the decoded weight, the kernels' copies and the choice of the path."""
        super().forget()
        self._choice, self._float_choice, self._weights, self._few, self._joint = None, None, {}, None, None

    def multiplied(self, x: Tensor) -> Tensor:
        """What `forward` gives for x where a kernel of the CPU computes it; the operator in graphs asks for it."""
        if self._few is not None:
            return self._few(x)
        return self._by_integers(x) if self._rounds(x) else self._by_cpu(x)

    def multiplied_with(self, numbers: list[Tensor], x: Tensor) -> Tensor:
        """What the modules of these numbers give, this one first, one behind the other; joined weights in one product.

        Args:
            numbers: int64 [] each, see `ops.number_of`.
            x: [..., k].
        """
        joint = self._joint
        if joint is None or not joint.fits(numbers):
            modules = [ops.module_of(number) for number in numbers]
            found = [m.multiplied(x) for m in modules]  # which lays out what isn't yet
            self._joint = _joint(modules, numbers)
            return torch.cat(found, -1)
        return joint.together(x)

    def _rounds(self, x: Tensor) -> bool:
        """Whether this input is rounded to integers."""
        quant = self.spec.input.quant
        return quant is not None and not (quant.decode_input == "float" and _one_token(x))

    def _laid_out(self, path: str, make: Callable[[], Any]) -> Any:
        """The weight in the layout of a path, made once unless nothing may be kept."""
        if path in self._weights:
            return self._weights[path]
        found = make()
        if not self._visiting:
            self._weights[path] = found
        return found

    def _by_integers(self, x: Tensor) -> Tensor:
        x = _autocast(x)
        if _path(self, True) == "triton":
            return self._by_triton(x, rounded=True)
        if _in_graph(x):
            return torch.ops.qexport.linear(x, self._number, self.n)
        multiply = self._laid_out("integers", self._product_of_integers)
        y: Tensor = multiply(x.reshape(-1, self.k))
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.n)

    def _product_of_integers(self) -> Callable[[Tensor], Tensor]:
        """What multiplies rows [m, k] by the weight as integers, with all that it needs laid out."""
        packed, fmt = self.packed, self.spec.weight
        from qexport.kernels import _integers

        assert isinstance(fmt, IntegerFormat)
        multiply = _integers.by_int8 if self.choice.path == "cpu" else _integers.exact
        weights = _integers.laid_out(fmt.integers(packed, self.n, self.k), packed, multiply)
        return partial(_integers.linear, self.spec.input, packed, weights, multiply)

    def _with_gradient(self, y: Tensor, x: Tensor) -> Tensor:
        """The result y for x, with the gradient of the decoded weight: rounding lets it pass."""
        weight = self._decoded_in(x.dtype)
        through = F.linear(x, weight.T if self.transposed else weight)
        return y + (through - through.detach())

    def _by_cpu(self, x: Tensor) -> Tensor:
        x = _autocast(x)
        if _in_graph(x):
            return torch.ops.qexport.linear(x, self._number, self.n)
        multiply: Callable[[Tensor], Tensor] = self._laid_out("cpu", self._for_cpu)
        if self.spec.input.quant is None and "cpu" in self._weights:
            self._few = multiply
        return multiply(x)

    def _for_cpu(self) -> Callable[[Tensor], Tensor]:
        fmt, packed = self.spec.weight, self.packed
        stored = {name: packed[name] for name in fmt.layout(self.n, self.k)}
        weight = cpu_weight_of(self.spec, stored, self.n, self.k)
        steps = replace(self.spec.input, quant=None)
        prepared = None if steps == InputSpec() else partial(steps.prepared, tensors=packed)
        if prepared is None and not self._visiting:
            return self._rest_on(weight)
        return partial(_multiply, weight.product, prepared, self._parameters, self.k)

    def _rest_on(self, weight: Weight) -> Callable[[Tensor], Tensor]:
        """Multiply few rows of inputs that need no steps before by this weight from now on."""
        path = partial(_multiply, weight.product, None, self._parameters, self.k)
        self._weights |= {"plain": weight, "cpu": path}
        if self.spec.input.quant is None:
            self._few = path
        return path

    def _by_triton(self, x: Tensor, *, rounded: bool) -> Tensor:
        """By one of Triton's kernels; in a graph it is an operator of the tensors that it reads."""
        if torch.compiler.is_compiling():
            text, weights = _ready(self, rounded), self._for_triton(rounded)
            inputs = [getattr(self, name) for name in self._fields if name.startswith("input_")]
            waits = products.waits(self.spec, rounded=rounded)
            operator = torch.ops.qexport.product_that_waits if waits else torch.ops.qexport.product
            y: Tensor = operator(x, weights, inputs, text, rounded, self.n)
        else:
            y = products.product(self.spec, x, self._for_triton(rounded), self.packed, self.n, rounded=rounded)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _for_triton(self, rounded: bool) -> tuple[Tensor, ...]:
        make = lambda: products.laid_out(self.spec, self.packed, self.n, self.k, rounded=rounded)  # noqa: E731
        return self._laid_out("integers" if rounded else "float", make)


@dataclass(frozen=True, eq=False)
class _Joint:
    """Linears that read the same input.

    Attributes:
        numbers: of all, see `ops.number_of`.
        others: all but the first, with which this lies and is forgotten.
        paths: those of few rows, of the others.
        together: gives the columns of all.
        joined: whether that is one product.
    """

    numbers: list[Tensor]
    others: list[QuantLinear]
    paths: list[Callable[[Tensor], Tensor]]
    together: Callable[[Tensor], Tensor]
    joined: bool

    def fits(self, numbers: list[Tensor]) -> bool:
        """Whether it is of these modules, and what it is made of still is theirs: paths end when contents change."""
        # Lists ask first whether their elements are the same objects, which is all that a token costs.
        return self.numbers == numbers and self.paths == [m._few for m in self.others]


def _joint(modules: list[QuantLinear], numbers: list[Tensor]) -> _Joint | None:
    """What linears share that all have a path of few rows, their weights joined if they can be; else None."""
    paths = [m._few for m in modules if m._few is not None]
    if len(paths) < len(modules):
        return None
    weights = [w for m in modules if isinstance(w := m._weights.get("plain"), Joinable)]
    found = weights[0].joined(weights[1:]) if len(weights) == len(modules) else None
    if found is None:
        return _Joint(numbers, modules[1:], paths[1:], lambda x: torch.cat([path(x) for path in paths], -1), False)
    (whole, parts), own = found, [m._parameters for m in modules]
    biased, ns = any(parameters.get("bias") is not None for parameters in own), [m.n for m in modules]

    def product(x: Tensor) -> Tensor:
        if not biased:
            return whole.product(x)
        y = whole.product(x.to(torch.float32))  # what a bias is added to is rounded afterwards
        for part, parameters in zip(y.split(ns, -1), own, strict=True):
            if (bias := parameters.get("bias")) is not None:
                part.add_(bias)
        return y

    paths = [m._rest_on(part) for m, part in zip(modules, parts, strict=True)]
    return _Joint(numbers, modules[1:], paths[1:], partial(_multiply, product, None, {}, modules[0].k), True)


def _multiply(
    product: Callable[[Tensor], Tensor],
    prepared: Callable[[Tensor], Tensor] | None,
    parameters: Mapping[str, Tensor | None],
    k: int,
    x: Tensor,
) -> Tensor:
    """The path of few rows. It runs for every linear and token, so it looks nothing up that can be known before."""
    rows, bias = x, parameters.get("bias")
    if prepared is not None:
        rows = prepared(x.reshape(-1, k))
    elif bias is not None or x.dtype not in DTYPES:
        rows = x.to(torch.float32)
    y = product(rows.contiguous())
    if bias is not None:
        y.add_(bias)
    if y.dtype is not x.dtype:
        y = y.to(x.dtype)
    return y if prepared is None else y.view(*x.shape[:-1], y.shape[1])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _path(module: QuantLinear, rounded: bool) -> str:
    """The path of rounded inputs or of floats; constant to a graph, because to choose looks at files and packages."""
    return (module.choice if rounded or module.spec.input.quant is None else module.float_choice).path


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _ready(module: QuantLinear, rounded: bool) -> str:
    """The spec in words; what is kept is made now, since nothing may stay of what a CUDA graph's first run makes."""
    module._for_triton(rounded)
    if module.spec.input.hadamard:
        module.spec.input.rotated(torch.zeros(1, module.k, device=module.place), module.packed)
    return ops.words(module.spec)


def _few_rows(x: Tensor) -> bool:
    """Whether a kernel for few rows is faster than decoding, and can be used."""
    return 0 < x.numel() <= FEW * x.shape[-1] and not _learns(x) and not x.is_meta


def _learns(x: Tensor) -> bool:
    """Whether a gradient of x will be asked for; kernels know none."""
    return x.requires_grad and torch.is_grad_enabled()


def _in_graph(x: Tensor) -> bool:
    """Whether `torch.compile` is looking, and an operator has to stand for what numba or C++ computes."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def _autocast(x: Tensor) -> Tensor:
    """An input in the dtype that autocast asks for, if it is on."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


def _one_token(x: Tensor) -> bool:
    """Whether an input [..., k] has one token of each sequence, as when a model generates."""
    return x.shape[-2] == 1 if x.ndim > 2 else x.ndim == 1 or x.shape[0] == 1
