"""Scoping: the schedules that shrink gamma along training, so that the relaxed loss turns into the loss itself.

Each value is computed from the initial value and the number of outer steps, never from the value before it, by + - * / alone:
a device computes the same numbers inside a graph.

Source: arXiv 1611.01838 (the exponential schedule, there of the stiffness 1/gamma); arXiv 1704.04932 (time runs backwards).
"""

from __future__ import annotations

import math
from typing import Any


def power(base: float, exponent: int) -> float:
    """Return base**exponent for an exponent >= 0 by repeated squaring, lowest bit first; inf where it overflows."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def shrink(initial: float, rate: float, floor: float, outer_steps: int) -> float:
    """Return max(floor, initial / (1 + rate)**outer_steps)."""
    return max(floor, initial / power(1.0 + rate, outer_steps))


def reverse_time(total: float, floor: float, outer_steps: int, inner_steps: int, inner_lr: float) -> float:
    """Return max(floor, total - elapsed); a gradient evaluation takes ``inner_lr`` of the time ``total``."""
    return max(floor, total - outer_steps * inner_steps * inner_lr)


def gamma_of(group: dict[str, Any]) -> float:
    """Return gamma after the group's ``outer_steps`` by the rule that is on, or the value that stands where none is.

    Rules: ``gamma_total`` (then ``scoping`` is ignored), else ``scoping`` where it is not 0. An infinite gamma stays infinite.
    """
    n, floor = group["outer_steps"], float(group["gamma_min"])
    if group["gamma_total"] is not None:
        return reverse_time(float(group["gamma_total"]), floor, n, group["inner_steps"], group["initial_inner_lr"])
    if group["scoping"] == 0.0 or group["initial_gamma"] == math.inf:
        return float(group["gamma"])
    return shrink(group["initial_gamma"], float(group["scoping"]), floor, n)
