"""Parle: replicas that each take periods of Entropy-SGD, and are pulled to their mean at the end of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deeprelax_cuda.optim.describe import Notes, Seen
from deeprelax_cuda.optim.langevin_loop import LangevinLoop
from deeprelax_cuda.optim.launches import Launch
from deeprelax_cuda.optim.options import arguments, check_choice, check_number
from deeprelax_cuda.replicas.base import Member, ReplicaOptimizer
from deeprelax_cuda.replicas.describe import PARLE_LEGEND, coupling_notes, parle_step, warn_of_overshoot
from deeprelax_cuda.steps import Rounding, Scalars, round_scalar


class Parle(ReplicaOptimizer, LangevinLoop):
    """Parle: n replicas of Entropy-SGD with distinct noise and data, coupled to their consensus once a period.

    Replica a takes the inner steps of `EntropySGD` on its own gradients. At the end of a period the replicas exchange their
    averages, and each takes an outer step that also goes towards the mean of them::

        c = 1/n * sum over a of m^a
        d = x^a - m^a + outer_weight_decay*x^a + (x^a - c)/rho;   w = momentum*w + d
        x^a = x^a - lr*(d + momentum*w);   m^a = y^a = x^a

    The answer is c: `eval` shows it on every replica, and exchanges nothing for it. Until the first exchange, and of a single
    replica, which has nobody to agree with, it is x. So one replica with rho=inf is `EntropySGD` bit for bit.

    Both ways of having replicas take the same steps bit for bit::

        Parle(replicas=[model.parameters() for model in models])             # in one process: one step() is a step of all
        Parle(model.parameters(), group=torch.distributed.group.WORLD)       # one on each rank, started by torchrun

    Over ranks the exchange is one flat message a period, of the size that a ring all-reduce of float32 gradients has at each
    step of data parallelism: 1/inner_steps of its traffic (2/inner_steps where the gradients are of 16 bits). A replica may
    itself be data parallel: each of its ranks is then in a group of its own, with one rank of each other replica, and all ranks
    take the same seed.

    An outer step is taken by all replicas or by none. Where a rank does not answer, differs in its steps, its seed, its period
    or its parameters, or has numbers that are not finite, `step` raises on all ranks, and leaves everything as it was before.
    A rank that has no gradient at all takes no step (as everywhere), and the others wait for it at the next exchange; in one
    process, where other replicas have gradients, the step is counted for it.

    * PDE: as Entropy-SGD; the sum over replicas of f(x^a) + |x^a - c|^2/(2 rho), each f smoothed by gamma.
    * Cost: one gradient evaluation a step and replica, and an exchange every ``inner_steps`` steps.
    * When: with several devices and slow links between them, or when one wants the flatter minimum that replicas agree on.

    Args:
        params: of this rank's replica; as for every `torch.optim.Optimizer`.
        lr: the outer step. With lr = rho and no momentum it ends at c, but for lr of the way from x to m.
        replicas: instead of params and group, the parameters of all replicas, each as params; equal in number and shapes. They
            may lie on different devices.
        group: the process group of which each rank is a replica.
        rho: the width of the coupling of the replicas, whose stiffness is 1/rho. ``inf``: no coupling.
        rho_scoping: after n outer steps rho is ``max(rho_min, rho / (1 + rho_scoping)**n)``. 0: rho stays.
        rho_min: the floor of rho. What makes outer steps diverge, lr*(1 + 1/rho) of 2*(1 + momentum)/(1 + 2*momentum) or more
            (without nesterov 2*(1 + momentum)), is warned of.
        consensus: what the replicas take the mean of: their "averages" m, or their "anchors" x from before the outer step.
        seed: that of the run, in [0, 2**64), the same on all ranks; replica a of several takes
            `deeprelax_cuda.derive_seed(seed, a)`. Give each replica other data too, say by that seed.
        capturable: must be False.

    The others are those of `EntropySGD`.

    Raises:
        ValueError, TypeError: an option outside its range, by name.

    Source: arXiv 1707.00424 (Parle); arXiv 1704.04932 section 2 (replicas in place of a time average).
    """

    METHOD: ClassVar[str] = "Parle"
    SHARED: ClassVar[tuple[str, ...]] = (*LangevinLoop.SHARED, "replicas", "consensus")

    def __init__(
        self,
        params: ParamsT | None = None,
        lr: float | Tensor = 0.1,
        *,
        replicas: Sequence[ParamsT] | None = None,
        group: dist.ProcessGroup | None = None,
        rho: float = 1.0,
        rho_scoping: float = 1e-3,
        rho_min: float = 0.1,
        consensus: Literal["averages", "anchors"] = "averages",
        inner_lr: float = 0.1,
        inner_steps: int = 25,
        gamma: float = 100.0,
        scoping: float = 1e-3,
        gamma_min: float = 1.0,
        gamma_total: float | None = None,
        temperature: float = 0.0,
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
        super().__init__(params, replicas, group, arguments(locals()))
        warn_of_overshoot(self.param_groups, parle_step)

    @torch.no_grad()
    def consolidate_(self) -> None:
        """Let training go on from the answer: ``y = m = x = c`` in every replica, so call it on all ranks.

        A new period starts; momentum buffers are treated as at the end of a period.
        """
        answer = self._answer()
        for _, state in self._stepped("anchor", answer):
            state["anchor"].copy_(state[answer])
        super().consolidate_()

    def _answer(self) -> str:
        return "consensus" if self.param_groups[0]["replicas"] > 1 else "anchor"

    def _offered(self, p: Tensor, state: dict[str, Any]) -> Tensor:
        offered: Tensor = state["average" if self.param_groups[0]["consensus"] == "averages" else "anchor"]
        return offered

    def _kind(self) -> str:
        return f"{self.METHOD} {self.param_groups[0]['consensus']}"

    def _is_sound(self, own: list[Member]) -> bool:
        if self.param_groups[0]["consensus"] == "averages":
            return True
        averages = [m for _, state, _ in own if (m := state["average"]).numel()]  # where y is not finite, m is not
        largest = torch._foreach_norm(averages, math.inf) if averages else []
        return all(map(math.isfinite, (float(size) for size in largest)))

    def _move(
        self, launches: list[Launch], scalars: list[Scalars], members: dict[int, list[Member]], means: list[list[Tensor]]
    ) -> None:
        for own, mean in zip(members.values(), means, strict=True):
            torch._foreach_copy_([state["consensus"] for _, state, _ in own], mean)
        self._outer_steps(launches, scalars)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        _check_consensus(group)

    def _check_rules(self, group: dict[str, Any]) -> None:
        super()._check_rules(group)
        _check_consensus(group)

    def _roles(self, group: dict[str, Any], dtype: torch.dtype) -> list[str]:
        return [*super()._roles(group, dtype), "consensus"]

    def _own_scalars(self, group: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        rho = check_number("rho", group["rho"], "(0, inf]")
        return {**super()._own_scalars(group, dtype), "kr": round_scalar("1/rho", 1.0 / rho, dtype)}

    def _legend(self, group: dict[str, Any]) -> str:
        return PARLE_LEGEND if group["replicas"] > 1 else super()._legend(group)

    def _notes(self, group: dict[str, Any], seen: Seen) -> Notes:
        return super()._notes(group, seen) + coupling_notes(group, parle_step)


def _check_consensus(group: dict[str, Any]) -> None:
    check_choice("consensus", group["consensus"], ("averages", "anchors"))
