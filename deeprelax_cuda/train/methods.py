"""The methods that `deeprelax train` compares, each with the options it takes from the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

import deeprelax_cuda as dr
from deeprelax_cuda.optim.base import RelaxationOptimizer
from deeprelax_cuda.optim.watched import watched
from deeprelax_cuda.train.averaged_sgd import AveragedSGD


class Method(NamedTuple):
    """``make(params, seed, steps, **options)`` builds the optimizer of a run of so many gradient evaluations.

    An option that is not given is left to its default. ``options`` are those that the command line has a name for; ``make``
    takes all that the optimizer has.
    """

    make: Callable[..., Optimizer]
    options: tuple[str, ...]
    has_replicas: bool = False
    """Then ``make`` takes ``params`` or ``group``, or ``replicas`` and None, as the optimizer does; "replicas", their number,
    is an option that is always given, and is not for ``make``."""


class SGD(torch.optim.SGD):
    """torch's, past its wrapper of ``step`` while there are neither profilers nor hooks, as EntropySGD is (`watched`)."""

    step = watched(torch.no_grad()(inspect.unwrap(torch.optim.SGD.step)))


def _sgd(params: Iterable[nn.Parameter], seed: int, steps: int, **options: Any) -> Optimizer:
    params = list(params)
    return SGD(params, **_nesterov(params, **options))


def _averaged_sgd(params: Iterable[nn.Parameter], seed: int, steps: int, **options: Any) -> Optimizer:
    params = list(params)
    return AveragedSGD(params, **_nesterov(params, **options))


def _nesterov(params: list[nn.Parameter], *, lr: float = 0.1, momentum: float = 0.9, **others: Any) -> dict[str, Any]:
    """Return the options of the papers' SGD, by torch's fastest implementation that is right.

    The fused one of torch 2.13 leaves bfloat16 weights on the CPU where they are, but for what is left over of whole vectors.
    """
    fused = all(p.dtype in (torch.float32, torch.float64) for p in params)
    return {"lr": lr, "momentum": momentum, "nesterov": momentum > 0, "fused": fused, **others}


def _entropy_sgd(
    params: Iterable[nn.Parameter], seed: int, steps: int, *, temperature: float = 0.0, **options: Any
) -> Optimizer:
    """Return the optimizer without noise: at the temperatures of the papers it is far below what the seeds differ by."""
    return dr.EntropySGD(params, seed=seed, temperature=temperature, **options)


def _controlled_sgd(
    params: Iterable[nn.Parameter],
    seed: int,
    steps: int,
    *,
    inner_lr: float = 0.1,
    gamma_min: float = 1.0,
    gamma_total: float | None = None,
    **options: Any,
) -> Optimizer:
    """Return Entropy-SGD whose gamma is the time that is left: ``steps`` of ``inner_lr``, down to ``gamma_min`` at the end."""
    total = gamma_min + steps * inner_lr if gamma_total is None else gamma_total
    return _entropy_sgd(params, seed, steps, inner_lr=inner_lr, gamma_min=gamma_min, gamma_total=total, **options)


def _hamilton_jacobi(params: Iterable[nn.Parameter], seed: int, steps: int, **options: Any) -> Optimizer:
    return dr.HamiltonJacobi(params, seed=seed, **options)


def _proximal(params: Iterable[nn.Parameter], seed: int, steps: int, **options: Any) -> Optimizer:
    """Return the proximal loop, at the width and with the momentum of Entropy-SGD."""
    found = {"inner_steps": 20, "gamma": 1e4, "inner_momentum": 0.9, **options}
    return dr.HamiltonJacobi(params, inner="prox", seed=seed, **found)


def _heat(params: Iterable[nn.Parameter], seed: int, steps: int, **options: Any) -> Optimizer:
    return dr.HeatSGD(params, seed=seed, **options)


def _sgld(
    params: Iterable[nn.Parameter], seed: int, steps: int, *, lr: float = 0.1, temperature: float = 1e-6, **options: Any
) -> Optimizer:
    """Return the sampler so cold that its last sample is a fair answer."""
    return dr.SGLD(params, lr, temperature=temperature, seed=seed, **options)


def _elastic_sgd(params: Iterable[nn.Parameter] | None, seed: int, steps: int, **options: Any) -> Optimizer:
    return dr.ElasticSGD(params, seed=seed, **options)


def _parle(params: Iterable[nn.Parameter] | None, seed: int, steps: int, **options: Any) -> Optimizer:
    return dr.Parle(params, seed=seed, **options)


def check_replicas(count: Any) -> int:
    """Return the number of replicas, or refuse what is none.

    Raises:
        ValueError: it names the option.
    """
    if type(count) is not int or not 1 <= count <= MOST_REPLICAS:
        raise ValueError(f"replicas: expected a whole number from 1 to {MOST_REPLICAS}, got {count!r}")
    return count


#: Of the methods that have several, in one process.
REPLICAS = 3
MOST_REPLICAS = 1024
SGD_OPTIONS = ("lr", "momentum", "weight_decay")
#: Of every method of this package: how its steps are computed.
STEP_OPTIONS = ("rounding", "master_weights", "backend")
PERIOD_OPTIONS = (*SGD_OPTIONS, "inner_steps", "gamma", "scoping", "gamma_min", *STEP_OPTIONS)
INNER_OPTIONS = ("inner_lr", "inner_momentum")
REPLICA_OPTIONS = ("replicas", "rho", "rho_scoping", "rho_min")
METHODS = {
    "sgd": Method(_sgd, SGD_OPTIONS),
    "sgd-ema": Method(_averaged_sgd, (*SGD_OPTIONS, "ema_decay")),
    "entropy-sgd": Method(_entropy_sgd, (*PERIOD_OPTIONS, *INNER_OPTIONS, "gamma_total", "temperature")),
    "controlled-sgd": Method(
        _controlled_sgd,
        (*SGD_OPTIONS, "inner_steps", "gamma_min", "gamma_total", *INNER_OPTIONS, "temperature", *STEP_OPTIONS),
    ),
    "hj": Method(_hamilton_jacobi, PERIOD_OPTIONS),
    "hj-prox": Method(_proximal, (*PERIOD_OPTIONS, *INNER_OPTIONS)),
    "heat": Method(_heat, (*PERIOD_OPTIONS, "temperature")),
    "sgld": Method(_sgld, ("lr", "weight_decay", "gamma", "temperature", *STEP_OPTIONS)),
    "elastic-sgd": Method(_elastic_sgd, (*SGD_OPTIONS, *REPLICA_OPTIONS, "temperature", *STEP_OPTIONS), has_replicas=True),
    "parle": Method(
        _parle, (*PERIOD_OPTIONS, *INNER_OPTIONS, *REPLICA_OPTIONS, "gamma_total", "temperature"), has_replicas=True
    ),
}


def settings_of(optimizer: Optimizer) -> dict[str, Any]:
    """Return the settings with which ``optimizer`` was built, defaults included, but for the seed, which is the run's."""
    return {name: value for name, value in optimizer.defaults.items() if name != "seed"}


def backend_of(optimizer: Optimizer) -> str:
    """Return who computes the steps of ``optimizer``, and why."""
    return optimizer.explain() if isinstance(optimizer, RelaxationOptimizer) else "torch"
