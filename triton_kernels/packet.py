"""How a block reads and writes its elements; csrc/cuda/packet.h.

A block is worked on in groups: of each packet (table.py) as many elements as 16 bytes hold in the compute type, (packets,
width). Where it is wide, memory is read and written by 16 bytes, so that narrow types go by two groups.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Kind(NamedTuple):
    """How a block is worked on, settled when a kernel is compiled; like `Terms`, it is made where it is passed on.

    ``stored`` is the type of y and g, uint16 for bfloat16. ``block`` elements are worked on, in packets of ``packet``, and in
    groups of ``width``. ``wide``: all of them are there, and aligned. ``pitched``: their noise is not that of whole counters in
    a row.
    """

    stored: tl.constexpr
    stochastic: tl.constexpr
    has_master: tl.constexpr
    block: tl.constexpr
    packet: tl.constexpr
    width: tl.constexpr
    wide: tl.constexpr
    pitched: tl.constexpr


class Span(NamedTuple):
    """The elements that a block works on: those of a row of the table from j0 on, as far as there are any."""

    row: tl.tensor  # pointer to the row
    j0: tl.tensor
    numel: tl.tensor


# Indices have 64 bits. With 32 Triton would take AMD's buffer instructions, whose base must be the same in all lanes of a wave.
# LLVM cannot see that of one from the table, so each access would become a loop over the lanes.


@triton.jit
def group_index(kind, group: tl.constexpr):
    packets = tl.arange(0, kind.block // kind.packet) * kind.packet
    return ((packets + kind.width * group)[:, None] + tl.arange(0, kind.width)[None, :]).to(tl.int64)


@triton.jit
def packet_index(kind):
    packets = tl.arange(0, kind.block // kind.packet) * kind.packet
    return (packets[:, None] + tl.arange(0, kind.packet)[None, :]).to(tl.int64)


@triton.jit
def in_two(packets):
    """Cut (n, 8) into two groups, (n, 4) each."""
    return tl.split(tl.permute(tl.reshape(packets, (packets.shape[0], 2, 4)), (0, 2, 1)))


@triton.jit
def in_one(low, high):
    """Undo `in_two`."""
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (low.shape[0], 8))


@triton.jit
def inside(span, index):
    j = span.j0 + index
    return (j >= 0) & (j < span.numel)


@triton.jit
def pointer(kind, span, address, dtype: tl.constexpr):
    """Return the pointer to the first element of the block."""
    at = (address + span.j0 * (dtype.primitive_bitwidth // 8)).to(tl.pointer_type(dtype))
    if kind.wide:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def read(kind, span, address, dtype: tl.constexpr):
    """Return the groups of a role."""
    at = pointer(kind, span, address, dtype)
    if kind.wide and dtype.primitive_bitwidth == 16:
        groups = in_two(tl.load(at + packet_index(kind)))
    else:
        groups = ()
        for group in tl.static_range(kind.packet // kind.width):
            index = group_index(kind, group)
            if kind.wide:
                groups = groups + (tl.load(at + index),)
            else:
                groups = groups + (tl.load(at + index, inside(span, index)),)
    return groups


@triton.jit
def write(kind, span, address, dtype: tl.constexpr, groups):
    at = pointer(kind, span, address, dtype)
    if kind.wide and dtype.primitive_bitwidth == 16:
        tl.store(at + packet_index(kind), in_one(groups[0], groups[1]))
    else:
        for group in tl.static_range(kind.packet // kind.width):
            index = group_index(kind, group)
            if kind.wide:
                tl.store(at + index, groups[group])
            else:
                tl.store(at + index, groups[group], inside(span, index))
