"""The optimizers estimate grad u, and the verification of it fails for optimizers and estimates that are wrong.

The full verification is that of `deeprelax pde --verify`; the quick one differs by fewer copies of each anchor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from contract_cases import TRITON

from deeprelax_cuda import backends
from deeprelax_cuda.pde import Grid, differences, estimates, verify
from deeprelax_cuda.pde.estimates import CASES, DOUBLE_WELL, METHODS, RUGGED, Case
from deeprelax_cuda.pde.verify import Row

pytestmark = pytest.mark.usefixtures("one_thread")
FIRST = backends.available("cpu")[:1]
Patch = pytest.MonkeyPatch
#: The standard deviation of a copy over grad u: what estimates of the right mean can cost in precision.
SPREAD = 2.5


#: The same questions at fewer nodes.
FEWER = (
    replace(RUGGED, sharp=Grid(-1.25, 1.25, 10241), reach=1.0),
    replace(
        DOUBLE_WELL,
        grid=Grid((-4.0, -4.0), (4.0, 4.0), (65, 65)),
        sharp=Grid((-1.25, -1.25), (1.25, 1.25), (641, 21)),
        reach=1.0,
    ),
)
#: More copies than the quick verification has.
LITTLE = replace(FEWER[1], copies=8192)


def rows_of(case: Case, method: str, patch: Patch, names: list[str] = FIRST) -> list[Row]:
    """Verify one method on one case."""
    patch.setattr(verify, "METHODS", {method: METHODS[method]})
    return verify.verify(backends=names, cases=[case])


def is_right(row: Row, factor: float = 1.0) -> bool:
    """Whether the estimates agree within ``factor`` times the bound, and are not too scattered to tell."""
    return replace(row, bound=factor * row.bound).agrees and row.precision * math.sqrt(row.copies) < SPREAD


# ---- The optimizers estimate grad u ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick() -> tuple[list[Row], list[str]]:
    said: list[str] = []
    return verify.verify(quick=True, progress=said.append, cases=FEWER), said


@pytest.mark.slow
def test_the_estimates_agree_on_every_backend(quick: tuple[list[Row], list[str]]) -> None:
    rows, said = quick
    names = backends.available("cpu")
    asked = [(case.landscape.name, method, name) for case in CASES for method in METHODS for name in names]
    assert [(row.landscape, row.method, row.backend) for row in rows] == asked
    assert said == [f"{landscape}: {method}, {name}" for landscape, method, name in asked]
    assert all(is_right(row) for row in rows), verify.table(rows)
    assert [row.same_bits for row in rows] == [None, *[True] * (len(names) - 1)] * (len(asked) // len(names))


@pytest.mark.slow
def test_the_bound_excludes_other_gradients(quick: tuple[list[Row], list[str]]) -> None:
    """Even the quick one tells grad u from grad f, and from grad u at another temperature."""
    for row in quick[0]:
        assert row.from_f > 5.0 * row.bound
        assert (row.from_half is None) == (row.method == "HamiltonJacobi")
        assert row.from_half is None or row.from_half > 1.5 * row.bound


@pytest.mark.slow
def test_the_full_verification_agrees() -> None:
    rows = verify.verify(backends=FIRST)
    assert all(is_right(row) for row in rows), verify.table(rows)
    for row in rows:
        assert row.from_half is None or row.from_half > 6.0 * row.bound


def test_standard_errors_are_those_of_the_means(monkeypatch: Patch) -> None:
    """Over seeds the error in standard errors is a standard normal, not less: of 4 seeds and 16 numbers."""
    case = replace(DOUBLE_WELL, copies=1024)
    compared = verify._Compared.of(case, METHODS["HeatSGD"])
    scores = []
    for seed in range(4):
        monkeypatch.setattr(estimates, "_SEED", seed)
        found = estimates.heat_sgd(estimates.Start(case, compared.anchors, 1024, FIRST[0], torch.device("cpu"))).numpy()
        scores.append((found.mean(2) - compared.relaxed) / (found.std(2) / 32.0))
    assert 0.7 < math.sqrt(np.mean(np.square(scores))) < 1.35


def test_errors_are_relative_to_the_gradient_of_their_own_anchor() -> None:
    """A small gradient that is off by 1e-5 of itself is wrong, however large the others are."""
    compared = verify._Compared.of(FEWER[0], METHODS["HamiltonJacobi"])
    estimate = compared.relaxed[:, :, None].copy()
    smallest = np.abs(compared.relaxed[0]).argmin()
    assert compared.row(FEWER[0], "HamiltonJacobi", "cpu", estimate, None).agrees
    estimate[0, smallest] *= 1.0 + 1e-5
    assert not compared.row(FEWER[0], "HamiltonJacobi", "cpu", estimate, None).agrees


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.landscape.name)
def test_the_fixed_point_contracts_everywhere(case: Case) -> None:
    """gamma*Lip(grad f) < 1 on the box, by second differences of f; so its minimiser is one and the limit of the iteration."""
    hessian = np.moveaxis(differences(case.landscape.on(case.sharp), case.sharp).hessian, (0, 1), (-2, -1))
    assert 0.7 < case.width * np.abs(np.linalg.eigvalsh(hessian)).max() < 0.85


# ---- What is left besides chance ---------------------------------------------------------------------------------------------


def exact_means(case: Case, inner_lr: float, steps: int) -> np.ndarray:
    """Return the means of y after 1, 2, ... Langevin steps from each anchor, shape (steps, anchors), from the law itself.

    A step is a Gaussian kernel around y - inner_lr V'(y); laws and kernels are on 513 nodes, five to a standard deviation.
    """
    y = np.linspace(-4.0, 4.0, 513)
    (slope,) = case.landscape.gradient(y)
    means = np.empty((steps, len(case.anchors[0])))
    for i, x in enumerate(case.anchors[0]):
        drift = y - inner_lr * (slope + (y - x) / case.t)
        kernel = np.exp(-((y - drift[:, None]) ** 2) * case.beta / (4.0 * inner_lr))
        kernel /= kernel.sum(axis=1, keepdims=True)
        law = (y == x).astype(float)
        for k in range(steps):
            law = law @ kernel
            means[k, i] = law @ y
    return means


@pytest.mark.slow
def test_the_estimate_of_entropy_sgd_is_right_but_for_chance() -> None:
    """What transient and Euler's steps leave is below half a standard error; without either remedy it is far more."""
    case, steps = RUGGED, RUGGED.inner_steps
    x = np.array(case.anchors[0])
    exact = verify._Compared.of(case, METHODS["EntropySGD"]).relaxed[0]
    coarse = exact_means(case, case.inner_lr, 2 * steps)
    fine = exact_means(case, case.inner_lr / 2.0, 4 * steps)
    settled = [(x - m[len(m) // 2 :].mean(axis=0)) / case.t for m in (coarse, fine)]
    whole = [(x - m.mean(axis=0)) / case.t for m in (coarse, fine)]
    standard_error = 0.0153 * np.sqrt(np.mean(exact**2))  # of the full verification

    def left(pair: list[np.ndarray]) -> float:
        return float(np.abs(2.0 * pair[1] - pair[0] - exact).max()) / standard_error

    assert left(settled) < 0.5
    assert left(whole) > 2.0
    assert left([settled[1], settled[1]]) > 0.8
    assert left([settled[0], settled[0]]) > 1.6


# ---- Mutants -----------------------------------------------------------------------------------------------------------------


def options(method: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Patch], None]:
    """Give a method other options than it is asked for."""

    def mutate(patch: Patch) -> None:
        make = getattr(estimates, method)
        patch.setattr(estimates, method, lambda params, **asked: make(params, **{**asked, **change(asked)}))

    return mutate


def periods(change: Callable[[list[Any]], list[Any]]) -> Callable[[Patch], None]:
    """Change what the periods are taken for."""

    def mutate(patch: Patch) -> None:
        take = estimates._periods
        patch.setattr(estimates, "_periods", lambda *args: change(take(*args)))

    return mutate


def constant(name: str, value: Any) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(estimates, name, value)


entropy, heat, hj = (partial(options, name) for name in ("EntropySGD", "HeatSGD", "HamiltonJacobi"))
MUTANTS: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "noise of sqrt(inner_lr*T)": ("EntropySGD", entropy(lambda o: {"temperature": o["temperature"] / 2.0})),
    "twice the temperature": ("EntropySGD", entropy(lambda o: {"temperature": o["temperature"] * 2.0})),
    "no noise": ("EntropySGD", entropy(lambda o: {"temperature": 0.0})),
    "1.2 times gamma": ("EntropySGD", entropy(lambda o: {"gamma": o["gamma"] * 1.2})),
    "recent y weigh more": ("EntropySGD", entropy(lambda o: {"averaging": 0.9})),
    "momentum, another temperature": ("EntropySGD", entropy(lambda o: {"inner_momentum": 0.5})),
    "weight decay": ("EntropySGD", entropy(lambda o: {"weight_decay": 0.2})),
    "an outer step of 0.9": ("EntropySGD", entropy(lambda o: {"lr": 0.9})),
    "other noise in the shorter period": ("EntropySGD", entropy(lambda o: {"seed": o["inner_steps"]})),
    "the start counts": ("EntropySGD", periods(lambda found: [found[-1]] * len(found))),
    "the first half alone": ("EntropySGD", periods(lambda found: [found[0]] * len(found))),
    "half the variance": ("HeatSGD", heat(lambda o: {"temperature": o["temperature"] / 2.0})),
    "the variance for the deviation": ("HeatSGD", heat(lambda o: {"temperature": o["temperature"] ** 2 * o["gamma"]})),
    "1.05 times the variance": ("HeatSGD", heat(lambda o: {"gamma": o["gamma"] * 1.05})),
    "weight decay in heat": ("HeatSGD", heat(lambda o: {"weight_decay": 0.05})),
    "too few steps": ("HamiltonJacobi", constant("_FIXED_POINT_STEPS", 30)),
    "a mean of all steps": ("HamiltonJacobi", hj(lambda o: {"averaging": "linear"})),
    "gamma off by 1e-4": ("HamiltonJacobi", hj(lambda o: {"gamma": o["gamma"] * 1.0001})),
    "weight decay in the envelope": ("HamiltonJacobi", hj(lambda o: {"weight_decay": 1e-4})),
    "momentum of the outer step": ("HamiltonJacobi", hj(lambda o: {"momentum": 0.5, "nesterov": True})),
}


@pytest.mark.slow
@pytest.mark.mutant("the estimates of grad u")
@pytest.mark.parametrize("name", MUTANTS)
def test_the_verification_can_fail(name: str, monkeypatch: Patch) -> None:
    method, mutate = MUTANTS[name]
    mutate(monkeypatch)
    (row,) = rows_of(LITTLE, method, monkeypatch)
    assert not is_right(row, factor=1.5), verify.table([row])  # by far, not by chance


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_so_it_does_not_fail_without_a_mutant(method: str, monkeypatch: Patch) -> None:
    (row,) = rows_of(LITTLE, method, monkeypatch)
    assert is_right(row), verify.table([row])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_other_bits_do_not_agree(method: str, monkeypatch: Patch) -> None:
    """A second backend whose estimates are as good, but others."""
    change = (
        {"gamma": lambda o: o["gamma"] * (1.0 + 1e-15)} if method == "HamiltonJacobi" else {"seed": lambda o: o["seed"] // 2}
    )
    made: list[Any] = []

    def changed(asked: dict[str, Any]) -> dict[str, Any]:
        made.append(asked)
        is_second = len(made) > (4 if method == "EntropySGD" else 1)
        return {name: value(asked) for name, value in change.items()} if is_second else {}

    options(method, changed)(monkeypatch)
    first, second = rows_of(replace(LITTLE, copies=256), method, monkeypatch, FIRST * 2)
    assert first.agrees
    assert second.error < second.bound
    assert second.same_bits is False
    assert not second.agrees


# ---- The table, and what is refused ------------------------------------------------------------------------------------------

ROW = Row("hill", "HeatSGD", "cpu", 0.5, 2.0, 8, 100, 65, 16, 0.01234, 2.5, 4.0, 30.0, 12.3, None)


def test_the_table_says_what_agrees() -> None:
    sharp = replace(
        ROW, method="HamiltonJacobi", beta=math.inf, copies=1, precision=0.0, error=2e-8, bound=1e-6, from_half=None
    )
    lines = verify.table([ROW, replace(ROW, backend="eager", same_bits=True), sharp]).splitlines()
    assert " ".join(lines[1].split()) == "hill HeatSGD cpu 0.5 2 8 100 65 1.23 2.5 4 30 12.3 - agrees"
    assert lines[2].split()[-2:] == ["same", "agrees"]
    assert " ".join(lines[3].split()) == "hill HamiltonJacobi cpu 0.5 inf 8 1 65 - 2e-08 1e-06 30 - - agrees"
    assert len({len(line) for line in lines[:4]}) == 1
    assert any(line.startswith("bound      of 16 right numbers, one is beyond 4 s.e. by chance for 0.1 %") for line in lines)
    assert lines[-1] == "all agree"
    assert not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize("wrong", [{"error": 4.0}, {"error": math.nan}, {"error": math.inf}, {"same_bits": False}], ids=str)
def test_the_table_says_what_does_not(wrong: dict[str, Any]) -> None:
    rows = [ROW, replace(ROW, **wrong)]
    assert [row.agrees for row in rows] == [True, False]
    lines = verify.table(rows).splitlines()
    assert lines[2].endswith("DIFFERS")
    assert lines[-1] == "1 of 2 do not agree"


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="backends: expected one name or more, got none"):
        verify.verify(backends=[])
    with pytest.raises(ValueError, match="backend: expected one of"):
        verify.verify(backends=["fast"], cases=[DOUBLE_WELL])


# ---- Triton ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRITON)
def test_the_kernels_of_triton_give_the_bits(name: str, monkeypatch: Patch) -> None:
    """A few steps of everything by the interpreter; where there is a GPU, tests/gpu has the estimates themselves."""
    monkeypatch.setattr(estimates, "_HEAT_STEPS", 3)
    monkeypatch.setattr(estimates, "_FIXED_POINT_STEPS", 3)
    sharp = Grid((-1.75, -1.75), (1.75, 1.75), (29, 15))
    rows = verify.verify(backends=[*FIRST, name], cases=[replace(DOUBLE_WELL, inner_steps=2, copies=33, sharp=sharp)])
    assert [row.same_bits for row in rows] == [None, True] * len(METHODS)
