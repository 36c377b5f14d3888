"""The box that the solvers work in, and what they return: a function's value, gradient and Hessian at its nodes.

One convention holds for every solver: **the walls of the box reflect**. Functions go on beyond a wall as in a mirror, paths are
thrown back, no mass leaves. Take a box whose walls lie where nothing happens.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, SupportsFloat

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Equally spaced nodes of a box in one or two dimensions, the walls included.

    Args:
        lower, upper: the walls: a number, or one for each dimension.
        points: number of nodes, 3 or more: a number, or one for each dimension.

    Raises:
        ValueError: one or two dimensions were expected, finite walls with lower < upper, 3 or more nodes well apart.
        TypeError: a number of nodes that is not whole.

    >>> Grid(-1.0, 1.0, 5).axes[0]
    array([-1. , -0.5,  0. ,  0.5,  1. ])
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...]
    points: tuple[int, ...]

    def __init__(self, lower: float | Sequence[float], upper: float | Sequence[float], points: int | Sequence[int]) -> None:
        fields = {
            "lower": tuple(float(wall) for wall in np.atleast_1d(lower)),
            "upper": tuple(float(wall) for wall in np.atleast_1d(upper)),
            "points": tuple(operator.index(count) for count in np.atleast_1d(np.asarray(points)).tolist()),
        }
        lengths = {name: len(field) for name, field in fields.items()}
        if len(set(lengths.values())) > 1 or lengths["lower"] not in (1, 2):
            raise ValueError(f"lower, upper, points: expected 1 or 2 numbers each, as many of each, got {lengths}")
        for name, field in fields.items():
            object.__setattr__(self, name, field)
        for low, high, count in zip(self.lower, self.upper, self.points, strict=True):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"lower, upper: expected finite walls, lower < upper, got {low} and {high}")
            if count < 3:
                raise ValueError(f"points: expected 3 or more nodes, got {count}")
            largest = max(abs(low), abs(high))
            if not 1e8 * np.finfo(np.float64).eps * largest < (high - low) / (count - 1) < math.inf:
                raise ValueError(f"points: expected nodes that float64 tells well apart, got {count} from {low} to {high}")

    @property
    def dimensions(self) -> int:
        """1 or 2."""
        return len(self.points)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an array with a number for each node: ``points``."""
        return self.points

    @property
    def spacing(self) -> tuple[float, ...]:
        """The distance h between neighbouring nodes, in each dimension."""
        return tuple((b - a) / (n - 1) for a, b, n in zip(self.lower, self.upper, self.points, strict=True))

    @cached_property
    def axes(self) -> tuple[Array, ...]:
        """The coordinates of the nodes: an array of shape (points,) for each dimension."""
        return tuple(np.linspace(a, b, n) for a, b, n in zip(self.lower, self.upper, self.points, strict=True))

    @cached_property
    def nodes(self) -> Array:
        """The coordinates of each node, shape (dimensions, \\*shape)."""
        return np.stack(np.meshgrid(*self.axes, indexing="ij"))

    @cached_property
    def weights(self) -> Array:
        """The weights of the trapezoidal rule, shape ``shape``: a node's share of the volume of the box."""
        total = np.ones(())
        for count, h in zip(self.points, self.spacing, strict=True):
            line = np.full(count, h)
            line[[0, -1]] = h / 2.0
            total = np.multiply.outer(total, line)
        return total

    def integrate(self, values: ArrayLike) -> float:
        """Return the integral of ``values``, shape ``shape``, over the box, by the trapezoidal rule."""
        return float(np.sum(self.weights * self.check("values", values)))

    def check(self, name: str, values: ArrayLike, leading: tuple[int, ...] = ()) -> Array:
        """Return ``values`` as float64 of shape (\\*leading, \\*shape).

        Raises:
            ValueError: another shape, or a value that is not finite; names ``name``.
        """
        array = np.asarray(values, dtype=np.float64)
        if array.shape != (*leading, *self.shape):
            raise ValueError(f"{name}: expected shape {(*leading, *self.shape)}, got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite numbers, got {array[~np.isfinite(array)].flat[0]}")
        return array


class Jet(NamedTuple):
    """A function on a grid: value of shape ``shape``, gradient (d, \\*shape), Hessian (d, d, \\*shape), d dimensions."""

    value: Array
    gradient: Array
    hessian: Array


def differences(values: ArrayLike, grid: Grid) -> Jet:
    """Return ``values``, shape ``grid.shape``, with gradient and Hessian by central differences.

    Order 2 in the spacing; at a wall, differences to one side, of order 2 for the gradient and 1 for the Hessian.
    """
    u = grid.check("values", values).copy()
    d = grid.dimensions
    gradient = np.stack([np.gradient(u, h, axis=axis, edge_order=2) for axis, h in enumerate(grid.spacing)])
    hessian = np.empty((d, d, *grid.shape))
    for i, h in enumerate(grid.spacing):
        line = np.moveaxis(u, i, 0)
        second = np.moveaxis(hessian[i, i], i, 0)
        second[1:-1] = (line[2:] - 2.0 * line[1:-1] + line[:-2]) / h**2
        second[0], second[-1] = second[1], second[-2]
        for j in range(i + 1, d):
            hessian[i, j] = hessian[j, i] = np.gradient(gradient[i], grid.spacing[j], axis=j, edge_order=2)
    return Jet(u, gradient, hessian)


def check_positive(name: str, value: float, *, zero: bool = False, infinite: bool = False) -> float:
    """Return ``value`` as a float.

    Raises:
        ValueError: not a number above 0 (or ``zero``), finite (or ``infinite``); names ``name``.
    """
    number = float(value) if isinstance(value, SupportsFloat) else math.nan
    if not (number > 0.0 or (zero and number == 0.0)) or (math.isinf(number) and not infinite):
        kind = f"{'a' if infinite else 'a finite'} number {'of 0 or more' if zero else 'above 0'}"
        raise ValueError(f"{name}: expected {kind}, got {value}")
    return number
