"""CUDA graphs: replayed steps are the eager ones bit for bit, through the ends of periods and with what a scheduler writes.

The eager steps are the CUDA backend's, whoever's the graph's are.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_runs import (
    CAPTURABLE,
    DEVICE,
    KERNELS,
    NEEDS_GPU,
    L,
    assert_lists_equal,
    assert_states_equal,
    has_periods,
    lists_on,
    optimizer_of,
)
from step_lists import F32, STEPS, Lists
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs

import deeprelax_cuda as dr

pytestmark = NEEDS_GPU

SHAPES = ((5, 3), (7,), (), (4099,))
KINDS: list[dict[str, Any]] = [
    {},
    {"averaging": "linear"},
    {"averaging": "last", "inner_momentum": 0.0, "momentum": 0.0},
    {"dtype": torch.bfloat16, "rounding": "stochastic"},
    {"dtype": torch.bfloat16, "master_weights": True},
    {"dtype": torch.float16, "weight_decay": 0.01},
    {"dtype": torch.float64, "gamma_total": 3.0, "gamma_min": 0.5},
    {"reset_inner_momentum": True},
    {"gamma": float("inf"), "temperature": 0.0},
    {"method": "HamiltonJacobi"},
    {"method": "HamiltonJacobi", "averaging": "linear", "dtype": torch.bfloat16, "rounding": "stochastic"},
    {"method": "HamiltonJacobi", "inner": "prox", "inner_momentum": 0.5, "gamma": 2.0, "dtype": torch.float64},
    {"method": "HeatSGD"},
    {"method": "HeatSGD", "dtype": torch.bfloat16, "master_weights": True, "outer_weight_decay": 0.01},
    {"method": "HeatSGD", "temperature": 0.0, "inner_steps": 2 * L, "dtype": torch.float64},
    {"method": "SGLD"},
    {"method": "SGLD", "dtype": torch.float16, "weight_decay": 0.01},
]
over_methods = pytest.mark.parametrize("method", CAPTURABLE)


class Run:
    """An optimizer with a loss of its own, whose gradients are the same elementwise ops whoever takes them."""

    def __init__(self, capturable: bool, device: torch.device = DEVICE, **options: Any) -> None:
        dtype = options.pop("dtype", torch.float32)
        generator = torch.Generator().manual_seed(0)

        def tensors() -> list[Tensor]:
            return [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]

        self.params = [nn.Parameter(t) for t in tensors()]
        self.aims = tensors()
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.optimizer = optimizer_of(self.params, capturable=capturable, **options)

    def step(self) -> None:
        with torch.no_grad():
            for p, aim in zip(self.params, self.aims, strict=True):
                p.grad.copy_(p).sub_(aim)
        self.optimizer.step()

    def step_with_new_gradients(self) -> None:
        """Take a step with gradients that lie elsewhere than those of before."""
        for p, aim in zip(self.params, self.aims, strict=True):
            p.grad = p.detach() - aim
        self.optimizer.step()

    def capture(self, steps: int) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(steps):
                self.step()
        return graph


def counters(optimizer: Any) -> dict[str, float]:
    group = optimizer.param_groups[0]
    return {name: float(group[name]) for name in ("step", "position", "outer_steps", "gamma", "lr")}


def assert_same(graphed: Run, eager: Run) -> None:
    torch.cuda.synchronize()
    assert_states_equal(graphed.optimizer, eager.optimizer)
    assert counters(graphed.optimizer) == counters(eager.optimizer)
    assert graphed.optimizer.stats() == eager.optimizer.stats()
    assert graphed.optimizer.at_outer_boundary == eager.optimizer.at_outer_boundary


@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize("warm_up", [1, L, L + 2])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_replays_of_a_whole_period(kind: dict[str, Any], warm_up: int, label: str) -> None:
    """Captured at any position of a period: the device, not the graph, knows where periods end."""
    graphed, eager = Run(True, backend=label, **kind), Run(False, **kind)
    for run in (graphed, eager):
        for _ in range(warm_up):
            run.step()
    graph = graphed.capture(L)
    assert_same(graphed, eager)  # a capture takes no step
    for _ in range(5):
        graph.replay()
        for _ in range(L):
            eager.step()
        assert_same(graphed, eager)
    length = kind.get("inner_steps", L)
    assert graphed.optimizer.stats()["outer_steps"] == ((warm_up + 5 * L) // length if has_periods(eager.optimizer) else 0)


@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_replays_of_one_step_through_ends_of_periods(kind: dict[str, Any], label: str) -> None:
    graphed, eager, clocked = Run(True, backend=label, **kind), Run(False, **kind), Run(True, backend=label, **kind)
    for run in (graphed, eager, clocked):
        run.step()
    graph = graphed.capture(1)
    ends, length = 0, kind.get("inner_steps", L)
    for _ in range(4 * L + 1):
        graph.replay()
        eager.step()
        clocked.step()
        assert_same(graphed, eager)
        assert_same(clocked, eager)
        ends += graphed.optimizer.at_outer_boundary
    assert ends == (4 * L + 2) // length if has_periods(eager.optimizer) else ends == 0
    for run in (graphed, eager):
        run.optimizer.eval()
    assert all(torch.equal(p, q) for p, q in zip(graphed.params, eager.params, strict=True))


@over_methods
@pytest.mark.parametrize("label", KERNELS)
def test_replays_are_the_steps_of_the_cpu(label: str, method: str) -> None:
    graphed = Run(True, method=method, backend=label)
    there = Run(False, device=torch.device("cpu"), method=method, backend="cpu")
    for run in (graphed, there):
        run.step()
    graph = graphed.capture(1)
    for _ in range(3 * L):
        graph.replay()
        there.step()
    assert_same(graphed, there)


@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: lrs.StepLR(optimizer, step_size=2, gamma=0.5),
        lambda optimizer: lrs.LambdaLR(optimizer, lambda epoch: 2.0**-epoch),
        lambda optimizer: lrs.MultiStepLR(optimizer, milestones=[2, 4], gamma=0.25),
    ],
    ids=["StepLR", "LambdaLR", "MultiStepLR"],
)
@pytest.mark.parametrize("method", ["EntropySGD", "SGLD"])  # lr is of the outer step, or of the inner ones and their noise
def test_a_scheduler_writes_lr_between_replays(make: Callable[[Any], lrs.LRScheduler], label: str, method: str) -> None:
    graphed, eager = Run(True, lr=0.5, method=method, backend=label), Run(False, lr=0.5, method=method)
    schedulers = [make(run.optimizer) for run in (graphed, eager)]
    for run in (graphed, eager):
        run.step()
    graph = graphed.capture(1)
    seen = set()
    for _ in range(5):
        for _ in range(L):
            graph.replay()
            eager.step()
            assert_same(graphed, eager)
        for scheduler in schedulers:
            scheduler.step()
        seen.add(counters(graphed.optimizer)["lr"])
    assert len(seen) >= 3


@over_methods
@pytest.mark.parametrize("label", KERNELS)
def test_two_graphs_and_eager_steps_in_turn(label: str, method: str) -> None:
    graphed, eager = Run(True, method=method, backend=label), Run(False, method=method)
    for run in (graphed, eager):
        run.step()
    one, two = graphed.capture(1), graphed.capture(2)
    for take, steps in (
        (one.replay, 1),
        (two.replay, 2),
        (graphed.step, 1),
        (two.replay, 2),
        (one.replay, 1),
        (graphed.step, 1),
    ):
        take()
        for _ in range(steps):
            eager.step()
        assert_same(graphed, eager)


@over_methods
@pytest.mark.parametrize("label", KERNELS)
def test_a_checkpoint_after_replays_goes_on_without_a_graph(label: str, method: str) -> None:
    graphed, eager = Run(True, method=method, backend=label), Run(False, method=method)
    other = Run(False, method=method, backend=label)
    for run in (graphed, eager):
        run.step()
    graph = graphed.capture(1)
    for _ in range(L + 1):
        graph.replay()
        eager.step()
    state = copy.deepcopy(graphed.optimizer.state_dict())
    state["param_groups"] = [{**group, "capturable": False} for group in state["param_groups"]]
    other.optimizer.load_state_dict(state)
    for p, q in zip(other.params, graphed.params, strict=True):
        p.data.copy_(q)
    for _ in range(2 * L):
        graph.replay()
        eager.step()
        other.step()
    assert_same(graphed, eager)
    assert_same(other, eager)


@pytest.mark.parametrize("label", KERNELS)
def test_not_capturable_is_refused_in_a_capture_and_nothing_breaks(label: str) -> None:
    refused, eager = Run(False, backend=label), Run(False)
    for run in (refused, eager):
        run.step()
    torch.cuda.synchronize()
    mark, graph = torch.zeros((), device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mark.add_(1)
        with pytest.raises(RuntimeError, match="capturable: expected True where step"):
            refused.optimizer.step()
    graph.replay()
    torch.cuda.synchronize()
    assert mark.item() == 1.0
    refused.step()
    eager.step()
    assert_same(refused, eager)


@pytest.mark.parametrize("label", KERNELS)
def test_a_first_step_in_a_capture_is_refused_and_nothing_breaks(label: str) -> None:
    refused, eager = Run(True, backend=label), Run(False)
    torch.cuda.synchronize()
    mark, graph = torch.zeros((), device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mark.add_(1)
        with pytest.raises(RuntimeError, match="capturable: take a step before the one that is captured"):
            refused.optimizer.step()
    for _ in range(L + 1):
        refused.step()
        eager.step()
    assert_same(refused, eager)


# ---- What a graph reads is its own ------------------------------------------------------------------------------------------


def churn() -> None:
    """Write into whatever memory of the device and of the host torch has got back."""
    gc.collect()
    torch.cuda.synchronize()
    for numel in (8, 64, 512, 4096, 32768):
        there = [torch.zeros(numel, dtype=torch.int64, device=DEVICE) for _ in range(64)]
        here = [torch.zeros(numel, dtype=torch.int64).pin_memory() for _ in range(16)]
        del there, here
    torch.cuda.synchronize()


@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize("steps", [1, L])
def test_gradients_in_the_memory_of_the_graph(steps: int, label: str) -> None:
    """Each captured step has gradients at other addresses, and eager steps in between have them at others again."""
    graphed, eager = Run(True, backend=label), Run(False)
    for run in (graphed, eager):
        run.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            graphed.step_with_new_gradients()
    for round_ in range(4):
        graph.replay()
        for _ in range(steps):
            eager.step_with_new_gradients()
        assert_same(graphed, eager)
        for run in (graphed, eager):
            for _ in range(round_ % 3):
                run.step_with_new_gradients()
        assert_same(graphed, eager)
        churn()


@pytest.mark.parametrize("label", KERNELS)
def test_a_plan_that_is_made_anew_leaves_a_graph_its_tables(label: str) -> None:
    """A step without one of the gradients needs other plans; those that were captured are dropped, and their memory is used."""
    graphed, eager = Run(True, backend=label), Run(False)
    for run in (graphed, eager):
        run.step()
    graph = graphed.capture(2)
    for _ in range(3):
        for run in (graphed, eager):
            kept = run.params[1].grad
            run.params[1].grad = None
            run.optimizer.step()
            run.params[1].grad = kept
        churn()
        graph.replay()
        for _ in range(2):
            eager.step()
        assert_same(graphed, eager)


@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize("name", STEPS)
def test_functions_in_a_graph(name: str, label: str) -> None:
    """Their plans are gone when the graph is replayed. The kernels have been loaded before, which a capture does not permit."""
    torch.manual_seed(0)
    here = Lists.of(F32)
    there = lists_on(here, DEVICE)
    STEPS[name](lists_on(here, DEVICE), backend=label)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(2):
            STEPS[name](there, backend=label)
    assert_lists_equal(there, here)  # a capture takes no step
    for _ in range(3):
        churn()
        graph.replay()
        torch.cuda.synchronize()
        for _ in range(2):
            STEPS[name](here, backend="cpu")
        assert_lists_equal(there, here)


@pytest.mark.parametrize("label", KERNELS)
def test_a_whole_training_step_in_a_graph(label: str) -> None:
    """Passes and step; the gradients lie in the graph's own memory."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).to(DEVICE)
    x = torch.randn(256, 8, device=DEVICE)
    y = x[:, :1] * x[:, 1:2]
    optimizer = dr.EntropySGD(
        model.parameters(), lr=0.5, inner_lr=0.05, inner_steps=5, temperature=1e-8, seed=0, capturable=True, backend=label
    )

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            first = step().item()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(1000):
        graph.replay()
    assert loss.item() < 0.2 * first
    assert optimizer.stats() == {"steps": 1003, "period_steps": 3, "outer_steps": 200}
