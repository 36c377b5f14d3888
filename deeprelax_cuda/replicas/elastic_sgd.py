"""Elastic-SGD: replicas that take gradient steps coupled to their mean, which is taken anew after each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deeprelax_cuda.clock import Law
from deeprelax_cuda.optim.describe import Notes, Seen
from deeprelax_cuda.optim.launches import Launch
from deeprelax_cuda.optim.options import NO_PERIODS, arguments, check_number
from deeprelax_cuda.replicas.base import Member, ReplicaOptimizer
from deeprelax_cuda.replicas.describe import ELASTIC_LEGEND, elastic_notes, elastic_step, warn_of_overshoot
from deeprelax_cuda.steps import NARROW, Rounding, Scalars, compute_type, round_scalar


class ElasticSGD(ReplicaOptimizer):
    """Elastic-SGD: n replicas of SGD with distinct noise and data, each coupled to the mean x of all.

    Replica a takes a step on its own gradient g at y^a; then the replicas exchange where they are, and x follows::

        d = g + weight_decay*y^a + (y^a - x)/rho;   v = momentum*v + (1 - dampening)*d
        y^a = y^a - lr*(d + momentum*v) + sqrt(2*lr*T)*z
        x = 1/n * sum over a of y^a

    The parameters hold y^a, which is never reset. The answer is x: `eval` shows it on every replica, and exchanges nothing for
    it. Until the first exchange, x of a replica is where it began.

    How replicas are told apart, live in one process or over ranks with the same bits, exchange, and refuse a step that not all
    can take, is as in `Parle`. Elastic-SGD exchanges at every step; it is Parle that pays on slow links.

    * PDE: as Entropy-SGD, where the mean over replicas stands for the average over time: at ergodicity both are <y>, and
      rho is the width gamma of the relaxation.
    * Noise of a step: standard deviation sqrt(2*lr*T).
    * Cost: one gradient evaluation and one exchange a step.
    * When: to compare with; it is the method that Parle and the time average of Entropy-SGD come from.

    Args:
        params: of this rank's replica; as for every `torch.optim.Optimizer`.
        lr: the step along the gradient; what LR schedulers change.
        replicas: instead of params and group, the parameters of all replicas, each as params; equal in number and shapes. They
            may lie on different devices.
        group: the process group of which each rank is a replica.
        rho: the width of the coupling, whose stiffness is 1/rho. ``inf``: no coupling. What makes steps diverge, lr/rho of
            2*(1 + momentum)/(1 + 2*momentum) or more (without nesterov 2*(1 + momentum)), is warned of.
        rho_scoping: after n steps rho is ``max(rho_min, rho / (1 + rho_scoping)**n)``. 0: rho stays.
        rho_min: the floor of rho.
        temperature: T of the noise.
        momentum: of the steps; noise stays outside it.
        nesterov: ignored where momentum is 0.
        dampening: 1 - dampening weights the first d too, unlike in torch.optim.SGD.
        weight_decay: added to the gradient.
        coupling_in_momentum: whether the momentum sees the coupling.
        maximize: climb f instead.
        seed: that of the run, in [0, 2**64), the same on all ranks; replica a of several takes
            `deeprelax_cuda.derive_seed(seed, a)`. Give each replica other data too, say by that seed.
        backend: "auto" or the name of a backend; see `deeprelax_cuda.backends.select`.
        rounding: how y is rounded to bfloat16 parameters, "nearest" or "stochastic".
        master_weights: keep a float32 y for bfloat16 and float16 parameters, which then hold its rounding.
        capturable: must be False.
        foreach: True asks for the eager backend.
        fused: True refuses the eager backend.
        differentiable: must be False.

    Raises:
        ValueError, TypeError: an option outside its range, by name.

    Source: arXiv 1412.6651 (elastic averaging); arXiv 1704.04932 section 2, with x the mean itself.
    """

    METHOD: ClassVar[str] = "ElasticSGD"
    WIDTH: ClassVar[str] = "rho"
    WITHOUT: ClassVar[Mapping[str, Any]] = {
        **{name: value for name, value in NO_PERIODS.items() if name not in ("momentum", "nesterov")},
        "inner_steps": 1,
        "gamma": math.inf,
    }
    SHARED: ClassVar[tuple[str, ...]] = (*ReplicaOptimizer.SHARED, "coupling_in_momentum")
    ENDS_AT_ANCHOR: ClassVar[bool] = False
    OUTER_STEP: ClassVar[str] = "lr, the step along the gradient"
    LR: ClassVar[str] = "the step along the gradient"
    SMALLEST_USEFUL_LR: ClassVar[float] = 0.0

    def __init__(
        self,
        params: ParamsT | None = None,
        lr: float | Tensor = 0.1,
        *,
        replicas: Sequence[ParamsT] | None = None,
        group: dist.ProcessGroup | None = None,
        rho: float = 1.0,
        rho_scoping: float = 1e-4,
        rho_min: float = 0.1,
        temperature: float = 0.0,
        momentum: float = 0.9,
        nesterov: bool = True,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        coupling_in_momentum: bool = True,
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
        super().__init__(params, replicas, group, arguments(locals()))
        warn_of_overshoot(self.param_groups, elastic_step)

    def _offered(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        y: Tensor = state.get("master", p.detach())
        return y.to(compute_type(y.dtype))

    def _move(
        self, launches: list[Launch], scalars: list[Scalars], members: dict[int, list[Member]], means: list[list[Tensor]]
    ) -> None:
        for own, mean in zip(members.values(), means, strict=True):
            torch._foreach_copy_([state["anchor"] for _, state, _ in own], mean)

    def _law(self, group: dict[str, Any]) -> Law:
        return Law(lr="inner", temperature=float(group["temperature"]))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("temperature", group["temperature"], "[0, inf)")
        check_number("dampening", group["dampening"], "[0, 1]")

    def _roles(self, group: dict[str, Any], dtype: torch.dtype) -> list[str]:
        roles = ["anchor", *(["momentum"] if group["momentum"] != 0.0 else [])]
        return [*roles, "master"] if group["master_weights"] and dtype in NARROW else roles

    def _own_scalars(self, group: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        check_number("temperature", group["temperature"], "[0, inf)")
        check_number("lr", group["lr"], "[0, inf)")
        check_number("rho", group["rho"], "(0, inf]")
        mu = round_scalar("momentum", group["momentum"], dtype)
        return {
            "mu": mu,
            "damp1": round_scalar("1 - dampening", 1.0 - group["dampening"], dtype),
            "nesterov": bool(group["nesterov"]) and mu != 0.0,
            "coupling_in_momentum": bool(group["coupling_in_momentum"]),
        }

    def _legend(self, group: dict[str, Any]) -> str:
        return ELASTIC_LEGEND

    def _notes(self, group: dict[str, Any], seen: Seen) -> Notes:
        return elastic_notes(group, seen)
