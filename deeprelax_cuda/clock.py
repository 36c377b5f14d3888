"""Counters and values that lie on the device that takes the steps, so that a captured graph goes on counting.

What a host otherwise computes before each step, from counters, gamma and lr, is computed there: by the native backends in
csrc/core/clock.h, by the eager one below. It is plain binary64 arithmetic, so all come to the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from deeprelax_cuda.steps import Family, Scalars, compute_type, round_scalar

#: Bytes of `Clock.numbers`.
NUMBERS = 256


def power(base: float, exponent: int) -> float:
    """Return base**exponent for an exponent >= 0 by repeated squaring, lowest bit first; inf where it overflows."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


class Rule(NamedTuple):
    """How periods end, and what gamma is after ``n`` of them; see `deeprelax_cuda.EntropySGD` for the options.

    gamma is computed from the initial value and the number of outer steps, never from the value before it, by + - * / alone.

    Source: arXiv 1611.01838 (the exponential schedule, there of the stiffness 1/gamma); arXiv 1704.04932 (time runs backwards).
    """

    inner_steps: int  # 0: no period ends
    initial_gamma: float
    scoping: float
    gamma_min: float
    gamma_total: float  # 0: gamma follows scoping
    inner_lr: float  # the initial one

    def gamma(self, n: int, gamma: float) -> float:
        """Return gamma after ``n`` outer steps, ``gamma`` where no rule is on. An infinite gamma stays infinite."""
        if self.gamma_total:
            return max(self.gamma_min, self.gamma_total - n * self.inner_steps * self.inner_lr)
        if self.scoping == 0.0 or self.initial_gamma == math.inf:
            return gamma
        return max(self.gamma_min, self.initial_gamma / power(1.0 + self.scoping, n))


class Law(NamedTuple):
    """What gamma, lr and the steps of a period are in the formula: a method's way from them to the numbers of a step."""

    #: "stiffness": k = 1/gamma; "drift": c = gamma; "variance": s = sqrt(gamma*temperature).
    gamma: Literal["stiffness", "drift", "variance"] = "stiffness"
    #: "outer": lr is that of the outer step; "inner": eta = lr and s = sqrt(2*lr*temperature).
    lr: Literal["outer", "inner"] = "outer"
    #: What a counted average weights its n-th sample with, "mean": 1/n; "restart": 1 for the first, the constant a after it.
    average: Literal["mean", "restart"] = "mean"
    temperature: float = 0.0

    def numbers(self, gamma: float, lr: float) -> dict[str, float]:
        """Return the numbers of `Scalars` that follow from gamma and lr, in binary64: they are yet to be rounded."""
        found = {"eta": lr, "s": self._deviation(2.0 * lr)} if self.lr == "inner" else {"lr": lr}
        if self.gamma == "stiffness":
            found["k"] = 1.0 / gamma if gamma else math.inf
        elif self.gamma == "drift":
            found["c"] = gamma
        else:
            found["s"] = self._deviation(gamma)
        return found

    def _deviation(self, per_degree: float) -> float:
        """Return the standard deviation of noise; without a temperature there is none, whatever gamma and lr become."""
        variance = per_degree * self.temperature if self.temperature else 0.0
        return math.nan if variance < 0.0 else math.sqrt(variance)

    def weight(self, count: int, constant: float) -> float:
        """Return a for the sample of number ``count`` in its period; in a mean, one before the first has none."""
        if self.average == "mean":
            return 1.0 / count if count > 0 else 0.0
        return 1.0 if count == 1 else constant


#: That of Entropy-SGD.
COUPLED = Law()


def follows(family: Family, count: int | None) -> bool:
    """Whether an outer step moves a parameter: in the gradient average, only if its period has ``count``ed a gradient."""
    return family == "langevin" or count is None or count > 0


@dataclass(frozen=True, slots=True)
class Clock:
    """The clock of a call: 0-dim tensors on the parameters' device, and the rule that they follow.

    A step with a clock takes ``outer`` and ``step`` of its `Scalars` from it, and what its law says of gamma, of lr and, with
    ``period_steps``, of ``a``.

    ``step`` (inner steps taken), ``position`` (of them in this period), ``outer_steps`` and ``period_steps`` (samples in the
    average of this period, below 0 before the first that counts; None for an average that nobody counts) are int64, ``gamma``
    is float64, ``lr`` float64 or float32. ``numbers`` is scratch memory of `NUMBERS` bytes that a captured graph may hold on
    to. ``counts``: whether the call moves the counters on; of the calls that share them it is the last.
    """

    step: Tensor
    position: Tensor
    outer_steps: Tensor
    gamma: Tensor
    lr: Tensor
    period_steps: Tensor | None
    numbers: Tensor
    counts: bool
    rule: Rule
    law: Law = COUPLED

    def advance(self, constant: Scalars, dtype: torch.dtype) -> Scalars:
        """Return the numbers of the coming step, and count it; this reads the device's memory and waits for it.

        As on a device, a value that is not finite is not refused any more.
        """
        position = int(self.position) + 1
        ends = 0 < self.rule.inner_steps <= position
        count = None if self.period_steps is None else int(self.period_steps) + constant.inner
        compute = compute_type(dtype)
        found = self.law.numbers(float(self.gamma), float(self.lr))
        rounded: dict[str, Any] = {
            name: float(torch.tensor(value, dtype=torch.float64).to(compute)) for name, value in found.items()
        }
        outer = ends and follows(constant.family, count)
        now = replace(constant, outer=outer, step=int(self.step), **rounded)
        if count is not None and self.period_steps is not None:
            if now.inner:
                now = replace(now, a=round_scalar("1 - averaging", self.law.weight(count, constant.a), dtype))
            self.period_steps.fill_(min(count, 0) if ends else count)
        if self.counts:
            self.step.add_(1)
            self.position.fill_(0 if ends else position)
            if ends:
                self.outer_steps.add_(1)
                self.gamma.fill_(self.rule.gamma(int(self.outer_steps), float(self.gamma)))
        return now
