"""SGLD: Langevin sampling of exp(-f/T), about an anchor if there is one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deeprelax_cuda.clock import Law
from deeprelax_cuda.optim.base import RelaxationOptimizer
from deeprelax_cuda.optim.describe import Notes, Seen
from deeprelax_cuda.optim.describe_sgld import sgld_notes
from deeprelax_cuda.optim.options import NO_PERIODS, arguments, check_number
from deeprelax_cuda.steps import NARROW, Rounding


class SGLD(RelaxationOptimizer):
    """Stochastic gradient Langevin dynamics: samples of exp(-V/T), V = f + |y - x|^2/(2 gamma), one a step.

    The parameters are the sample y, and a step is::

        y = y - lr*(g + weight_decay*y + (y - x)/gamma) + sqrt(2*lr*T)*z

    With the default ``gamma=inf`` there is no x, and the samples are those of exp(-f/T). With a finite gamma they stay about
    the anchor x, the weights at the first step: the measure whose mean `EntropySGD` follows, and whose log-normaliser is the
    local entropy. x never moves but by `reset_anchors_`, which puts it where y is. There is no average: `eval`, `train` and
    `consolidate_` change nothing.

    * PDE: the density of y follows the Fokker-Planck equation rho_s = div(rho grad V) + T Lap rho, which ends in exp(-V/T).
    * Noise of a step: standard deviation sqrt(2*lr*T), T = 1/beta. At a finite lr the law on a quadratic of curvature h is
      still normal and exact, with H = h + 1/gamma and variance T/(H*(1 - lr*H/2)).
    * Cost: one gradient evaluation a step.
    * When: to sample, not to minimise: posteriors (f the mean loss of N examples and T = 1/N, weight_decay the precision of
      the prior over N), local entropies, checks of a temperature. To train, take the others.

    Args:
        params: as for every `torch.optim.Optimizer`; see `EntropySGD`.
        lr: the step along the gradient, which also sets the noise; what LR schedulers change.
        temperature: T.
        gamma: the width of the coupling to x, in (0, inf]; the group's "gamma" is its current value. Set from ``inf`` to a
            number in mid-run, it makes x at that step, where y then is; with ``capturable`` an x is kept for ``inf`` too, and
            is where y was at the first step.
        weight_decay: added to the gradient.
        maximize: sample exp(f/T) instead.
        seed, backend, rounding, master_weights, capturable, foreach, fused, differentiable: as for `EntropySGD`.

    Raises:
        ValueError, TypeError: an option outside its range, by name; in a process group of several ranks, no seed.

    Source: Welling and Teh, "Bayesian learning via stochastic gradient Langevin dynamics", ICML 2011; the coupling: arXiv
    1611.01838.
    """

    METHOD: ClassVar[str] = "SGLD"
    WITHOUT: ClassVar[Mapping[str, Any]] = NO_PERIODS
    SMALLEST_USEFUL_LR: ClassVar[float] = 0.0

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        temperature: float,
        gamma: float = math.inf,
        weight_decay: float = 0.0,
        maximize: bool = False,
        seed: int | None = None,
        backend: str = "auto",
        rounding: Rounding = "nearest",
        master_weights: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        super().__init__(params, arguments(locals()))

    def eval(self) -> None:
        """Do nothing: the parameters are the sample."""

    def train(self) -> None:
        """Do nothing: the parameters are the sample."""

    def consolidate_(self) -> None:
        """Do nothing: there is no average to go on from."""

    def _law(self, group: dict[str, Any]) -> Law:
        return Law(lr="inner", temperature=float(group["temperature"]))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("temperature", group["temperature"], "[0, inf)")

    def _needed(self, training: bool) -> list[str]:
        return []

    def _roles(self, group: dict[str, Any], dtype: torch.dtype) -> list[str]:
        # With capturable the device alone knows gamma.
        roles = ["anchor"] if group["capturable"] or group["gamma"] != math.inf else []
        return [*roles, "master"] if group["master_weights"] and dtype in NARROW else roles

    def _own_scalars(self, group: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        check_number("temperature", group["temperature"], "[0, inf)")
        if not group["capturable"]:
            check_number("lr", group["lr"], "[0, inf)")
        return {}

    def _legend(self, group: dict[str, Any]) -> str:
        return "y the sample, which the parameters hold, x anchor, h a curvature"

    def _notes(self, group: dict[str, Any], seen: Seen) -> Notes:
        return sgld_notes(group, seen)
