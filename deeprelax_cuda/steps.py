"""What one call of the fused step is made of: its tensors and its scalars, already checked, in the names of the formula.

This is the language between the public functions above and the backends below: whoever builds a `Scalars` has rounded each
number once to the compute type, so that every backend computes with the very same values.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from deeprelax_cuda.noise import Place

if TYPE_CHECKING:
    from deeprelax_cuda.clock import Clock

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
    return _round(name, value, dtype) if value else value  # the cache could not tell 0 from -0


@functools.lru_cache(maxsize=256)
def _round(name: str, value: float, dtype: torch.dtype) -> float:
    if compute_type(dtype) == torch.float32:
        try:
            value = struct.unpack("f", struct.pack("f", value))[0]
        except OverflowError:
            value = float("inf")
    if value - value != 0.0:
        raise ValueError(f"{name}: expected a number that is finite in {compute_type(dtype)}, got {value}")
    return value


def check_rounding(rounding: str, dtype: torch.dtype, masters: bool) -> Rounding:
    """Return how parameters of type ``dtype`` are rounded; there is nothing to round in the types that are computed in.

    Raises:
        ValueError: no rounding of that name, or a stochastic one of float16 or of parameters that have masters.
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f'rounding: expected "nearest" or "stochastic", got "{rounding}"')
    if rounding == "nearest" or dtype not in NARROW:
        return "nearest"
    if dtype != torch.bfloat16:
        raise ValueError(f"rounding: stochastic rounding is to torch.bfloat16, the parameters are {dtype}")
    if masters:
        raise ValueError("rounding: stochastic rounding and masters exclude each other")
    return "stochastic"


#: The roles of `Tensors` that hold tensors, in the order of its fields.
ROLES = ("params", "anchors", "averages", "momenta", "masters", "outer_momenta", "consensus")


@dataclass(slots=True)
class Tensors:
    """The tensors of one call, as parallel lists; a role that plays no part in the call is an empty list.

    ``params`` share one type and are ``y`` of the formula; the others are of its compute type: ``anchors`` ``x``, ``averages``
    ``m`` (Langevin) or ``p`` (gradient average), ``momenta`` ``v``, ``masters`` the float32 ``y`` behind narrow parameters,
    ``outer_momenta`` ``w``, ``consensus`` ``c``. All are dense and laid out like their parameter. ``numbers`` are
    the tensor numbers of the noise streams, ``places`` the shards' places.

    The last two are for errors: ``labels`` name the parameters where their positions in the list would say little, ``names``
    the roles that the caller knows by other names.

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
    labels: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def name(self, role: str, index: int | None = None) -> str:
        """Return what errors call a list, or the tensor at ``index`` of it."""
        role = self.names.get(role, role)
        return role if index is None else f"{role}[{self.labels[index] if self.labels else index}]"


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

    @property
    def reads(self) -> frozenset[str]:
        """The roles that the step reads; of a parameter and its master the step reads one, but both are named."""
        inner, outer, langevin = self.inner, self.outer, self.family == "langevin"
        y = inner and (langevin or self.wd != 0.0)
        by_average = self.a not in (0.0, 1.0) or (not langevin and self.a == 0.0 and self.c != 0.0)  # 1 forgets the old average
        return _those(
            params=y,
            anchors=outer or (inner and (not langevin or self.k != 0.0)),
            averages=outer or (inner and by_average),
            momenta=inner and langevin and self.mu != 0.0,
            masters=y,
            outer_momenta=outer and self.mu_o != 0.0,
            consensus=outer and self.kr != 0.0,
        )

    @property
    def writes(self) -> frozenset[str]:
        """The roles that the step writes."""
        return _those(
            params=True,
            anchors=self.outer,
            averages=(self.inner and self.a != 0.0) or (self.outer and self.family == "langevin"),
            momenta=self.inner and self.family == "langevin" and self.mu != 0.0,
            masters=True,
            outer_momenta=self.outer and self.mu_o != 0.0,
        )


def _those(**roles: bool) -> frozenset[str]:
    return frozenset(role for role, plays in roles.items() if plays)


def may_write(*, outer: bool) -> frozenset[str]:
    """Return the roles that a step may write, whatever its family and its numbers, with or without an outer step."""
    return Scalars(outer=outer, a=1.0, mu=1.0, mu_o=1.0).writes


class Plan(Protocol):
    """A backend's hold on the tensors of a call: made once, run every step while the tensors stay where they are."""

    #: Whether a step with a clock can go into a CUDA graph; otherwise the host reads the clock.
    CAPTURABLE: ClassVar[bool]

    def __init__(self, tensors: Tensors) -> None: ...

    def run(
        self,
        grads: Sequence[Tensor],
        scalars: Scalars,
        inv_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        addresses: bytes | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Take the step in place, or nothing at all where ``found_inf`` holds a number other than 0.

        ``grads`` are ``g`` of the formula, in the parameters' type and layout; empty where ``scalars.inner`` is off.
        ``inv_scale`` and ``found_inf`` are one-element tensors on the parameters' device, of the compute type and of float32.
        ``addresses`` are those of the gradients as the bytes of an ``array("Q")``, from a caller who has them at hand.
        With a ``clock`` some of the scalars are worked out where the tensors lie, and the clock counts the step.
        """
