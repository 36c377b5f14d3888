"""The other methods against closed forms, on quadratics and cosines, through the public API.

Hamilton-Jacobi is deterministic: in float64 it must come to its closed form but for rounding. HEAT and SGLD are run at 10^6
coordinates from a start without chance, so that the deviation of each mean and variance from its closed form, over the standard
error of that, is a standard normal if the method is right. The mutants are wrong algorithms, put into the same optimizers, and
must fail the same bounds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from quadratic_law import Law
from torch import Tensor, nn
from wrong_steps import Mutation, Step, count_over_periods, gamma_by, numbers, step_as, weight_by

import deeprelax_cuda as dr
from deeprelax_cuda import backends
from deeprelax_cuda.steps import Scalars, Tensors

N = 1_000_000
#: In standard errors, of some ten numbers each.
BOUND = 4.0
#: Of the closed forms without chance, in float64.
EXACT = 1e-12

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:lr=0 hardly moves")]
NATIVE = pytest.mark.skipif("cpu" not in backends.available("cpu"), reason="10^6 coordinates need the native module")

#: The z-scores of a run, or its errors over `EXACT`, each against the closed form that its name says.
Scores = dict[str, float]


def of_sample(name: str, sample: Tensor, mean: float, variance: float, fourth: float | None = None) -> Scores:
    """Return the z-scores of the mean and the variance of a sample.

    ``fourth`` is the fourth central moment of the law, that of a normal one where it is not given.
    """
    deviations = sample.detach().double() - mean
    n = deviations.numel()
    spread = math.sqrt(((3.0 * variance**2 if fourth is None else fourth) - variance**2) / n)
    of_mean = float(deviations.mean()) / math.sqrt(variance / n)
    return {f"mean {name}": of_mean, f"variance {name}": (float(deviations.square().mean()) - variance) / spread}


def error(got: Tensor, want: Tensor, exact: float = EXACT) -> float:
    """Return the largest error over ``exact``, relative to numbers above 1; they grow where a curvature is negative."""
    return float(((got.detach() - want).abs() / want.abs().clamp(min=1.0)).max()) / exact


def is_right(scores: Scores, bound: float) -> bool:
    return all(abs(score) < bound for score in scores.values())  # a NaN is not


# ---- Hamilton-Jacobi ---------------------------------------------------------------------------------------------------------

#: Curvatures of the loss; the start x of each coordinate is below.
CURVATURES = torch.tensor([0.0, 0.3, 1.0, 4.0, -0.5, -1.0], dtype=torch.float64)
STARTS = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, 2.0], dtype=torch.float64)
ANY: dict[str, Any] = {"momentum": 0.0, "scoping": 0.0, "seed": 0}
FIXED_POINTS: list[dict[str, Any]] = [
    {"gamma": 0.6, "inner_steps": 1},
    {"gamma": 0.6, "inner_steps": 2},
    {"gamma": 0.6, "inner_steps": 7, "weight_decay": 0.2},
    {"gamma": 0.4, "inner_steps": 60, "averaging": 0.4},
    {"gamma": 0.2, "inner_steps": 5, "averaging": "last", "scoping": 0.5},
    {"gamma": 0.2, "inner_steps": 6, "averaging": "linear", "maximize": True},
    {"gamma": 0.9, "inner_steps": 4, "averaging": 0.0, "outer_weight_decay": 0.3},
]


def fixed_point(options: dict[str, Any], **shared: Any) -> Scores:
    """Take three periods on f = h/2 y^2: with p* = h x/(1 + gamma*h), the distance of p to it falls by a factor a step.

    The first gradient of a period is h*x; each that follows multiplies the distance by 1 - a*(1 + gamma*h).
    """
    p = nn.Parameter(STARTS.clone())
    options = {**ANY, "lr": 0.3, **options}
    optimizer = dr.HamiltonJacobi([p], **options, **shared)
    length, averaging = options["inner_steps"], options.get("averaging", 0.75)
    scores, x = {}, STARTS.clone()
    for period in range(3):
        gamma = options["gamma"] / (1.0 + options["scoping"]) ** period
        h = CURVATURES * (-1.0 if options.get("maximize") else 1.0) + options.get("weight_decay", 0.0)
        direction = h * x / (1.0 + gamma * h)
        left = h * x - direction
        for j in range(2, length + 1):
            a = {"linear": 1.0 / j, "last": 1.0}.get(averaging) or 1.0 - averaging
            left = left * (1.0 - a * (1.0 + gamma * h))
        for _ in range(length):
            p.grad = CURVATURES * p.detach()
            optimizer.step()
        state = optimizer.state[p]
        scores[f"p of period {period}"] = error(state["gradient_average"], direction + left)
        x = x - 0.3 * (direction + left + options.get("outer_weight_decay", 0.0) * x)
        scores[f"x of period {period}"] = error(state["anchor"], x)
        scores[f"y of period {period}"] = error(p.detach(), x)
    return scores


def all_fixed_points() -> Scores:
    runs = enumerate(FIXED_POINTS)
    return {f"{name} of run {i}": score for i, options in runs for name, score in fixed_point(options).items()}


@pytest.mark.parametrize("options", FIXED_POINTS, ids=str)
def test_the_fixed_point_goes_to_its_closed_form(options: dict[str, Any]) -> None:
    for clocked in (False, True):
        scores = fixed_point(options, capturable=clocked)
        assert is_right(scores, 1.0), (clocked, scores)


def test_a_long_period_ends_in_the_gradient_of_the_envelope() -> None:
    """h x/(1 + t h) on quadratics."""
    p = nn.Parameter(STARTS.clone())
    optimizer = dr.HamiltonJacobi([p], gamma=0.5, inner_steps=400, **ANY)
    for _ in range(400):
        p.grad = CURVATURES * p.detach()
        optimizer.step()
    want = CURVATURES * STARTS / (1.0 + 0.5 * CURVATURES)
    assert torch.allclose(optimizer.state[p]["gradient_average"], want, rtol=0.0, atol=1e-12)


WAVE, WIDTH = 2.0, 0.2
#: Where cos(WAVE*x) is of either curvature, WIDTH*WAVE^2 = 0.8 < 1 in size: the proximal point is one, and contracts.
PLACES = torch.linspace(-3.0, 3.0, 13, dtype=torch.float64)


def envelope_gradient() -> Tensor:
    """Of f = cos(WAVE*y): (x - y*)/t for the y* that minimises f(y) + (y - x)^2/(2t), found by bisection of its slope.

    With t*WAVE^2 < 1 the slope is increasing.
    """
    low, high = PLACES - 1.0, PLACES + 1.0
    for _ in range(80):
        middle = (low + high) / 2.0
        rises = -WAVE * torch.sin(WAVE * middle) + (middle - PLACES) / WIDTH > 0.0
        low, high = torch.where(rises, low, middle), torch.where(rises, middle, high)
    return (PLACES - low) / WIDTH


@pytest.mark.parametrize("averaging", [None, 0.2, "last"])
def test_the_fixed_point_on_cosines(averaging: Any) -> None:
    p = nn.Parameter(PLACES.clone())
    optimizer = dr.HamiltonJacobi([p], gamma=WIDTH, inner_steps=400, averaging=averaging, **ANY)
    for _ in range(400):
        p.grad = -WAVE * torch.sin(WAVE * p.detach())
        optimizer.step()
    assert torch.allclose(optimizer.state[p]["gradient_average"], envelope_gradient(), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_the_proximal_loop_on_cosines(momentum: float) -> None:
    p = nn.Parameter(PLACES.clone())
    optimizer = dr.HamiltonJacobi(
        [p], lr=1.0, inner="prox", gamma=WIDTH, inner_lr=0.1, inner_steps=600, inner_momentum=momentum, **ANY
    )
    for _ in range(600):
        p.grad = -WAVE * torch.sin(WAVE * p.detach())
        optimizer.step()
    assert torch.allclose((PLACES - p.detach()) / WIDTH, envelope_gradient(), rtol=0.0, atol=1e-10)


PROXIMAL_LOOPS: list[dict[str, Any]] = [
    {"gamma": 0.5, "inner_lr": 0.2, "inner_steps": 1},
    {"gamma": 0.5, "inner_lr": 0.2, "inner_steps": 4, "weight_decay": 0.2},
    {"gamma": 0.9, "inner_lr": 0.1, "inner_steps": 9, "scoping": 0.4},
    {"gamma": 0.9, "inner_lr": 0.3, "inner_steps": 400, "outer_weight_decay": 0.2},
    {"gamma": 0.5, "inner_lr": 0.05, "inner_steps": 5, "maximize": True, "averaging": "last"},
]


def proximal_loop(options: dict[str, Any]) -> Scores:
    """Take three periods on f = h/2 y^2: x - y goes to t h x/(1 + t h) by the factor 1 - inner_lr*(h + 1/t) a step."""
    p = nn.Parameter(STARTS.clone())
    options = {**ANY, "lr": 0.6, "inner": "prox", **options}
    optimizer = dr.HamiltonJacobi([p], **options)
    scores, x = {}, STARTS.clone()
    for period in range(3):
        gamma = options["gamma"] / (1.0 + options["scoping"]) ** period
        h = CURVATURES * (-1.0 if options.get("maximize") else 1.0) + options.get("weight_decay", 0.0)
        way = gamma * h * x / (1.0 + gamma * h)
        way = way * (1.0 - (1.0 - options["inner_lr"] * (h + 1.0 / gamma)) ** options["inner_steps"])
        for _ in range(options["inner_steps"]):
            p.grad = CURVATURES * p.detach()
            optimizer.step()
        x = x - 0.6 * (way + options.get("outer_weight_decay", 0.0) * x)
        scores[f"x of period {period}"] = error(optimizer.state[p]["anchor"], x)
    return scores


@pytest.mark.parametrize("options", PROXIMAL_LOOPS, ids=str)
def test_the_proximal_loop_goes_to_its_closed_form(options: dict[str, Any]) -> None:
    assert is_right(proximal_loop(options), 1.0), proximal_loop(options)


def all_proximal_loops() -> Scores:
    runs = enumerate(PROXIMAL_LOOPS)
    return {f"{name} of run {i}": score for i, options in runs for name, score in proximal_loop(options).items()}


# ---- HEAT --------------------------------------------------------------------------------------------------------------------


#: Wave number, place, gamma, temperature, wave numbers times the perturbation near 1: there the mean depends on it most.
WAVES = ((1.5, 0.7, 0.5, 0.8), (3.0, -0.2, 0.3, 0.25))
LENGTH = 3


def normal_mean(function: Callable[[np.ndarray], np.ndarray]) -> float:
    """Return the mean of a smooth function of a standard normal, by Gauss and Hermite."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return float(weights @ function(nodes) / weights.sum())


