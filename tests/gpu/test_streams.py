"""Steps belong to the stream and the device that they are taken on; the host does not wait for them, nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contract_cases import CASES, whole
from device_runs import DEVICE, KERNELS, LONG, NEEDS_GPU, assert_lists_equal, assert_states_equal, lists_on
from step_lists import BF16, F32, STEPS, Lists
from torch import nn

import deeprelax_cuda as dr
from deeprelax_cuda import backends, functional
from deeprelax_cuda.steps import Tensors

pytestmark = NEEDS_GPU

SHAPES = ((5, 3), (70_001,), ())


def busy() -> None:
    """Keep the current stream at work for a while."""
    torch.cuda._sleep(LONG)


@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_for_what_its_stream_does_before(name: str, label: str) -> None:
    """The parameters and gradients are right only after a long while: on another stream the step would take the wrong ones."""
    torch.manual_seed(0)
    here = Lists.of(F32, SHAPES)
    good, there = lists_on(here, DEVICE), lists_on(here, DEVICE)
    for role in vars(there).values():
        for t in role:
            t.fill_(float("nan"))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # whatever is loaded at a first step, or takes memory of the stream, does so now
        STEPS[name](lists_on(here, DEVICE), backend=label)
        lists_on(here, DEVICE)
    STEPS[name](here, backend="cpu")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        busy()
        for role, items in vars(there).items():
            for t, right in zip(items, getattr(good, role), strict=True):
                t.copy_(right)
        STEPS[name](there, backend=label)
        assert not side.query(), "nothing has waited for the stream"
        late = lists_on(there, "cuda")
    assert torch.cuda.default_stream().query(), "there is nothing on the default stream"
    side.synchronize()
    assert_lists_equal(there, here)
    assert_lists_equal(late, here)


@pytest.mark.parametrize("label", KERNELS)
def test_a_step_does_not_wait_for_other_streams(label: str) -> None:
    torch.manual_seed(0)
    here = Lists.of(F32, SHAPES)
    there = lists_on(here, DEVICE)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        STEPS["langevin"](lists_on(here, DEVICE), backend=label)
    STEPS["langevin"](here, backend="cpu")
    torch.cuda.synchronize()
    busy()
    with torch.cuda.stream(side):
        STEPS["langevin"](there, backend=label)
        done = side.record_event()
    done.synchronize()
    assert not torch.cuda.default_stream().query(), "the default stream is still at work"
    torch.cuda.synchronize()
    assert_lists_equal(there, here)


@pytest.mark.parametrize("label", KERNELS)
def test_normals_are_made_on_the_current_stream(label: str) -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # loads the kernel and leaves memory of that stream: both would wait for what runs
        functional.gaussian(1000, seed=1, step=2, device=DEVICE, backend=label)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        busy()
        z = functional.gaussian(1000, seed=1, step=2, device=DEVICE, backend=label)
        assert not side.query()
    assert torch.cuda.default_stream().query()
    side.synchronize()
    assert torch.equal(z.cpu(), functional.gaussian(1000, seed=1, step=2, backend="cpu"))


@pytest.mark.parametrize("label", KERNELS)
def test_memory_that_a_step_reads_is_not_given_away_before_it(label: str) -> None:
    """A plan that is gone, and with it whatever it has on the device, while its step has yet to run on another stream."""
    torch.manual_seed(0)
    case = next(case for case in CASES if case.name == "langevin")
    here = [[torch.randn(1000 + i) for i in range(100)] for _ in range(4)]
    there = [[t.to(DEVICE) for t in role] for role in here]

    def plan_of(name: str, lists: list[list[torch.Tensor]]) -> backends.Plan:
        y, _, x, m = lists
        places = [whole(t.numel()) for t in y]
        return backends.make_plan(name, Tensors(y, anchors=x, averages=m, numbers=range(len(y)), places=places))

    ours, theirs, scalars = plan_of(label, there), plan_of("cpu", here), case.rounded(F32)
    ours.run(there[1], scalars)  # on the default stream, whose memory it takes
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        busy()
        ours.run(there[1], scalars)
    del ours
    for numel in (50, 100, 200, 1600):
        zeros = [torch.zeros(numel, dtype=torch.int64, device=DEVICE) for _ in range(32)]
        del zeros
    assert not side.query()
    side.synchronize()
    for _ in range(2):
        theirs.run(here[1], scalars)
    for a, b in zip(there, here, strict=True):
        assert all(torch.equal(t.cpu(), want) for t, want in zip(a, b, strict=True))


# ---- The optimizer ----------------------------------------------------------------------------------------------------------


def optimizer_on(device: torch.device | str, dtype: torch.dtype = F32, **options: object) -> dr.EntropySGD:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
    return dr.EntropySGD(params, **{"inner_steps": 3, "gamma": 2.0, "temperature": 1e-3, "seed": 11, **options})


@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize("capturable", [False, True])
def test_the_optimizer_steps_on_the_current_stream(capturable: bool, label: str) -> None:
    ours, theirs = optimizer_on(DEVICE, capturable=capturable, backend=label), optimizer_on("cpu", backend="cpu")
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


@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize(
    "options", [{}, {"capturable": True}, {"averaging": "linear"}, {"dtype": BF16, "rounding": "stochastic"}], ids=str
)
def test_a_step_neither_waits_nor_allocates(options: dict[str, object], label: str) -> None:
    optimizer = optimizer_on(DEVICE, backend=label, **options)
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


@pytest.mark.parametrize("label", KERNELS)
def test_new_gradients_are_not_waited_for(label: str) -> None:
    """Gradients of each step lie elsewhere, as after ``zero_grad()``: their addresses go to the device without a wait."""
    ours, theirs = optimizer_on(DEVICE, backend=label), optimizer_on("cpu", backend="cpu")
    params = ours.param_groups[0]["params"]

    def step() -> None:
        kept = [p.grad for p in params]
        for p in params:
            p.grad = p.grad.clone()
        ours.step()
        del kept
        theirs.step()

    busy()
    for _ in range(7):  # takes memory for the copies while none of it comes back, as below: an allocation may wait
        step()
    torch.cuda.synchronize()
    busy()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.cuda.current_stream().query(), "the host has waited for the device"
    assert_states_equal(ours, theirs)


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


def step_everything(device: torch.device, label: str) -> None:
    torch.manual_seed(0)
    here = Lists.of(F32, SHAPES)
    for step in STEPS.values():
        there = lists_on(here, device)
        step(there, backend=label)
        assert all(t.device == device for t in there.params)
        want = here.clone()
        step(want, backend="cpu")
        assert_lists_equal(there, want)
    z = functional.gaussian(1000, seed=1, step=2, device=device, backend=label)
    assert z.device == device
    assert torch.equal(z.cpu(), functional.gaussian(1000, seed=1, step=2))


def keeps_the_current_device(do: Callable[[torch.device, str], None], device: torch.device, label: str, current: int) -> None:
    with torch.cuda.device(current):
        do(device, label)
        assert torch.cuda.current_device() == current


@pytest.mark.parametrize("label", KERNELS)
def test_the_current_device_stays(label: str) -> None:
    keeps_the_current_device(step_everything, torch.device("cuda", 0), label, 0)


@several
@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize(("device", "current"), [(0, 1), (1, 0), (1, 1)])
def test_a_step_on_another_device_than_the_current(device: int, current: int, label: str) -> None:
    keeps_the_current_device(step_everything, torch.device("cuda", device), label, current)


@several
@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize("capturable", [False, True])
def test_one_optimizer_on_several_devices(capturable: bool, label: str) -> None:
    def split(devices: tuple[str, str], backend: str) -> dr.EntropySGD:
        generator = torch.Generator().manual_seed(0)
        groups = []
        for device in devices:
            params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            groups.append({"params": params})
        return dr.EntropySGD(groups, inner_steps=3, temperature=1e-3, seed=11, capturable=capturable, backend=backend)

    ours, theirs = split(("cuda:1", "cuda:0"), label), split(("cpu", "cpu"), "cpu")
    for _ in range(7):
        ours.step()
        theirs.step()
        assert_states_equal(ours, theirs)
    assert torch.cuda.current_device() == 0
