"""HEAT: gradient descent on the loss smoothed by the heat equation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deeprelax_cuda.clock import Law
from deeprelax_cuda.optim.base import RelaxationOptimizer
from deeprelax_cuda.optim.describe import Notes, Seen, coarseness, count, number, sizes, type_name
from deeprelax_cuda.optim.describe_gradient import heat_notes, perturbation
from deeprelax_cuda.optim.options import arguments, check_number
from deeprelax_cuda.steps import Family, Rounding


class HeatSGD(RelaxationOptimizer):
    """HEAT: gradient descent on the loss f smoothed by a Gaussian of variance gamma*temperature a coordinate.

    w(x) = mean of f(y) over y normal around x with variance gamma*T. Its gradient is the mean of grad f(y), which is what the
    inner steps estimate: each of them is at a point of its own, and p is the plain mean of the period's gradients::

        inner   d = g + weight_decay*y;   p = p + (d - p)/j, for the j-th gradient of the period
                y = x + sqrt(gamma*T)*z
        outer   d = p + outer_weight_decay*x;   w = momentum*w + d
                x = x - lr*(d + momentum*w);   y = x + sqrt(gamma*T)*z, with the same z

    with the gradient g at y. The very first gradient is taken at x itself, before there is a z, and does not count: that period
    has a mean over ``inner_steps - 1`` gradients, and so has the first after `consolidate_` or `reset_anchors_`. The parameters
    never hold x in training; `eval` shows it.

    * PDE: the heat equation w_t = T/2 Lap w at t = gamma, w = f at t = 0.
    * Noise of a step: standard deviation sqrt(gamma*T) about x, not added up from step to step. T is that of the heat equation
      with 1/(2 beta), T = 1/beta: the variance is gamma*T, not 2*gamma*T.
    * Cost: ``inner_steps`` gradient evaluations an outer step.
    * When: to smooth ripples that are narrower than sqrt(gamma*T) (a wave sin(k x) is damped by exp(-k^2 gamma*T/2)) and to
      have a gradient whose mean is exact, without a condition on gamma. It blurs minima with their surroundings: where depth
      matters, local entropy (`EntropySGD`) does better, in the published comparison too.

    Args:
        params: as for every `torch.optim.Optimizer`; see `EntropySGD`.
        lr: the step along p; what LR schedulers change.
        inner_steps: L, gradients a period, at least 2; equal in all groups.
        gamma: the time t of the heat equation, in (0, inf); the group's "gamma" is its current value.
        temperature: T. Only gamma*T matters, but gamma alone is scoped.
        scoping: after n outer steps gamma is ``max(gamma_min, gamma / (1 + scoping)**n)``. 0: gamma stays.
        gamma_min: the floor of gamma.
        momentum: of the outer step.
        nesterov: for it; ignored where the momentum is 0.
        weight_decay: added to the gradient, inside the inner steps, times the perturbed weights.
        outer_weight_decay: in the outer step.
        maximize, seed, backend, rounding, master_weights, closure_mode, capturable, foreach, fused, differentiable: as for
            `EntropySGD`. A warning names the parameters in whose type the perturbation is too small: that type is what the
            model computes with, so that masters do not help. For it the weights are measured at the first step and after 1, 2,
            4, 8, ... outer steps.

    Raises:
        ValueError, TypeError: an option outside its range, by name; in a process group of several ranks, no seed.

    Source: arXiv 1704.04932 (smoothing by the heat equation, the algorithm "HEAT").
    """

    METHOD: ClassVar[str] = "HeatSGD"
    WITHOUT: ClassVar[Mapping[str, Any]] = {"gamma_total": None}
    GAMMAS: ClassVar[str] = "(0, inf)"
    FIRST_COUNT: ClassVar[int] = -1  # the gradient at x itself
    ENDS_AT_ANCHOR: ClassVar[bool] = False
    OUTER_STEP: ClassVar[str] = "lr, the step of x along p"
    LR: ClassVar[str] = "the step along the mean gradient, 0.1 or so, once in inner_steps calls"
    SMALLEST_USEFUL_LR: ClassVar[float] = 1e-3

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        inner_steps: int = 5,
        gamma: float = 1.0,
        temperature: float = 1e-4,
        scoping: float = 1e-3,
        gamma_min: float = 0.0,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        outer_weight_decay: float = 0.0,
        maximize: bool = False,
        seed: int | None = None,
        backend: str = "auto",
        rounding: Rounding = "nearest",
        master_weights: bool = False,
        closure_mode: Literal["once", "inner_loop"] = "once",
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        super().__init__(params, arguments(locals()))

    def _forget(self) -> None:
        super()._forget()
        # The perturbation that the coarsest parameter of each group can just hold, and how many there were when last measured.
        self._least: list[float] = []
        self._parameters = 0

    def _family(self, group: dict[str, Any]) -> Family:
        return "gradient_average"

    def _law(self, group: dict[str, Any]) -> Law:
        return Law(gamma="variance", average="mean", temperature=float(group["temperature"]))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        self._check_inner(group)

    def _check_inner(self, group: dict[str, Any]) -> None:
        """Refuse options of the inner loop, in a new group and at each step."""
        check_number("temperature", group["temperature"], "[0, inf)")
        if group["inner_steps"] < 2:
            raise ValueError("inner_steps: expected at least 2, as the first gradient is at x and does not count, got 1")

    def _own_scalars(self, group: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        self._check_inner(group)
        return {}

    def _judge(self) -> None:
        """Warn where the perturbation is rounded away. To measure weights waits for them; they grow, most of all at first."""
        if "lost" in self._warned or self._is_rehearsal:
            return
        stds = [perturbation(group) for group in self.param_groups]
        parameters = sum(len(group["params"]) for group in self.param_groups)
        too_small = any(0.0 < std < least for std, least in zip(stds, self._least, strict=False))
        n = int(self.param_groups[0]["outer_steps"])
        if not (n & (n - 1) == 0 or too_small or parameters != self._parameters):
            return
        labels = iter(self._labels())
        self._least, self._parameters = [], parameters
        for group, std in zip(self.param_groups, stds, strict=True):
            measured = [(next(labels), p.dtype, size) for p, size in zip(group["params"], sizes(group["params"]), strict=True)]
            self._least.append(max((coarseness(size, dtype) for _, dtype, size in measured), default=0.0))
            if lost := [entry for entry in measured if 0.0 < std < coarseness(entry[2], entry[1])]:
                self._warn_once("lost", _lost(std, lost))

    def _notes(self, group: dict[str, Any], seen: Seen) -> Notes:
        return heat_notes(group, seen) + super()._notes(group, seen)


def _lost(std: float, lost: list[tuple[str, torch.dtype, float]]) -> str:
    """Return the warning that a perturbation is lost in parameters, each a name, a type and the size of its weights."""
    label, dtype, size = max(lost, key=lambda entry: coarseness(entry[2], entry[1]))
    least = coarseness(size, dtype)
    others = f" and {count(len(lost) - 1, 'other')}" if len(lost) > 1 else ""
    return (
        f"gamma*temperature: the perturbation sqrt(gamma*temperature) = {number(std)} is lost in params[{label}]{others}: half "
        f"a unit in the last place of weights of size {number(size)} in {type_name(dtype)} is {number(least)}, so their "
        f"gradients are not those of the smoothed loss. It takes {number(4.0 * least * least)} or more, or wider parameters"
    )
