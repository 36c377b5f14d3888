"""The instants at which the solvers that march in time hand out their solution."""

from __future__ import annotations

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
    """Return how many equal steps, none above ``longest`` but for rounding, go through the time that is ``left``."""
    return max(1, int(np.ceil(left / longest * (1.0 - 1e-12))))
