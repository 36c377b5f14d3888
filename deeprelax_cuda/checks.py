"""The checks of a call's tensors, made once, before anything is written: the backends check nothing.

Every error names the tensor, as in ``params[3] (shape (3, 5), stride (1, 3), torch.int64): expected a floating dtype, got
torch.int64``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from operator import attrgetter, gt
from typing import NamedTuple

import torch
from torch import Tensor

from deeprelax_cuda.noise import STREAMS_PER_DOMAIN, as_place, check_range
from deeprelax_cuda.steps import NARROW, STORED, Tensors, compute_type

#: The roles of `Tensors` that hold tensors, with whether an inner step and an outer step write them.
_WRITTEN_BY = {
    "params": (True, True),
    "anchors": (False, True),
    "averages": (True, True),
    "momenta": (True, True),
    "masters": (True, True),
    "outer_momenta": (False, True),
    "consensus": (False, False),
}


def check_tensors(tensors: Tensors, *, outer: bool) -> None:
    """Check the lists of a call, whatever its gradients and its scalars.

    The parameters have one floating type, lie on one device and are dense, in any order of dimensions (channels_last and
    permuted ones too). The other lists are empty, or hold for each parameter a tensor of its compute type, its shape and its
    layout. No written tensor overlaps another tensor of the call; tensors may share a storage without overlapping.

    Args:
        tensors: the lists of the call.
        outer: whether the call takes the outer step, which writes the anchors too.

    Raises:
        TypeError: a tensor of the wrong type.
        ValueError: anything else; the message begins with the name of the tensor or the list.
    """
    params = tensors.params
    state = {role: items for role in _WRITTEN_BY if role != "params" and (items := getattr(tensors, role))}
    for role, items in {**state, "streams": tensors.numbers, "places": tensors.places}.items():
        _check_length(role, items, params)
    if not params:
        return

    dtype, device = params[0].dtype, params[0].device
    for i, p in enumerate(params):
        if p.dtype not in STORED:
            expected = f"one of {', '.join(map(str, STORED))}" if p.dtype.is_floating_point else "a floating dtype"
            raise TypeError(f"{_describe('params', i, p)}: expected {expected}, got {p.dtype}")
        _check_kind("params", i, p, dtype, device)
        if not (p.is_contiguous() or _is_dense(p)):
            raise ValueError(f"{_describe('params', i, p)}: expected a dense tensor, without gaps or overlaps in memory")
    if tensors.masters and dtype not in NARROW:
        raise ValueError(f"masters: expected none, since {dtype} parameters are their own masters")
    for role, items in state.items():
        for i in _find_unlike(items, params, compute_type(dtype)):
            _check_kind(role, i, items[i], compute_type(dtype), device)
            _check_shape(role, i, items[i], params[i])
            if not _is_laid_out_like(items[i], params[i]):
                raise ValueError(
                    f"{_describe(role, i, items[i])}: expected the layout of its parameter, stride {params[i].stride()}"
                )

    for i, (number, place, p) in enumerate(zip(tensors.numbers, tensors.places, params, strict=True)):
        if not 0 <= number < STREAMS_PER_DOMAIN:
            check_range(f"streams[{i}]", number, STREAMS_PER_DOMAIN)
        whole = max(p.numel(), 1)
        if place != (0, whole, whole):
            as_place(f"places[{i}]", place, p.numel())
    written = _written(tensors, outer)
    _check_disjoint(written, {role: items for role, items in state.items() if role not in written})


def check_grads(tensors: Tensors, grads: Sequence[Tensor], *, outer: bool = True) -> list[Tensor]:
    """Check the gradients of a call against its tensors, which have been checked, and return them laid out like the parameters.

    A gradient of its parameter's type, device and shape but of another layout (a transposed or an expanded one) is copied into
    the parameter's layout. ``outer`` says whether the call writes the anchors and the outer momenta too.

    Raises:
        TypeError: a gradient of the wrong type.
        ValueError: anything else; the message begins with the name of the gradient or of the list.
    """
    params, grads = tensors.params, list(grads)
    _check_length("grads", grads, params)
    if not params:
        return grads
    dtype, device = params[0].dtype, params[0].device
    for i in _find_unlike(grads, params, dtype):
        g, p = grads[i], params[i]
        _check_kind("grads", i, g, dtype, device)
        _check_shape("grads", i, g, p)
        if not _is_laid_out_like(g, p):
            grads[i] = torch.empty_strided(p.shape, p.stride(), dtype=dtype, device=device).copy_(g.detach())
    _check_disjoint(_written(tensors, outer), {"grads": grads})
    return grads


def check_scale(name: str, scale: Tensor | None, tensors: Tensors, *, outer: bool) -> None:
    """Check ``inv_scale`` or ``found_inf``: None, or one float32 number on the parameters' device that is not written."""
    if scale is None or not tensors.params:
        return
    _check_kind(name, None, scale, torch.float32, tensors.params[0].device)
    if scale.numel() != 1:
        raise ValueError(f"{_describe(name, None, scale)}: expected one element, got {scale.numel()}")
    start, end = scale.data_ptr(), scale.data_ptr() + scale.nbytes
    for role, items in _written(tensors, outer).items():
        for i, t in enumerate(items):
            if start < t.data_ptr() + t.nbytes and t.data_ptr() < end:
                raise ValueError(
                    f"{_describe(name, None, scale)}: shares memory with {_describe(role, i, t)}, which is written"
                )


