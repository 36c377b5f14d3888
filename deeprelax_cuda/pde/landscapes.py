"""Functions to relax: the paper's rugged one of one variable, a double well of two, and valleys of any width in one or two.

Each takes its coordinates as numpy arrays or as torch tensors, so that a solver and an optimizer see the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deeprelax_cuda.pde.grid import Array, Grid

#: numpy arrays or torch tensors, of one shape.
Coordinate = Any


@dataclass(frozen=True)
class Landscape:
    """A function of one or two variables with its gradient.

    Attributes:
        name: what it is called.
        value: the function of as many coordinates as it has variables, element by element.
        gradient: its partial derivatives at the same coordinates, as a tuple.
    """

    name: str
    value: Callable[..., Coordinate]
    gradient: Callable[..., tuple[Coordinate, ...]]

    def on(self, grid: Grid) -> Array:
        """Return the values at the nodes of ``grid``, shape ``grid.shape``."""
        return np.asarray(self.value(*grid.nodes), dtype=np.float64)

    def gradient_on(self, grid: Grid) -> Array:
        """Return the gradient at the nodes of ``grid``, shape (dimensions, \\*grid.shape)."""
        return np.stack(self.gradient(*grid.nodes))


def rugged(*, ripple: float = 1.5, noise: float = 0.3, length: float = 0.2, seed: int = 0) -> Landscape:
    """Return x^2 + ripple*sin(2 pi x) + smoothed noise, a function of one variable: the paper's, but for the noise.

    The noise is white noise smoothed by a Gaussian: ``noise`` is its root mean square, ``length`` the distance over which it
    is correlated (correlation exp(-1/2) at ``length``). It is a trigonometric sum of period 8, so that it has derivatives of
    every order. Source: Deep Relaxation, figure 1.
    """
    waves = _Waves.smoothed(noise, length, seed)

    def value(x: Coordinate) -> Coordinate:
        return x * x + ripple * _sin(2.0 * math.pi * x) + waves.value(x)

    def gradient(x: Coordinate) -> tuple[Coordinate]:
        return (2.0 * x + (2.0 * math.pi * ripple) * _cos(2.0 * math.pi * x) + waves.slope(x),)

    return Landscape("rugged", value, gradient)


def double_well(*, tilt: float = 0.3, coupling: float = 0.5) -> Landscape:
    """Return (x^2 - 1)^2 + tilt*x + (y - coupling*x)^2, a function of two variables with minima near x = 1 and x = -1."""

    def value(x: Coordinate, y: Coordinate) -> Coordinate:
        across, along = y - coupling * x, x * x - 1.0
        return along * along + tilt * x + across * across

    def gradient(x: Coordinate, y: Coordinate) -> tuple[Coordinate, Coordinate]:
        across = 2.0 * (y - coupling * x)
        return 4.0 * x * (x * x - 1.0) + tilt - coupling * across, across

    return Landscape("double well", value, gradient)


def valleys(
    centres: Sequence[Sequence[float]],
    depths: Sequence[float],
    widths: Sequence[float],
    *,
    ripple: float = 0.0,
    length: float = 0.5,
) -> Landscape:
    """Return round valleys in a rippled plain, a function of one or two variables.

        f(x) = -sum_j depth_j exp(-|x - c_j|^2/(2 width_j^2)) + ripple sum_i sin(pi x_i/length)^2

    At the bottom of a valley far from the others, without ripples, the Hessian is depth/width^2 times the identity. At a wall
    the ripples go on as in a mirror if its coordinate is a multiple of length/2.

    Args:
        centres: c_j, with as many coordinates as the function has variables.
        depths, widths: one for each centre.
        ripple, length: height of the ripples, and the distance from one to the next, above 0.
    """
    wells = list(zip(centres, depths, widths, strict=True))

    def value(*x: Coordinate) -> Coordinate:
        plain = sum(ripple * _sin((math.pi / length) * each) ** 2 for each in x)
        return plain - sum(_well(x, *well) for well in wells)

    def gradient(*x: Coordinate) -> tuple[Coordinate, ...]:
        hollows = [(centre, width, _well(x, centre, depth, width)) for centre, depth, width in wells]
        return tuple(
            (ripple * math.pi / length) * _sin((2.0 * math.pi / length) * each)
            + sum(hollow * (each - centre[i]) / width**2 for centre, width, hollow in hollows)
            for i, each in enumerate(x)
        )

    return Landscape("valleys", value, gradient)


def _well(x: Sequence[Coordinate], centre: Sequence[float], depth: float, width: float) -> Coordinate:
    """Return depth * exp(-|x - centre|^2/(2 width^2))."""
    return depth * _exp(sum((each - c) ** 2 for each, c in zip(x, centre, strict=True)) * (-0.5 / width**2))


@dataclass(frozen=True)
class _Waves:
    """The real part of the sum over k = 1, 2, ... of coefficients[k - 1] * exp(i k frequency x)."""

    coefficients: tuple[complex, ...]
    frequency: float

    @staticmethod
    def smoothed(rms: float, length: float, seed: int, period: float = 8.0) -> _Waves:
        """Return noise of correlation exp(-d^2/(2 length^2)) at distance d, scaled to the root mean square ``rms``."""
        frequency = 2.0 * math.pi / period
        count = math.ceil(5.5 / (frequency * length))  # beyond, amplitudes are below exp(-5.5^2/4) < 1e-3 of the first
        amplitudes = np.exp(-((frequency * length * np.arange(1, count + 1)) ** 2) / 4.0)
        random = np.random.default_rng(seed).normal(size=(2, count))
        coefficients = amplitudes * (random[0] + 1j * random[1])
        coefficients *= rms / math.sqrt(float(np.sum(np.abs(coefficients) ** 2)) / 2.0)
        return _Waves(tuple(complex(c) for c in coefficients), frequency)

    def value(self, x: Coordinate) -> Coordinate:
        return self._sum(x, self.coefficients)

    def slope(self, x: Coordinate) -> Coordinate:
        return self._sum(x, tuple(1j * k * self.frequency * c for k, c in enumerate(self.coefficients, start=1)))

    def _sum(self, x: Coordinate, coefficients: tuple[complex, ...]) -> Coordinate:
        """By Horner's rule in exp(i frequency x): one sine and one cosine, whatever the number of terms."""
        cosine, sine = _cos(self.frequency * x), _sin(self.frequency * x)
        real = imaginary = 0.0 * x
        for c in reversed(coefficients):
            real, imaginary = real + c.real, imaginary + c.imag
            real, imaginary = real * cosine - imaginary * sine, real * sine + imaginary * cosine
        return real


def _sin(x: Coordinate) -> Coordinate:
    return np.sin(x) if isinstance(x, np.ndarray | np.generic | float) else x.sin()


def _cos(x: Coordinate) -> Coordinate:
    return np.cos(x) if isinstance(x, np.ndarray | np.generic | float) else x.cos()


def _exp(x: Coordinate) -> Coordinate:
    return np.exp(x) if isinstance(x, np.ndarray | np.generic | float) else x.exp()