def deviation_of_slope(w: float, x: float, std: float, mean: float, power: int, z: np.ndarray) -> np.ndarray:
    return (-w * np.sin(w * (x + std * z)) - mean) ** power


def heat_on_cosines(n: int = N, **options: Any) -> Scores:
    """Take three periods on f = cos(w y), lr 0, so that each is a sample about the same x; look at the p of each.

    p is a mean over ``LENGTH`` gradients, in the first period over one less, at y = x + sqrt(gamma*T) z, so its mean is
    -w exp(-w^2 gamma T/2) sin(w x), and moments of -w sin(w y) follow from the same formula or a quadrature.
    """
    groups = []
    for _, x, gamma, temperature in WAVES:
        groups.append({"params": [nn.Parameter(torch.full((n,), x))], "gamma": gamma, "temperature": temperature})
    optimizer = dr.HeatSGD(groups, lr=0.0, inner_steps=LENGTH, scoping=0.0, momentum=0.0, seed=3, **options)
    params = [group["params"][0] for group in groups]
    scores: Scores = {}
    for step in range(3 * LENGTH):
        for p, (w, *_) in zip(params, WAVES, strict=True):
            p.grad = torch.mul(p.detach(), w).sin_().mul_(-w)
        optimizer.step()
        if (step + 1) % LENGTH == 0:
            period = step // LENGTH
            for p, (w, x, gamma, temperature) in zip(params, WAVES, strict=True):
                count = LENGTH - (period == 0)
                mean = -w * math.exp(-(w**2) * gamma * temperature / 2.0) * math.sin(w * x)
                std = math.sqrt(gamma * temperature)
                moments = [normal_mean(partial(deviation_of_slope, w, x, std, mean, e)) for e in (1, 2, 4)]
                assert abs(moments[0]) < 1e-12
                variance = moments[1] / count
                fourth = (moments[2] + 3.0 * (count - 1) * moments[1] ** 2) / count**3
                name = f"of p at w={w} in period {period}"
                scores |= of_sample(name, optimizer.state[p]["gradient_average"], mean, variance, fourth)
                scores |= of_sample(f"of y at w={w} in period {period}", p, x, std**2)
    return scores


