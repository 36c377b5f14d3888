"""What a block does, in every step kernel; csrc/cuda/step.h.

What a call does and does not do is settled when its kernel is compiled: each way of calling has a kernel of its own, without
branches for what is switched off. What differs from tensor to tensor lies in a table on the device.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .gaussian import box_muller, in_order, normals
from .packet import Kind, Span, group_index, read, write
from .philox import DOMAIN_ROUNDING, philox4x32
from .rounding import narrow, widen
from .table import COLUMNS, ROW
from .update import gradient_average_step, langevin_step, outer_step

Y = tl.constexpr(COLUMNS.index("y"))
X = tl.constexpr(COLUMNS.index("x"))
M = tl.constexpr(COLUMNS.index("m"))
V = tl.constexpr(COLUMNS.index("v"))
W = tl.constexpr(COLUMNS.index("w"))
C = tl.constexpr(COLUMNS.index("c"))
MASTER = tl.constexpr(COLUMNS.index("master"))
ALIGNED = tl.constexpr(COLUMNS.index("aligned"))
NUMEL = tl.constexpr(COLUMNS.index("numel"))
START = tl.constexpr(COLUMNS.index("start"))
FIRST_BLOCK = tl.constexpr(COLUMNS.index("first_block"))
NUMBER = tl.constexpr(COLUMNS.index("number"))
OFFSET = tl.constexpr(COLUMNS.index("offset"))
RUN = tl.constexpr(COLUMNS.index("run"))
PITCH = tl.constexpr(COLUMNS.index("pitch"))
LENGTH = tl.constexpr(ROW)


# ---- The noise of a group ----------------------------------------------------------------------------------------------------


@triton.jit
def global_index(span, index):
    j = tl.maximum(span.j0 + index, 0)  # a packet may begin before the tensor
    run = tl.load(span.row + RUN)
    return tl.load(span.row + OFFSET) + j // run * tl.load(span.row + PITCH) + j % run


@triton.jit
def counters(kind, span, group: tl.constexpr):
    """Return the counters that a group draws on, where packets are of whole ones, (packets,)."""
    packets = tl.arange(0, kind.block // kind.packet)
    return ((tl.load(span.row + OFFSET) + span.j0) >> 2) + (packets * (kind.packet // 4) + group * kind.width // 4)


@triton.jit
def normal(kind, span, seed, step, group: tl.constexpr):
    """Return the normals of a group, float32."""
    number = tl.load(span.row + NUMBER)
    if kind.pitched:  # a counter for each element, of which it takes one lane
        i = global_index(span, group_index(kind, group))
        w0, w1, w2, w3 = philox4x32(seed, i >> 2, step, number)
        high, odd = (i & 2) != 0, (i & 1) != 0
        z0, z1 = box_muller(tl.where(high, w2, w0), tl.where(high, w3, w1))
        return tl.where(odd, z1, z0)
    else:
        w0, w1, w2, w3 = philox4x32(seed, counters(kind, span, group), step, number)
        if kind.width == 4:
            return normals(w0, w1, w2, w3)
        elif group % 2 == 0:
            z0, z1 = box_muller(w0, w1)
            return tl.join(z0, z1)
        else:
            z2, z3 = box_muller(w2, w3)
            return tl.join(z2, z3)


@triton.jit
def random(kind, span, seed, step, group: tl.constexpr):
    """Return the words of a group's stochastic rounding, uint32."""
    stream = tl.load(span.row + NUMBER) | DOMAIN_ROUNDING
    if kind.pitched:
        i = global_index(span, group_index(kind, group))
        w0, w1, w2, w3 = philox4x32(seed, i >> 2, step, stream)
        high, odd = (i & 2) != 0, (i & 1) != 0
        return tl.where(high, tl.where(odd, w3, w2), tl.where(odd, w1, w0))
    else:
        w0, w1, w2, w3 = philox4x32(seed, counters(kind, span, group), step, stream)
        return in_order(w0, w1, w2, w3)


# ---- One block ---------------------------------------------------------------------------------------------------------------


class Addresses(NamedTuple):
    """Where the tensors of a row are. They are read from the table once, and before anything is written.

    After a store the compiler has to read the table again, as it may have changed. Those that play no part it leaves out.
    """

    y: tl.tensor
    g: tl.tensor
    x: tl.tensor
    m: tl.tensor
    v: tl.tensor
    w: tl.tensor
    c: tl.tensor
    master: tl.tensor


