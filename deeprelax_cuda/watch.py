"""Whether the tensors of a step are those of the step before, so that what was checked then still holds.

On many small tensors nearly all of a step is asking for facts one by one. The native `Watch` asks in one walk over the Python
objects, through the DLPack exchange API of torch's tensors; where either is missing `PythonWatch` asks the same questions.
"""

from __future__ import annotations

import bisect
import contextlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deeprelax_cuda import native

State = Mapping[Tensor, Mapping[str, Any]]

#: Bytes of a tensor up to which asking for facts costs more than taking its step.
SMALL = 4096


class Look(NamedTuple):
    """What a look saw, where nothing but the gradients has changed.

    ``grads`` has an entry for every parameter, None where there is no gradient. ``fit`` says that each gradient can be read as
    it is: of the type, device, shape and layout of its parameter, with its numbers in memory, clear of all that is written.
    (Of several elements in one piece they always are, unless ``torch._neg_view`` or ``as_strided`` forces a lazy negation.)
    ``addresses`` are then those of the gradients that there are, as the bytes of an ``array("Q")``.
    """

    grads: list[Tensor | None]
    fit: bool
    addresses: bytes


class Watch(Protocol):
    """Takes note of parameters and their state when it is made, and at each look compares them with that.

    Compared are every parameter object and its memory, whether it has a gradient, its type, device, shape and strides; the
    state's dicts and the tensors in them. Plain numbers in the state are not: they count. Of parameters up to `SMALL` bytes
    less is asked: with one dimension it will do that the gradient has the
    type and shape that were noted, and the state's memory is not compared unless it is the largest there is. It is kept alive
    instead, so that nothing else can come to lie there.
    """

    def look(self, groups: Sequence[list[Tensor]], state: State) -> Look | None:
        """Return what is to be seen, or None where anything but the gradients has changed."""


def make_watch(groups: Sequence[list[Tensor]], state: State, written: Sequence[Tensor]) -> Watch:
    """Return a watch over the parameters of each group and their ``state``; ``written`` are dense and do not overlap."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if native.module is not None and exchange is not None:
        with contextlib.suppress(ValueError, TypeError):  # a tensor that DLPack cannot describe, a state that is no dict
            return NativeWatch(exchange, groups, state, written)
    return PythonWatch(groups, state, written)


class NativeWatch:
    """The watch in C++; this half keeps alive what that one knows by address."""

    def __init__(self, exchange: object, groups: Sequence[list[Tensor]], state: State, written: Sequence[Tensor]) -> None:
        self._held = list(_objects(groups, state))
        self._held += [t.untyped_storage() for t in written if t.nbytes <= SMALL]
        self._native = native.module.Watch(exchange, _address_function(), SMALL, groups, state, written)

    def look(self, groups: Sequence[list[Tensor]], state: State) -> Look | None:
        """Return what is to be seen; see `Watch`."""
        seen = self._native.look(groups, state)
        return None if seen is None else Look(*seen)


def _address_function() -> int:
    """Return the function through which the code that torch generates reads the address of a tensor, 0 where torch has none.

    It is not public, so nothing depends on it but speed; each watch holds its answers against DLPack's.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    return int(getattr(guards, "_torchinductor_pyobject_tensor_data_ptr", 0))


class PythonWatch:
    """The watch in Python."""

    def __init__(self, groups: Sequence[list[Tensor]], state: State, written: Sequence[Tensor]) -> None:
        self._held = list(_objects(groups, state))
        self._facts = self._read(groups, state)
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in written if t.nbytes)
        self._starts, self._ends = ([span[i] for span in spans] for i in range(2))

    def look(self, groups: Sequence[list[Tensor]], state: State) -> Look | None:
        """Return what is to be seen; see `Watch`."""
        held = list(_objects(groups, state))
        if len(held) != len(self._held) or not all(map(is_, held, self._held)) or self._facts != self._read(groups, state):
            return None
        params = list(chain.from_iterable(groups))
        grads = [p.grad for p in params]
        fit = all(g is None or self._can_be_read(g, p) for g, p in zip(grads, params, strict=True))
        addresses = [g.data_ptr() for g in grads if g is not None] if fit else []
        return Look(grads, fit, array("Q", addresses).tobytes())

    def _read(self, groups: Sequence[list[Tensor]], state: State) -> list[Any]:
        own = (value for values in state.values() if isinstance(values, dict) for value in values.values())
        return [
            [len(group) for group in groups],
            [(*_facts(p), p.grad is None) for p in chain.from_iterable(groups)],
            [_address(t) for t in own if isinstance(t, Tensor)],
        ]

    def _can_be_read(self, g: Tensor, p: Tensor) -> bool:
        if g.layout is not torch.strided or g.dtype != p.dtype or g.device != p.device or g.shape != p.shape:
            return False
        if g.numel() == 0:
            return True
        laid_out = all(size == 1 or a == b for size, a, b in zip(p.shape, g.stride(), p.stride(), strict=True))
        start = g.data_ptr()
        behind = bisect.bisect_right(self._ends, start)
        clear = behind == len(self._ends) or start + g.nbytes <= self._starts[behind]
        return laid_out and start != 0 and not g.is_neg() and clear


def _facts(t: Tensor) -> tuple[Any, ...]:
    try:
        return t.data_ptr(), t.dtype, t.device, t.shape, t.stride()
    except (RuntimeError, ValueError, NotImplementedError):  # a sparse or an uninitialized one, say, which nobody trains
        return ()


def _address(t: Tensor) -> int:
    return next(iter(_facts(t)), 0)


def _objects(groups: Sequence[list[Tensor]], state: State) -> Iterator[object]:
    """Yield every object that has to be the same at the next look, in the same order."""
    yield from chain.from_iterable(groups)
    for p, own in state.items():
        yield p
        yield own
        for name, value in own.items() if isinstance(own, dict) else ():  # else it is something of the user's
            yield name
            if not isinstance(value, int):
                yield value
