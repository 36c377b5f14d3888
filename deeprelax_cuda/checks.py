"""The checks of a call's tensors, made once, before anything is written: the backends check nothing.

Every error names the tensor, as in ``params[3] (shape (3, 5), stride (1, 3), torch.int64): expected a floating dtype, got
torch.int64``; `Tensors.name` says how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from operator import attrgetter, gt
from typing import NamedTuple

import torch
from torch import Tensor

from deeprelax_cuda.noise import STREAMS_PER_DOMAIN, as_place, check_range
from deeprelax_cuda.steps import NARROW, ROLES, STORED, Tensors, compute_type, may_write


def check_tensors(tensors: Tensors, *, outer: bool, disjoint: bool = True) -> None:
    """Check the lists of a call, whatever its gradients and its scalars.

    The parameters have one floating type, lie on one device and are dense, in any order of dimensions (channels_last and
    permuted ones too). The other lists are empty, or hold for each parameter a tensor of its compute type, its shape and its
    layout. No written tensor overlaps another tensor of the call; tensors may share a storage without overlapping.

    Args:
        tensors: the lists of the call.
        outer: whether the call takes the outer step, which writes the anchors too.
        disjoint: whether to check for overlaps; who leaves it out does `check_disjoint` later.

    Raises:
        TypeError: a tensor of the wrong type.
        ValueError: anything else; the message begins with the name of the tensor or the list.
    """
    params = tensors.params
    state = {role: items for role in ROLES[1:] if (items := getattr(tensors, role))}
    for role, items in {**state, "streams": tensors.numbers, "places": tensors.places}.items():
        _check_length(tensors, role, items)
    if not params:
        return

    dtype, device = params[0].dtype, params[0].device
    for i in (0, *_suspects(params, params, dtype)):
        name, p = tensors.name("params", i), params[i]
        if p.dtype not in STORED:
            expected = f"one of {', '.join(map(str, STORED))}" if p.dtype.is_floating_point else "a floating dtype"
            raise TypeError(f"{_describe(name, p)}: expected {expected}, got {p.dtype}")
        _check_kind(name, p, dtype, device)
        _check_written_out(name, p)
    for i, p in enumerate(params):
        if not (p.is_contiguous() or _is_dense(p)):
            name = tensors.name("params", i)
            raise ValueError(f"{_describe(name, p)}: expected a dense tensor, without gaps or overlaps in memory")
    if tensors.masters and dtype not in NARROW:
        raise ValueError(f"{tensors.name('masters')}: expected none, since {dtype} parameters are their own masters")
    for role, items in state.items():
        for i in _suspects(items, params, compute_type(dtype)):
            name, t, p = tensors.name(role, i), items[i], params[i]
            _check_kind(name, t, compute_type(dtype), device)
            _check_shape(name, t, p)
            _check_written_out(name, t)
            if not _is_laid_out_like(t, p):
                raise ValueError(f"{_describe(name, t)}: expected the layout of its parameter, stride {p.stride()}")

    for i, (number, place, p) in enumerate(zip(tensors.numbers, tensors.places, params, strict=True)):
        if not 0 <= number < STREAMS_PER_DOMAIN:
            check_range(tensors.name("streams", i), number, STREAMS_PER_DOMAIN)
        whole = max(p.numel(), 1)
        if place != (0, whole, whole):
            as_place(tensors.name("places", i), place, p.numel())
    if disjoint:
        written = _written(tensors, outer)
        check_disjoint(written, {role: items for role, items in state.items() if role not in written}, tensors.name)


def check_grads(tensors: Tensors, grads: Sequence[Tensor], *, outer: bool = True, disjoint: bool = True) -> list[Tensor]:
    """Check the gradients of a call against its tensors, which have been checked, and return them laid out like the parameters.

    A gradient of its parameter's type, device and shape but of another layout (a transposed or an expanded one), or one whose
    numbers are not written out in memory (a lazy negation), is copied into the parameter's layout. ``outer`` says whether the
    call writes the anchors and the outer momenta too, ``disjoint`` whether to check for overlaps.

    Raises:
        TypeError: a gradient of the wrong type.
        ValueError: anything else; the message begins with the name of the gradient or of the list.
    """
    params, grads = tensors.params, list(grads)
    _check_length(tensors, "grads", grads)
    if not params:
        return grads
    dtype, device = params[0].dtype, params[0].device
    for i in _suspects(grads, params, dtype):
        name, g, p = tensors.name("grads", i), grads[i], params[i]
        _check_kind(name, g, dtype, device)
        _check_shape(name, g, p)
        if not (_is_laid_out_like(g, p) and _is_written_out(g)):
            grads[i] = torch.empty_strided(p.shape, p.stride(), dtype=dtype, device=device).copy_(g.detach())
    if disjoint:
        check_disjoint(_written(tensors, outer), {"grads": grads}, tensors.name)
    return grads


def check_scale(name: str, scale: Tensor | None, tensors: Tensors, *, outer: bool) -> None:
    """Check ``inv_scale`` or ``found_inf``: None, or one number on the parameters' device that is not written.

    The one is of the compute type, since gradients are multiplied by it, the other a float32.
    """
    if scale is None or not tensors.params:
        return
    dtype = compute_type(tensors.params[0].dtype) if name == "inv_scale" else torch.float32
    _check_kind(name, scale, dtype, tensors.params[0].device)
    _check_written_out(name, scale)
    if scale.numel() != 1:
        raise ValueError(f"{_describe(name, scale)}: expected one element, got {scale.numel()}")
    start, end = scale.data_ptr(), scale.data_ptr() + scale.nbytes
    for role, items in _written(tensors, outer).items():
        for i, t in enumerate(items):
            if start < t.data_ptr() + t.nbytes and t.data_ptr() < end:
                other = _describe(tensors.name(role, i), t)
                raise ValueError(f"{_describe(name, scale)}: shares memory with {other}, which is written")


def check_device(name: str, t: Tensor, device: torch.device) -> None:
    """Refuse a tensor that does not lie on ``device``."""
    if t.device != device:
        raise ValueError(f"{_describe(name, t)}: expected a tensor on {device}, got one on {t.device}")


def check_disjoint(
    written: Mapping[str, Iterable[Tensor]],
    read: Mapping[str, Iterable[Tensor]],
    name: Callable[[str, int], str] = "{}[{}]".format,
) -> None:
    """Refuse a written tensor that shares memory with another tensor; every tensor is dense.

    ``name`` gives the name of a tensor from its key in the mapping and its position there.

    Raises:
        ValueError: two tensors that overlap, one of them written; the message begins with the name of one.
    """
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
        _name_overlap(written, read, name)


def _written(tensors: Tensors, outer: bool) -> dict[str, list[Tensor]]:
    """Return, by role, the lists that a call may write."""
    written = may_write(outer=outer)
    return {role: getattr(tensors, role) for role in ROLES if role in written}


def _describe(name: str, t: Tensor) -> str:
    layout = f"stride {t.stride()}" if t.layout is torch.strided else f"layout {t.layout}"
    return f"{name} (shape {tuple(t.shape)}, {layout}, {t.dtype})"


def _check_length(tensors: Tensors, role: str, items: Sequence[object]) -> None:
    if len(items) != len(tensors.params):
        raise ValueError(f"{tensors.name(role)}: expected {len(tensors.params)} of them, one a parameter, got {len(items)}")


def _suspects(items: Sequence[Tensor], params: Sequence[Tensor], dtype: torch.dtype) -> list[int]:
    """Return the numbers of the items that are worth the checks below: only a filter, strict enough to let nothing unfit pass.

    It asks for the very strides of the parameter where `_is_laid_out_like` knows better. One pass in place of several calls an
    item: this is the host's time of every step.
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
        or t.is_neg()
        or not t.data_ptr()
    ]