def check_device(role: str, index: int | None, t: Tensor, device: torch.device) -> None:
    """Refuse a tensor that does not lie on ``device``."""
    if t.device != device:
        raise ValueError(f"{_describe(role, index, t)}: expected a tensor on {device}, got one on {t.device}")


def _written(tensors: Tensors, outer: bool) -> dict[str, list[Tensor]]:
    """Return, by role, the lists that a call writes."""
    return {role: getattr(tensors, role) for role, by in _WRITTEN_BY.items() if by[outer]}


def _describe(role: str, index: int | None, t: Tensor) -> str:
    name = role if index is None else f"{role}[{index}]"
    layout = f"stride {t.stride()}" if t.layout is torch.strided else f"layout {t.layout}"
    return f"{name} (shape {tuple(t.shape)}, {layout}, {t.dtype})"


def _check_length(role: str, items: Sequence[object], params: Sequence[Tensor]) -> None:
    if len(items) != len(params):
        raise ValueError(f"{role}: expected {len(params)} of them, one a parameter, got {len(items)}")


def _find_unlike(items: Sequence[Tensor], params: Sequence[Tensor], dtype: torch.dtype) -> list[int]:
    """Return the numbers of the items that are not plainly like their parameter but for being of type ``dtype``.

    One pass in place of several calls an item: this is the host's time of every step.
    """
    device = params[0].device
    return [
        i
        for i, (t, p) in enumerate(zip(items, params, strict=True))
        if t.dtype is not dtype
        or t.layout is not torch.strided
        or t.shape != p.shape
        or t.stride() != p.stride()
        or t.device != device
    ]


def _check_kind(role: str, index: int | None, t: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if t.layout is not torch.strided:
        raise ValueError(f"{_describe(role, index, t)}: expected a strided tensor, got {t.layout}")
    if t.dtype is not dtype:
        raise TypeError(f"{_describe(role, index, t)}: expected {dtype}, got {t.dtype}")
    check_device(role, index, t, device)


def _check_shape(role: str, index: int, t: Tensor, p: Tensor) -> None:
    if t.shape != p.shape:
        raise ValueError(f"{_describe(role, index, t)}: expected the shape of its parameter, {tuple(p.shape)}")


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill a range of memory, each once, in some order of the dimensions."""
    numel = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1):
        if stride != numel:
            return False
        numel *= size
    return True


def _is_laid_out_like(t: Tensor, p: Tensor) -> bool:
    """Whether ``t``, of the shape of ``p``, has its elements in the same order in memory; a size of 1 has no stride."""
    return p.numel() == 0 or all(size == 1 or a == b for size, a, b in zip(p.shape, t.stride(), p.stride(), strict=True))


def _check_disjoint(written: Mapping[str, Iterable[Tensor]], read: Mapping[str, Iterable[Tensor]]) -> None:
    """Refuse a written tensor that shares memory with another tensor; every tensor is dense."""
    starts, ends = [], []
    for items in (*written.values(), *read.values()):
        for t in items:
            if nbytes := t.nbytes:
                starts.append(start := t.data_ptr())
                ends.append(start + nbytes)
    # Ranges are disjoint just when, each sorted by itself, every end lies at or before the next start. So no pairs of
    # numbers need sorting as long as all is well.
    starts.sort()
    ends.sort()
    if any(map(gt, ends, islice(starts, 1, None))):
        _name_overlap(written, read)


class _Range(NamedTuple):
    start: int
    end: int
    written: bool
    name: str


def _name_overlap(written: Mapping[str, Iterable[Tensor]], read: Mapping[str, Iterable[Tensor]]) -> None:
    """Raise an error that names two tensors that overlap, one of them written; two that are only read may overlap."""
    ranges = [
        _Range(start := t.data_ptr(), start + t.nbytes, is_written, _describe(role, i, t))
        for roles, is_written in ((written, True), (read, False))
        for role, items in roles.items()
        for i, t in enumerate(items)
        if t.nbytes
    ]
    furthest = furthest_written = _Range(0, 0, False, "")
    for this in sorted(ranges, key=attrgetter("start")):
        other = furthest if this.written else furthest_written
        if this.start < other.end:
            raise ValueError(f"{this.name}: shares memory with {other.name}, and this call writes one of them")
        furthest = max(furthest, this, key=attrgetter("end"))
        if this.written:
            furthest_written = max(furthest_written, this, key=attrgetter("end"))
