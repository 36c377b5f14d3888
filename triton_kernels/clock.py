"""The numbers of a step worked out where the tensors lie, from counters and values that lie there too; csrc/core/clock.h."""

from typing import NamedTuple

import triton
import triton.language as tl


class Rule(NamedTuple):
    """How gamma follows from the outer steps; int64 and float64, see deeprelax_cuda/clock.py."""

    inner_steps: tl.tensor
    initial_gamma: tl.tensor
    scoping: tl.tensor
    gamma_min: tl.tensor
    gamma_total: tl.tensor
    inner_lr: tl.tensor


@triton.jit
def stiffness(gamma):
    return 1.0 / tl.where(gamma == 0.0, 0.0, gamma)  # -0 is 0


@triton.jit
def deviation(per_degree, temperature):
    """Return the standard deviation of noise; Triton's root of a float64 is correctly rounded, unlike that of a float32."""
    return tl.sqrt(per_degree * temperature)


@triton.jit
def weight(count, constant, AVERAGE: tl.constexpr):
    """Return a for the sample of number ``count`` in the average of its period; one before the first has none in a mean."""
    if AVERAGE == "restart":
        return tl.where(count == 1, 1.0, constant)
    else:
        return tl.where(count > 0, 1.0 / tl.maximum(count, 1).to(tl.float64), 0.0)


@triton.jit
def power(base, exponent):
    """Return base**exponent by repeated squaring, lowest bit first; infinity where it overflows."""
    result = base * 0.0 + 1.0
    while exponent != 0:
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def floored(rule, value):
    return tl.where(value > rule.gamma_min, value, rule.gamma_min)


@triton.jit
def gamma_after(rule, n, gamma):
    """Return gamma after n outer steps."""
    steps = n.to(tl.float64) * rule.inner_steps.to(tl.float64)
    by_time = floored(rule, rule.gamma_total - steps * rule.inner_lr)
    by_scoping = floored(rule, rule.initial_gamma / power(1.0 + rule.scoping, n))
    constant = (rule.scoping == 0.0) | (rule.initial_gamma == float("inf"))
    return tl.where(rule.gamma_total != 0.0, by_time, tl.where(constant, gamma, by_scoping))
