"""The runs that the tests of the optimizers share: a small model, its steps, and copies of all that a step may change.

`METHODS` is the table of the methods. What differs between them by design is said there as a fact, which the tests ask for:
a test that means nothing for a method is not collected for it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lone_replicas import LoneElasticSGD, LoneParle
from torch import Tensor, nn

from deeprelax_cuda.optim import SGLD, EntropySGD, HamiltonJacobi, HeatSGD
from deeprelax_cuda.optim.base import RelaxationOptimizer
from deeprelax_cuda.replicas.base import ReplicaOptimizer

L = 3


@dataclass(frozen=True, eq=False, kw_only=True)
class Method:
    """A constructor with settings under which everything moves, and facts about what it constructs."""

    kind: type[RelaxationOptimizer]
    settings: dict[str, Any]
    #: The role of the average in the state: of "average" or "gradient_average", or None.
    average: str | None
    #: Options of the constructor that the settings leave without a meaning.
    ignores: tuple[str, ...] = ()
    #: Options with which the state is smaller, and how those are set that make it grow.
    smaller: dict[str, float]
    larger: dict[str, float]
    #: Values that other methods take: option and value.
    refuses: tuple[tuple[str, Any], ...] = ()
    #: Whether an outer step ends periods of ``inner_steps``: otherwise there is no other set of weights to evaluate either.
    has_periods: bool = True
    #: Steps in a period of the settings.
    length: int = L
    #: Whether there is an anchor in the state, without which there is no state.
    has_anchor: bool = True
    #: Whether the parameters hold the anchor after an outer step.
    ends_at_anchor: bool = True
    #: Whether the gradient of an inner step moves the parameters in that step.
    moves_inside: bool = True
    #: The gradients at an anchor just made that do not count.
    uncounted: int = 0

    def __call__(self, params: Any, **options: Any) -> Any:
        return self.kind(params, **{**self.settings, **options})

    @property
    def options(self) -> list[str]:
        """The options of its constructor."""
        return [name for name in inspect.signature(self.kind).parameters if name != "params"]

    def takes(self, *names: str) -> bool:
        """Whether these options mean something to it."""
        return all(name in self.options and name not in self.ignores for name in names)

    def of(self, options: dict[str, Any]) -> dict[str, Any]:
        """Those of the options that mean something to it."""
        return {name: value for name, value in options.items() if self.takes(name)}

    @property
    def averages_gradients(self) -> bool:
        return self.average == "gradient_average"

    def is_capturable(self) -> bool:
        return ("capturable", True) not in self.refuses

    @property
    def exchanges(self) -> bool:
        """Whether it takes a mean over replicas."""
        return issubclass(self.kind, ReplicaOptimizer)

    @property
    def has_long_periods(self) -> bool:
        """Whether there are inner steps that no outer step follows."""
        return self.has_periods and self.length > 1

    @property
    def roles(self) -> list[str]:
        """The roles of the tensors in the state that an outer step starts from."""
        return [role for role in ("anchor" if self.has_anchor else None, self.average) if role is not None]

    def stats(self, steps: int, length: int | None = None) -> dict[str, int]:
        """What `stats` has to say after so many steps in periods of ``length``."""
        length = length if length is not None and self.takes("inner_steps") else self.length
        outer = steps // length if self.has_periods else 0
        return {"steps": steps, "period_steps": steps - outer * length, "outer_steps": outer}


MOMENTA = {"smaller": {"momentum": 0.0, "inner_momentum": 0.0}, "larger": {"momentum": 0.9, "inner_momentum": 0.9}}
OUTER_MOMENTUM = {"smaller": {"momentum": 0.0}, "larger": {"momentum": 0.9}}
#: The settings have a gamma that changes, noise and momenta, as far as the method has them.
METHODS: dict[str, Method] = {
    "EntropySGD": Method(
        kind=EntropySGD,
        settings={"inner_steps": L, "gamma": 2.0, "scoping": 0.1, "temperature": 1e-3, "seed": 11},
        average="average",
        **MOMENTA,
    ),
    "EntropySGD controlled": Method(
        kind=EntropySGD,
        settings={"inner_steps": L, "gamma_total": 2.0, "gamma_min": 0.5, "temperature": 1e-3, "seed": 11},
        average="average",
        ignores=("scoping",),
        **MOMENTA,
    ),
    "HamiltonJacobi": Method(
        kind=HamiltonJacobi,
        settings={"inner_steps": L, "gamma": 0.5, "scoping": 0.1, "seed": 11},
        average="gradient_average",
        ignores=("inner_lr", "inner_momentum"),
        refuses=(("gamma", math.inf), ("inner", "exact"), ("check_contraction", "yes")),
        **OUTER_MOMENTUM,
    ),
    "HamiltonJacobi prox": Method(
        kind=HamiltonJacobi,
        settings={"inner_steps": L, "inner": "prox", "gamma": 2.0, "scoping": 0.1, "inner_momentum": 0.5, "seed": 11},
        average="average",
        ignores=("averaging", "check_contraction"),
        refuses=(("gamma", math.inf), ("averaging", 0.75), ("check_contraction", True)),
        **MOMENTA,
    ),
    "HeatSGD": Method(
        kind=HeatSGD,
        settings={"inner_steps": L, "gamma": 2.0, "scoping": 0.1, "temperature": 1e-3, "seed": 11},
        average="gradient_average",
        refuses=(("gamma", math.inf), ("inner_steps", 1)),
        ends_at_anchor=False,
        moves_inside=False,
        uncounted=1,
        **OUTER_MOMENTUM,
    ),
    "SGLD": Method(
        kind=SGLD,
        settings={"lr": 0.1, "gamma": 2.0, "temperature": 1e-3, "seed": 11},
        average=None,
        has_periods=False,
        smaller={"gamma": math.inf},
        larger={"gamma": 2.0},
    ),
    "SGLD free": Method(
        kind=SGLD,
        settings={"lr": 0.1, "gamma": math.inf, "temperature": 1e-3, "seed": 11},
        average=None,
        has_periods=False,
        has_anchor=False,
        smaller={},
        larger={"gamma": 2.0},
    ),
    "Parle": Method(
        kind=LoneParle,
        settings={
            **{"inner_steps": L, "gamma": 2.0, "scoping": 0.1, "temperature": 1e-3, "seed": 11},
            **{"rho": 2.0, "rho_scoping": 0.1, "rho_min": 0.5},
        },
        average="average",
        refuses=(("capturable", True), ("rho", 0.0), ("rho", math.nan), ("consensus", "mean"), ("rho_min", -1.0)),
        **MOMENTA,
    ),
    "ElasticSGD": Method(
        kind=LoneElasticSGD,
        settings={"rho": 2.0, "rho_scoping": 0.1, "rho_min": 0.5, "temperature": 1e-3, "seed": 11},
        average=None,
        refuses=(("capturable", True), ("rho", 0.0), ("rho_scoping", -0.1), ("temperature", -1.0)),
        length=1,
        **OUTER_MOMENTUM,
    ),
}
#: One that stands for all, where what is tested lies outside of them and is costly.
ONE = "EntropySGD"


def those(fits: Callable[[Method], bool]) -> pytest.MarkDecorator:
    """Run a test of the fixture ``make`` with the methods that fit, and with no others."""
    return pytest.mark.parametrize("make", [name for name, method in METHODS.items() if fits(method)], indirect=True)


def with_options(
    name: str, choices: Sequence[dict[str, Any]], fits: Callable[[Method], bool] = lambda method: True
) -> pytest.MarkDecorator:
    """Run a test with each of the ``choices`` of options under ``name``, as far as they mean something to the method.

    A "dtype" among them is that of the model. What comes to the same for a method is run once, what it refuses is not.
    """
    pairs = []
    for method in METHODS:
        if not fits(METHODS[method]):
            continue
        seen: list[dict[str, Any]] = []
        for choice in choices:
            own = {key: value for key, value in choice.items() if key == "dtype" or METHODS[method].takes(key)}
            if own not in seen and not any(pair in METHODS[method].refuses for pair in own.items()):
                seen.append(own)
                label = " ".join(str(value).removeprefix("torch.") for value in own.values())
                pairs.append(pytest.param(method, own, id=f"{method}-{label}"))
    return pytest.mark.parametrize(("make", name), pairs, indirect=["make"])


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


def walk(model: nn.Module, optimizer: RelaxationOptimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def snapshot(model: nn.Module, optimizer: RelaxationOptimizer) -> dict[str, Tensor]:
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


def counters(optimizer: RelaxationOptimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


KINDS: list[dict[str, Any]] = [
    {"dtype": torch.float32},
    {"dtype": torch.float32, "averaging": "linear"},
    {"dtype": torch.bfloat16, "rounding": "stochastic"},
    {"dtype": torch.bfloat16, "master_weights": True},
    {"dtype": torch.float64, "gamma_total": 3.0, "gamma_min": 0.5},
]
