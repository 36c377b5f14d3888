"""Averages under a Gaussian times a density, along one axis of a grid: what local entropy and heat smoothing are made of.

In more dimensions the Gaussian is a product, so that averages are taken along one axis after the other.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline

from deeprelax_cuda.pde.grid import Array, Grid

#: Numbers of a block of the kernel's matrix that are worked on at once: 16 MiB in float64.
BLOCK = 2**21
#: What is smaller than exp(-40) of the largest does not count; a Gaussian gets there at 9 standard deviations.
LOST = 40.0
#: A density confined to so many spacings is one of a standard deviation below 4/3 of the spacing, and is sampled more finely.
#: Above, the sum over the nodes is as good as float64: its relative error is exp(-2 pi^2 (4/3)^2) = 6e-16.
NARROW = 24
#: Of the box: the least standard deviation of the Gaussian, below which rounding moves it.
RESOLUTION = 1e-10
#: Nodes that a narrow density is sampled at.
SAMPLES = 129


class GaussianAverage:
    """Averages around each node x of an axis, over y distributed as exp(log_density(y)) times a Gaussian about x.

    Beyond the walls y goes on over mirror images. Sums over the nodes are the trapezoidal rule, which converges faster than
    any power of the spacing where the density is resolved. Where it is confined to a few spacings, it is found and sampled
    between the nodes, on the cubic spline through what is given there.

    Raises:
        ValueError: a variance that float64 cannot resolve in the box.
    """

    def __init__(self, grid: Grid, axis: int, variance: float) -> None:
        self._nodes, self._h, self._variance = grid.axes[axis], grid.spacing[axis], variance
        self._width = grid.upper[axis] - grid.lower[axis]
        if not variance >= (RESOLUTION * self._width) ** 2:
            deviation = f"sqrt(t/beta) = {math.sqrt(variance):.3g}"
            raise ValueError(f"t, beta: {deviation} is lost in a box of width {self._width:g}: expected {RESOLUTION:g} of it")
        count = grid.points[axis]
        # An image counts beside the node in the box that it mirrors until it is farther by 2 LOST variances.
        self._beyond = math.ceil((count - 1) * math.sqrt(1.0 + 2.0 * LOST * variance / self._width**2))
        self._sources = self._nodes[0] + self._h * np.arange(-self._beyond, count + self._beyond)

    def __call__(self, log_density: Array, functions: Array) -> tuple[Array, Array]:
        """Return the logarithm of the mean of the density around each node, and averages under it.

        Args:
            log_density: shape (n,), at the n nodes of the axis.
            functions: what is averaged, shape (k, n).

        Returns:
            Logarithm of the Gaussian average of exp(log_density), shape (n,); averages of (y - x)^j times each function for
            j = 0, 1, 2, shape (3, k, n).
        """
        log_mass = np.empty(len(self._nodes))
        moments = np.empty((3, *functions.shape))
        logs, others = self._mirrored(log_density), self._mirrored(functions)
        runs = []
        count = max(1, BLOCK // len(self._sources))
        for first in range(0, len(self._nodes), count):
            rows = slice(first, first + count)
            steps = self._sources - self._nodes[rows, None]
            kernel = steps**2 * (-0.5 / self._variance)
            log_sums, weights = _softmax(logs + kernel)
            log_mass[rows] = log_sums - np.log(np.exp(kernel).sum(1))  # a sum of 1 or more: the node itself is a source
            for j in range(3):
                moments[j][:, rows] = others @ (weights * steps**j).T
            few = np.flatnonzero(np.einsum("rs,rs->r", weights, weights) > 1.0 / NARROW)  # others count more nodes than that
            row, low, high = _runs((logs + kernel)[few])
            runs.append(np.stack([few[row] + first, low, high]))
        row, low, high = np.concatenate(runs, axis=1)
        narrow = ~np.isin(row, row[high - low > NARROW])
        if narrow.any():
            row, low, high = row[narrow], self._sources[low[narrow]], self._sources[high[narrow]]
            parts, inside = self._sampled(np.column_stack([log_density, functions.T]), self._nodes[row], low, high)
            log_mass[row], moments[:, :, row] = -np.inf, 0.0
            np.logaddexp.at(log_mass, row, parts)
            shares = inside * np.exp(parts - log_mass[row])
            np.add.at(np.moveaxis(moments, -1, 0), row, np.moveaxis(shares, -1, 0))
        return log_mass, moments

    def _mirrored(self, values: Array) -> Array:
        """Return values at the nodes, shape (..., n), with those at the images to both sides."""
        around = [(0, 0)] * (values.ndim - 1) + [(self._beyond, self._beyond)]
        return np.pad(values, around, mode="reflect")

    def _sampled(self, points: Array, x: Array, low: Array, high: Array) -> tuple[Array, Array]:
        """Return what calling does for nodes ``x`` and the part of their density from ``low`` to ``high``.

        ``points`` has the logarithm of the density and the functions at the nodes, shape (n, 1 + k).
        """
        spline = make_interp_spline(self._nodes, points, k=min(3, len(self._nodes) - 1))
        while True:
            step = (high - low) / (SAMPLES - 1)
            y = low[:, None] + step[:, None] * np.arange(SAMPLES)
            images = np.mod(y - self._nodes[0], 2.0 * self._width)
            values = spline(self._nodes[0] + np.minimum(images, 2.0 * self._width - images))
            terms = values[..., 0] + (y - x[:, None]) ** 2 * (-0.5 / self._variance)
            row, first, last = _runs(terms)
            first = first[np.searchsorted(row, np.arange(len(x)))]
            last = last[np.searchsorted(row, np.arange(len(x)), side="right") - 1]
            if np.all(last - first > SAMPLES // 2):
                break
            low, high = low + first * step, low + last * step
        log_sums, weights = _softmax(terms)
        log_mass = log_sums + np.log(step) - 0.5 * math.log(2.0 * math.pi * self._variance)
        moments = [np.einsum("rs,rsk->kr", weights * (y - x[:, None]) ** j, values[..., 1:]) for j in range(3)]
        return log_mass, np.stack(moments)


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
