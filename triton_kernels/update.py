"""The formula: the three element-wise updates of the numeric contract (docs/contract.md); csrc/core/update.h.

y live parameter, g gradient, x anchor, m running average (of y, or p: of the gradient), v inner momentum, w outer momentum,
c consensus of the replicas, z standard normal. Every *, +, - is one rounding; a term that is switched off is absent.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .rounding import stored_as


class Terms(NamedTuple):
    """Which terms there are, as far as numbers do not say it: settled when a kernel is compiled.

    ``forgets``: a is 1. ``open_...``: the number was worked out on the device, and only there it shows whether it is 0 or, for
    a, 1. Made where it is passed on: Triton makes tensors of what is assigned to a name.
    """

    langevin: tl.constexpr
    inner: tl.constexpr
    outer: tl.constexpr
    maximize: tl.constexpr
    nesterov: tl.constexpr
    coupling_in_momentum: tl.constexpr
    nesterov_o: tl.constexpr
    forgets: tl.constexpr
    open_k: tl.constexpr
    open_s: tl.constexpr
    open_a: tl.constexpr
    open_c: tl.constexpr


class Scalars(NamedTuple):
    """The numbers of a call in the compute type; one that is 0 is None, so that its term is left out when compiled."""

    inv_scale: tl.tensor
    eta: tl.tensor
    k: tl.tensor
    s: tl.tensor
    a: tl.tensor
    c: tl.tensor
    wd: tl.tensor
    mu: tl.tensor
    damp1: tl.tensor
    lr: tl.tensor
    mu_o: tl.tensor
    wd_o: tl.tensor
    kr: tl.tensor


@triton.jit
def negative(d):
    """Flip the sign bit; ``-d`` would compile to 0 - d, which has another sign for 0."""
    if d.dtype == tl.float64:
        return (d.to(tl.uint64, bitcast=True) ^ 0x8000000000000000).to(tl.float64, bitcast=True)
    else:
        return (d.to(tl.uint32, bitcast=True) ^ 0x80000000).to(tl.float32, bitcast=True)


@triton.jit
def gradient(terms, h, y, g):
    d = g
    if h.inv_scale is not None:
        d = d * h.inv_scale
    if terms.maximize:
        d = negative(d)
    if h.wd is not None:
        d = d + h.wd * y
    return d


@triton.jit
def with_coupling(terms, h, d, y, x):
    coupled = d + h.k * (y - x)
    if terms.open_k:
        coupled = tl.where(h.k != 0.0, coupled, d)
    return coupled


@triton.jit
def with_drift(terms, h, y, p):
    drifted = y - h.c * p
    if terms.open_c:
        drifted = tl.where(h.c != 0.0, drifted, y)
    return drifted


@triton.jit
def with_noise(terms, h, y, z):
    noisy = y + h.s * z
    if terms.open_s:
        noisy = tl.where(h.s != 0.0, noisy, y)
    return noisy


@triton.jit
def averaged(terms, h, m, sample):
    """Return the running average after one more sample."""
    if terms.forgets:
        return sample
    elif h.a is None:
        return m
    else:
        average = m + h.a * (sample - m)
        if terms.open_a:
            average = tl.where(h.a == 1.0, sample, tl.where(h.a == 0.0, m, average))
        return average


@triton.jit
def langevin_step(terms, h, y, g, x, m, v, z, w, STORED: tl.constexpr):
    """Family A; returns y, m, v. ``w`` are the random words of stochastic rounding, or None."""
    d = gradient(terms, h, y, g)
    if h.k is not None and terms.coupling_in_momentum:
        d = with_coupling(terms, h, d, y, x)
    if h.mu is not None:
        v = h.mu * v + h.damp1 * d
        if terms.nesterov:
            d = d + h.mu * v
        else:
            d = v
    if h.k is not None and not terms.coupling_in_momentum:
        d = with_coupling(terms, h, d, y, x)
    y = y - h.eta * d
    if h.s is not None:
        y = with_noise(terms, h, y, z)
    y = stored_as(y, w, STORED)
    return y, averaged(terms, h, m, y), v


@triton.jit
def gradient_average_step(terms, h, y, g, x, m, z, w, STORED: tl.constexpr):
    """Family B, p is m; returns y, m."""
    d = gradient(terms, h, y, g)
    m = averaged(terms, h, m, d)
    y = x
    if h.c is not None:
        y = with_drift(terms, h, y, m)
    if h.s is not None:
        y = with_noise(terms, h, y, z)
    return stored_as(y, w, STORED), m


@triton.jit
def outer_step(terms, h, x, m, momentum, c, z, w, STORED: tl.constexpr):
    """Returns y, x, m and the momentum, which is w of the formula."""
    if terms.langevin:
        d = x - m
    else:
        d = m
    if h.wd_o is not None:
        d = d + h.wd_o * x
    if h.kr is not None:
        d = d + h.kr * (x - c)
    if h.mu_o is not None:
        momentum = h.mu_o * momentum + d
        if terms.nesterov_o:
            d = d + h.mu_o * momentum
        else:
            d = momentum
    x = x - h.lr * d
    y = x
    if terms.langevin:
        m = x
    elif h.s is not None:
        y = with_noise(terms, h, y, z)
    return stored_as(y, w, STORED), x, m, momentum