@NATIVE
def test_heat_on_cosines() -> None:
    scores = heat_on_cosines()
    assert is_right(scores, BOUND), scores
    # Scores that were small for want of chance would show nothing.
    assert 0.6 < math.sqrt(sum(score**2 for score in scores.values()) / len(scores)) < 1.5


@pytest.mark.parametrize("options", [{"backend": "eager"}, {"capturable": True}], ids=str)
def test_so_is_heat_in_eager_and_with_a_clock(options: dict[str, Any]) -> None:
    scores = heat_on_cosines(20_000, **options)
    assert is_right(scores, BOUND), scores


def heat_on_quadratics(n: int = N) -> Scores:
    """Take three periods on f = h/2 (y - c)^2 with all options: everything is a linear function of the normals z drawn.

    The numbers of a coordinate are rows: the coefficients of 1 and of each z, in a program that nothing of the package is in.
    """
    h, c, start, length = 1.2, 0.5, -1.0, 4
    options: dict[str, Any] = {"lr": 0.4, "momentum": 0.5, "nesterov": True, "weight_decay": 0.3, "outer_weight_decay": 0.2}
    options |= {"gamma": 0.8, "temperature": 0.5, "scoping": 0.25, "gamma_min": 0.55}
    p = nn.Parameter(torch.full((n,), start))
    optimizer = dr.HeatSGD([p], inner_steps=length, seed=8, **options)
    one, *normals = np.eye(1 + 3 * length)
    x = y = start * one
    average = w = 0.0 * one
    scores: Scores = {}
    counted = 0
    for step in range(3 * length):
        gamma = max(options["gamma_min"], options["gamma"] / 1.25 ** (step // length))
        if step > 0:
            counted += 1
            d = h * (y - c * one) + options["weight_decay"] * y
            average = average + (d - average) / counted
        y = x + math.sqrt(gamma * options["temperature"]) * normals[step]
        if (step + 1) % length == 0:
            d = average + options["outer_weight_decay"] * x
            w = options["momentum"] * w + d
            x = x - options["lr"] * (d + options["momentum"] * w)
            y = x + math.sqrt(gamma * options["temperature"]) * normals[step]
            counted = 0
        p.grad = torch.sub(p.detach(), c).mul_(h)
        optimizer.step()
        if step in (2, 3, 5, 11):
            state = optimizer.state[p]
            held = {"x": (state["anchor"], x), "y": (p.detach(), y), "p": (state["gradient_average"], average)}
            held |= {"w": (state["outer_momentum"], w)}
            held |= {f"{a}+{b}": (held[a][0] + held[b][0], held[a][1] + held[b][1]) for a, b in itertools.combinations(held, 2)}
            for name, (sample, row) in held.items():
                if variance := float(row[1:] @ row[1:]):
                    scores |= of_sample(f"of {name} after step {step}", sample, row[0], variance)
                else:
                    scores[f"{name} after step {step}"] = error(sample, torch.tensor(row[0]), 1e-6)
    return scores


@NATIVE
def test_heat_on_quadratics() -> None:
    scores = heat_on_quadratics()
    assert is_right(scores, BOUND), scores


# ---- SGLD --------------------------------------------------------------------------------------------------------------------

#: Curvature, start, options; the second step is so large, lr*H = 1.5, that the variance is 4 times T/H.
SAMPLERS: tuple[tuple[float, float, dict[str, Any]], ...] = (
    (1.0, 1.0, {"lr": 0.1, "gamma": 2.0, "temperature": 0.3}),
    (2.0, -0.5, {"lr": 0.6, "gamma": 2.0, "temperature": 1.0}),
    (0.8, 0.7, {"lr": 0.5, "temperature": 0.05}),
    (-0.5, 1.0, {"lr": 0.4, "gamma": 0.8, "temperature": 0.4, "weight_decay": 0.3}),
    (-1.5, -1.0, {"lr": 0.3, "gamma": 1.5, "temperature": 0.02, "maximize": True}),
)
LOOKS = (1, 2, 5, 40)


def sgld(n: int = N, **shared: Any) -> Scores:
    """Take steps on f = h/2 y^2 from y = x: a recursion of order one, with the factor b = 1 - lr*H a step.

    Mean x/(gamma*H) + b^n x (1 - 1/(gamma*H)), variance T/(H (1 - lr*H/2)) (1 - b^(2n)), H = h + weight_decay + 1/gamma.
    """
    groups = [{"params": [nn.Parameter(torch.full((n,), start))], **options} for _, start, options in SAMPLERS]
    optimizer = dr.SGLD(groups, lr=0.1, temperature=1.0, seed=6, **shared)
    params = [group["params"][0] for group in groups]
    for p in params:
        p.grad = torch.empty_like(p)
    scores: Scores = {}
    for step in range(1, LOOKS[-1] + 1):
        for p, (h, *_) in zip(params, SAMPLERS, strict=True):
            torch.mul(p.detach(), h, out=p.grad)
        optimizer.step()
        for i, (p, (h, start, options)) in enumerate(zip(params, SAMPLERS, strict=True)) if step in LOOKS else ():
            sign, k = (-1.0 if options.get("maximize") else 1.0), 1.0 / options.get("gamma", math.inf)
            H, lr = sign * h + options.get("weight_decay", 0.0) + k, options["lr"]
            b = 1.0 - lr * H
            mean = start * (k / H + b**step * (1.0 - k / H))
            variance = options["temperature"] / (H * (1.0 - lr * H / 2.0)) * (1.0 - b ** (2 * step))
            scores |= of_sample(f"of sampler {i} after {step} steps", p, mean, variance)
    return scores


@NATIVE
def test_sgld_on_quadratics() -> None:
    scores = sgld()
    assert is_right(scores, BOUND), scores
    assert 0.6 < math.sqrt(sum(score**2 for score in scores.values()) / len(scores)) < 1.5


@pytest.mark.parametrize("options", [{"backend": "eager"}, {"capturable": True}], ids=str)
def test_so_is_sgld_in_eager_and_with_a_clock(options: dict[str, Any]) -> None:
    scores = sgld(5_000, **options)
    assert is_right(scores, BOUND), scores


def test_noise_of_sgld_follows_a_scheduled_lr() -> None:
    """The variance goes by (1 - lr*h)^2 and 2*lr*T a step, whatever lr is at each."""
    p = nn.Parameter(torch.zeros(100_000))
    optimizer = dr.SGLD([p], lr=0.8, temperature=0.5, seed=1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    variance, lr = 0.0, 0.8
    for step in range(4):
        p.grad = 1.5 * p.detach()
        optimizer.step()
        scheduler.step()
        variance, lr = (1.0 - 1.5 * lr) ** 2 * variance + 2.0 * lr * 0.5, lr / 2.0
        scores = of_sample(f"after {step + 1} steps", p, 0.0, variance)
        assert is_right(scores, BOUND), scores


def test_sgld_forgets_its_start_as_the_closed_form_does() -> None:
    """Two samplers with the same noise from two starts: their distance has no chance in it."""
    params = [nn.Parameter(torch.full((50,), start, dtype=torch.float64)) for start in (0.0, 1.0)]
    optimizers = [dr.SGLD([p], lr=0.25, temperature=0.5, seed=1) for p in params]
    for step in range(1, 6):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = 1.2 * p.detach()
            optimizer.step()
        assert torch.allclose(params[1] - params[0], torch.full((50,), (1.0 - 0.25 * 1.2) ** step, dtype=torch.float64))


# ---- Controlled SGD ----------------------------------------------------------------------------------------------------------

CONTROLLED: dict[str, Any] = {
    **{"lr": 0.7, "inner_lr": 0.2, "inner_steps": 3, "gamma": 1.0, "scoping": 0.0, "gamma_min": 0.3, "gamma_total": 2.0},
    **{"temperature": 0.2, "averaging": "linear", "momentum": 0.4, "inner_momentum": 0.3, "nesterov": True},
    **{"dampening": 0.0, "weight_decay": 0.1, "outer_weight_decay": 0.0, "maximize": False},
    **{"coupling_in_momentum": True, "reset_inner_momentum": False},
}


def controlled_sgd(n: int = N) -> Scores:
    """Take four periods, in the last of which gamma is at its floor: 2, 1.4, 0.8, 0.3."""
    p = nn.Parameter(torch.full((n,), 0.5))
    optimizer = dr.EntropySGD([p], seed=2, **CONTROLLED)
    law = Law(0.9, -1.0, 0.5, CONTROLLED)
    scores: Scores = {}
    for step in range(12):
        gamma = max(0.3, 2.0 - (step // 3) * 3 * 0.2)
        scores[f"gamma of step {step}"] = (float(optimizer.param_groups[0]["gamma"]) - gamma) / EXACT
        p.grad = torch.sub(p.detach(), -1.0).mul_(0.9)
        optimizer.step()
        law.step()
        if step % 3 == 2:
            scores |= of_sample(f"of x after step {step}", optimizer.state[p]["anchor"], law.mean[0], law.cov[0, 0])
        else:
            scores |= of_sample(f"of y after step {step}", p, law.mean[1], law.cov[1, 1])
    return scores


@NATIVE
def test_controlled_sgd_follows_the_law() -> None:
    scores = controlled_sgd()
    assert is_right(scores, BOUND), scores


# ---- The mutants -------------------------------------------------------------------------------------------------------------


def p_kept(step: Step, tensors: Tensors, grads: list[Tensor], h: Scalars) -> None:
    """Leave p as an outer step leaves m: at the anchor."""
    step(grads, h)
    for p, x in zip(tensors.averages, tensors.anchors, strict=True) if h.outer else ():
        p.copy_(x)


def outer_step_with(change: Callable[[Scalars], dict[str, Any]]) -> Mutation:
    """Replace numbers of each outer step."""

    def changed(step: Step, tensors: Tensors, grads: list[Tensor], h: Scalars) -> None:
        step(grads, replace(h, outer=False))
        if h.outer:
            step([], replace(h, inner=False, **change(h)))

    return step_as(changed)


def first_count(value: int) -> Mutation:
    return lambda patch: patch.setattr(dr.HeatSGD, "FIRST_COUNT", value)


def anchor_follows(step: Step, tensors: Tensors, grads: list[Tensor], h: Scalars) -> None:
    step(grads, h)
    for x, y in zip(tensors.anchors, tensors.params, strict=False):
        x.copy_(y.detach())


COUNTS: dict[str, Mutation] = {
    "the mean weighs by 1/(j + 1)": weight_by(lambda weight, count, constant: weight(count + 1)),
    "the mean weighs by 1/(j - 1)": weight_by(lambda weight, count, constant: weight(max(1, count - 1))),
    "the mean goes on over periods": count_over_periods,
}
RUNS: dict[str, tuple[Callable[[], Scores], float, dict[str, Mutation]]] = {
    "fixed point": (
        *(all_fixed_points, 1.0),
        {
            **COUNTS,
            "the last period's p carried over": weight_by(
                lambda weight, count, constant: weight(count) if weight(2) < 0 else constant
            ),
            "drift sign": numbers(lambda h: {"c": -h.c}),
            "drift dropped": numbers(lambda h: {"c": 0.0}),
            "drift 1/gamma": numbers(lambda h: {"c": 1.0 / h.c}),
            "averaging reversed": numbers(lambda h: {"a": 1.0 - h.a if h.a < 1.0 else 1.0}),
            "damping dropped": weight_by(lambda weight, count, constant: 1.0),
            "p left at x": step_as(p_kept),
            "outer direction times gamma": numbers(lambda h: {"lr": h.lr * h.c}),
            "gamma not scoped": gamma_by(lambda o: {"outer_steps": 0}),
            "maximize ignored": numbers(lambda h: {"maximize": False}),
            "inner decay in the outer step": numbers(lambda h: {"wd": 0.0, "wd_o": h.wd_o + h.wd}),
        },
    ),
    "prox": (
        *(all_proximal_loops, 1.0),
        {
            "coupling sign": numbers(lambda h: {"k": -h.k}),
            "coupling dropped": numbers(lambda h: {"k": 0.0}),
            "gamma taken for the stiffness": numbers(lambda h: {"k": 1.0 / h.k}),
            "averaged": numbers(lambda h: {"a": 0.25}),
            "noise": numbers(lambda h: {"s": 1e-6}),
            "inner_lr and lr interchanged": numbers(lambda h: {"eta": h.lr, "lr": h.eta}),
            "gamma not scoped": gamma_by(lambda o: {"outer_steps": 0}),
        },
    ),
    "heat": (
        *(heat_on_cosines, BOUND),
        {
            **COUNTS,
            "the gradient at x counts": first_count(0),
            "two gradients do not count": first_count(-2),
            "noise 1 % too strong": numbers(lambda h: {"s": 1.01 * h.s}),
            "noise sqrt(2) too strong": numbers(lambda h: {"s": 2**0.5 * h.s}),
            "noise gamma*T": numbers(lambda h: {"s": h.s**2}),
            "noise reused at every step": numbers(lambda h: {"step": 0}),
            "drift as in Hamilton-Jacobi": numbers(lambda h: {"c": 0.1}),
            "the last gradient alone": weight_by(lambda weight, count, constant: float(count > 0)),
            "y at x after an outer step": outer_step_with(lambda h: {"s": 0.0}),
        },
    ),
    "heat on quadratics": (
        *(heat_on_quadratics, BOUND),
        {
            "the next noise in the outer step": outer_step_with(lambda h: {"step": h.step + 1}),
            "gamma not scoped": gamma_by(lambda o: {"outer_steps": 0}),
            "inner decay dropped": numbers(lambda h: {"wd": 0.0}),
            "outer decay dropped": numbers(lambda h: {"wd_o": 0.0}),
            "outer nesterov dropped": numbers(lambda h: {"nesterov_o": False}),
            "p left at x": step_as(p_kept),
            "the gradient at x counts": first_count(0),
        },
    ),
    "sgld": (
        *(sgld, BOUND),
        {
            "noise sqrt(T*lr), the factor 2 lost": numbers(lambda h: {"s": 0.5**0.5 * h.s}),
            "noise 1 % too strong": numbers(lambda h: {"s": 1.01 * h.s}),
            "temperature taken for its root": numbers(lambda h: {"s": h.s**2 / (2.0 * h.eta) ** 0.5}),
            "coupling dropped": numbers(lambda h: {"k": 0.0}),
            "coupling sign": numbers(lambda h: {"k": -h.k}),
            "gamma taken for the stiffness": numbers(lambda h: {"k": 1.0 / h.k if h.k else 0.0}),
            "anchor follows the sample": step_as(anchor_follows),
            "noise reused at every step": numbers(lambda h: {"step": 0}),
            "noise of lr 1": numbers(lambda h: {"s": h.s / h.eta**0.5}),
            "maximize ignored": numbers(lambda h: {"maximize": False}),
            "decay dropped": numbers(lambda h: {"wd": 0.0}),
        },
    ),
    "controlled": (
        *(controlled_sgd, BOUND),
        {
            "gamma does not run": gamma_by(lambda o: {"outer_steps": 0}),
            "gamma runs in outer steps": gamma_by(lambda o: {"inner_steps": 1}),
            "gamma runs at every step": gamma_by(lambda o: {"outer_steps": o["step"]}),
            "no floor": gamma_by(lambda o: {"gamma_min": 1e-9}),
            "gamma grows": gamma_by(lambda o: {"initial_inner_lr": -o["initial_inner_lr"]}),
        },
    ),
}


@NATIVE
@pytest.mark.slow
@pytest.mark.mutant("the other methods")
@pytest.mark.parametrize(("run", "name"), [(run, name) for run, (*_, mutants) in RUNS.items() for name in mutants])
def test_the_mutant_is_caught(
    run: str, name: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[..., None]
) -> None:
    scores, bound, mutants = RUNS[run]
    mutants[name](monkeypatch)
    found = scores()
    record_property("largest score", max(map(abs, found.values())))
    assert not is_right(found, bound), found
