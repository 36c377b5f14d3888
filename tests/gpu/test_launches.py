"""How often the device is started: once a step, by CUDA kernels that bear the names of the operators and take up to 288
tensors, or by Triton's for any number of tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from device_runs import CAPTURABLE, DEVICE, KERNELS, NEEDS_GPU, NEEDS_TRITON, L, lists_on, optimizer_of
from step_lists import BF16, F16, F32, F64, STEPS, Lists
from torch import nn

import deeprelax_cuda as dr
from deeprelax_cuda import functional

pytestmark = NEEDS_GPU

#: Tensors of a launch of the CUDA backend; csrc/cuda/arguments.h.
ROWS = 288
#: Triton's kernels have the names of their functions alone; triton_kernels/kernels.py.
TRITON_NAMES = ("step_kernel", "advance_kernel", "gaussian_kernel")


def kernels(do: Callable[[], object]) -> list[str]:
    """Return the names of all kernels that are started, in order: C++ names, which copies, fills and ranges lack, or ours."""
    do()  # makes what is made once
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        do()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    names = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    return [name for name in names if "::" in name or name in TRITON_NAMES]


@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize("count", [1, 2, 252, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, 2 * ROWS + 1])
def test_launches_of_an_optimizer(count: int, label: str) -> None:
    params = [nn.Parameter(torch.randn(7 + i % 5, device=DEVICE)) for i in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = dr.EntropySGD(params, inner_steps=2, temperature=1e-4, seed=0, backend=label)
    optimizer.step()
    for _ in range(2):  # the last step of a period, with the outer one in the same launch, and a first one
        started = kernels(optimizer.step)
        assert len(started) == (-(-count // ROWS) if label == "cuda" else 1), started
        assert all(("langevin_step" if label == "cuda" else "step_kernel") in name for name in started)


@pytest.mark.parametrize("label", KERNELS)
def test_new_gradients_are_no_more_launches(label: str) -> None:
    """Their addresses go to the device by a copy at most."""
    params = [nn.Parameter(torch.randn(7, device=DEVICE)) for _ in range(40)]
    optimizer = dr.EntropySGD(params, inner_steps=3, temperature=1e-4, seed=0, backend=label)
    grads = iter([[torch.ones_like(p) for p in params] for _ in range(2)])

    def step() -> None:
        for p, g in zip(params, next(grads), strict=True):
            p.grad = g
        optimizer.step()

    assert len(kernels(step)) == 1


@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "clock"])
@pytest.mark.parametrize("method", CAPTURABLE)
def test_launches_of_each_method(method: str, capturable: bool, label: str) -> None:
    """One a step at any position of a period; a clock is one more."""
    params = [nn.Parameter(torch.randn(7 + i, device=DEVICE)) for i in range(5)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = optimizer_of(params, method, capturable=capturable, backend=label)
    family = "gradient_average_step" if method in ("HamiltonJacobi", "HeatSGD") else "langevin_step"
    for _ in range(2 * L):
        started = kernels(optimizer.step)
        assert len(started) == 1 + capturable, started
        assert (family if label == "cuda" else "step_kernel") in started[-1]


@NEEDS_TRITON
@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_triton_is_one_kernel(name: str) -> None:
    lists = lists_on(Lists.of(F32), DEVICE)
    assert kernels(lambda: STEPS[name](lists, backend="triton")) == ["step_kernel"]


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_kernels_are_named_after_operators(name: str, dtype: torch.dtype) -> None:
    lists = lists_on(Lists.of(dtype), DEVICE)
    wanted = "outer_step" if name.startswith("outer") else name.partition(",")[0].replace(" ", "_") + "_step"
    started = kernels(lambda: STEPS[name](lists, backend="cuda"))
    assert len(started) == 1, started
    assert wanted in started[0]


@pytest.mark.parametrize("label", KERNELS)
def test_normals_are_one_launch(label: str) -> None:
    started = kernels(lambda: functional.gaussian(10**6, seed=1, step=0, device=DEVICE, backend=label))
    assert len(started) == 1, started
    assert "gaussian" in started[0]


@pytest.mark.parametrize("label", KERNELS)
def test_a_clock_is_one_more_launch(label: str) -> None:
    params = [nn.Parameter(torch.randn(7, device=DEVICE)) for _ in range(3)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = dr.EntropySGD(params, inner_steps=3, temperature=1e-4, seed=0, capturable=True, backend=label)
    optimizer.step()
    started = kernels(optimizer.step)
    assert len(started) == 2, started
    first, second = ("advance_clock", "langevin_step") if label == "cuda" else ("advance_kernel", "step_kernel")
    assert first in started[0]
    assert second in started[1]
