"""What one call of the fused step is made of: its tensors and its scalars, already checked, in the names of the formula.

This is the language between the public functions above and the backends below: whoever builds a `Scalars` has rounded each
number once to the compute type, so that every backend computes with the very same values.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from deeprelax_cuda.noise import Place

Family = Literal["langevin", "gradient_average"]
Rounding = Literal["nearest", "stochastic"]

NARROW = (torch.bfloat16, torch.float16)
STORED = (torch.float32, torch.float64, *NARROW)


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a parameter of type ``dtype`` is updated and its state is stored."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def round_scalar(name: str, value: float, dtype: torch.dtype) -> float:
    """Round a binary64 scalar once, to nearest even, to the compute type of ``dtype``; refuse it if it is not finite there."""
    value = float(value)
    if compute_type(dtype) == torch.float32:
        try:
            value = struct.unpack("f", struct.pack("f", value))[0]
        except OverflowError:
            value = float("inf")
    if value - value != 0.0:
        raise ValueError(f"{name}: expected a number that is finite in {compute_type(dtype)}, got {value}")
    return value


@dataclass(slots=True)
class Tensors:
    """The tensors of one call, as parallel lists; a role that plays no part in the call is an empty list.

    ``params`` share one type and are ``y`` of the formula; the others are of its compute type: ``anchors`` ``x``, ``averages``
    ``m`` (Langevin) or ``p`` (gradient average), ``momenta`` ``v``, ``masters`` the float32 ``y`` behind narrow parameters,
    ``outer_momenta`` ``w``, ``consensus`` ``c``. All are dense and laid out like their parameter. ``numbers`` are
    the tensor numbers of the noise streams, ``places`` the shards' places.

    Gradients are not among them: they come anew each step, and nobody may keep them alive between steps.
    """

    params: list[Tensor]
    anchors: list[Tensor] = field(default_factory=list)
    averages: list[Tensor] = field(default_factory=list)
    momenta: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    outer_momenta: list[Tensor] = field(default_factory=list)
    consensus: list[Tensor] = field(default_factory=list)
    numbers: Sequence[int] = ()
    places: Sequence[Place] = ()


@dataclass(frozen=True, slots=True)
class Scalars:
    """The numbers of one call, in the names of the formula and rounded to the compute type.

    ``inner`` and ``outer`` say which steps are taken (both: the fused last step of a period); ``family`` is the inner step's
    family, or the one the outer step follows.

    Langevin step: ``d = g + wd*y + k*(y - x)``, ``v = mu*v + damp1*d``, ``y = y - eta*d + s*z``, ``m = m + a*(y - m)``.
    Gradient-average step: ``d = g + wd*y``, ``p = p + a*(d - p)``, ``y = x - c*p + s*z``.
    Outer step: ``d = (x - m or p) + wd_o*x + kr*(x - consensus)``, ``w = mu_o*w + d``, ``x = x - lr*d``.
    """

    family: Family = "langevin"
    inner: bool = True
    outer: bool = False
    eta: float = 0.0
    k: float = 0.0
    s: float = 0.0
    a: float = 0.0
    c: float = 0.0
    wd: float = 0.0
    mu: float = 0.0
    damp1: float = 1.0
    nesterov: bool = False
    coupling_in_momentum: bool = True
    maximize: bool = False
    lr: float = 0.0
    mu_o: float = 0.0
    wd_o: float = 0.0
    kr: float = 0.0
    nesterov_o: bool = False
    seed: int = 0
    step: int = 0
    rounding: Rounding = "nearest"


class Plan(Protocol):
    """A backend's hold on the tensors of a call: made once, run every step while the tensors stay where they are."""

    def __init__(self, tensors: Tensors) -> None: ...

    def run(
        self, grads: Sequence[Tensor], scalars: Scalars, inv_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        """Take the step in place, or nothing at all where ``found_inf`` holds a number other than 0.

        ``grads`` are ``g`` of the formula, in the parameters' type and layout; empty where ``scalars.inner`` is off.
        ``inv_scale`` and ``found_inf`` are one-element float32 tensors on the parameters' device.
        """
