"""The streaming view of a model: all but the blocks in memory, and one block at a time."""

import copy

import torch
from torch import Tensor, nn

from qexport.errors import PlanError
from qexport.models.build import shell, striped, wanted_dtype
from qexport.models.chain import Call, Stop, find_blocks, forward, head_module, record, replaced, tensors_in
from qexport.models.parts import Anatomy, WeightView
from qexport.models.source import Source


class Skeleton:
    """Embedding, position tables and final norm of a model, and the means to run its blocks one by one.

    Running `embed`, every `run`, and `finish` gives what the whole model gives, bit for bit on one machine and batch.

    Args:
        source: the model.
        anatomy: its description.
        dtype: compute dtype of the weights; modules that transformers keeps in float32 stay so.
        device: where everything but the lazily read blocks lives, and where blocks run.
        seqlen: length of every sequence.

    Raises:
        PlanError: a block takes an input besides the hidden state that depends on the tokens, or `seqlen` is longer
            than the model's context.
    """

    def __init__(
        self, source: Source, anatomy: Anatomy, *, dtype: torch.dtype, device: str | torch.device, seqlen: int
    ) -> None:
        if anatomy.context is not None and seqlen > anatomy.context:
            raise PlanError(
                f"--seqlen {seqlen} is longer than the context of {source.name}, {anatomy.context}. Use that or less."
            )
        self._source, self._anatomy = source, anatomy
        self._dtype, self._device, self._seqlen = dtype, torch.device(device), seqlen
        self._model = shell(source.config, dtype)
        _, blocks = find_blocks(self._model)
        self._blocks = list(blocks)
        self._fill_rest()
        self._calls = {1: self._record()}

    def _fill_rest(self) -> None:
        """Give weights and buffers to everything outside blocks and towers; a head of its own is not needed."""
        absent = [*(b.name for b in self._anatomy.blocks), *self._anatomy.towers]
        head = head_module(self._model)
        for path, module in self._model.named_modules():
            if module is head or any(path == a or path.startswith(a + ".") for a in absent):
                continue
            self._fill(module, path)

    def _fill(self, module: nn.Module, path: str) -> None:
        """Own parameters and buffers of one module, not those of its children."""
        for name, param in list(module._parameters.items()):
            if param is not None:
                tensor = self._read(f"{path}.{name}" if path else name)
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                full = f"{path}.{name}" if path else name
                stored = name not in module._non_persistent_buffers_set
                module._buffers[name] = self._read(full) if stored else buffer.to(self._device)

    def _read(self, name: str) -> Tensor:
        dtype = wanted_dtype(self._model, name, self._dtype)
        return self._source.read_as(name, dtype, self._device)

    def _record(self) -> list[Call]:
        # The same call twice, on other tokens: what differs depends on the tokens, and can't be replayed.
        low = torch.zeros(1, self._seqlen, dtype=torch.int64, device=self._device)
        high = torch.arange(self._seqlen, device=self._device).remainder(self._anatomy.vocab - 1).unsqueeze(0) + 1
        calls = record(self._model, self._blocks, low)
        others = record(self._model, self._blocks, high)
        for index, (a, b) in enumerate(zip(calls, others, strict=True)):
            if not _same((a.args, a.kwargs), (b.args, b.kwargs)):
                raise PlanError(
                    f"{self._anatomy.blocks[index].name}: takes an input besides the hidden state that depends on "
                    "the tokens. qexport streams decoders whose only token-dependent input is the hidden state."
                )
        return calls

    def _calls_for(self, count: int) -> list[Call]:
        """How the blocks are called for `count` sequences: some masks and tables have an entry for each."""
        if count not in self._calls:
            tokens = torch.zeros(count, self._seqlen, dtype=torch.int64, device=self._device)
            self._calls[count] = record(self._model, self._blocks, tokens)
        return self._calls[count]

    def embed(self, tokens: Tensor) -> Tensor:
        """Input of the first block, [b, L, d], for tokens int64 [b, L]."""

        def first(*args: object, **kwargs: object) -> Tensor:
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            assert isinstance(hidden, Tensor)
            raise Stop(hidden)

        try:
            with replaced(self._blocks[:1], [first]):
                forward(self._model, tokens.to(self._device))
        except Stop as stop:
            return stop.value
        raise AssertionError("the first block was never called")  # `record` has seen it called

    def put_embedding(self, weight: Tensor) -> None:
        """Replace the token embedding's table [vocab, width], rounded to the compute dtype; before `embed`."""
        self._model.get_input_embeddings().weight.data.copy_(weight)

    def forget_embedding(self) -> None:
        """Free the token embedding once every sequence is embedded; `run` and `finish` do without it."""
        module = self._model.get_input_embeddings()
        shape = module.weight.shape
        column = striped((shape[0], 1)).to(self._device, module.weight.dtype)
        module.weight = nn.Parameter(column.expand(shape), requires_grad=False)

    def block(self, index: int) -> nn.Module:
        """A fresh copy of a block with its weights, read now; it is the caller's to change and to drop."""
        block = copy.deepcopy(self._blocks[index])
        for path, module in block.named_modules():
            name = self._anatomy.blocks[index].name
            self._fill(module, f"{name}.{path}" if path else name)
        return block

    def run(self, index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """Output of a block for hidden states [b, L, d] on the device; L must be `seqlen`."""
        if hidden.shape[1] != self._seqlen:
            raise ValueError(f"expected sequences of {self._seqlen} tokens, got {hidden.shape[1]}")
        return self._calls_for(hidden.shape[0])[index].run(module, hidden)

    def finish(self, hidden: Tensor) -> Tensor:
        """Input of the output projection, [b, L, d'], for the output of the last block."""
        head = head_module(self._model)
        if head is None:
            raise PlanError(f"{self._anatomy.architecture}: has no output projection.")

        calls = self._calls_for(hidden.shape[0])

        def given(*_args: object, **_kwargs: object) -> object:
            return calls[0].output(hidden)

        def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise Stop(args[0])

        handle = head.register_forward_pre_hook(stop)
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self._device)
        try:
            with replaced(self._blocks, [given] * len(self._blocks)):
                forward(self._model, tokens)
        except Stop as seen:
            return seen.value
        finally:
            handle.remove()
        raise AssertionError("the output projection was never called")

    def submodule(self, index: int, module: nn.Module, view: WeightView) -> nn.Module:
        """The linear behind a view, in a module made by `block(index)`: to hook, or to look at."""
        return module.get_submodule(view.name.removeprefix(self._anatomy.blocks[index].name + "."))

    def put(self, index: int, module: nn.Module, view: WeightView, weight: Tensor) -> None:
        """Write a weight [n, k] into a module made by `block(index)`, rounded to the compute dtype."""
        param = module.get_parameter(view.param.removeprefix(self._anatomy.blocks[index].name + "."))
        target = param.data if view.index is None else param.data[view.index]
        target.copy_(weight.T if view.transposed else weight)

    def put_tensor(self, index: int, module: nn.Module, name: str, tensor: Tensor) -> None:
        """Write any other tensor of the model, by its full name, into a module made by `block(index)`."""
        own = module.state_dict()
        own[name.removeprefix(self._anatomy.blocks[index].name + ".")].copy_(tensor)


def skeleton(
    source: Source, anatomy: Anatomy, *, dtype: torch.dtype, device: str | torch.device = "cpu", seqlen: int
) -> Skeleton:
    """A `Skeleton` of a model; see there."""
    return Skeleton(source, anatomy, dtype=dtype, device=device, seqlen=seqlen)


def _same(a: object, b: object) -> bool:
    left, right = list(tensors_in(a)), list(tensors_in(b))
    return len(left) == len(right) and all(_equal(x, y) for x, y in zip(left, right, strict=True))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))
