"""The Langevin step as torch programs take it without this package: what our steps are measured against.

Every function takes the same step in place, on one tensor of each role or on lists: gradient, coupling, optionally Nesterov
momentum, optionally noise, running average. Beside bfloat16 ``y`` and ``g`` the state ``x``, ``m``, ``v`` is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ETA, K, S, A, MU = 0.1, 0.01, 1e-3, 0.25, 0.9


class Terms(NamedTuple):
    """Which terms that may be absent a step has."""

    noise: bool = True
    momentum: bool = False


class Roles(NamedTuple):
    """The tensors of a step; ``v`` is empty without momentum."""

    y: list[Tensor]
    g: list[Tensor]
    x: list[Tensor]
    m: list[Tensor]
    v: list[Tensor]

    def each(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]:
        """Return the tensors parameter by parameter."""
        return list(zip(self.y, self.g, self.x, self.m, self.v or [None] * len(self.y), strict=True))  # type: ignore[list-item]


Step = Callable[[Roles], object]
PLAIN = Terms()


def naive_eager(y: Tensor, g: Tensor, x: Tensor, m: Tensor, v: Tensor | None = None, terms: Terms = PLAIN) -> None:
    """Take the step as one writes it down."""
    d = g + K * (y - x)
    if terms.momentum and v is not None:
        v.copy_(MU * v + d)
        d = d + MU * v
    stepped = y - ETA * d
    y.copy_(stepped + S * torch.randn_like(stepped) if terms.noise else stepped)
    m.copy_(m + A * (y - m))


def in_place_eager(y: Tensor, g: Tensor, x: Tensor, m: Tensor, v: Tensor | None = None, terms: Terms = PLAIN) -> None:
    """Take the step as published code does: one temporary, scaled additions in place."""
    d = torch.sub(y, x).mul_(K).add_(g)
    if terms.momentum and v is not None:
        v.mul_(MU).add_(d)
        d.add_(v, alpha=MU)
    y.add_(d, alpha=-ETA)
    if terms.noise:
        y.add_(d.normal_(), alpha=S)
    m.lerp_(y.to(m.dtype), A)


def foreach(roles: Roles, terms: Terms = PLAIN) -> None:
    """Take the step with torch's horizontally fused ops, the noise of all tensors drawn at once."""
    y, g, x, m, v = roles
    d = torch._foreach_sub(y, x)
    torch._foreach_mul_(d, K)
    torch._foreach_add_(d, g)
    if terms.momentum:
        torch._foreach_mul_(v, MU)
        torch._foreach_add_(v, d)
        torch._foreach_add_(d, v, alpha=MU)
    torch._foreach_add_(y, d, alpha=-ETA)
    if terms.noise:
        z = torch.randn(sum(t.numel() for t in d), dtype=d[0].dtype, device=d[0].device)
        pieces = torch.split(z, [t.numel() for t in d])
        torch._foreach_add_(y, [piece.view_as(t) for piece, t in zip(pieces, d, strict=True)], alpha=S)
    torch._foreach_lerp_(m, [t.to(a.dtype) for t, a in zip(y, m, strict=True)], A)


def compiled(aten_noise: bool) -> Callable[..., None]:
    """Return the naive step under torch.compile, with Inductor's random numbers or with ATen's."""
    step: Callable[..., None] = torch.compile(naive_eager, fullgraph=True, options={"fallback_random": aten_noise})
    return step


def one_by_one(step: Callable[..., None], terms: Terms) -> Step:
    """Return a step on lists that takes one tensor after the other."""

    def steps(roles: Roles) -> None:
        for tensors in roles.each():
            step(*tensors, terms=terms)

    return steps


# ---- What a step must have done ---------------------------------------------------------------------------------------------


def wrong(before: Sequence[Tensor], after: Sequence[Tensor], terms: Terms, *, coupling: bool = True) -> str | None:
    """Return what is wrong with a step in words, None where nothing is.

    ``before`` are y, g, x, m, v (empty without momentum), ``after`` are y and m (empty where there is none to look at), all
    flat. The random numbers are the contender's own, so that noise is known by its mean and its spread alone; of bfloat16,
    which is coarser than it, by its bound.
    """
    narrow = before[0].element_size() == 2
    y, g, x, m, v = (t.double() for t in before)
    stepped, average = (t.double() for t in after)
    d = g + K * (y - x) if coupling else g
    if terms.momentum:
        d = d + MU * (MU * v + d)
    error = stepped - (y - ETA * d)
    rounding = 2.0**-7 if narrow else 2.0**-22  # of several operations, at most
    bound = rounding * float(stepped.abs().max() + 1) + (8 * S if terms.noise else 0.0)
    if not float(error.abs().max()) <= bound:  # not: NaN is wrong too
        return f"y is {float(error.abs().max()):.3g} away from where it should be, expected at most {bound:.3g}"
    if terms.noise and not narrow:
        mean, spread, sigma = float(error.mean()) / S, float(error.std()) / S, 1 / math.sqrt(error.numel())
        if not (abs(mean) < 6 * sigma and abs(spread - 1) < 6 * sigma):
            return f"the noise has mean {mean:.3g} and standard deviation {spread:.3g}, expected 0 and 1"
    if average.numel():
        error = average - (m + A * (stepped - m))
        if not float(error.abs().max()) <= 2.0**-22 * float(average.abs().max() + 1) * (2.0**15 if narrow else 1.0):
            return f"m is {float(error.abs().max()):.3g} away from where it should be"
    return None
