"""HeatSGD warns where the type of the parameters, in which the model computes, cannot hold its perturbation."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from deeprelax_cuda.optim import HeatSGD
from deeprelax_cuda.optim.constants import half_ulp
from deeprelax_cuda.optim.describe import sizes

#: Half the distance of the numbers of each type from 1 to 2.
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in HALF}


def walk(optimizer: HeatSGD, steps: int) -> list[tuple[int, str]]:
    """Take steps on gradients of 0 or, lest the first be a phantom, next to it; return the warnings and their steps."""
    said = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 1e-6)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said += [(step, str(w.message)) for w in caught]
    return said


def heat(params: Any, std: float, **options: Any) -> HeatSGD:
    return HeatSGD(params, **{"gamma": 1.0, "temperature": std**2, "scoping": 0.0, "inner_steps": 3, "seed": 4, **options})


@pytest.mark.parametrize("dtype", HALF, ids=NAMES.get)
@pytest.mark.parametrize("options", [{}, {"master_weights": True}, {"backend": "eager"}], ids=str)
def test_said_exactly_where_it_is_lost(dtype: torch.dtype, options: dict[str, Any]) -> None:
    weights = torch.full((500,), 1.3, dtype=dtype)
    ((step, said),) = walk(heat([nn.Parameter(weights.clone())], 0.99 * HALF[dtype], **options), 7)
    assert step == 1
    assert said.startswith("gamma*temperature: the perturbation sqrt(gamma*temperature) = ")
    assert "is lost in params[0]: half a unit in the last place of weights of size 1.3 in " + NAMES[dtype] in said
    assert walk(heat([nn.Parameter(weights.clone())], 1.01 * HALF[dtype], **options), 7) == []

    enough = float(re.search(r"It takes ([\d.e-]+) or more, or wider parameters", said)[1])
    assert enough == pytest.approx(4.0 * HALF[dtype] ** 2, rel=0.01)
    p = nn.Parameter(weights.clone())
    assert walk(heat([p], math.sqrt(enough), **options), 2) == []
    assert float((p.detach() != weights).double().mean()) > 0.5, "most weights are perturbed"


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_what_is_lost_is_lost(share: float) -> None:
    """Of a perturbation z times this share of half a unit, the part |z| > 1/share is left, and rounded to a unit."""
    weights = torch.full((20_000,), 1.3).bfloat16()
    p = nn.Parameter(weights.clone())
    (_,) = walk(heat([p], share * HALF[torch.bfloat16], master_weights=True), 2)
    left = float((p.detach() != weights).double().mean())
    assert left == pytest.approx(math.erfc(1.0 / share / math.sqrt(2.0)), abs=0.005)


def test_stochastic_rounding_is_told_too() -> None:
    """It puts its own noise, far larger, in the place of the perturbation."""
    std, weights = 0.1 * HALF[torch.bfloat16], torch.full((20_000,), 1.3).bfloat16()
    p = nn.Parameter(weights.clone())
    ((_, said),) = walk(heat([p], std, rounding="stochastic"), 2)
    assert "is lost in params[0]: " in said
    assert float((p.detach() - weights).double().std()) > 3.0 * std


def test_each_parameter_is_measured_by_itself() -> None:
    """A few large weights, such as those of a norm, are lost first."""
    small, large = nn.Parameter(torch.full((10_000,), 0.01)), nn.Parameter(torch.full((10,), 100.0))
    narrow = nn.Parameter(torch.full((10,), 0.5).bfloat16())
    least = half_ulp(100.0, torch.float32)
    ((_, said),) = walk(heat([("body", small), ("norm", large)], 0.9 * least), 2)
    assert "is lost in params[1 norm]: half a unit in the last place of weights of size 100 in float32" in said
    assert walk(heat([small, large], 1.1 * least), 2) == []
    ((_, said),) = walk(heat([{"params": [small]}, {"params": [large, narrow]}], 1e-6), 2)
    assert "is lost in params[2] and 1 other: " in said
    assert "in bfloat16" in said


def test_groups_are_measured_by_their_own_perturbation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one beside small weights asks for nothing because of what large weights elsewhere could hold."""
    measured = []
    monkeypatch.setattr("deeprelax_cuda.optim.heat_sgd.sizes", lambda params: measured.append(1) or sizes(params))
    small, large = nn.Parameter(torch.full((10,), 1e-3)), nn.Parameter(torch.full((10,), 100.0))
    optimizer = heat([{"params": [small], "gamma": 1e-4}, {"params": [large]}], 1e-4, lr=0.01)
    assert walk(optimizer, 3 * 7) == []
    assert len(measured) == 2 * 4, "two groups, at the first step and after 1, 2 and 4 periods"


def test_weights_that_grow_are_measured_again() -> None:
    p = nn.Parameter(torch.zeros(10).bfloat16())
    optimizer = heat([p], 1e-5, lr=1.0, momentum=0.0)
    steps = []
    for step in range(1, 40):
        p.grad = torch.full_like(p, -0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        steps += [step] * len(caught)
    assert steps == [3], "after the first outer step they are 0.1"


@pytest.mark.filterwarnings("ignore:lr=0 hardly moves")
@pytest.mark.parametrize(("value", "std"), [(0.0, 1e-50), (1.0, 0.0)])
def test_nothing_is_said_of_weights_of_zero_or_of_no_perturbation(value: float, std: float) -> None:
    assert walk(heat([nn.Parameter(torch.full((10,), value))], std, lr=0.0), 7) == []


@pytest.mark.filterwarnings("ignore:lr=0 hardly moves")
@pytest.mark.parametrize("gamma_min", [0.0, 0.3])
def test_scoping_brings_it_there(gamma_min: float) -> None:
    """After n outer steps gamma is 0.8^n times the first: it is said at the first that is too small."""
    p = nn.Parameter(torch.full((10,), 1.3).bfloat16())
    optimizer = heat([p], 1.5 * HALF[torch.bfloat16], scoping=0.25, gamma_min=gamma_min, lr=0.0)
    said = walk(optimizer, 3 * 12)
    n = next(n for n in range(12) if 1.5 * math.sqrt(max(0.8**n, gamma_min)) < 1.0)
    assert [step for step, _ in said] == [3 * n]
    optimizer.param_groups[0]["gamma"] = 1e-9
    assert walk(optimizer, 6) == [], "said once"


def test_a_floor_keeps_it_from_there() -> None:
    p = nn.Parameter(torch.full((10,), 1.3).bfloat16())
    assert walk(heat([p], 1.5 * HALF[torch.bfloat16], scoping=0.25, gamma_min=0.5), 3 * 12) == []


def test_a_group_that_joins_is_looked_at() -> None:
    optimizer = heat([nn.Parameter(torch.ones(4))], 1e-3)
    assert walk(optimizer, 3 * 4) == []
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4).bfloat16())]})
    ((step, said),) = walk(optimizer, 6)
    assert step == 3
    assert "is lost in params[1]: " in said


def test_with_a_clock_the_first_step_says_it() -> None:
    ((step, _),) = walk(heat([nn.Parameter(torch.ones(4).bfloat16())], 1e-4, capturable=True, backend="eager"), 6)
    assert step == 1


@pytest.mark.filterwarnings("error")
def test_a_rehearsal_says_nothing() -> None:
    optimizer = heat([nn.Parameter(torch.ones(4).bfloat16())], 1e-4)
    optimizer.rehearse()
    assert len(walk(optimizer, 1)) == 1
