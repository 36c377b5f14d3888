"""The kernels: a step on any number of tensors in one launch, its numbers where a clock has them, normals by themselves."""

import triton
import triton.language as tl

from .clock import Rule, deviation, gamma_after, stiffness, weight
from .gaussian import normals
from .philox import philox4x32
from .step import take_any_block
from .update import Scalars, Terms

# Where a clock leaves the numbers of a step: two int64, then values in the compute type.
AT_STEP = tl.constexpr(0)
AT_OUTER = tl.constexpr(1)
AT_VALUES = tl.constexpr(16)  # bytes
AT_GAMMA = tl.constexpr(0)  # k or c
AT_LR = tl.constexpr(1)  # lr or eta
AT_A = tl.constexpr(2)
AT_S = tl.constexpr(3)


@triton.jit
def scalar(argument, STORED: tl.constexpr):
    """Return a scalar argument in the compute type: one of float64 comes as its bits, as Triton's own are float32."""
    if STORED == tl.float64:
        return argument.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return tl.full((), argument, tl.float32)  # the interpreter has a float of Python here


# Numbers that change from call to call, and addresses of single numbers, are nothing to compile anew for.

_OF_THE_CALL = [
    *("inv_scale", "found_inf", "seed", "step"),
    *("eta", "k", "s", "a", "c", "wd", "mu", "damp1", "lr", "mu_o", "wd_o", "kr"),
]
_OF_A_CLOCK = [
    *("step", "position", "outer_steps", "gamma", "lr", "period_steps", "numbers", "found_inf"),
    *("inner_steps", "initial_gamma", "scoping", "gamma_min", "gamma_total", "inner_lr", "temperature", "a"),
]
_OF_NORMALS = ["out", "numel", "seed", "step", "stream", "offset"]


@triton.jit(do_not_specialize=_OF_THE_CALL)
def step_kernel(
    rows,
    grads,
    blocks,
    numbers,
    inv_scale,
    found_inf,
    eta,
    k,
    s,
    a,
    c,
    wd,
    mu,
    damp1,
    lr,
    mu_o,
    wd_o,
    kr,
    seed: tl.int64,
    step: tl.int64,
    STORED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANGEVIN: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NESTEROV: tl.constexpr,
    COUPLING_IN_MOMENTUM: tl.constexpr,
    NESTEROV_O: tl.constexpr,
    FORGETS: tl.constexpr,
    GAMMA: tl.constexpr,
    LR: tl.constexpr,
    S_FOLLOWS: tl.constexpr,
    COUNTED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    PITCHED: tl.constexpr,
):
    """Take the step; the arguments are those of the formula, None for a number that is 0.

    ``rows`` is the table, int64; ``grads`` has the addresses of the gradients, int64; ``blocks`` the number of each block's
    tensor, int32. ``numbers`` is where a clock has left what it determines: step, whether there is an outer step (if OUTER),
    what GAMMA and LR are by its law, s with S_FOLLOWS, a with COUNTED. Without a clock GAMMA and LR are empty.
    """
    eta = None if eta is None else scalar(eta, STORED)
    k = None if k is None else scalar(k, STORED)
    s = None if s is None else scalar(s, STORED)
    a = None if a is None else scalar(a, STORED)
    c = None if c is None else scalar(c, STORED)
    lr = None if lr is None else scalar(lr, STORED)
    if numbers is not None:
        values = (numbers + AT_VALUES).to(tl.pointer_type(tl.float64 if STORED == tl.float64 else tl.float32))
        counts = numbers.to(tl.pointer_type(tl.int64))
        step = tl.load(counts + AT_STEP)
        if OUTER:
            outer = tl.load(counts + AT_OUTER) != 0
        else:
            outer: tl.constexpr = False
        if GAMMA == "stiffness":
            k = tl.load(values + AT_GAMMA)
        elif GAMMA == "drift":
            c = tl.load(values + AT_GAMMA)
        if LR == "inner":
            eta = tl.load(values + AT_LR)
        else:
            lr = tl.load(values + AT_LR)
        if COUNTED:
            a = tl.load(values + AT_A)
        if S_FOLLOWS:
            s = tl.load(values + AT_S)
    if inv_scale is not None:
        inv_scale = tl.load(inv_scale)
    h = Scalars(
        inv_scale,
        eta,
        k,
        s,
        a,
        c,
        None if wd is None else scalar(wd, STORED),
        None if mu is None else scalar(mu, STORED),
        None if damp1 is None else scalar(damp1, STORED),
        lr,
        None if mu_o is None else scalar(mu_o, STORED),
        None if wd_o is None else scalar(wd_o, STORED),
        None if kr is None else scalar(kr, STORED),
    )
    if numbers is None:
        take_any_block(
            Terms(
                LANGEVIN, INNER, OUTER, MAXIMIZE, NESTEROV, COUPLING_IN_MOMENTUM, NESTEROV_O, FORGETS,
                False, False, False, False,
            ),
            h, rows, grads, blocks, found_inf, seed, step, STORED, BLOCK, STOCHASTIC, HAS_MASTER, PITCHED,
        )  # fmt: skip
    elif outer:
        take_any_block(
            Terms(
                LANGEVIN, INNER, True, MAXIMIZE, NESTEROV, COUPLING_IN_MOMENTUM, NESTEROV_O, FORGETS,
                GAMMA == "stiffness", S_FOLLOWS, COUNTED, GAMMA == "drift",
            ),
            h, rows, grads, blocks, found_inf, seed, step, STORED, BLOCK, STOCHASTIC, HAS_MASTER, PITCHED,
        )  # fmt: skip
    elif INNER:
        take_any_block(
            Terms(
                LANGEVIN, INNER, False, MAXIMIZE, NESTEROV, COUPLING_IN_MOMENTUM, NESTEROV_O, FORGETS,
                GAMMA == "stiffness", S_FOLLOWS, COUNTED, GAMMA == "drift",
            ),
            h, rows, grads, blocks, found_inf, seed, step, STORED, BLOCK, STOCHASTIC, HAS_MASTER, PITCHED,
        )  # fmt: skip


