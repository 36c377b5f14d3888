"""The Hamilton-Jacobi method: gradient descent on the Moreau envelope of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deeprelax_cuda.clock import COUPLED, Law
from deeprelax_cuda.optim.base import RelaxationOptimizer
from deeprelax_cuda.optim.contraction import MEASURED, SHORTEST, Contraction
from deeprelax_cuda.optim.describe import LEGEND, Notes, Seen, gamma_notes, outer_notes, overshoot_notes
from deeprelax_cuda.optim.describe_gradient import fixed_point_notes
from deeprelax_cuda.optim.describe_langevin import divergence, proximal_notes
from deeprelax_cuda.optim.langevin import (
    PLAIN,
    check_averaging,
    check_langevin,
    langevin_roles,
    langevin_scalars,
    weight_of_sample,
)
from deeprelax_cuda.optim.launches import Launch
from deeprelax_cuda.optim.options import arguments, check_choice
from deeprelax_cuda.steps import Family, Rounding, round_scalar


class HamiltonJacobi(RelaxationOptimizer):
    """Hamilton-Jacobi: gradient descent on the Moreau envelope u of the loss f, at the width gamma.

    u(x) = min over y of f(y) + |x - y|^2/(2 gamma), the Hopf-Lax formula. It solves the Hamilton-Jacobi equation
    u_t = -|grad u|^2/2 at t = gamma, u = f at t = 0: what the equation of `EntropySGD` becomes at temperature 0. Its gradient
    p = (x - y)/gamma satisfies p = grad f(x - gamma*p), and is found in one of two ways, an inner step a call of `step`::

        inner="fixed_point"   d = g + weight_decay*y;   p = p + (1 - averaging)*(d - p), the first of a period p = d
                              y = x - gamma*p
        outer                 d = p + outer_weight_decay*x;   w = momentum*w + d
                              x = x - lr*(d + momentum*w);   y = x

        inner="prox"          the steps of EntropySGD without noise and with averaging="last":
                              y = y - inner_lr*(g + weight_decay*y + (y - x)/gamma), with inner_momentum
        outer                 d = x - y + outer_weight_decay*x, the rest as in EntropySGD

    with the gradient g at y. Note the two scales of lr: the fixed point moves x along the gradient p, by lr*p, the proximal
    loop along the way x - y = gamma*p, by lr*gamma*p.

    * PDE: u_t = -|grad u|^2/2. Curvatures h >= 0 of the loss become h/(1 + gamma*h): sharp directions are flattened, flat ones
      stay, and the global minimisers are kept.
    * Noise of a step: none. The seed matters to ``rounding="stochastic"`` alone.
    * Cost: ``inner_steps`` gradient evaluations an outer step; memory traffic as EntropySGD without momentum.
    * When: a loss with sharp, narrow ripples and gradients of little noise, or to go without a temperature. The fixed point has
      no inner_lr to tune and forgets everything at each period, but contracts only while gamma times the curvature is small:
      undamped below 1, with averaging=a up to (1 + a)/(1 - a) for positive curvatures, and below 1 for negative ones. Beyond
      that take the proximal loop, which needs inner_lr < 2/(h + 1/gamma) instead. With noisy gradients prefer EntropySGD.

    Args:
        params: as for every `torch.optim.Optimizer`; see `EntropySGD`.
        lr: of the outer step; what LR schedulers change. For "prox" the part of the way from x to y.
        inner_steps: L, inner steps a period; equal in all groups.
        gamma: the width t of the envelope, in (0, inf); the group's "gamma" is its current value.
        scoping: after n outer steps gamma is ``max(gamma_min, gamma / (1 + scoping)**n)``. 0: gamma stays.
        gamma_min: the floor of gamma; the proximal loop needs one above inner_lr/2 where gamma is scoped.
        averaging: the weight of the OLD p, in [0, 1), which damps the iteration; "linear": the plain mean of the period's
            gradients; "last": no damping. None: 0.75. For "prox" it is "last", and nothing else.
        momentum: of the outer step.
        nesterov: for both momenta; ignored where a momentum is 0.
        inner: "fixed_point" or "prox"; equal in all groups.
        inner_lr: the step along the gradient, of "prox" alone.
        inner_momentum: of the inner steps of "prox" alone, coupling included; kept across periods.
        weight_decay: added to the gradient, inside the inner steps.
        outer_weight_decay: in the outer step.
        check_contraction: measure whether the fixed point contracts, by the ratios of successive |d - p| in the last steps of
            each period; from 3 inner_steps on. Where it does not, a warning says so and names a gamma at which it would. The
            last ratio is in `stats` as "contraction", and what they come to in `describe`. Without noise in the gradients the
            first period tells (of 3 inner_steps the first two). Noise does not shrink, which keeps the ratio near 1 and
            scatters it; through it the warning comes once ratios stay above what noise can do. It costs some passes over
            gradients and p and three copies of the gradients a period, and reads the device at its end; the steps are the same
            bits.
        maximize, seed, backend, rounding, master_weights, closure_mode, capturable, foreach, fused, differentiable: as for
            `EntropySGD`.

    Raises:
        ValueError, TypeError: an option outside its range, by name; in a process group of several ranks, no seed.

    Source: arXiv 1704.04932 (the equation without viscosity, the Hopf-Lax formula, the algorithm "HJ").
    """

    METHOD: ClassVar[str] = "HamiltonJacobi"
    SHARED: ClassVar[tuple[str, ...]] = (*RelaxationOptimizer.SHARED, "inner", "check_contraction")
    WITHOUT: ClassVar[Mapping[str, Any]] = {"gamma_total": None}
    GAMMAS: ClassVar[str] = "(0, inf)"
    OUTER_STEP: ClassVar[str] = "lr, the step of x along p"
    LR: ClassVar[str] = "the step along the gradient that the inner steps have found, 0.1 or so, once in inner_steps calls"
    SMALLEST_USEFUL_LR: ClassVar[float] = 1e-3

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        inner_steps: int = 5,
        gamma: float = 0.1,
        scoping: float = 0.0,
        gamma_min: float = 0.0,
        averaging: float | Literal["linear", "last"] | None = None,
        momentum: float = 0.9,
        nesterov: bool = True,
        inner: Literal["fixed_point", "prox"] = "fixed_point",
        inner_lr: float = 0.1,
        inner_momentum: float = 0.0,
        weight_decay: float = 0.0,
        outer_weight_decay: float = 0.0,
        check_contraction: bool = False,
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
        self._contraction = Contraction()

    def stats(self) -> dict[str, float]:
        """Return the counts of the loop and, with ``check_contraction``, the last ratio of |d - p|, NaN where there is none."""
        checked = self.param_groups[0]["check_contraction"]
        return {**super().stats(), **({"contraction": self._contraction.last} if checked else {})}

    def _family(self, group: dict[str, Any]) -> Family:
        return "langevin" if group["inner"] == "prox" else "gradient_average"

    def _law(self, group: dict[str, Any]) -> Law:
        if group["inner"] == "prox":
            return COUPLED
        return Law(gamma="drift", average="mean" if group["averaging"] == "linear" else "restart")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_langevin({**PLAIN, **group, "averaging": "last"})
        self._check_inner(group)

    def _check_inner(self, group: dict[str, Any]) -> None:
        """Refuse options of the inner loop that do not go together, in a new group and at each step."""
        check_choice("inner", group["inner"], ("fixed_point", "prox"))
        check_choice("check_contraction", group["check_contraction"], (False, True))
        prox, averaging = group["inner"] == "prox", group["averaging"]
        if prox and averaging not in (None, "last"):
            raise ValueError(f'averaging: inner="prox" averages nothing, expected "last" or None, got {averaging!r}')
        if averaging is not None:
            check_averaging(averaging)
        if group["check_contraction"]:
            needed = f"check_contraction: expected False with {'{}'}, got True"
            if prox:
                raise ValueError(needed.format('inner="prox", which has no p to check'))
            if group["capturable"]:
                raise ValueError(needed.format("capturable=True, as it reads the device"))
            if group["inner_steps"] < SHORTEST:
                raise ValueError(needed.format(f"fewer than {SHORTEST} inner_steps, of which it takes the last"))

    def _roles(self, group: dict[str, Any], dtype: torch.dtype) -> list[str]:
        roles = super()._roles(group, dtype)
        return roles + langevin_roles(_as_langevin(group)) if group["inner"] == "prox" else roles

    def _own_scalars(self, group: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        self._check_inner(group)
        if group["inner"] == "prox":
            return langevin_scalars(_as_langevin(group), dtype)
        return {"a": round_scalar("1 - averaging", weight_of_sample(averaging_of(group)), dtype)}

    def _observe(self, launches: list[Launch]) -> None:
        first = self.param_groups[0]
        left = first["inner_steps"] - first["position"]
        if first["check_contraction"] and left <= MEASURED:
            if left == MEASURED:  # whatever a period that was broken off has left
                self._contraction.begin()
            self._contraction.measure(launches, self.param_groups)

    def _judge(self) -> None:
        proximal = ((i, _as_langevin(group)) for i, group in enumerate(self.param_groups) if group["inner"] == "prox")
        if said := divergence(proximal):
            self._warn_once("diverging", said)
        if (first := self.param_groups[0])["check_contraction"]:
            groups, length = self.param_groups, first["inner_steps"]
            weights = [self._law(group).weight(length - 1, weight_of_sample(averaging_of(group))) for group in groups]
            if said := self._contraction.conclude(weights, length):
                self._warn_once("contraction", said)

    def _legend(self, group: dict[str, Any]) -> str:
        return LEGEND.replace("m average of y", "m = y") if group["inner"] == "prox" else super()._legend(group)

    def _notes(self, group: dict[str, Any], seen: Seen) -> Notes:
        if group["inner"] == "prox":
            outer = outer_notes(group, super().OUTER_STEP, self.LR, self.SMALLEST_USEFUL_LR) + overshoot_notes(group)
            return proximal_notes(_as_langevin(group), seen) + gamma_notes(group) + outer
        notes = fixed_point_notes(group, averaging_of(group), seen)
        if group["check_contraction"]:
            notes.line("contraction", *self._contraction.words())
        return notes + super()._notes(group, seen)


def averaging_of(group: dict[str, Any]) -> float | str:
    """Return the averaging of the fixed point."""
    averaging: float | str | None = group["averaging"]
    return 0.75 if averaging is None else averaging


def _as_langevin(group: dict[str, Any]) -> dict[str, Any]:
    """Return the group of a proximal loop with all options that a Langevin loop has."""
    return {**PLAIN, **group, "averaging": "last"}
