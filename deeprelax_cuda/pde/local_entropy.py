"""The local entropy, by the transformation of Hopf and Cole: a Gaussian average of exp(-beta f), taken in logarithms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deeprelax_cuda.pde.grid import Array, Grid, Jet, check_positive
from deeprelax_cuda.pde.line import LOST, RESOLVED, Line

#: Numbers of a block of the kernel's matrix that are worked on at once: 16 MiB in float64.
BLOCK = 2**21
#: A density confined to so many spacings is narrower than what the nodes resolve, and is sampled between them.
NARROW = round(2.0 * math.sqrt(2.0 * LOST) * RESOLVED)
#: Places that a narrow density is sampled at.
SAMPLES = 129
#: Of a temperature: the rounding of f up to which f is known well enough for it.
KNOWN = 0.01


def local_entropy(f: ArrayLike, grid: Grid, t: float, beta: float) -> Jet:
    """Return the local entropy of f, which solves the viscous Hamilton-Jacobi equation, with its gradient and Hessian.

        u(x, t) = -(1/beta) log (G_{t/beta} * exp(-beta f))(x)          G_s the Gaussian density of variance s
        u_t = -|grad u|^2/2 + Lap u/(2 beta),  u(x, 0) = f(x)
        grad u = (x - <y>)/t,  Hess u = I/t - (beta/t^2) Cov(y)         under rho(y; x) ~ exp(-beta f(y) - beta |x - y|^2/(2t))

    The integrals are sums over the nodes and their mirror images beyond the walls, in logarithms. For smooth f they converge
    faster than any power of the spacing h while rho is resolved (its standard deviation is 4/3 h or more), walls aside where
    the slope of f is not 0: there, and at kinks of f, order 2. A narrower rho is sampled between the nodes, on the cubic spline
    through f: orders 4, 3, 2 in h for value, gradient, Hessian, at any temperature, with `moreau_envelope` as the limit (at
    kinks of f, order 1). There grad u = <grad f> and Hess u = <Hess f> - beta Cov(grad f), which divide by neither t nor T.

    Args:
        f: values at the nodes, shape ``grid.shape``.
        grid: the box, in one or two dimensions.
        t: the time, gamma of the optimizers; above 0.
        beta: the inverse temperature 1/T; above 0.

    Returns:
        Value of shape ``grid.shape``, gradient (d, \\*shape) and Hessian (d, d, \\*shape).

    Raises:
        ValueError: an argument out of range; f of another shape or not finite, or too large to be known to within 1/beta.

    Source: Deep Relaxation, sections 3 and 4; Chaudhari et al., Entropy-SGD.
    """
    f = grid.check("f", f)
    t, beta = check_positive("t", t), check_positive("beta", beta)
    size = float(np.abs(f).max())
    if not beta * size * np.finfo(np.float64).eps < KNOWN:
        known = size * np.finfo(np.float64).eps
        raise ValueError(f"f, beta: float64 knows f = {size:.3g} to {known:.2g} only, too little for 1/beta = {1.0 / beta:.3g}")
    none = np.zeros(grid.points[-1])
    last = Line(grid, grid.dimensions - 1, t, beta)
    if grid.dimensions == 1:
        v = _log_average(last, -beta * f, none, none)
        return Jet(-v.value / beta, -v.x[None] / beta, -v.xx[None, None] / beta)
    # The Gaussian is a product: the average along the last axis, then that of its results along the first.
    inner = _Log(*np.stack([_log_average(last, row, none, none) for row in -beta * f], axis=1))
    columns = zip(inner.value.T, inner.x.T, inner.xx.T, strict=True)
    first = Line(grid, 0, t, beta)
    v = _Log(*np.stack([_log_average(first, *column) for column in columns], axis=-1))
    gradient, hessian = np.stack([v.x, v.c]), np.array([[v.xx, v.xc], [v.xc, v.cc]])
    return Jet(-v.value / beta, -gradient / beta, -hessian / beta)


class _Log(NamedTuple):
    """The logarithm of the average around x of a density that depends on c too, and its derivatives in x and c."""

    value: Array
    x: Array
    c: Array
    xx: Array
    xc: Array
    cc: Array


def _log_average(line: Line, log: Array, log_c: Array, log_cc: Array) -> _Log:
    """Return the logarithm of the Gaussian average of a density around each node x of a line.

    The density's logarithm at the nodes and its derivatives in a parameter c have shape (n,) each. The average is a sum of
    parts: of what the nodes resolve it is the sum over them, of each narrow run of nodes that count, one over places between.
    """
    given = np.stack([log, log_c, log_cc])
    mirrored, smooth = line.mirrored(given), line.spline(given.T)
    rows, parts = [], []
    count = max(1, BLOCK // len(line.sources))
    for begin in range(0, len(line.nodes), count):
        x = line.nodes[begin : begin + count]
        steps = line.sources - x[:, None]
        terms = mirrored[0] + steps**2 * (-0.5 / line.variance)
        value, weights = _softmax(terms)
        # The nodes that count are as many as one over the sum of the squares of their shares.
        few = np.flatnonzero(np.einsum("rs,rs->r", weights, weights) > 1.0 / NARROW)
        row, low, high = _runs(terms[few])
        row, narrow = few[row], high - low <= NARROW
        summed = np.ones(len(x), dtype=bool)
        summed[row] = False
        both = np.unique(row[~narrow])  # of these rows the narrow runs are taken out of the sum
        for i, a, b in zip(row[narrow], low[narrow], high[narrow], strict=True):
            terms[i, a : b + 1] = -np.inf
        value[both], weights[both] = _softmax(terms[both])
        summed[both] = True
        row, low, high = row[narrow], low[narrow], high[narrow]
        rows += [begin + np.flatnonzero(summed), begin + row]
        parts += [
            _summed(line, value[summed], weights[summed], steps[summed], mirrored),
            _sampled(line, smooth, x[row], steps[row, low], steps[row, high]),
        ]
    return _together(np.concatenate(rows), _Log(*np.concatenate(parts, axis=1)), len(line.nodes))


def _summed(line: Line, value: Array, weights: Array, steps: Array, mirrored: Array) -> _Log:
    """Return the average over the nodes x + steps, from the logarithm of their sum and their shares, shape (rows, sources)."""
    mean = np.einsum("rs,rs->r", weights, steps)
    off = steps - mean[:, None]
    slope = weights @ mirrored[1]
    off_slope = mirrored[1] - slope[:, None]
    weighted = weights * off
    v = line.variance  # of the kernel: d/dx is the mean of (y - x)/v, d/dx of a mean the covariance with it
    return _Log(
        value + math.log(line.h) - 0.5 * math.log(2.0 * math.pi * v),
        mean / v,
        slope,
        (np.einsum("rs,rs->r", weighted, off) / v - 1.0) / v,
        np.einsum("rs,rs->r", weighted, off_slope) / v,
        weights @ mirrored[2] + np.einsum("rs,rs,rs->r", weights, off_slope, off_slope),
    )


def _sampled(line: Line, smooth: Callable[[Array, int], Array], x: Array, low: Array, high: Array) -> _Log:
    """Return the average over y from x + low to x + high, where the density is and within it is narrow."""
    for _ in range(64):  # each time half as wide or less
        step = (high - low) / (SAMPLES - 1)
        steps = low[:, None] + step[:, None] * np.arange(SAMPLES)
        here = smooth(x[:, None] + steps, 0)
        terms = here[..., 0] + steps**2 * (-0.5 / line.variance)
        row, first, last = _runs(terms)
        begins = np.flatnonzero(np.diff(row, prepend=-1))  # runs of one row: from the first one's start to the last one's end
        first, last = first[begins], np.maximum.reduceat(last, begins)
        if np.all(last - first > SAMPLES // 2):
            break
        low, high = low + first * step, low + last * step
    value, weights = _softmax(terms)
    slopes, bends = smooth(x[:, None] + steps, 1), smooth(x[:, None] + steps, 2)[..., 0]

    def mean(values: Array) -> Array:
        total: Array = np.einsum("rs,rs->r", weights, values)
        return total

    x_mean, c_mean = mean(slopes[..., 0]), mean(here[..., 1])
    off_x, off_c = slopes[..., 0] - x_mean[:, None], here[..., 1] - c_mean[:, None]
    return _Log(
        value + np.log(step) - 0.5 * math.log(2.0 * math.pi * line.variance),
        x_mean,  # by parts: the mean of (y - x)/variance is that of the slope
        c_mean,
        mean(bends + off_x**2),
        mean(slopes[..., 1] + off_x * off_c),
        mean(here[..., 2] + off_c**2),
    )


def _together(rows: NDArray[np.intp], part: _Log, count: int) -> _Log:
    """Return the logarithm of the sum of the parts of each row."""
    value = np.full(count, -np.inf)
    np.logaddexp.at(value, rows, part.value)
    share = np.exp(part.value - value[rows])

    def mean(values: Array) -> Array:
        total = np.zeros(count)
        np.add.at(total, rows, share * values)
        return total

    x, c = mean(part.x), mean(part.c)
    off_x, off_c = part.x - x[rows], part.c - c[rows]
    return _Log(value, x, c, mean(part.xx + off_x**2), mean(part.xc + off_x * off_c), mean(part.cc + off_c**2))


def _softmax(terms: Array) -> tuple[Array, Array]:
    """Return the logarithm of the sum of exp(terms) along the last axis, and the shares in it."""
    top = terms.max(axis=-1, keepdims=True)
    weights = np.exp(terms - top)
    total = weights.sum(axis=-1, keepdims=True)
    return (top + np.log(total))[..., 0], weights / total


def _runs(terms: Array) -> tuple[NDArray[np.intp], ...]:
    """Return where exp(terms), shape (rows, places), is large enough to count: row, first and last place of each run of places.

    Between two places a term can be higher than at both by an eighth of its second difference; twice that is allowed for. A
    place more is taken at each end.
    """
    hidden = np.zeros_like(terms)
    hidden[:, 1:-1] = np.abs(np.diff(terms, n=2, axis=1)) / 4.0
    counts = np.pad(terms + hidden > terms.max(axis=1, keepdims=True) - LOST, ((0, 0), (1, 1)))
    counts[:, 1:-1] |= counts[:, 2:] | counts[:, :-2]
    ends = np.diff(counts.astype(np.int8), axis=1)
    row, first = np.nonzero(ends == 1)
    last = np.nonzero(ends == -1)[1] - 1
    return row, first, last