def _check_kind(name: str, t: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if t.layout is not torch.strided:
        raise ValueError(f"{_describe(name, t)}: expected a strided tensor, got {t.layout}")
    if t.dtype is not dtype:
        raise TypeError(f"{_describe(name, t)}: expected {dtype}, got {t.dtype}")
    check_device(name, t, device)


def _check_shape(name: str, t: Tensor, p: Tensor) -> None:
    if t.shape != p.shape:
        raise ValueError(f"{_describe(name, t)}: expected the shape of its parameter, {tuple(p.shape)}")


def _is_written_out(t: Tensor) -> bool:
    """Whether the numbers of ``t`` are those in its memory.

    Torch keeps a negation and zeros without memory as flags; a tensor that wraps others, such as the result of a functional
    collective that may not have arrived yet, has no memory of its own.
    """
    return not t.is_neg() and (t.numel() == 0 or t.data_ptr() != 0)


def _check_written_out(name: str, t: Tensor) -> None:
    if not _is_written_out(t):
        lazy = "a lazy negation, zeros without memory or a wrapper of other tensors"
        raise ValueError(f"{_describe(name, t)}: expected the numbers in memory of its own, got {lazy}")


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


class _Range(NamedTuple):
    start: int
    end: int
    written: bool
    name: str


def _name_overlap(
    written: Mapping[str, Iterable[Tensor]], read: Mapping[str, Iterable[Tensor]], name: Callable[[str, int], str]
) -> None:
    """Raise an error that names two tensors that overlap, one of them written; two that are only read may overlap."""
    ranges = [
        _Range(start := t.data_ptr(), start + t.nbytes, is_written, _describe(name(role, i), t))
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
