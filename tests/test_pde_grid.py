"""The grid, its differences, and the functions to relax."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from deeprelax_cuda.pde import Grid, Landscape, differences, double_well, rugged


def test_a_grid_has_its_walls_among_its_nodes() -> None:
    grid = Grid((-1.0, 0.0), (1.0, 3.0), (5, 4))
    assert grid.shape == (5, 4)
    assert grid.spacing == (0.5, 1.0)
    assert grid.nodes.shape == (2, 5, 4)
    assert grid.nodes[:, 0, 0].tolist() == [-1.0, 0.0]
    assert grid.nodes[:, -1, 1].tolist() == [1.0, 1.0]
    assert Grid(0, 1, 3) == Grid([0.0], [1.0], [3])


def test_the_integral_is_the_trapezoidal_rule() -> None:
    grid = Grid((0.0, -1.0), (2.0, 1.0), (41, 31))
    assert grid.integrate(np.ones(grid.shape)) == pytest.approx(4.0, rel=1e-14)
    x, y = grid.nodes
    assert grid.integrate(3.0 * x + y + 1.0) == pytest.approx(16.0, rel=1e-14)  # exact for what is linear
    assert grid.integrate(x**2) == pytest.approx(2.0 * 8.0 / 3.0, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1.0, 2), "points: expected 3 or more nodes, got 2"),
        ((1.0, 1.0, 5), "lower, upper: expected finite walls, lower < upper, got 1.0 and 1.0"),
        ((1e16, 1e16 + 8.0, 9), "points: expected nodes that float64 tells well apart"),
        ((-1e308, 1e308, 5), "points: expected nodes that float64 tells well apart"),
        ((0.0, math.inf, 5), "lower, upper: expected finite walls"),
        ((0.0, math.nan, 5), "lower, upper: expected finite walls"),
        (((0.0, 0.0), (1.0, 1.0), 5), "lower, upper, points: expected 1 or 2 numbers each"),
        (((0.0,) * 3, (1.0,) * 3, (5,) * 3), "lower, upper, points: expected 1 or 2 numbers each"),
    ],
)
def test_a_wrong_grid_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(*arguments)


def test_half_a_node_is_refused() -> None:
    with pytest.raises(TypeError):
        Grid(0.0, 1.0, 5.9)  # type: ignore[arg-type]


def test_values_of_another_shape_or_not_finite_are_refused() -> None:
    grid = Grid(0.0, 1.0, 5)
    with pytest.raises(ValueError, match=r"values: expected shape \(5,\), got \(4,\)"):
        differences(np.zeros(4), grid)
    with pytest.raises(ValueError, match="values: expected finite numbers, got nan"):
        differences([0.0, math.nan, 0.0, 0.0, 0.0], grid)


def test_differences_are_of_second_order() -> None:
    """Halving the spacing quarters the error of gradient and Hessian; at the walls that of the Hessian halves."""
    errors = []
    for n in (41, 81):
        grid = Grid((-1.0, 0.0), (1.0, 2.0), (n, n))
        x, y = grid.nodes
        jet = differences(np.sin(2.0 * x) * np.exp(y), grid)
        gradient = np.array([2.0 * np.cos(2.0 * x), np.sin(2.0 * x)]) * np.exp(y)
        mixed = 2.0 * np.cos(2.0 * x) * np.exp(y)
        hessian = np.array([[-4.0 * jet.value, mixed], [mixed, jet.value]])
        off = np.abs(jet.hessian - hessian)
        errors.append([np.abs(jet.gradient - gradient).max(), off[:, :, 1:-1, 1:-1].max(), off.max()])
    assert np.allclose(np.log2(np.divide(*errors)), [2.0, 2.0, 1.0], atol=0.15)


@pytest.mark.parametrize(
    ("landscape", "grid"),
    [(rugged(), Grid(-3.0, 3.0, 6001)), (double_well(), Grid((-2.0, -2.0), (2.0, 2.0), (801, 801)))],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_gradient_of_a_landscape_is_that_of_its_value(landscape: Landscape, grid: Grid) -> None:
    measured = differences(landscape.on(grid), grid).gradient
    assert np.allclose(measured, landscape.gradient_on(grid), rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("landscape", [rugged(), double_well()], ids=lambda value: value.name)
def test_torch_sees_the_function_that_numpy_sees(landscape: Landscape) -> None:
    x = np.linspace(-2.0, 2.0, 101)
    coordinates = (x,) if landscape.name == "rugged" else (x, x[::-1].copy())
    tensors = [torch.from_numpy(c).requires_grad_() for c in coordinates]
    value = landscape.value(*tensors)
    assert np.allclose(value.detach().numpy(), landscape.value(*coordinates), rtol=0.0, atol=1e-12)
    by_autograd = torch.autograd.grad(value.sum(), tensors)
    for got, want in zip(landscape.gradient(*tensors), by_autograd, strict=True):
        assert torch.allclose(got, want, rtol=0.0, atol=1e-10)


def test_the_rugged_function_has_the_noise_it_names() -> None:
    """Over its period the noise has the root mean square that was asked for, and falls off with distance as was asked for."""
    x = np.linspace(-4.0, 4.0, 8001)[:-1]
    noise = rugged(noise=0.5, length=0.3, seed=3).value(x) - rugged(noise=0.0).value(x)
    assert math.sqrt(np.mean(noise**2)) == pytest.approx(0.5, rel=1e-9)
    assert abs(noise.mean()) < 1e-12
    # Waves k of amplitude exp(-(k w l)^2/4), no constant: the correlation at l, over seeds, is that of their squares.
    squares = np.exp(-((np.arange(1, 24) * 2.0 * math.pi / 8.0 * 0.3) ** 2) / 2.0)
    want = np.average(np.cos(np.arange(1, 24) * 2.0 * math.pi / 8.0 * 0.3), weights=squares)
    assert want == pytest.approx(math.exp(-0.5), abs=0.05)
    waves = [rugged(length=0.3, seed=seed).value(x) - rugged(noise=0.0).value(x) for seed in range(400)]
    at_length = np.sum([one @ np.roll(one, 300) for one in waves]) / np.sum([one @ one for one in waves])
    assert at_length == pytest.approx(want, abs=0.03)
