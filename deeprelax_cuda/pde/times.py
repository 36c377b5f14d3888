"""What the solvers that march in time share: the instants they hand out, the steps between, a check of what they computed."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from deeprelax_cuda.pde.grid import Array


def check_times(times: ArrayLike) -> Array:
    """Return ``times`` as an array, shape (count,).

    Raises:
        ValueError: one finite number or more was expected, of 0 or more, each above the one before it.
    """
    array = np.atleast_1d(np.asarray(times, dtype=np.float64))
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all() or array[0] < 0.0 or (np.diff(array) <= 0.0).any():
        raise ValueError(f"times: expected finite numbers of 0 or more, each above the one before, got {times!r}")
    return array


def equal_steps(left: float, longest: float) -> int:
    """Return how many equal steps, none above ``longest`` but for rounding, go through the time that is ``left``.

    Raises:
        ValueError: so many that adding a step no longer changes the time.
    """
    steps = float(left) / float(longest) * (1.0 - 1e-12)
    if not steps < 2.0**53:
        raise ValueError(f"times: expected times that 2^53 steps reach, got {left} to go in steps of at most {longest}")
    return max(1, math.ceil(steps))


def check_computed(names: str, what: str, values: Array) -> Array:
    """Return ``values``, which were computed from the arguments ``names``.

    Raises:
        ValueError: they are not finite, as the arguments are too large or too small for float64; names ``names``.
    """
    if not np.isfinite(values).all():
        raise ValueError(f"{names}: expected {what} to be finite in float64, got {values[~np.isfinite(values)].flat[0]}")
    return values
