"""EntropySGD follows its exact law: 10^6 coordinates on quadratics against the mean and covariance of `quadratic_law`.

The optimizer itself is run, on gradients set by hand, from a start without chance, so that all that varies comes from its
noise. Every mean, variance and covariance within and between the tensors of a run becomes a z-score, a standard normal if the
optimizer is right. The mutants are wrong algorithms, put into the same optimizer, and must fail the same bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from quadratic_law import NAMES, Law
from torch import Tensor, nn
from wrong_steps import Mutation, Step, count_over_periods, gamma_by, noises, numbers, step_as, streams, weight_by

import deeprelax_cuda as dr
from deeprelax_cuda import backends
from deeprelax_cuda.optim.weights import TwoWeights
from deeprelax_cuda.steps import Scalars, Tensors

N = 1_000_000
#: Far out for the largest of some ten thousand standard normals; a noise that is 1 % too strong gives 14.
BOUND = 5.0
ROLES = {"x": "anchor", "m": "average", "v": "momentum", "w": "outer_momentum"}
PLAIN: dict[str, Any] = {
    "lr": 0.5,
    "inner_lr": 0.1,
    "gamma": 1.0,
    "scoping": 0.0,
    "gamma_min": 0.0,
    "gamma_total": None,
    "temperature": 0.1,
    "averaging": 0.75,
    "momentum": 0.0,
    "inner_momentum": 0.0,
    "nesterov": False,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "outer_weight_decay": 0.0,
    "maximize": False,
}


def setting(*quadratics: tuple[float, float, float], **options: Any) -> tuple[list[tuple[float, float, float]], dict[str, Any]]:
    """Return a param group: (h, target, start) of each of its tensors, and its options."""
    return list(quadratics), {**PLAIN, **options}


@dataclass(frozen=True)
class Run:
    """An optimizer with several groups, looked at after some of its steps."""

    shared: dict[str, Any]
    groups: list[tuple[list[tuple[float, float, float]], dict[str, Any]]]
    looks: tuple[int, ...]


def run(inner_steps: int, coupling: bool, reset: bool, seed: int, looks: tuple[int, ...], *groups: Any) -> Run:
    shared = {"inner_steps": inner_steps, "coupling_in_momentum": coupling, "reset_inner_momentum": reset, "seed": seed}
    return Run(shared, list(groups), looks)


# Temperatures of 0.01 to 1 and weights of the order of 1: the rounding of float32 stays far below the statistical error. The
# looks are after 1, 2, 3 and more whole periods, and inside of periods.
RUNS = {
    "periods of one step": run(
        *(1, True, False, 5, (1, 2, 3, 7, 12)),
        setting((1.0, 1.0, 0.0), averaging="last", lr=1.0, gamma=float("inf"), inner_momentum=0.9),  # SGD with noise
        setting((1.5, -0.5, 0.5), averaging="linear", inner_momentum=0.5, nesterov=True, momentum=0.5, lr=0.6, scoping=0.1),
    ),
    "coupling outside, kept": run(
        *(2, False, False, 4, (1, 2, 4, 6, 11, 16)),
        setting((1.0, -1.0, 1.0), inner_momentum=0.8, averaging=0.2, momentum=0.6, gamma=0.5, inner_lr=0.2, temperature=1.0),
        setting((0.3, 2.0, 1.0), inner_momentum=0.6, nesterov=True, averaging="linear", scoping=0.5, gamma=3.0, lr=0.9),
        setting((2.0, 0.0, 1.0), averaging=0.0, momentum=0.8, nesterov=True, lr=0.1, outer_weight_decay=0.5, gamma=0.4),
    ),
    "coupling inside, cleared": run(
        *(5, True, True, 3, (3, 5, 10, 15, 22, 30)),
        setting(
            (1.0, 0.0, 2.0), inner_momentum=0.9, nesterov=True, averaging="linear", gamma=4.0, scoping=0.1, temperature=0.01
        ),
        setting((3.0, 1.0, 0.0), inner_momentum=0.5, weight_decay=0.5, outer_weight_decay=0.3, lr=0.7, temperature=0.3),
        setting((0.5, 1.5, 0.0), averaging=0.9, inner_lr=0.4, gamma_total=10.0, gamma_min=1.0, momentum=0.7, lr=0.2),
    ),
    "coupling outside, cleared": run(
        *(3, False, True, 2, (2, 3, 6, 9, 13, 18)),
        setting(
            *((1.2, 1.0, 2.0), (0.4, -1.0, 0.0)),
            **{"averaging": 0.4, "inner_momentum": 0.7, "nesterov": True, "momentum": 0.6, "lr": 0.4},
            **{"scoping": 0.3, "gamma_min": 0.5, "weight_decay": 0.1, "outer_weight_decay": 0.1},
        ),
        setting(
            (2.0, 0.5, 0.0),
            **{"averaging": "linear", "inner_momentum": 0.9, "dampening": 0.5, "temperature": 0.5, "gamma": 0.7},
        ),
        setting(
            (-1.0, 1.0, -0.5),
            **{"maximize": True, "inner_momentum": 0.5, "nesterov": True, "dampening": 0.4, "weight_decay": 0.2, "lr": 1.0},
        ),
        setting((0.8, -1.0, 1.0), gamma=float("inf"), averaging="last", inner_momentum=0.6, momentum=0.4, nesterov=True),
    ),
    "coupling inside, kept": run(
        *(4, True, False, 1, (3, 4, 8, 12, 18, 24)),
        setting(
            *((1.0, 1.0, 0.0), (2.5, -0.5, 1.0)),
            **{"averaging": 0.6, "inner_momentum": 0.6, "dampening": 0.2, "weight_decay": 0.3, "momentum": 0.5},
        ),
        setting((0.5, -1.0, 0.5), dampening=0.3),  # without momentum there is no dampening
        setting(
            (1.5, 0.5, -1.0),
            **{"averaging": "linear", "inner_momentum": 0.8, "nesterov": True, "momentum": 0.5, "lr": 0.3},
            **{"scoping": 0.2, "outer_weight_decay": 0.2, "temperature": 1.0, "gamma": 2.0, "inner_lr": 0.15},
        ),
        setting(
            (0.7, 2.0, 0.0),
            **{"averaging": "last", "inner_momentum": 0.7, "inner_lr": 0.2, "lr": 0.8, "temperature": 0.02},
            **{"gamma_total": 4.0, "gamma_min": 0.75, "momentum": 0.3},
        ),
    ),
}


# ---- The optimizer against the law -------------------------------------------------------------------------------------------


def z_scores(run: Run, n: int = N, dtype: torch.dtype = torch.float32, backend: str = "auto") -> np.ndarray:
    """Take the steps of ``run`` with ``n`` coordinates in each tensor; return the z-scores of all looks."""
    laws: list[Law] = []
    groups = []
    for quadratics, options in run.groups:
        laws += [Law(*quadratic, options={**options, **run.shared}) for quadratic in quadratics]
        groups.append({"params": [nn.Parameter(torch.full((n,), start, dtype=dtype)) for *_, start in quadratics], **options})
    optimizer = dr.EntropySGD(groups, backend=backend, **run.shared)
    params = [p for group in groups for p in group["params"]]
    for p in params:
        p.grad = torch.empty_like(p)

    scores = []
    for step in range(1, run.looks[-1] + 1):
        for p, law in zip(params, laws, strict=True):
            torch.sub(p.detach(), law.target, out=p.grad).mul_(law.h)
            law.step()
        optimizer.step()
        if step in run.looks:
            states = [{"y": p.detach(), **optimizer.state[p]} for p in params]
            scores.append(look([[state.get(ROLES.get(name, name)) for name in NAMES] for state in states], laws))
    return np.concatenate(scores)


def look(samples: list[list[Tensor | None]], laws: list[Law]) -> np.ndarray:
    """Return the z-scores of all means and covariances of the numbers that vary; a number that does not must be its mean.

    Between tensors the law has covariance 0. Deviations are from the exact mean, so that with the exact covariance C the mean
    of a product of two of them has variance (C_ii C_jj + C_ij^2)/n.
    """
    tensors, means, rows = [], [], []
    scores = [0.0]
    for i, (sample, law) in enumerate(zip(samples, laws, strict=True)):
        for j, tensor in enumerate(sample):
            if law.cov[j, j] > 1e-12:
                assert tensor is not None, f"{NAMES[j]} of {law} has a variance and no tensor"
                tensors.append(tensor)
                means.append(law.mean[j])
                rows.append(5 * i + j)
            elif tensor is not None and not bool((tensor - law.mean[j]).abs().max() < 1e-5):
                scores.append(np.inf)
    cov = np.zeros((5 * len(laws), 5 * len(laws)))
    for i, law in enumerate(laws):
        cov[5 * i : 5 * i + 5, 5 * i : 5 * i + 5] = law.cov
    cov = cov[np.ix_(rows, rows)]

    n = tensors[0].numel()
    first = torch.zeros(len(rows), dtype=torch.float64)
    second = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    center = torch.tensor(means)[:, None]
    for parts in zip(*(tensor.split(1 << 14) for tensor in tensors), strict=True):  # parts that stay in the cache
        deviations = torch.stack(parts).double() - center
        first += deviations.sum(1)
        second += deviations @ deviations.T
    variances = np.diag(cov)
    of_means = first.numpy() / n / np.sqrt(variances / n)
    of_products = (second.numpy() / n - cov) / np.sqrt((np.outer(variances, variances) + cov**2) / n)
    return np.concatenate([scores[1:], of_means, of_products[np.triu_indices(len(rows))]])


def largest(scores: np.ndarray) -> float:
    """Return the largest absolute z-score; a NaN is infinite."""
    return float(np.nan_to_num(np.abs(scores), nan=np.inf, posinf=np.inf).max())


def follows_the_law(scores: np.ndarray) -> bool:
    return largest(scores) < BOUND


NATIVE = pytest.mark.skipif("cpu" not in backends.available("cpu"), reason="10^6 coordinates need the native module")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("q", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("nesterov", [False, True], ids=["heavy ball", "nesterov"])
def test_the_law_has_the_known_stationary_variance(nesterov: bool, mu: float, q: float) -> None:
    """Of the inner loop alone: closed forms in the momentum and q = inner_lr*(h + 1/gamma)."""
    h, k, T = 0.7, 0.8, 0.3
    endless = {"inner_steps": 10**9, "coupling_in_momentum": True, "reset_inner_momentum": False}
    options = {**PLAIN, **endless, "inner_lr": q / (h + k), "gamma": 1.0 / k, "temperature": T, "averaging": "last"}
    law = Law(h, 0.0, 1.0, {**options, "inner_momentum": mu, "nesterov": nesterov})
    for _ in range(4000):
        law.step()
    b = 1.0 - q
    heavy_ball = ((1 + mu) * (1 - mu) ** 2 + 2 * mu * q) / ((1 - mu) * (1 + mu - q / 2))
    accelerated = 2 * ((1 + mu**2) * (1 + mu * b) - 2 * mu * (1 + mu) * b) / ((1 - mu * b) * (1 + b + 2 * mu * b))
    assert law.cov[1, 1] == pytest.approx(T / (h + k) * (accelerated if nesterov else heavy_ball), rel=1e-9)
    assert law.mean[1] == pytest.approx(k / (h + k), rel=1e-9)


@NATIVE
@pytest.mark.parametrize("name", RUNS)
def test_the_optimizer_follows_the_law(name: str) -> None:
    scores = z_scores(RUNS[name])
    assert follows_the_law(scores), largest(scores)
    # Scores that were small for want of chance, or of exactness, would show nothing.
    assert 0.7 < np.sqrt(np.mean(scores**2)) < 1.4


@pytest.mark.parametrize(
    ("name", "n", "dtype", "backend"),
    [
        pytest.param("coupling inside, kept", N, torch.float64, "auto", marks=NATIVE),
        pytest.param("coupling outside, cleared", N, torch.float64, "auto", marks=NATIVE),
        ("coupling inside, kept", 30_000, torch.float32, "eager"),
        ("coupling outside, kept", 30_000, torch.float64, "eager"),
    ],
)
def test_so_it_does_in_other_types_and_backends(name: str, n: int, dtype: torch.dtype, backend: str) -> None:
    scores = z_scores(RUNS[name], n, dtype, backend)
    assert follows_the_law(scores), largest(scores)
    assert 0.7 < np.sqrt(np.mean(scores**2)) < 1.4


# ---- The mutants -------------------------------------------------------------------------------------------------------------


def start_period_as(owner: type, change: Callable[[Any], None]) -> Mutation:
    return lambda patch: patch.setattr(owner, "_start_period", change)


def around_the_outer_step(keep: Callable[[Tensors], list[Tensor]]) -> Mutation:
    """Leave some tensors as they are before the outer step, which then moves the others alone."""

    def change(step: Step, tensors: Tensors, grads: list[Tensor], h: Scalars) -> None:
        step(grads, replace(h, outer=False))
        if h.outer:
            kept = [t.detach().clone() for t in keep(tensors)]
            step([], replace(h, inner=False))
            for t, value in zip(keep(tensors), kept, strict=True):
                t.detach().copy_(value)

    return step_as(change)


def cleared(role: str, when: Callable[[Scalars], bool]) -> Mutation:
    """Clear the buffers of a momentum before the steps for which ``when`` holds."""

    def change(step: Step, tensors: Tensors, grads: list[Tensor], h: Scalars) -> None:
        for t in getattr(tensors, role) if when(h) else ():
            t.zero_()
        step(grads, h)

    return step_as(change)


def cleared_after_periods(step: Step, tensors: Tensors, grads: list[Tensor], h: Scalars) -> None:
    step(grads, h)
    for v in tensors.momenta if h.outer else ():
        v.zero_()


def noise_in_the_gradient(step: Step, tensors: Tensors, grads: list[Tensor], h: Scalars) -> None:
    noisy = [g.clone() for g in grads]
    for i, z in noises(tensors, h):
        noisy[i] -= h.s / h.eta * z
    step(noisy, replace(h, s=0.0))


def average_without_the_last_noise(step: Step, tensors: Tensors, grads: list[Tensor], h: Scalars) -> None:
    step(grads, replace(h, outer=False))
    for i, z in noises(tensors, h):
        tensors.averages[i] -= h.a * h.s * z
    if h.outer:
        step([], replace(h, inner=False))


def noise_after_the_outer_step(step: Step, tensors: Tensors, grads: list[Tensor], h: Scalars) -> None:
    step(grads, h)
    for i, z in noises(tensors, h) if h.outer else ():
        tensors.params[i].detach().add_(h.s * z)


def decay_outside_the_momentum(step: Step, tensors: Tensors, grads: list[Tensor], h: Scalars) -> None:
    for p in tensors.params:
        p.detach().mul_(1.0 - h.eta * h.wd)
    step(grads, replace(h, wd=0.0))


def outer_momentum_from_a_gradient(step: Step, tensors: Tensors, grads: list[Tensor], h: Scalars) -> None:
    for w, g in zip(tensors.outer_momenta, grads, strict=False) if h.outer else ():
        if not w.any():
            w.copy_(g)
    step(grads, h)


def first_group_alone(step: Step, tensors: Tensors, grads: list[Tensor], h: Scalars) -> None:
    if tensors.numbers[0] == 0:
        step(grads, h)


def inverted(h: Scalars) -> float:
    return 1.0 / h.k if h.k else 0.0


MUTANTS: dict[str, Mutation] = {
    # Noise.
    "noise 1 % too strong": numbers(lambda h: {"s": 1.01 * h.s}),
    "noise sqrt(2) too strong": numbers(lambda h: {"s": 2**0.5 * h.s}),
    "noise sqrt(T*inner_lr), the factor 2 lost": numbers(lambda h: {"s": 0.5**0.5 * h.s}),
    "temperature taken for eps": numbers(lambda h: {"s": h.s**2 / (2.0 * h.eta) ** 0.5}),
    "noise inside the momentum": step_as(noise_in_the_gradient),
    "noise after the outer step": step_as(noise_after_the_outer_step),
    "noise reused at every step": numbers(lambda h: {"step": 0}),
    "each noise used twice": numbers(lambda h: {"step": h.step // 2}),
    "noise of four steps repeated": numbers(lambda h: {"step": h.step % 4}),
    "one noise for all tensors": streams(lambda t: [0] * len(t.params)),
    "tensors numbered anew in each group": streams(lambda t: list(range(len(t.params)))),
    # Inner step.
    "coupling sign": numbers(lambda h: {"k": -h.k}),
    "coupling dropped": numbers(lambda h: {"k": 0.0}),
    "gamma taken for the stiffness": numbers(lambda h: {"k": inverted(h)}),
    "coupling in the wrong mode": numbers(lambda h: {"coupling_in_momentum": not h.coupling_in_momentum}),
    "inner momentum dropped": numbers(lambda h: {"mu": 0.0}),
    "inner momentum not kept": cleared("momenta", lambda h: True),
    "inner momentum cleared where it is kept": step_as(cleared_after_periods),
    "inner momentum kept where it is cleared": start_period_as(dr.EntropySGD, TwoWeights._start_period),
    "inner nesterov dropped": numbers(lambda h: {"nesterov": False}),
    "inner nesterov for heavy ball": numbers(lambda h: {"nesterov": h.mu != 0.0}),
    "dampening ignored": numbers(lambda h: {"damp1": 1.0}),
    "dampening ignored at the first step": numbers(lambda h: {"damp1": 1.0 if h.step == 0 else h.damp1}),
    "dampening reversed": numbers(lambda h: {"damp1": 1.0 - h.damp1 if h.damp1 < 1.0 else 1.0}),
    "maximize ignored": numbers(lambda h: {"maximize": False}),
    "maximize turns the decay too": numbers(lambda h: {"wd": -h.wd if h.maximize else h.wd}),
    "inner_lr and lr interchanged": numbers(lambda h: {"eta": h.lr, "lr": h.eta}),
    # Decay.
    "inner decay dropped": numbers(lambda h: {"wd": 0.0}),
    "outer decay dropped": numbers(lambda h: {"wd_o": 0.0}),
    "inner decay in the outer step": numbers(lambda h: {"wd": 0.0, "wd_o": h.wd_o + h.wd}),
    "inner decay in the outer step too": numbers(lambda h: {"wd_o": h.wd_o + h.wd}),
    "outer decay in the inner steps": numbers(lambda h: {"wd": h.wd + h.wd_o, "wd_o": 0.0}),
    "inner decay outside the momentum": step_as(decay_outside_the_momentum),
    # Average.
    "averaging reversed": numbers(lambda h: {"a": 1.0 - h.a if h.a < 1.0 else 1.0}),
    "average not restarted at x": around_the_outer_step(lambda t: t.averages),
    "average without the last noise": step_as(average_without_the_last_noise),
    "linear as 1/(j + 1)": weight_by(lambda weight, count, constant: weight(count + 1)),
    "linear over all periods": count_over_periods,
    # Outer step.
    "anchor not moved": numbers(lambda h: {"lr": 0.0}),
    "live weights not reset to x": around_the_outer_step(lambda t: t.params),
    "outer step from y": numbers(lambda h: {"a": 1.0 if h.outer else h.a}),
    "outer direction over gamma": numbers(lambda h: {"lr": h.lr * h.k if h.k else h.lr}),
    "outer momentum dropped": numbers(lambda h: {"mu_o": 0.0}),
    "outer momentum not kept": cleared("outer_momenta", lambda h: h.outer),
    "outer momentum begun with a gradient": step_as(outer_momentum_from_a_gradient),
    "outer nesterov dropped": numbers(lambda h: {"nesterov_o": False}),
    "outer nesterov for heavy ball": numbers(lambda h: {"nesterov_o": h.mu_o != 0.0}),
    "first group alone is stepped": step_as(first_group_alone),
    # Scoping.
    "gamma not scoped": gamma_by(lambda o: {"outer_steps": 0}),
    "gamma scoped at every inner step": gamma_by(lambda o: {"outer_steps": o["step"]}),
    "gamma scoped a period late": gamma_by(lambda o: {"outer_steps": max(0, o["outer_steps"] - 1)}),
    "gamma grows": gamma_by(lambda o: {"scoping": 1.0 / (1.0 + o["scoping"]) - 1.0}),
    "floor of gamma halved": gamma_by(lambda o: {"gamma_min": 0.5 * o["gamma_min"]}),
    "elapsed time counted in outer steps": gamma_by(lambda o: {"inner_steps": 1}),
}


@NATIVE
def test_a_mutation_that_changes_nothing_is_not_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seams alone, the inner and outer step taken in turn among them, leave the same scores."""
    run = RUNS["coupling outside, kept"]
    scores = z_scores(run)
    nothing = (
        numbers(lambda h: {}),
        streams(lambda t: list(t.numbers)),
        gamma_by(lambda o: {}),
        around_the_outer_step(lambda t: []),
    )
    for mutation in nothing:
        mutation(monkeypatch)
    assert np.array_equal(z_scores(run), scores)


@NATIVE
@pytest.mark.slow
@pytest.mark.mutant("the algorithm")
@pytest.mark.parametrize("name", MUTANTS)
def test_the_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[..., None]) -> None:
    MUTANTS[name](monkeypatch)
    for run in RUNS.values():
        if not follows_the_law(scores := z_scores(run)):
            record_property("largest z-score", largest(scores))
            return
    pytest.fail(f"no run shows it: largest z-score {largest(scores)}")
