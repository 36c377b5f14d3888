"""One axis of a grid, with the mirror images of its nodes beyond the walls, and splines between them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.interpolate import make_interp_spline

from deeprelax_cuda.pde.grid import Array, Grid

#: What is smaller than exp(-40) of the largest does not count; a Gaussian gets there at 9 standard deviations.
LOST = 40.0
#: In spacings: a Gaussian of this standard deviation is summed over nodes to a relative error of exp(-2 pi^2 (4/3)^2) = 6e-16.
RESOLVED = 4.0 / 3.0
#: In widths of the box: a Gaussian this wide and its images are the same everywhere in the box, but for exp(-8 pi^2) of it.
WIDEST = 4.0
#: In widths of the box: the least standard deviation, below which float64 cannot tell places apart.
NARROWEST = 1e-10


class Line:
    """The nodes of an axis, shape (n,), their spacing h, and the variance t/beta of a Gaussian around each of them.

    Raises:
        ValueError: a variance that float64 cannot resolve in the box.
    """

    def __init__(self, grid: Grid, axis: int, t: float, beta: float) -> None:
        self.nodes, self.h = grid.axes[axis], grid.spacing[axis]
        self.width = grid.upper[axis] - grid.lower[axis]
        if not math.sqrt(t) / math.sqrt(beta) >= NARROWEST * self.width:
            deviation = f"sqrt(t/beta) = {math.sqrt(t) / math.sqrt(beta):.3g}"
            raise ValueError(f"t, beta: {deviation} is lost in a box of width {self.width:g}: expected {NARROWEST:g} of it")
        # A wider Gaussian gives the same averages, from more images.
        self.variance = min(math.sqrt(t) / math.sqrt(beta), WIDEST * self.width) ** 2
        # An image counts beside the node in the box that it mirrors until it is farther by 2 LOST variances.
        self._beyond = math.ceil((len(self.nodes) - 1) * math.sqrt(1.0 + 2.0 * LOST * self.variance / self.width**2))
        self.sources = self.nodes[0] + self.h * np.arange(-self._beyond, len(self.nodes) + self._beyond)

    def mirrored(self, values: Array) -> Array:
        """Return values at the nodes, shape (..., n), with those at the images to both sides, as `sources` has them."""
        around = [(0, 0)] * (values.ndim - 1) + [(self._beyond, self._beyond)]
        return np.pad(values, around, mode="reflect")

    def spline(self, values: Array) -> Callable[[Array, int], Array]:
        """Return the cubic spline through values at the nodes as a function of places, in the box or not, and of the order.

        Its derivatives of order 1 change their sign in each mirror.
        """
        within = make_interp_spline(self.nodes, values, k=min(3, len(self.nodes) - 1))

        def derivative(places: Array, order: int) -> Array:
            images = np.mod(places - self.nodes[0], 2.0 * self.width)
            turned = images > self.width
            found: Array = within(self.nodes[0] + np.where(turned, 2.0 * self.width - images, images), nu=order)
            if order % 2:
                found[turned] *= -1.0
            return found

        return derivative
