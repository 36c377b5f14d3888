"""Heat smoothing: the Gaussian average of a function, by Fourier series."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from deeprelax_cuda.pde.grid import Array, Grid, Jet, check_positive


def heat(f: ArrayLike, grid: Grid, t: float, beta: float) -> Jet:
    """Return the Gaussian average of f, which solves the heat equation, with its gradient and Hessian.

        w(x, t) = (G_{t/beta} * f)(x) = E f(x + sqrt(t/beta) z)         z standard normal
        w_t = Lap w/(2 beta),  w(x, 0) = f(x);  grad w = E grad f(x + sqrt(t/beta) z)

    f and its mirror images are a cosine series, of which each wave decays on its own: exact for functions of so many waves,
    faster than any power of the spacing for smooth f whose slope is 0 at the walls, and else of order 2. Where sqrt(t/beta) is
    less than the spacing, f should be smooth at that scale: jumps ring.

    Args:
        f: values at the nodes, shape ``grid.shape``.
        grid: the box, in one or two dimensions.
        t: the time, gamma of the optimizers; above 0.
        beta: the inverse temperature 1/T; above 0.

    Returns:
        Value of shape ``grid.shape``, gradient (d, \\*shape) and Hessian (d, d, \\*shape).

    Raises:
        ValueError: an argument out of range, or f of another shape or not finite.

    Source: Deep Relaxation, section 3 (heat equation as smoothing).
    """
    f = grid.check("f", f)
    variance = check_positive("t", t) / check_positive("beta", beta)
    # The even extension of n nodes has the period 2(n - 1); its transform is real along each axis.
    spectrum = np.fft.fftn(np.pad(f, [(0, n - 2) for n in grid.points], mode="reflect"))
    rates = [2.0 * np.pi * np.fft.fftfreq(2 * (n - 1), h) for n, h in zip(grid.points, grid.spacing, strict=True)]
    waves = np.meshgrid(*rates, indexing="ij")
    spectrum *= np.exp(-0.5 * variance * sum(wave**2 for wave in waves))

    def back(multiplier: Array | complex) -> Array:
        return np.fft.ifftn(spectrum * multiplier).real[tuple(slice(0, n) for n in grid.points)]

    gradient = np.stack([back(1j * wave) for wave in waves])
    hessian = np.stack([np.stack([back(-one * other) for other in waves]) for one in waves])
    return Jet(back(1.0), gradient, hessian)
