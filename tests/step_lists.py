"""The lists of a call of the public steps, the numbers that they are called with, and the steps by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deeprelax_cuda import functional
from deeprelax_cuda.functional import OuterStep
from deeprelax_cuda.steps import compute_type

SHAPES = ((5, 3), (7,), (), (0, 2))
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def some(dtype: torch.dtype = F32, shapes: Iterable[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


@dataclass
class Lists:
    """One list for every role."""

    params: list[Tensor]
    grads: list[Tensor]
    anchors: list[Tensor]
    averages: list[Tensor]
    momenta: list[Tensor]
    outer_momenta: list[Tensor]
    consensus: list[Tensor]
    masters: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, dtype: torch.dtype = F32, shapes: Iterable[tuple[int, ...]] = SHAPES, masters: bool = False) -> Lists:
        wide = compute_type(dtype)
        lists = cls(some(dtype, shapes), some(dtype, shapes), *(some(wide, shapes) for _ in range(5)))
        return replace(lists, masters=[p.to(F32) for p in lists.params]) if masters else lists

    def clone(self) -> Lists:
        return Lists(**{role: [t.clone() for t in items] for role, items in vars(self).items()})


def same(one: Lists, other: Lists) -> bool:
    return all(torch.equal(a, b) for role, items in vars(one).items() for a, b in zip(items, vars(other)[role], strict=True))


# Numbers that float32 does not hold exactly, and no two of them equal: an argument in another's place shows.
NOISE = {"seed": 2**64 - 5, "step": 2**32 - 2}
LANGEVIN = {
    "lr": 0.1, "stiffness": 0.37, "noise_std": 0.21, "averaging": 0.26, "weight_decay": 0.013, "momentum": 0.83,
    "dampening": 0.11, "nesterov": True, "maximize": True, "coupling_in_momentum": False, **NOISE,
}  # fmt: skip
AVERAGE = {"averaging": 0.26, "drift": 0.41, "noise_std": 0.21, "weight_decay": 0.013, "maximize": True, **NOISE}
OUTER = {"lr": 0.55, "momentum": 0.72, "nesterov": True, "weight_decay": 0.017, "replica_stiffness": 0.23}
STREAMS = [7, 2**28 - 1, 0, 3]
PLACES = [(2**40 + 1, 4, 9), 5, (3, 1, 1), 0]


def outer_of(lists: Lists) -> OuterStep:
    return OuterStep(**OUTER, momenta=lists.outer_momenta, consensus=lists.consensus)


def langevin(t: Lists, **changes: object) -> None:
    arguments = {"params": t.params, "grads": t.grads, "anchors": t.anchors, "averages": t.averages, "momenta": t.momenta}
    functional.langevin_step_(**{**arguments, "masters": t.masters or None, **LANGEVIN, **changes})


def gradient_average(t: Lists, **changes: object) -> None:
    arguments = {"params": t.params, "grads": t.grads, "anchors": t.anchors, "gradient_averages": t.averages}
    functional.gradient_average_step_(**{**arguments, "masters": t.masters or None, **AVERAGE, **changes})


def outer(t: Lists, **changes: object) -> None:
    arguments = {"params": t.params, "anchors": t.anchors, "averages": t.averages, "outer_momenta": t.outer_momenta}
    arguments |= {"consensus": t.consensus, "masters": t.masters or None}
    functional.outer_step_(**{**arguments, "noise_std": 0.21, **OUTER, **NOISE, **changes})


STEPS = {
    "langevin": langevin,
    "langevin, fused": lambda t, **k: langevin(t, **{"outer": outer_of(t), **k}),
    "gradient average": gradient_average,
    "gradient average, fused": lambda t, **k: gradient_average(t, **{"outer": outer_of(t), **k}),
    "outer": outer,
    "outer of gradient average": lambda t, **k: outer(t, **{"family": "gradient_average", **k}),
}