@triton.jit(do_not_specialize=_OF_A_CLOCK)
def advance_kernel(
    step,
    position,
    outer_steps,
    gamma,
    lr,
    period_steps,
    numbers,
    found_inf,
    inner_steps: tl.int64,
    initial_gamma: tl.int64,
    scoping: tl.int64,
    gamma_min: tl.int64,
    gamma_total: tl.int64,
    inner_lr: tl.int64,
    temperature: tl.int64,
    a: tl.int64,
    STORED: tl.constexpr,
    LANGEVIN: tl.constexpr,
    INNER: tl.constexpr,
    GAMMA: tl.constexpr,
    LR: tl.constexpr,
    AVERAGE: tl.constexpr,
    S_FOLLOWS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Leave the numbers of the coming step in ``numbers``, and count it; one program.

    The first arguments are the addresses of a clock's tensors (deeprelax_cuda/clock.py). The float64 of its rule and its law
    come as bits, and so does ``a``, the weight of an average that the law lets be. S_FOLLOWS: there is noise by the law.
    """
    taken = True
    if found_inf is not None:
        taken = ~(tl.load(found_inf) != 0.0)
    if taken:
        rule = Rule(
            inner_steps,
            scalar(initial_gamma, tl.float64),
            scalar(scoping, tl.float64),
            scalar(gamma_min, tl.float64),
            scalar(gamma_total, tl.float64),
            scalar(inner_lr, tl.float64),
        )
        compute: tl.constexpr = tl.float64 if STORED == tl.float64 else tl.float32
        counts = numbers.to(tl.pointer_type(tl.int64))
        values = (numbers + AT_VALUES).to(tl.pointer_type(compute))
        ends = (inner_steps > 0) & (tl.load(position) + 1 >= inner_steps)
        outer = ends
        tl.store(counts + AT_STEP, tl.load(step))
        rate = tl.load(lr).to(tl.float64)
        tl.store(values + AT_LR, rate.to(compute))
        if GAMMA == "stiffness":
            tl.store(values + AT_GAMMA, stiffness(tl.load(gamma)).to(compute))
        elif GAMMA == "drift":
            tl.store(values + AT_GAMMA, tl.load(gamma).to(compute))
        if S_FOLLOWS:
            if GAMMA == "variance":
                s = deviation(tl.load(gamma), scalar(temperature, tl.float64))
            else:
                s = deviation(2.0 * rate, scalar(temperature, tl.float64))
            tl.store(values + AT_S, s.to(compute))
        if period_steps is not None:
            count = tl.load(period_steps)
            if INNER:
                count += 1
                tl.store(values + AT_A, weight(count, scalar(a, tl.float64), AVERAGE).to(compute))
            if not LANGEVIN:  # only a period that has counted a gradient
                outer = ends & (count > 0)
            tl.store(period_steps, tl.where(ends, tl.minimum(count, 0), count))
        tl.store(counts + AT_OUTER, outer.to(tl.int64))
        if COUNTS:
            tl.store(step, tl.load(step) + 1)
            tl.store(position, tl.where(ends, 0, tl.load(position) + 1))
            if ends:
                n = tl.load(outer_steps) + 1
                tl.store(outer_steps, n)
                tl.store(gamma, gamma_after(rule, n, tl.load(gamma)))


@triton.jit(do_not_specialize=_OF_NORMALS)
def gaussian_kernel(
    out, numel: tl.int64, seed: tl.int64, step: tl.int64, stream: tl.int64, offset: tl.int64, BLOCK: tl.constexpr
):
    """Write the normals of elements offset to offset + numel of a stream (the whole counter word); 16 divides the address."""
    lead = offset & 3  # elements of the first counter that come before the offset
    j0 = tl.program_id(0).to(tl.int64) * BLOCK - lead
    q = ((offset + j0) >> 2) + tl.arange(0, BLOCK // 4)
    index = (tl.arange(0, BLOCK // 4) * 4)[:, None] + tl.arange(0, 4)[None, :]
    wide = (lead == 0) & (j0 + BLOCK <= numel)
    if wide:  # each way has normals of its own: shared ones would be laid out for narrow accesses, and the wide way pay for it
        w0, w1, w2, w3 = philox4x32(seed, q, step, stream)
        tl.store(tl.multiple_of(out + j0, 16) + index, normals(w0, w1, w2, w3))
    else:
        w0, w1, w2, w3 = philox4x32(seed, q, step, stream)
        tl.store(out + j0 + index, normals(w0, w1, w2, w3), (j0 + index >= 0) & (j0 + index < numel))
