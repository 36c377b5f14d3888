"""Whether the fixed point of Hamilton-Jacobi contracts: measured on its steps, concluded once a period, said in words.

With p' = p + a*(d(p) - p) and d(p) = grad f(x - gamma*p), a curvature h of the loss multiplies the distance to the fixed point,
and with it the residual d - p, by 1 - a*(1 + gamma*h) a step. So the ratio of successive |d - p| tends to the largest modulus
of these numbers, and the iteration contracts where it is below 1. Noise of the gradients scatters the ratio, the more the less
they have in common, and may make |d - p| grow for a few steps where the iteration contracts: `noise_growth`.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deeprelax_cuda.optim.describe import count, number, suggestion
from deeprelax_cuda.optim.launches import Launch
from deeprelax_cuda.steps import compute_type

#: Inner steps of the shortest period that has two residuals: the first step has none.
SHORTEST = 3
#: The last inner steps of a period that are measured, where it has them: two pairs of residuals.
MEASURED = 3
#: Periods whose ratios are looked at together, and how many it takes: noise of few elements has ratios of any size.
WINDOW, FEWEST = 32, 8
#: How far the logarithm of one ratio is taken to scatter by the noise of the gradients, before it is known: from minibatch to
#: minibatch their norm varies by half and more. And how many standard errors the mean of several must lie above chance.
SCATTER, SURE = 0.5, 4.0
#: The cosine of two residuals above which they are one line, as those of a mode that grows are, and those of noise are not.
COLLINEAR = 0.999
#: Elements from which on noise is hardly ever a line, and how close two ratios of fewer have to be.
MANY, EQUAL = 64, 1e-4
#: Residuals below this many units in the last place of the gradient are rounding errors.
ROUNDING = 16.0
#: What the gamma that would contract is taken below the largest one.
MARGIN = 0.9
#: How much gamma may change among periods that are looked at together, as scoping changes it.
NEAR = 0.05


class _Residual(NamedTuple):
    """d - p of the parameters of these numbers, launch by launch; ``least`` is the square below which it is rounding errors."""

    numbers: list[list[int]]
    parts: list[list[Tensor]]
    least: list[Tensor]


class _Pair(NamedTuple):
    """|r|^2, |r'|^2, |r + r'|^2 of two successive residuals, and the least of |r'|^2, launch by launch on its device."""

    before: list[Tensor]
    after: list[Tensor]
    sum: list[Tensor]
    least: list[Tensor]
    elements: int


class _Growth(NamedTuple):
    """What has become of a residual in a step: how many times longer it is, in which direction, and whether it is one."""

    ratio: float
    cosine: float
    is_rounding: bool
    elements: int

    def confirms(self, other: _Growth) -> bool:
        """Whether this and the step before tell that a mode of the iteration grows, and not noise.

        Of few elements those of noise are often one line too. Then the two ratios have to be equal besides.
        """
        both = (self, other)
        if not all(g.ratio > 1.0 and abs(g.cosine) >= COLLINEAR and not g.is_rounding for g in both):
            return False
        same = self.cosine * other.cosine > 0.0
        return same and (self.elements >= MANY or abs(self.ratio / other.ratio - 1.0) < EQUAL)


def noise_growth(a: float, length: int) -> float:
    """Return what noise alone can multiply |d - p| by in the last of ``length`` steps, though the iteration contracts.

    p begins as one gradient, of noise 1, and gathers that of the others: its variance goes by v = r^2*v + a^2, with the factor
    r = 1 - a*(1 + gamma*h), and |d - p|^2 is (1 + gamma*h)^2*v + 1 before it. That grows most at r = -1.
    """
    before, after = (4.0 * (1.0 + (j - 1) * a * a) + a * a for j in (length - 2, length - 1))
    return math.sqrt(after / before)


