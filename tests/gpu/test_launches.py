"""How often the device is started: once a step for up to 288 tensors, by kernels that bear the names of the operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from device_runs import DEVICE, NEEDS_GPU, lists_on
from step_lists import BF16, F16, F32, F64, STEPS, Lists
from torch import nn

import deeprelax_cuda as dr
from deeprelax_cuda import functional

pytestmark = NEEDS_GPU

#: Tensors of a launch; csrc/cuda/arguments.h.
ROWS = 288


def kernels(do: Callable[[], object]) -> list[str]:
    """Return the names of all kernels that are started, in order; copies, fills and ranges have no C++ names."""
    do()  # makes what is made once
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        do()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    names = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    return [name for name in names if "::" in name]


@pytest.mark.parametrize("count", [1, 2, 252, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, 2 * ROWS + 1])
def test_launches_of_an_optimizer(count: int) -> None:
    params = [nn.Parameter(torch.randn(7 + i % 5, device=DEVICE)) for i in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = dr.EntropySGD(params, inner_steps=2, temperature=1e-4, seed=0)
    optimizer.step()
    for _ in range(2):  # the last step of a period, with the outer one in the same launch, and a first one
        started = kernels(optimizer.step)
        assert len(started) == -(-count // ROWS), started
        assert all("langevin_step" in name for name in started)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_kernels_are_named_after_operators(name: str, dtype: torch.dtype) -> None:
    lists = lists_on(Lists.of(dtype), DEVICE)
    wanted = "outer_step" if name.startswith("outer") else name.partition(",")[0].replace(" ", "_") + "_step"
    started = kernels(lambda: STEPS[name](lists, backend="cuda"))
    assert len(started) == 1, started
    assert wanted in started[0]


def test_normals_are_one_launch() -> None:
    started = kernels(lambda: functional.gaussian(10**6, seed=1, step=0, device=DEVICE, backend="cuda"))
    assert len(started) == 1, started
    assert "gaussian" in started[0]


def test_a_clock_is_one_more_launch() -> None:
    params = [nn.Parameter(torch.randn(7, device=DEVICE)) for _ in range(3)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = dr.EntropySGD(params, inner_steps=3, temperature=1e-4, seed=0, capturable=True)
    optimizer.step()
    started = kernels(optimizer.step)
    assert len(started) == 2, started
    assert "advance_clock" in started[0]
    assert "langevin_step" in started[1]
