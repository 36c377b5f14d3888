"""The methods that `deeprelax train` compares, each with the options it takes from the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

import deeprelax_cuda as dr


class Method(NamedTuple):
    """``make(params, seed, **options)`` builds the optimizer; an option that is not given is left to its default."""

    make: Callable[..., Optimizer]
    options: tuple[str, ...]


def _sgd(params: Iterable[nn.Parameter], seed: int, *, lr: float = 0.1) -> Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True)


def _entropy_sgd(params: Iterable[nn.Parameter], seed: int, **options: Any) -> Optimizer:
    return dr.EntropySGD(params, seed=seed, **options)


METHODS = {
    "sgd": Method(_sgd, options=("lr",)),
    "entropy-sgd": Method(_entropy_sgd, options=("lr", "inner_steps", "gamma", "scoping", "temperature", "backend")),
}


def settings_of(optimizer: Optimizer) -> dict[str, Any]:
    """Return the settings with which ``optimizer`` was built, defaults included, but for the seed, which is the run's."""
    return {name: value for name, value in optimizer.defaults.items() if name != "seed"}


def backend_of(optimizer: Optimizer) -> str:
    """Return who computes the steps of ``optimizer``, and why."""
    return optimizer.explain() if isinstance(optimizer, dr.EntropySGD) else "torch"