class Contraction:
    """The ratios of the last periods."""

    def __init__(self) -> None:
        self.last = math.nan
        self._residual: _Residual | None = None
        self._pairs: list[_Pair] = []
        self._gammas: list[float] = []  # of the groups
        self._first_gammas: list[float] = []  # of the first of the periods below
        self._logs: deque[float] = deque(maxlen=WINDOW)
        self._growths: deque[_Growth] = deque(maxlen=2)
        self._chance = 0.0  # the logarithm up to which a ratio may be noise

    def begin(self) -> None:
        """Begin the measured part of a period."""
        self._residual, self._pairs = None, []

    @torch.no_grad()
    def measure(self, launches: Sequence[Launch], groups: Sequence[dict[str, Any]]) -> None:
        """Take the residual of a step that is about to be taken; the numbers stay on their device."""
        now = _Residual([], [], [])
        for call, grads, _ in launches:
            if not call.bucket.inner or (call.count or 0) < 2:  # before the first gradient of a period p is none of its own
                continue
            group, compute = groups[call.bucket.group], compute_type(call.bucket.dtype)
            residual = [g.to(compute, copy=True) for g in grads]
            if group["maximize"]:
                torch._foreach_neg_(residual)
            if group["weight_decay"]:
                weights = [own.get("master", p).to(compute) for p, own in zip(call.bucket.params, call.states, strict=True)]
                torch._foreach_add_(residual, weights, alpha=group["weight_decay"])
            now.least.append(_square(residual) * (ROUNDING * torch.finfo(call.bucket.dtype).eps) ** 2)
            torch._foreach_sub_(residual, [own["gradient_average"] for own in call.states])
            now.parts.append(residual)
            now.numbers.append(list(call.bucket.numbers))
        if (then := self._residual) is not None:  # a ratio is of the same parameters, in the same launches
            self._pairs = [*self._pairs, _pair(then, now)] if then.numbers == now.numbers else []
        self._residual, self._gammas = now, [float(group["gamma"]) for group in groups]

    def conclude(self, weights: Sequence[float], length: int) -> str | None:
        """Read the ratios of the period of ``length`` steps that has ended; return what is to be said if it does not contract.

        ``weights`` are those of the new gradient, in each group, in the step between the two residuals.
        """
        found = [growth for pair in self._pairs if (growth := _growth(pair))]
        self.begin()
        self.last = math.nan
        if not found:
            return None
        self.last = found[-1].ratio
        pairs = itertools.zip_longest(self._gammas, self._first_gammas, fillvalue=math.nan)
        if not all(abs(gamma / first - 1.0) < NEAR for gamma, first in pairs) or not self._first_gammas:
            self._logs.clear()
            self._growths.clear()
            self._first_gammas = self._gammas
        if not found[-1].is_rounding:  # else it has converged
            self._logs.append(math.log(self.last))
        self._growths.extend(found)
        self._chance = math.log(noise_growth(max(weights), length))
        if not self.grows():
            return None
        ratio, since = self.last, ""
        if not self._is_certain():
            ratio, since = self.mean(), f", by the last {count(len(self._logs), 'period')}"
        # Residuals that turn round grow by a*(1 + gamma*h) - 1, which a curvature h > 0 does; others by 1 - a*(1 + gamma*h).
        # Which group's they are is not known.
        turned = found[-1].cosine < 0.0
        part = MARGIN * min((2.0 - a) / (1.0 + ratio - a) if turned else a / (ratio - 1.0 + a) for a in weights)
        gammas = list(dict.fromkeys(self._gammas))
        remedy = f"gamma={suggestion(part * gammas[0])}" if len(gammas) == 1 else f"{number(part)} times every gamma"
        return (
            f"check_contraction: the fixed point does not contract at gamma={', '.join(map(number, gammas))}: |d - p| grows "
            f"{number(ratio)} times an inner step{since}. It would contract at {remedy}, noise of the gradients aside; "
            'inner="prox" needs no such gamma'
        )

    def mean(self) -> float:
        """Return the geometric mean of the ratios."""
        return math.exp(sum(self._logs) / len(self._logs)) if self._logs else math.nan

    def grows(self) -> bool:
        """Whether the residuals grow: along a line twice in succession, or in the mean by more than chance would have it."""
        if self._is_certain():
            return True
        if (n := len(self._logs)) < FEWEST:
            return False
        mean = sum(self._logs) / n
        scatter = math.sqrt((SCATTER**2 + sum((log - mean) ** 2 for log in self._logs)) / n)
        return mean > self._chance + SURE * scatter / math.sqrt(n)

    def words(self) -> tuple[str, str]:
        """Return a number and words for `describe`."""
        if not self._logs and math.isnan(self.last):
            return "?", "the ratio of successive |d - p|: no period has been measured yet"
        if not self._logs:
            return number(self.last), "the ratio of rounding errors: the iteration converges within a period"
        verdict = "it does not contract" if self.grows() else "it contracts" if self.mean() < 1.0 else "as good as none"
        mean = f"{number(self.mean())} by the last {count(len(self._logs), 'period')}"
        words = f"the ratio of |d - p| in the last two steps of a period, {mean}"
        return number(self.last), f"{words}: {verdict}"

    def _is_certain(self) -> bool:
        return len(self._growths) == 2 and self._growths[1].confirms(self._growths[0])


def _square(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Return the sum of the squares of all elements, float64, on their device."""
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()


def _pair(then: _Residual, now: _Residual) -> _Pair:
    sums = [_square(torch._foreach_add(a, b)) for a, b in zip(then.parts, now.parts, strict=True)]
    elements = sum(t.numel() for part in now.parts for t in part)
    return _Pair([_square(part) for part in then.parts], [_square(part) for part in now.parts], sums, now.least, elements)


def _growth(pair: _Pair) -> _Growth | None:
    """Read a pair, for which the host waits; None where there is nothing, or nothing finite, to compare."""
    before, after, both, least = (sum(map(float, numbers)) for numbers in pair[:4])
    if not (before > 0.0 and after > 0.0 and math.isfinite(before + after)):
        return None
    cosine = (both - before - after) / (2.0 * math.sqrt(before * after))
    return _Growth(math.sqrt(after / before), cosine, after < least, pair.elements)
