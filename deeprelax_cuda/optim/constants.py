"""What the numbers of a method amount to: times, limits and temperatures of its loops, as functions of numbers alone.

They are those of a quadratic loss of curvature h with its minimum at the anchor, where one inner step is linear in (y, v) and
all has a closed form. ``q = inner_lr*h`` is the part of the way that a plain gradient step goes, ``q_k = inner_lr/gamma`` that
of the coupling. With ``inside`` for what the momentum sees (``q``, and ``q_k`` where it sees it) and ``outside`` for the rest,

    v' = mu*v + damp1*inside*y;   y' = y - (v' or, Nesterov, inside*y + mu*v') - outside*y + s*z

has the trace and the determinant of `_invariants`, from which all below follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Momentum:
    """The settings of a momentum: ``damp1`` is 1 - dampening; ``nesterov``, or else the heavy ball.

    Where ``mu`` is 0 there is no buffer, and the others mean nothing.
    """

    mu: float = 0.0
    damp1: float = 1.0
    nesterov: bool = False
    sees_coupling: bool = True


class _Invariants(NamedTuple):
    """Of the matrix that takes (y, v) one step on: 2 - trace, determinant, and the characteristic polynomial at 1 and at -1.

    Each is summed without cancellation, so that couplings of 1e-12 keep their digits.
    """

    two_minus_trace: float
    determinant: float
    at_one: float
    at_minus_one: float


def _invariants(momentum: Momentum, q: float, q_k: float) -> _Invariants:
    mu = momentum.mu
    damp1, nesterov = (momentum.damp1, momentum.nesterov) if mu else (1.0, False)
    inside, outside = (q + q_k, 0.0) if momentum.sees_coupling else (q, q_k)
    if nesterov:
        return _Invariants(
            two_minus_trace=1.0 - mu + inside * (1.0 + mu * damp1) + outside,
            determinant=mu * (1.0 - inside - outside),
            at_one=inside * (1.0 - mu + mu * damp1) + outside * (1.0 - mu),
            at_minus_one=(2.0 - outside) * (1.0 + mu) - inside * (1.0 + mu + mu * damp1),
        )
    return _Invariants(
        two_minus_trace=1.0 - mu + inside * damp1 + outside,
        determinant=mu * (1.0 - outside),
        at_one=inside * damp1 + outside * (1.0 - mu),
        at_minus_one=(2.0 - outside) * (1.0 + mu) - inside * damp1,
    )


def momentum_gain(momentum: Momentum) -> float:
    """Return how many times its plain step a lasting force moves y: damp1/(1 - mu), Nesterov 1 + mu*damp1/(1 - mu).

    Both are 1/(1 - mu) without dampening. The sum of the weights with which one d enters all later steps.
    """
    if not momentum.mu:
        return 1.0
    built_up = momentum.damp1 / (1.0 - momentum.mu)
    return 1.0 + momentum.mu * built_up if momentum.nesterov else built_up


def stability_limit(momentum: Momentum, *, coupling: bool) -> float:
    """Return the q (or, ``coupling``, the q_k) at which steps by it alone begin to diverge, whatever is averaged.

    2(1 + mu)/damp1 for the heavy ball, 2(1 + mu)/(1 + mu + mu*damp1) for Nesterov; 2 without momentum, and for a coupling that
    the momentum does not see. Source: the Jury conditions on the characteristic polynomial; the one at -1 fails first.
    """
    if not momentum.mu or (coupling and not momentum.sees_coupling):
        return 2.0
    weight = 1.0 + momentum.mu + momentum.mu * momentum.damp1 if momentum.nesterov else momentum.damp1
    return 2.0 * (1.0 + momentum.mu) / weight if weight else math.inf


def is_stable(momentum: Momentum, q: float, q_k: float = 0.0) -> bool:
    """Return whether the steps converge from every start."""
    if not math.isfinite(q + q_k):
        return False
    it = _invariants(momentum, q, q_k)
    return it.at_one > 0.0 and it.at_minus_one > 0.0 and it.determinant < 1.0


def relaxation_time(momentum: Momentum, q: float, q_k: float = 0.0) -> float:
    """Return the steps in which the distance to the minimum falls by a factor e in the end; inf where it does not fall.

    -1/ln(spectral radius) of the step; where it is long this is 1/(gain*q), for the coupling alone gamma*(1 - mu)/inner_lr.
    """
    if not is_stable(momentum, q, q_k):
        return math.inf
    it = _invariants(momentum, q, q_k)
    discriminant = it.two_minus_trace**2 - 4.0 * it.at_one
    if discriminant < 0.0:  # a pair of complex eigenvalues, of modulus sqrt(determinant)
        return -2.0 / math.log(it.determinant)
    total = it.two_minus_trace + math.sqrt(discriminant)
    slow, fast = 2.0 * it.at_one / total, total / 2.0  # 1 - eigenvalue
    if abs(1.0 - fast) > abs(1.0 - slow):
        slow = 1.0 - abs(1.0 - fast)
    return -1.0 / math.log1p(-slow) if slow < 1.0 else 0.0


def effective_temperature(momentum: Momentum, q: float, q_k: float = 0.0) -> float:
    """Return T_eff/T: y is distributed in the end as exp(-V/T_eff) for V = f + |y - x|^2/(2 gamma); inf where it diverges.

    T_eff = (h + 1/gamma) Var(y), where Var solves the discrete Lyapunov equation of the step with noise sqrt(2*inner_lr*T)*z:

        Var = 2 inner_lr T ((1 + mu^2)(1 + det) - 2 mu tr) / ((1 - det)(1 - tr + det)(1 + tr + det))

    With coupling inside, no dampening, q the sum of both and b = 1 - q this is, heavy ball and Nesterov,

        ((1 + mu)(1 - mu)^2 + 2 mu q)/((1 - mu)(1 + mu - q/2))
        2((1 + mu^2)(1 + mu b) - 2 mu (1 + mu) b)/((1 - mu b)(1 + b + 2 mu b))

    and 1 - mu where q << (1 - mu)^2. Source: y is an ARMA(2, 1) process, whose variance is in every book on time series.
    """
    if not is_stable(momentum, q, q_k):
        return math.inf
    it, mu = _invariants(momentum, q, q_k), momentum.mu
    # (1 + mu^2)(1 + det) - 2 mu tr, in terms that are not close to each other
    driven = (1.0 - mu) ** 2 * (1.0 + it.determinant) + 2.0 * mu * it.at_one
    return 2.0 * (q + q_k) * driven / ((1.0 - it.determinant) * it.at_one * it.at_minus_one)


def noise_std(inner_lr: float, temperature: float) -> float:
    """Return the standard deviation of the noise of one inner step, sqrt(2*inner_lr*T)."""
    return math.sqrt(2.0 * inner_lr * temperature)


def temperature_of_noise(std: float, inner_lr: float) -> float:
    """Return the T whose noise has this standard deviation a step, std^2/(2*inner_lr)."""
    return std * std / (2.0 * inner_lr)


def averaging_window(averaging: float | str, inner_steps: int) -> float:
    """Return how many inner steps count in m: 1/(1 - averaging), L for "linear", whose middle is L/2 back, 1 for "last"."""
    if isinstance(averaging, str):
        return {"linear": float(inner_steps), "last": 1.0}[averaging]
    return 1.0 / (1.0 - averaging)


def weight_of_anchor(averaging: float | str, inner_steps: int) -> float:
    """Return the weight in m, at the end of a period, of the anchor where it began: averaging^L."""
    return 0.0 if isinstance(averaging, str) else averaging**inner_steps


def half_life(rate: float) -> float:
    """Return the outer steps in which scoping halves a number, ln 2/ln(1 + rate); inf for 0."""
    return math.log(2.0) / math.log1p(rate) if rate else math.inf


def steps_until_below(after: Callable[[int], float], bound: float, *, start: int = 0, end: int = 2**40) -> int | None:
    """Return the first n in [start, end] with after(n) <= bound, for ``after`` that does not increase; None: there is none."""
    if after(start) <= bound:
        return start
    if not after(end) <= bound:
        return None
    above, below = start, end
    while below - above > 1:
        middle = (above + below) // 2
        above, below = (above, middle) if after(middle) <= bound else (middle, below)
    return below


def half_ulp(value: float, dtype: torch.dtype) -> float:
    """Return half the distance of the numbers of ``dtype`` at ``value``: rounding to nearest loses an addend below it."""
    info = torch.finfo(dtype)
    _, exponent = math.frexp(max(abs(value), info.tiny))
    return math.ldexp(info.eps, exponent - 2)
