"""The loop of the authors' public Entropy-SGD code, computed again in float64 numpy: what `from_published_code` must follow.

Written from what python/optim.py of github.com/ucla-vision/entropy-sgd computes, in its own words. Without ``defects`` it is
that code as it was meant; each defect of the original is switched on by its name. The normals are the numeric contract's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: The gradients at some weights, of the minibatch of a number.
Gradient = Callable[[list[Array], int], list[Array]]

STUCK = "the counter of scoping never advances"
SEEDED = "the outer momentum starts from a gradient of the loss"
ALIASED = "without Nesterov, coupling and noise get into the inner momentum"
FIRST_GROUP = "only the first group moves"
DEFECTS = (STUCK, SEEDED, ALIASED, FIRST_GROUP)


@dataclass(frozen=True)
class Config:
    """The options of the published code with its defaults, its two constants, and what the comparison needs."""

    lr: float = 0.01
    momentum: float = 0.0
    damp: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = True
    L: int = 0
    eps: float = 1e-4
    g0: float = 1e-2
    g1: float = 0.0
    inner_lr: float = 0.1
    averaging: float = 0.75
    seed: int = 0


def push(d: Array, buffer: Array, o: Config, aliased: bool = False) -> Array:
    """Return ``d`` under momentum, whose ``buffer`` is brought up to date; ``aliased``: without Nesterov it is the buffer."""
    if o.momentum == 0.0:
        return d
    buffer[...] = o.momentum * buffer + (1.0 - o.damp) * d
    if o.nesterov:
        return d + o.momentum * buffer
    return buffer if aliased else buffer.copy()


def weights_of(
    start: list[Array],
    gradient: Gradient,
    calls: int,
    *,
    defects: Collection[str] = (),
    first_group: int | None = None,
    **config: Any,
) -> Iterator[list[Array]]:
    """Yield the weights after each gradient evaluation that counts: the live ones, after the last of a call the new anchor.

    Args:
        start: the first weights.
        gradient: called with the weights and the number of the inner step, from 0; at x with that of the next.
        calls: of the published step(closure); L inner steps and an outer one, or one step of SGD where L is 0.
        defects: those of `DEFECTS` that are switched on.
        first_group: how many parameters the first group has; None: all.
        config: the fields of `Config`.
    """
    o = Config(**config)
    x = [np.array(w, np.float64) for w in start]
    moving = range(first_group if first_group is not None and FIRST_GROUP in defects else len(x))
    outer_buffers = [np.zeros_like(w) for w in x]
    for call in range(calls):
        at_x = gradient(x, call * max(o.L, 1))
        if call == 0 and SEEDED in defects:
            outer_buffers = [g.copy() for g in at_x]
        stiffness = o.g0 * (1.0 + o.g1) ** (0 if STUCK in defects else call)

        live, average = [w.copy() for w in x], [w.copy() for w in x]
        inner_buffers = [np.zeros_like(w) for w in x]
        for step in range(call * o.L, (call + 1) * o.L):
            gradients = gradient(live, step)
            for i in moving:
                d = push(gradients[i] + o.weight_decay * live[i], inner_buffers[i], o, aliased=ALIASED in defects)
                z = oracle.normals(np.arange(d.size), o.seed, step, i).astype(np.float64).reshape(d.shape)
                d += stiffness * (live[i] - x[i])  # in place: how the buffer catches it
                d += o.eps / math.sqrt(0.5 * o.inner_lr) * -z  # descended along, so that the weights get +z as in the contract
                live[i] = live[i] - o.inner_lr * d
                average[i] = o.averaging * average[i] + (1.0 - o.averaging) * live[i]
            if step + 1 < (call + 1) * o.L:
                yield [w.copy() for w in live]

        for i in moving:
            d = x[i] - average[i] if o.L else at_x[i]
            x[i] = x[i] - o.lr * push(d + o.weight_decay * x[i], outer_buffers[i], o)
        yield [w.copy() for w in x]
