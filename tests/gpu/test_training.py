"""Training on a GPU: given the same gradients the optimizer's bits are the CPU's, and networks learn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from device_runs import DEVICE, KERNELS, METHODS, NEEDS_GPU, NEEDS_TRITON, assert_states_equal
from torch import Tensor, nn

import deeprelax_cuda as dr

pytestmark = NEEDS_GPU

L = 4
KINDS: list[dict[str, Any]] = [
    {"dtype": torch.float32},
    {"dtype": torch.float32, "averaging": "linear", "weight_decay": 1e-3},
    {"dtype": torch.float32, "capturable": True},
    {"dtype": torch.float64, "gamma_total": 3.0, "gamma_min": 0.5},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "rounding": "stochastic"},
    {"dtype": torch.bfloat16, "master_weights": True},
    {"dtype": torch.float16, "master_weights": True},
    {"dtype": torch.float32, "method": "HamiltonJacobi", "gamma": 0.1, "weight_decay": 1e-3},
    {"dtype": torch.bfloat16, "method": "HamiltonJacobi", "gamma": 0.1, "averaging": "linear", "master_weights": True},
    {"dtype": torch.float32, "method": "HamiltonJacobi", "inner": "prox", "inner_lr": 0.05, "capturable": True},
    {"dtype": torch.float32, "method": "HeatSGD", "capturable": True},
    {"dtype": torch.bfloat16, "method": "HeatSGD", "rounding": "stochastic", "temperature": 1e-3},
    {"dtype": torch.float32, "method": "SGLD", "capturable": True},
    {"dtype": torch.float64, "method": "SGLD", "gamma": float("inf")},
    {"dtype": torch.bfloat16, "method": "Parle", "rounding": "stochastic", "temperature": 1e-5, "inner_lr": 0.05},
    {"dtype": torch.float32, "method": "ElasticSGD", "temperature": 1e-5},
]
#: Triton compiles two kernels for each kind: a few of them.
RUNS = [pytest.param(kind, "cuda", id=f"{kind}-cuda") for kind in KINDS]
RUNS += [
    pytest.param(KINDS[i], "triton", id=f"{KINDS[i]}-triton", marks=NEEDS_TRITON) for i in (0, 1, 2, 3, 5, 7, 8, 10, 11, 13, 14)
]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 6 * 6, 10)).to(memory_format=torch.channels_last, dtype=dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return images whose class is the brightest of ten patches."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(64, 3, 16, 16, generator=generator), torch.randint(10, (64,), generator=generator)
    for image, label in zip(x, y.tolist(), strict=True):
        image[:, 3 * (label // 4) : 3 * (label // 4) + 4, 4 * (label % 4) : 4 * (label % 4) + 4] += 2.0
    return x.to(DEVICE, dtype), y.to(DEVICE)


def optimizer_of(model: nn.Module, method: str = "EntropySGD", **options: Any) -> Any:
    make, settings = METHODS[method]
    own = {"temperature": 1e-5, "inner_lr": 0.05} if method == "EntropySGD" else {}
    length = {"inner_steps": L} if "inner_steps" in settings else {}
    return make(model.parameters(), **{**settings, **length, **own, "seed": 11, **options})


@pytest.mark.parametrize(("kind", "label"), RUNS)
def test_the_bits_of_the_cpu_given_the_same_gradients(kind: dict[str, Any], label: str) -> None:
    dtype, options = kind["dtype"], {name: value for name, value in kind.items() if name != "dtype"}
    here = network(dtype)
    there = copy.deepcopy(here).to(DEVICE)
    on_cpu, on_gpu = optimizer_of(here, backend="cpu", **options), optimizer_of(there, backend=label, **options)
    assert f"{label} for " in on_gpu.explain()
    for step in range(3 * L + 1):
        x, y = batch(step, dtype)
        on_gpu.zero_grad()
        nn.functional.cross_entropy(there(x).float(), y).backward()
        for p, q in zip(here.parameters(), there.parameters(), strict=True):
            assert bool(q.grad.isfinite().all())
            assert bool((q.grad != 0).any())
            p.grad = q.grad.cpu()
        before = [q.detach().clone() for q in there.parameters()]
        on_cpu.step()
        on_gpu.step()
        assert_states_equal(on_gpu, on_cpu)
        assert not any(torch.equal(q, old) for q, old in zip(there.parameters(), before, strict=True) if q.numel() > 100)
    length = on_cpu.param_groups[0]["inner_steps"]
    outer, rest = divmod(3 * L + 1, length) if length else (0, 3 * L + 1)
    assert on_gpu.stats() == on_cpu.stats() == {"steps": 3 * L + 1, "period_steps": rest, "outer_steps": outer}
    for optimizer in (on_cpu, on_gpu):
        optimizer.eval()
    assert all(torch.equal(p, q.cpu()) for p, q in zip(here.parameters(), there.parameters(), strict=True))


def loss_of(model: nn.Module, optimizer: Any, dtype: torch.dtype = torch.float32) -> float:
    """Return the loss at the anchor, on images that are not trained on."""
    optimizer.eval()
    with torch.no_grad(), dr.recalibrate_batch_norm(model, [batch(step, dtype) for step in range(8)]):
        model.eval()
        x, y = batch(10_000, dtype)
        loss = nn.functional.cross_entropy(model(x).float(), y).item()
    model.train()
    optimizer.train()
    return loss


LEARNERS: list[dict[str, Any]] = [
    {"dtype": torch.float32, "lr": 0.7, "gamma": 1e3},
    {"dtype": torch.bfloat16, "lr": 0.7, "gamma": 1e3, "master_weights": True},
    {"dtype": torch.float32, "method": "HamiltonJacobi", "lr": 0.3, "gamma": 0.05},
    {"dtype": torch.float32, "method": "HeatSGD", "lr": 0.3, "temperature": 1e-5},
]


@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize("kind", LEARNERS, ids=str)
def test_a_network_learns(kind: dict[str, Any], label: str) -> None:
    dtype, options = kind["dtype"], {name: value for name, value in kind.items() if name != "dtype"}
    model = network(dtype).to(DEVICE)
    optimizer = optimizer_of(model, momentum=0.0, backend=label, **options)
    first = loss_of(model, optimizer, dtype)
    for step in range(40 * L):
        x, y = batch(step, dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
    assert loss_of(model, optimizer, dtype) < 0.5 * first


@pytest.mark.parametrize("label", KERNELS)
def test_autocast_with_a_scaler(label: str) -> None:
    """An infinite gradient skips the step whole; float16 passes train float32 weights."""
    model = network().to(DEVICE)
    optimizer = optimizer_of(model, lr=0.7, momentum=0.0, gamma=1e3, backend=label)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12, growth_interval=50)
    first = loss_of(model, optimizer)
    skipped = 0
    for step in range(40 * L):
        x, y = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if step % 50 == 7:
            next(model.parameters()).grad[0, 0, 0, 0] = float("inf")
            before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if step % 50 == 7:
            skipped += 1
            assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.stats()["steps"] <= 40 * L - skipped
    assert loss_of(model, optimizer) < 0.5 * first
