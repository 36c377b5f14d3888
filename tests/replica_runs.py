"""Small runs with replicas, in one process or on this rank, whose gradients differ by replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deeprelax_cuda as dr

L = 3
#: Settings under which everything moves: noise, momenta, gamma and rho that change.
SETTINGS: dict[str, dict[str, Any]] = {
    "Parle": {
        "inner_steps": L,
        "gamma": 2.0,
        "gamma_min": 0.5,
        "scoping": 0.1,
        "rho": 1.0,
        "rho_scoping": 0.2,
        "rho_min": 0.5,
        "temperature": 1e-3,
        "seed": 11,
    },
    "ElasticSGD": {"rho": 1.0, "rho_scoping": 0.2, "rho_min": 0.5, "temperature": 1e-3, "seed": 11},
}


class Mixed(nn.Module):
    """A net whose parameters have all types and layouts that are exchanged, and sizes that no number of ranks divides."""

    def __init__(self, dtypes: Sequence[torch.dtype]) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = ((2, 3, 2, 2), (5,), (7, 3), (), (0, 4), (1,))
        self.weights = nn.ParameterList()
        for i, shape in enumerate(shapes):
            weight = torch.randn(shape).to(dtypes[i % len(dtypes)])
            if weight.dim() == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            self.weights.append(nn.Parameter(weight))

    def backward(self, replica: int, step: int) -> None:
        """Put the gradients of a step in place: those of a rugged function that differs by replica and step."""
        generator = torch.Generator().manual_seed(1000 * replica + step)
        for p in self.weights:
            y = p.detach().cpu().double()  # where sines have the same bits
            target = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = (y - target + 0.3 * torch.sin(5.0 * y)).to(p.device, p.dtype)


DTYPES = {
    "float32": (torch.float32,),
    "mixed": (torch.float32, torch.float64, torch.bfloat16),
}


def make(method: str, models: Sequence[Mixed], group: Any = None, **options: Any) -> Any:
    """Return the optimizer of all models, or of the one on this rank of ``group``."""
    settings = {**SETTINGS[method], **options}
    kind = getattr(dr, method)
    if group is None:
        return kind(replicas=[model.parameters() for model in models], **settings)
    (model,) = models
    return kind(model.parameters(), group=group, **settings)


def walk(models: dict[int, Mixed], optimizer: Any, steps: range) -> None:
    """Take steps, with the models by the numbers of their replicas."""
    for step in steps:
        for replica, model in models.items():
            model.backward(replica, step)
        optimizer.step()


def snapshot(model: Mixed, optimizer: Any) -> dict[str, Tensor]:
    """Return copies of a replica's parameters and of all state of theirs."""
    found = {}
    for i, p in enumerate(model.weights):
        found[f"{i}"] = p.detach().cpu().clone()
        for role, value in optimizer.state.get(p, {}).items():
            found[f"{i} {role}"] = torch.as_tensor(value).detach().cpu().clone()
    return found


def answer(model: Mixed, optimizer: Any) -> dict[str, Tensor]:
    """Return what `eval` shows."""
    optimizer.eval()
    found = {f"{i} answer": p.detach().cpu().clone() for i, p in enumerate(model.weights)}
    optimizer.train()
    return found


def numbers(optimizer: Any, replica: int) -> dict[str, Any]:
    """Return the plain numbers of a replica's groups."""
    groups = [group for group in optimizer.param_groups if group["replica"] == replica]
    return {f"group {i} {name}": value for i, group in enumerate(groups) for name, value in group.items() if name != "params"}


def differences(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """Return the names of what is not equal to the bit."""
    names = [name for name in (*got, *want) if (name in got) != (name in want)]
    for name in got.keys() & want.keys():
        a, b = got[name], want[name]
        same = a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, Tensor) else a == b
        if not same:
            names.append(name)
    return sorted(set(names))


def world() -> Any:
    """Return the process group of all ranks."""
    return dist.group.WORLD
