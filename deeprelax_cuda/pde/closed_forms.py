"""What the relaxations of quadratics and cosines are, exactly and without walls."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from deeprelax_cuda.pde.grid import Array, Jet, check_positive


def relaxed_quadratic(matrix: ArrayLike, x: ArrayLike, t: float, beta: float = math.inf) -> Jet:
    """Return the local entropy of f(x) = x'Ax/2, or with beta infinite its Moreau envelope.

        u = x' A (I + tA)^-1 x/2 + log det(I + tA)/(2 beta)

    Args:
        matrix: A, symmetric, shape (d, d), with I + tA positive definite.
        x: points, shape (d, ...).
        t: the time; above 0.
        beta: the inverse temperature 1/T; above 0.

    Returns:
        Value of shape (...), gradient (d, ...), Hessian (d, d, ...).

    Raises:
        ValueError: an argument out of range; a matrix that is not symmetric, or whose f falls too fast for u to be finite.
    """
    a = np.asarray(matrix, dtype=np.float64)
    points = np.atleast_1d(np.asarray(x, dtype=np.float64))
    t, beta = check_positive("t", t), check_positive("beta", beta, infinite=True)
    d = len(points)
    if a.shape != (d, d):
        raise ValueError(f"matrix: expected shape {(d, d)}, got {a.shape}")
    if not np.allclose(a, a.T, rtol=1e-12, atol=0.0):
        raise ValueError("matrix: expected a symmetric one")
    widths = 1.0 + t * np.linalg.eigvalsh(a)
    if not np.all(widths > 0.0):
        raise ValueError(f"matrix: expected I + t*matrix to be positive definite, got an eigenvalue {widths.min():.3g}")
    hessian = np.linalg.solve(np.eye(d) + t * a, a)
    gradient = np.tensordot(hessian, points, 1)
    value = (points * gradient).sum(0) / 2.0 + np.log(widths).sum() / (2.0 * beta)
    return Jet(value, gradient, np.broadcast_to(hessian.reshape(d, d, *(1,) * (points.ndim - 1)), (d, *points.shape)))


def heated_cosine(frequency: float, x: ArrayLike, t: float, beta: float) -> Jet:
    """Return the Gaussian average of f(x) = cos(w x), w the ``frequency``: exp(-w^2 t/(2 beta)) cos(w x).

    Args:
        frequency: w, in radians per unit of x.
        x: points, of any shape.
        t: the time; above 0.
        beta: the inverse temperature 1/T; above 0.

    Returns:
        Value of the shape of x, gradient (1, ...), Hessian (1, 1, ...).

    Raises:
        ValueError: t or beta out of range.
    """
    points = np.asarray(x, dtype=np.float64)
    rate = frequency**2 * check_positive("t", t) / (2.0 * check_positive("beta", beta))
    value: Array = math.exp(-rate) * np.cos(frequency * points)
    slope = -frequency * math.exp(-rate) * np.sin(frequency * points)
    return Jet(value, slope[None], -(frequency**2) * value[None, None])


def widened(curvature: ArrayLike, t: float) -> Array:
    """Return what the Moreau envelope makes of an eigenvalue of the Hessian at a minimum: lambda/(1 + t lambda).

    A minimum of curvature lambda is 1/lambda wide; t is added to that.

    Raises:
        ValueError: t out of range.
    """
    eigenvalue = np.asarray(curvature, dtype=np.float64)
    return eigenvalue / (1.0 + check_positive("t", t, zero=True) * eigenvalue)
