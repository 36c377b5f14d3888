"""Counters and values that lie on the device that takes the steps, so that a captured graph goes on counting.

What a host otherwise computes before each step, from counters, gamma and lr, is computed there: by the native backends in
csrc/core/clock.h, by the eager one below. It is plain binary64 arithmetic, so all come to the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from deeprelax_cuda.steps import Scalars, compute_type, round_scalar

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

    inner_steps: int
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


@dataclass(frozen=True, slots=True)
class Clock:
    """The clock of a call: 0-dim tensors on the parameters' device, and the rule that they follow.

    A step with a clock takes ``outer``, ``k``, ``lr`` and ``step`` of its `Scalars` from it, with ``period_steps`` ``a`` too.

    ``step`` (inner steps taken), ``position`` (of them in this period), ``outer_steps`` and ``period_steps`` (steps in the
    plain mean of this period, None for another average) are int64, ``gamma`` is float64, ``lr`` float64 or float32.
    ``numbers`` is scratch memory of `NUMBERS` bytes that a captured graph may hold on to. ``counts``: whether the call moves
    the counters on; of the calls that share them it is the last.
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

    def advance(self, constant: Scalars, dtype: torch.dtype) -> Scalars:
        """Return the numbers of the coming step, and count it; this reads the device's memory and waits for it.

        As on a device, a value that is not finite is not refused any more.
        """
        position = int(self.position) + 1
        outer = position >= self.rule.inner_steps
        now = replace(
            constant,
            outer=outer,
            step=int(self.step),
            k=float((1.0 / self.gamma).to(compute_type(dtype))),
            lr=float(self.lr.to(compute_type(dtype))),
        )
        if self.period_steps is not None:
            count = int(self.period_steps) + now.inner
            if now.inner:
                now = replace(now, a=round_scalar("1 - averaging", 1.0 / count, dtype))
            self.period_steps.fill_(0 if outer else count)
        if self.counts:
            self.step.add_(1)
            self.position.fill_(0 if outer else position)
            if outer:
                self.outer_steps.add_(1)
                self.gamma.fill_(self.rule.gamma(int(self.outer_steps), float(self.gamma)))
        return now
