"""The tensors of a replica as one buffer of bytes, which is cut into slices, and the mean of such buffers.

The mean of n replicas is ``(((t_0 + t_1) + t_2) + ...) * (1/n)``, each operation one rounding in the tensors' type, to which
1/n is rounded once: the same bits whoever adds, and wherever the slices are cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from deeprelax_cuda.steps import round_scalar

#: Slices begin at multiples of the widest type.
ALIGNMENT = 8


def digest_of(text: str) -> int:
    """Return a number of 56 bits that tells texts apart."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


class Layout:
    """Where tensors of float64 and of float32 lie in a buffer: those of float64 before the others, each in its order.

    The buffer is as long as ``slices`` equal slices; ``used`` bytes of it are the tensors', and what is left over at its end
    means nothing. ``digest`` tells lists of shapes and types apart.
    """

    def __init__(self, tensors: Sequence[Tensor], slices: int) -> None:
        self._kinds = [(t.shape, t.dtype) for t in tensors]
        order = sorted(range(len(tensors)), key=lambda i: tensors[i].dtype != torch.float64)
        ends = list(accumulate(tensors[i].numel() * tensors[i].element_size() for i in order))
        self._spans = {i: slice(begin, end) for i, begin, end in zip(order, [0, *ends], ends, strict=False)}
        self._wide = sum(t.numel() * 8 for t in tensors if t.dtype == torch.float64)  # bytes of the float64 part
        self.used = ends[-1] if ends else 0
        self.slice_bytes = max(1, -(-self.used // (slices * ALIGNMENT))) * ALIGNMENT
        self.bytes = slices * self.slice_bytes
        self.digest = digest_of(repr([(tuple(shape), str(dtype)) for shape, dtype in self._kinds]))

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether this is the layout of these tensors."""
        return self._kinds == [(t.shape, t.dtype) for t in tensors]

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return the tensors in a buffer."""
        return [buffer[self._spans[i]].view(dtype).view(shape) for i, (shape, dtype) in enumerate(self._kinds)]

    def parts(self, piece: Tensor, begin: int = 0) -> list[Tensor]:
        """Return the numbers in a piece of a buffer that begins at byte ``begin``: those of float64, those of float32."""
        wide = min(max(self._wide - begin, 0), len(piece))
        return [piece[:wide].view(torch.float64), piece[wide:].view(torch.float32)]


class Buffer:
    """The tensors of a replica, copied into one buffer."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.bytes = torch.zeros(layout.bytes, dtype=torch.uint8, device=device)
        self.tensors = layout.views(self.bytes)
        self.parts = layout.parts(self.bytes[: layout.used])

    def fill(self, tensors: list[Tensor]) -> bool:
        """Copy the tensors into it; return whether all numbers are finite, for which a device is waited for."""
        torch._foreach_copy_(self.tensors, tensors)
        return is_finite(self.parts)


def is_finite(parts: Sequence[Tensor]) -> bool:
    """Return whether all numbers are finite."""
    return all(bool(torch.isfinite(torch.stack(part.aminmax())).all()) for part in parts if part.numel())


def add_(total: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Add the numbers of one more replica."""
    for t, part in zip(total, parts, strict=True):
        t.add_(part)


def divide_(total: Sequence[Tensor], count: int) -> None:
    """Turn the sum over ``count`` replicas into their mean."""
    for t in total:
        t.mul_(round_scalar("1/replicas", 1.0 / count, t.dtype))
