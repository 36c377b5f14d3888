"""Entropy-SGD: gradient descent on the local entropy of the loss."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deeprelax_cuda.optim.base import RelaxationOptimizer
from deeprelax_cuda.optim.options import check_choice, check_number
from deeprelax_cuda.steps import Rounding, round_scalar


class EntropySGD(RelaxationOptimizer):
    """Entropy-SGD: gradient descent on the local entropy u of the loss f, at the width gamma and the temperature T.

    u(x) = -T log of the mean of exp(-f(y)/T) over y normal around x with variance gamma*T; it solves the viscous
    Hamilton-Jacobi equation. Its gradient (x - <y>)/gamma is estimated by Langevin steps on the live weights y, one a call of
    `step`, with the gradients at y; every ``inner_steps``-th call moves the anchor x towards their average m::

        inner   d = g + weight_decay*y + (y - x)/gamma;   v = inner_momentum*v + (1 - dampening)*d
                y = y - inner_lr*(d + inner_momentum*v) + sqrt(2*inner_lr*T)*z;   m = m + (1 - averaging)*(y - m)
        outer   d = x - m + outer_weight_decay*x;   w = momentum*w + d
                x = x - lr*(d + momentum*w);   m = y = x

    Between steps the parameters hold y. The answer is x: `eval` shows it, `train` brings y back. A step costs one gradient
    evaluation. The noise z is a function of (seed, step, parameter, element): no generator is read, and every backend on every
    device takes the same steps bit for bit.

    Args:
        params: as for every `torch.optim.Optimizer`: tensors, named tensors or groups; float32, float64, bfloat16 or float16.
        lr: the outer step, the part of the way from x to m that x moves; what LR schedulers change.
        inner_lr: the step along the gradient.
        inner_steps: L, inner steps a period; equal in all groups.
        gamma: the width of the relaxation; the coupling of y to x has stiffness 1/gamma. ``inf``: no coupling. The group's
            "gamma" is its current value.
        scoping: after n outer steps gamma is ``max(gamma_min, gamma / (1 + scoping)**n)``. 0: gamma stays.
        gamma_min: the floor of gamma. Keep 1/gamma well under 1/inner_lr: a stiffer coupling makes the inner steps diverge.
        gamma_total: the other rule, time reversal: gamma is ``max(gamma_min, gamma_total - n*inner_steps*inner_lr)``, with the
            initial inner_lr. It needs ``0 < gamma_min < gamma_total``; ``gamma`` and ``scoping`` are then ignored.
        temperature: T, so that the noise of an inner step has the standard deviation sqrt(2*inner_lr*T) and y samples
            exp(-V/T) for V = f + |y - x|^2/(2 gamma), exactly so for inner_momentum 0 and small inner_lr.
        averaging: the weight of the OLD average in m, in [0, 1); "linear": the plain mean of the period; "last": m = y.
        momentum: of the outer step.
        inner_momentum: of the inner steps; noise stays outside it.
        nesterov: for both momenta; ignored where a momentum is 0.
        dampening: of the inner momentum; 1 - dampening weights the first d too, unlike in torch.optim.SGD.
        weight_decay: added to the gradient, inside the inner steps.
        outer_weight_decay: in the outer step.
        coupling_in_momentum: whether the inner momentum sees the coupling; the public Entropy-SGD code has False.
        reset_inner_momentum: whether each period begins with an empty inner momentum; the public Entropy-SGD code has True.
        maximize: climb f instead.
        seed: in [0, 2**64), the same on all data-parallel ranks. None: ``torch.initial_seed()``. Give several optimizers of one
            program `deeprelax_cuda.derive_seed(seed, i)`.
        backend: "auto" or the name of a backend; see `deeprelax_cuda.backends.select`.
        rounding: how y is rounded to bfloat16 parameters, "nearest" or "stochastic"; float16 ones cannot be rounded
            stochastically, wider ones are not rounded.
        master_weights: keep a float32 y for bfloat16 and float16 parameters, which then hold its rounding.
        closure_mode: "once": one call of `step` is one inner step, and a closure is evaluated once. "inner_loop": one call of
            ``step(closure)`` takes all inner steps of a period, and evaluates the closure before each, which should then take
            another minibatch each time.
        capturable: must be False in this version.
        foreach: True asks for the eager backend.
        fused: True refuses the eager backend.
        differentiable: must be False.

    Raises:
        ValueError, TypeError: an option outside its range, by name; in a process group of several ranks, no seed.

    Source: arXiv 1611.01838 (algorithm 1), arXiv 1704.04932 (the viscous equation and its averaging).
    """

    SHARED: ClassVar[tuple[str, ...]] = (*RelaxationOptimizer.SHARED, "coupling_in_momentum", "reset_inner_momentum")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        inner_lr: float = 0.1,
        inner_steps: int = 20,
        gamma: float = 1e4,
        scoping: float = 1e-3,
        gamma_min: float = 0.0,
        gamma_total: float | None = None,
        temperature: float = 1e-8,
        averaging: float | Literal["linear", "last"] = 0.75,
        momentum: float = 0.9,
        inner_momentum: float = 0.9,
        nesterov: bool = True,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        outer_weight_decay: float = 0.0,
        coupling_in_momentum: bool = True,
        reset_inner_momentum: bool = False,
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
        defaults = {
            "lr": lr,
            "inner_lr": inner_lr,
            "inner_steps": inner_steps,
            "gamma": gamma,
            "scoping": scoping,
            "gamma_min": gamma_min,
            "gamma_total": gamma_total,
            "temperature": temperature,
            "averaging": averaging,
            "momentum": momentum,
            "inner_momentum": inner_momentum,
            "nesterov": nesterov,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "outer_weight_decay": outer_weight_decay,
            "coupling_in_momentum": coupling_in_momentum,
            "reset_inner_momentum": reset_inner_momentum,
            "maximize": maximize,
            "seed": seed,
            "backend": backend,
            "rounding": rounding,
            "master_weights": master_weights,
            "closure_mode": closure_mode,
            "capturable": capturable,
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("inner_lr", group["inner_lr"], "[0, inf)")
        check_number("temperature", group["temperature"], "[0, inf)")
        check_number("inner_momentum", group["inner_momentum"], "[0, 1)")
        check_number("dampening", group["dampening"], "[0, 1]")
        if isinstance(group["averaging"], str):
            check_choice("averaging", group["averaging"], ("linear", "last"))
        else:
            check_number("averaging", group["averaging"], "[0, 1)")

    def _roles(self, group: dict[str, Any], dtype: torch.dtype) -> list[str]:
        roles = super()._roles(group, dtype)
        if group["inner_momentum"] != 0.0:
            roles.append("momentum")
        if group["averaging"] == "linear":
            roles.append("period_steps")
        return roles

    def _inner_scalars(self, group: dict[str, Any], dtype: torch.dtype, count: int) -> dict[str, Any]:
        inner_lr, gamma, averaging = float(group["inner_lr"]), float(group["gamma"]), group["averaging"]
        if not gamma > 0.0:
            raise ValueError(f"gamma: expected a number above 0, got {gamma}; gamma_min keeps scoping above 0")
        a = {"linear": 1.0 / count, "last": 1.0}[averaging] if isinstance(averaging, str) else 1.0 - float(averaging)
        mu = round_scalar("inner_momentum", group["inner_momentum"], dtype)
        return {
            "family": "langevin",
            "eta": round_scalar("inner_lr", inner_lr, dtype),
            "k": round_scalar("1/gamma", 1.0 / gamma, dtype),
            "s": round_scalar("noise std", math.sqrt(2.0 * inner_lr * float(group["temperature"])), dtype),
            "a": round_scalar("1 - averaging", a, dtype),
            "mu": mu,
            "damp1": round_scalar("1 - dampening", 1.0 - group["dampening"], dtype),
            "nesterov": bool(group["nesterov"]) and mu != 0.0,
            "coupling_in_momentum": bool(group["coupling_in_momentum"]),
        }

    def _start_period(self) -> None:
        super()._start_period()
        if self.param_groups[0]["reset_inner_momentum"]:
            for _, state in self._stepped():
                if "momentum" in state:
                    state["momentum"].zero_()