@triton.jit
def take_block(terms, h, kind, span, at, seed, step):
    """Read, take the step, write. The loads come first: memory works while the noise is computed."""
    compute: tl.constexpr = tl.float64 if kind.stored == tl.float64 else tl.float32
    rounded_to: tl.constexpr = compute if kind.has_master else kind.stored
    # Which roles the call reads and writes; y is always written.
    reads_y: tl.constexpr = terms.inner and (terms.langevin or h.wd is not None)
    reads_x: tl.constexpr = terms.outer or (terms.inner and (not terms.langevin or h.k is not None))
    remembers: tl.constexpr = h.a is not None and not terms.forgets
    drifts: tl.constexpr = not terms.langevin and h.a is None and h.c is not None
    reads_m: tl.constexpr = terms.outer or (terms.inner and (remembers or drifts))
    writes_m: tl.constexpr = (terms.inner and h.a is not None) or (terms.outer and terms.langevin)
    has_v: tl.constexpr = terms.inner and terms.langevin and h.mu is not None
    has_w: tl.constexpr = terms.outer and h.mu_o is not None
    reads_c: tl.constexpr = terms.outer and h.kr is not None
    noisy: tl.constexpr = h.s is not None and (terms.inner or not terms.langevin)

    if reads_y and kind.has_master:
        ys = read(kind, span, at.master, compute)
    elif reads_y:
        ys = read(kind, span, at.y, kind.stored)
    if terms.inner:
        gs = read(kind, span, at.g, kind.stored)
    if reads_x:
        xs = read(kind, span, at.x, compute)
    if reads_m:
        ms = read(kind, span, at.m, compute)
    if has_v:
        vs = read(kind, span, at.v, compute)
    if has_w:
        ws = read(kind, span, at.w, compute)
    if reads_c:
        cs = read(kind, span, at.c, compute)

    absent = tl.full((), 0.0, tl.float32)  # in the place of what plays no part
    stored_ys, new_masters, new_xs, new_ms, new_vs, new_ws = (), (), (), (), (), ()
    for group in tl.static_range(kind.packet // kind.width):
        y, g, x, m, v, w, c, z, bits = absent, absent, absent, absent, absent, absent, absent, absent, None
        if reads_y:
            y = widen(ys[group])
        if terms.inner:
            g = widen(gs[group])
        if reads_x:
            x = xs[group]
        if reads_m:
            m = ms[group]
        if has_v:
            v = vs[group]
        if has_w:
            w = ws[group]
        if reads_c:
            c = cs[group]
        if kind.stochastic:
            bits = random(kind, span, seed, step, group)
        if noisy:
            z = normal(kind, span, seed, step, group).to(compute)

        if terms.inner and terms.langevin:
            y, m, v = langevin_step(terms, h, y, g, x, m, v, z, bits, rounded_to)
        elif terms.inner:
            y, m = gradient_average_step(terms, h, y, g, x, m, z, bits, rounded_to)
        if terms.outer:
            y, x, m, w = outer_step(terms, h, x, m, w, c, z, bits, rounded_to)

        stored_ys = stored_ys + (narrow(y, kind.stored),)
        if kind.has_master:
            new_masters = new_masters + (y,)
        if terms.outer:
            new_xs = new_xs + (x,)
        if writes_m:
            new_ms = new_ms + (m,)
        if has_v:
            new_vs = new_vs + (v,)
        if has_w:
            new_ws = new_ws + (w,)

    if kind.has_master:
        write(kind, span, at.master, compute, new_masters)
    write(kind, span, at.y, kind.stored, stored_ys)
    if terms.outer:
        write(kind, span, at.x, compute, new_xs)
    if writes_m:
        write(kind, span, at.m, compute, new_ms)
    if has_v:
        write(kind, span, at.v, compute, new_vs)
    if has_w:
        write(kind, span, at.w, compute, new_ws)


@triton.jit
def take_any_block(
    terms,
    h,
    rows,
    grads,
    blocks,
    found_inf,
    seed,
    step,
    STORED: tl.constexpr,
    BLOCK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    PITCHED: tl.constexpr,
):
    """Find what this block is to work on, and the quickest way to it."""
    size: tl.constexpr = STORED.primitive_bitwidth // 8
    packet: tl.constexpr = 8 if size == 2 else 4
    width: tl.constexpr = 2 if size == 8 else 4
    block = tl.program_id(0)
    tensor = tl.load(blocks + block).to(tl.int64)
    row = rows + tensor * LENGTH
    numel = tl.load(row + NUMEL)
    if found_inf is not None:  # where it holds a number other than 0 (NaN counts), there is nothing to work on
        numel = tl.where(tl.load(found_inf) != 0.0, 0, numel)
    j0 = tl.load(row + START) + (block - tl.load(row + FIRST_BLOCK)) * BLOCK
    wide = (tl.load(row + ALIGNED) != 0) & (j0 >= 0) & (j0 + BLOCK <= numel)
    g_address = None
    if terms.inner:
        g_address = tl.load(grads + tensor)
        wide = wide & ((g_address + j0 * size) % 16 == 0)
    at = Addresses(
        tl.load(row + Y), g_address, tl.load(row + X), tl.load(row + M),
        tl.load(row + V), tl.load(row + W), tl.load(row + C), tl.load(row + MASTER),
    )  # fmt: skip
    if PITCHED:
        pitched = numel > tl.load(row + RUN)
        wide = wide & ~pitched

    if wide:
        take_block(
            terms, h, Kind(STORED, STOCHASTIC, HAS_MASTER, BLOCK, packet, width, True, False),
            Span(row, j0, numel), at, seed, step,
        )  # fmt: skip
    else:  # by packets of 4: this seldom way must not decide how many registers the threads have
        parts: tl.constexpr = packet // 4
        part: tl.constexpr = BLOCK // parts
        for i in range(parts):
            span = Span(row, j0 + i * part, numel)
            if not PITCHED:
                take_block(terms, h, Kind(STORED, STOCHASTIC, HAS_MASTER, part, 4, width, False, False), span, at, seed, step)
            elif pitched:
                take_block(terms, h, Kind(STORED, STOCHASTIC, HAS_MASTER, part, 4, width, False, True), span, at, seed, step)
            else:
                take_block(terms, h, Kind(STORED, STOCHASTIC, HAS_MASTER, part, 4, width, False, False), span, at, seed, step)
