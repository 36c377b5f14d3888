"""The runs that the tests of the optimizers share: a small model, its steps, and copies of all that a step may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deeprelax_cuda.optim import EntropySGD

L = 3
#: Constructors with settings under which everything moves: a gamma that changes, noise and momenta.
METHODS: dict[str, Callable[..., EntropySGD]] = {
    "EntropySGD": lambda params, **options: EntropySGD(
        params, **{"inner_steps": L, "gamma": 2.0, "scoping": 0.1, "temperature": 1e-3, "seed": 11, **options}
    ),
}


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def backward(model: nn.Module, step: int) -> Tensor:
    """Put the gradients of step number ``step`` in place."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return loss


def walk(model: nn.Module, optimizer: EntropySGD, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def snapshot(model: nn.Module, optimizer: EntropySGD) -> dict[str, Tensor]:
    """Copies of the parameters and of all state, by name."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for role, value in optimizer.state.get(p, {}).items():
            tensors[f"{name} {role}"] = torch.as_tensor(value).detach().clone()
    return tensors


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def counters(optimizer: EntropySGD) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


KINDS: list[dict[str, Any]] = [
    {"dtype": torch.float32},
    {"dtype": torch.float32, "averaging": "linear"},
    {"dtype": torch.bfloat16, "rounding": "stochastic"},
    {"dtype": torch.bfloat16, "master_weights": True},
    {"dtype": torch.float64, "gamma_total": 3.0, "gamma_min": 0.5},
]
