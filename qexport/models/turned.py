"""A model whose hidden states between the layers are rotated: the same function, other weights."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qexport.models.mapping import Plain
from qexport.models.parts import WeightView
from qexport.models.source import PIECE, Source
from qexport.models.stream import Stream, turn


@dataclass
class Turned(Source):
    """A source that rotates tensors as they are read; see `stream`. Tied tensors are two here.

    Weights to quantize come in float32, tensors that stay dense are rounded to their stored dtype.

    Attributes:
        stream: which tensors those are.
        signs: float32 [d], of 1 and -1; they decide the rotation.
    """

    stream: Stream
    signs: Tensor

    @classmethod
    def of(cls, source: Source, stream: Stream, rng: torch.Generator) -> "Turned":
        """A source with a random rotation of its hidden states."""
        d = source.config.get_text_config().hidden_size
        signs = torch.randint(0, 2, (d,), generator=rng).float() * 2 - 1
        return cls(source.folder, source.name, source.commit, source.config, source.stored, stream, signs)

    def view(self, view: WeightView) -> Tensor:
        """A weight as float32 [n, k], contiguous and never shared with another."""
        return self._turned(view.name, super().view(view)).contiguous()

    def read(self, param: str) -> Tensor:
        """A tensor in its stored dtype, on the CPU."""
        return torch.cat(list(self._pieces(param))) if self._changes(param) else super().read(param)

    def read_as(self, param: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
        """A tensor in another dtype, on a device."""
        if not self._changes(param):
            return super().read_as(param, dtype, device)
        return torch.cat([piece.to(device, dtype) for piece in self._pieces(param)])

    def chunks(self, param: str, size: int = 1 << 24) -> Iterator[bytes]:
        """The bytes of a tensor, `size` at a time or less."""
        if not self._changes(param):
            yield from super().chunks(param, size)
            return
        for piece in self._pieces(param):
            data = piece.contiguous().flatten().view(torch.uint8)
            for start in range(0, data.numel(), size):
                yield data[start : start + size].numpy().tobytes()

    def _changes(self, param: str) -> bool:
        stream, module = self.stream, param.removesuffix(".weight")
        return param in stream.norms or param in stream.vectors or module in stream.readers or module in stream.writers

    def _pieces(self, param: str) -> Iterator[Tensor]:
        """A changed tensor in its stored dtype; of a large table a few rows at a time."""
        module, origin = param.removesuffix(".weight"), self._origin(param)
        if param in self.stream.norms:
            yield torch.full(origin.shape, 1 - self.stream.norms[param], dtype=origin.dtype)
        elif module in self.stream.writers or not isinstance(origin, Plain):
            yield self._turned(module, super().read(param)).to(origin.dtype)
        else:
            rows = max(PIECE * origin.shape[0] // torch.Size(origin.shape).numel(), 1)
            for start in range(0, origin.shape[0], rows):
                part = self.stored.read_rows(origin.key, start, min(start + rows, origin.shape[0]))
                yield self._turned(module, part).to(origin.dtype)

    def _turned(self, module: str, w: Tensor) -> Tensor:
        """Weight or bias of a module after the rotation, float32 unless nothing happens to it."""
        if module in self.stream.writers:
            return turn(w.T, self.signs).T
        if module in self.stream.readers:
            norm = self.stream.readers[module]
            return turn(w * (super().read(norm.weight).to(torch.float32) + norm.unit), self.signs)
        known = module in self.stream.vectors or f"{module}.weight" in self.stream.vectors
        return turn(w, self.signs) if known else w
