"""Steps belong to the stream and the device that they are taken on; the host does not wait for them, nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from device_runs import DEVICE, LONG, NEEDS_GPU, assert_lists_equal, assert_states_equal, lists_on
from step_lists import BF16, F32, STEPS, Lists
from torch import nn

import deeprelax_cuda as dr
from deeprelax_cuda import functional

pytestmark = NEEDS_GPU

SHAPES = ((5, 3), (70_001,), ())


def busy() -> None:
    """Keep the current stream at work for a while."""
    torch.cuda._sleep(LONG)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_what_its_stream_does_before(name: str) -> None:
    """The parameters and gradients are right only after a long while: on another stream the step would take the wrong ones."""
    torch.manual_seed(0)
    here = Lists.of(F32, SHAPES)
    good, there = lists_on(here, DEVICE), lists_on(here, DEVICE)
    for role in vars(there).values():
        for t in role:
            t.fill_(float("nan"))
    STEPS[name](lists_on(here, DEVICE), backend="cuda")  # whatever is loaded at a first step is loaded now
    STEPS[name](here, backend="cpu")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        busy()
        for role, items in vars(there).items():
            for t, right in zip(items, getattr(good, role), strict=True):
                t.copy_(right)
        STEPS[name](there, backend="cuda")
        assert not side.query(), "nothing has waited for the stream"
        late = lists_on(there, "cuda")
    assert torch.cuda.default_stream().query(), "there is nothing on the default stream"
    side.synchronize()
    assert_lists_equal(there, here)
    assert_lists_equal(late, here)


def test_a_step_does_not_wait_for_other_streams() -> None:
    torch.manual_seed(0)
    here = Lists.of(F32, SHAPES)
    there = lists_on(here, DEVICE)
    STEPS["langevin"](lists_on(here, DEVICE))
    STEPS["langevin"](here, backend="cpu")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    busy()
    with torch.cuda.stream(side):
        STEPS["langevin"](there, backend="cuda")
        done = side.record_event()
    done.synchronize()
    assert not torch.cuda.default_stream().query(), "the default stream is still at work"
    torch.cuda.synchronize()
    assert_lists_equal(there, here)


def test_normals_are_made_on_the_current_stream() -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # loads the kernel and leaves memory of that stream: both would wait for what runs
        functional.gaussian(1000, seed=1, step=2, device=DEVICE, backend="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        busy()
        z = functional.gaussian(1000, seed=1, step=2, device=DEVICE, backend="cuda")
        assert not side.query()
    assert torch.cuda.default_stream().query()
    side.synchronize()
    assert torch.equal(z.cpu(), functional.gaussian(1000, seed=1, step=2, backend="cpu"))


# ---- The optimizer ----------------------------------------------------------------------------------------------------------


def optimizer_on(device: torch.device | str, dtype: torch.dtype = F32, **options: object) -> dr.EntropySGD:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
    return dr.EntropySGD(params, **{"inner_steps": 3, "gamma": 2.0, "temperature": 1e-3, "seed": 11, **options})


@pytest.mark.parametrize("capturable", [False, True])
def test_the_optimizer_steps_on_the_current_stream(capturable: bool) -> None:
    ours, theirs = optimizer_on(DEVICE, capturable=capturable), optimizer_on("cpu", backend="cpu")
    params = ours.param_groups[0]["params"]
    right = [p.grad.clone() for p in params]
    for _ in range(3):  # a period: every kernel has been loaded then, which would wait for what runs
        ours.step()
        theirs.step()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for _ in range(7):
        with torch.cuda.stream(side):
            for p in params:
                p.grad.fill_(float("nan"))
            torch.cuda._sleep(LONG // 20)
            for p, g in zip(params, right, strict=True):
                p.grad.copy_(g)
            ours.step()
            assert not side.query()
        assert torch.cuda.default_stream().query()
        theirs.step()
        side.synchronize()
        assert_states_equal(ours, theirs)


@pytest.mark.parametrize(
    "options", [{}, {"capturable": True}, {"averaging": "linear"}, {"dtype": BF16, "rounding": "stochastic"}], ids=str
)
def test_a_step_neither_waits_nor_allocates(options: dict[str, object]) -> None:
    optimizer = optimizer_on(DEVICE, **options)
    for _ in range(7):  # through two ends of a period: all plans are made
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(7):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()
    for counter in ("allocation.all.allocated", "segment.all.allocated", "num_alloc_retries"):
        assert after[counter] == before[counter], counter
    torch.cuda.synchronize()
    busy()
    optimizer.step()
    assert not torch.cuda.current_stream().query(), "the host has waited for the device"


def test_waiting_would_be_seen() -> None:
    """The check of the test above, on something that waits."""
    busy()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            torch.ones((), device=DEVICE).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.current_stream().query()


# ---- Devices ----------------------------------------------------------------------------------------------------------------

several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def step_everything(device: torch.device) -> None:
    torch.manual_seed(0)
    here = Lists.of(F32, SHAPES)
    for step in STEPS.values():
        there = lists_on(here, device)
        step(there, backend="cuda")
        assert all(t.device == device for t in there.params)
        want = here.clone()
        step(want, backend="cpu")
        assert_lists_equal(there, want)
    z = functional.gaussian(1000, seed=1, step=2, device=device, backend="cuda")
    assert z.device == device
    assert torch.equal(z.cpu(), functional.gaussian(1000, seed=1, step=2))


def keeps_the_current_device(do: Callable[[torch.device], None], device: torch.device, current: int) -> None:
    with torch.cuda.device(current):
        do(device)
        assert torch.cuda.current_device() == current


def test_the_current_device_stays() -> None:
    keeps_the_current_device(step_everything, torch.device("cuda", 0), 0)


@several
@pytest.mark.parametrize(("device", "current"), [(0, 1), (1, 0), (1, 1)])
def test_a_step_on_another_device_than_the_current(device: int, current: int) -> None:
    keeps_the_current_device(step_everything, torch.device("cuda", device), current)


@several
@pytest.mark.parametrize("capturable", [False, True])
def test_one_optimizer_on_several_devices(capturable: bool) -> None:
    def split(devices: tuple[str, str]) -> dr.EntropySGD:
        generator = torch.Generator().manual_seed(0)
        groups = []
        for device in devices:
            params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            groups.append({"params": params})
        return dr.EntropySGD(groups, inner_steps=3, temperature=1e-3, seed=11, capturable=capturable)

    ours, theirs = split(("cuda:1", "cuda:0")), split(("cpu", "cpu"))
    for _ in range(7):
        ours.step()
        theirs.step()
        assert_states_equal(ours, theirs)
    assert torch.cuda.current_device() == 0
