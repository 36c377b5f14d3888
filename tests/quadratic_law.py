"""The exact law of Entropy-SGD on quadratics, as an independent program in float64.

With the loss f(y) = h/2 (y - target)^2 of each coordinate, every formula of the method is linear in the coordinate's numbers.
So a step maps (x, y, m, v, w) affinely and adds a multiple of a standard normal z, the coordinates are Gaussian, and their mean
and covariance after any number of steps follow exactly. The formulas are those of docs/contract.md, with the options of
`EntropySGD`; nothing of the package is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: The numbers of a coordinate: anchor, live weight, average, inner and outer momentum.
NAMES = ("x", "y", "m", "v", "w")


@dataclass
class Law:
    """Mean (5,) and covariance (5, 5) of (x, y, m, v, w) after the steps taken so far, from ``x = y = m = start``.

    ``options`` are those of `EntropySGD`, all of them that the method has.
    """

    h: float
    target: float
    start: float
    options: dict[str, Any]
    steps: int = 0
    mean: np.ndarray = field(init=False)
    cov: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.mean = np.array([self.start] * 3 + [0.0, 0.0])
        self.cov = np.zeros((5, 5))

    def step(self) -> None:
        """Take an inner step, and the outer step where it ends a period."""
        rows = self._rows()
        matrix, shift, noise = rows[:, :5], rows[:, 5], rows[:, 6]
        self.mean = matrix @ self.mean + shift
        self.cov = matrix @ self.cov @ matrix.T + np.outer(noise, noise)
        self.steps += 1

    def gamma(self) -> float:
        """Return gamma in the present period, the first of which has the number 0."""
        o, period = self.options, self.steps // self.options["inner_steps"]
        if o["gamma_total"] is not None:
            return max(o["gamma_min"], o["gamma_total"] - period * o["inner_steps"] * o["inner_lr"])
        return max(o["gamma_min"], o["gamma"] / (1.0 + o["scoping"]) ** period)

    def _rows(self) -> np.ndarray:
        """Return (x, y, m, v, w) after the step, each as its coefficients of x, y, m, v, w before it, of 1 and of z."""
        o = self.options
        x, y, m, v, w, one, z = np.eye(7)
        place = self.steps % o["inner_steps"] + 1

        g = self.h * (y - self.target * one)
        d = (-g if o["maximize"] else g) + o["weight_decay"] * y
        e = (y - x) / self.gamma()
        mu = o["inner_momentum"]
        if o["coupling_in_momentum"]:
            d = d + e
        if mu > 0.0:
            v = mu * v + (1.0 - o["dampening"]) * d
            d = d + mu * v if o["nesterov"] else v
        if not o["coupling_in_momentum"]:
            d = d + e
        y = y - o["inner_lr"] * d + np.sqrt(2.0 * o["inner_lr"] * o["temperature"]) * z

        old = {"last": 0.0, "linear": (place - 1) / place}.get(o["averaging"], o["averaging"])
        m = old * m + (1.0 - old) * y

        if place == o["inner_steps"]:
            mu = o["momentum"]
            d = x - m + o["outer_weight_decay"] * x
            if mu > 0.0:
                w = mu * w + d
                d = d + mu * w if o["nesterov"] else w
            x = x - o["lr"] * d
            m = y = x
            if o["reset_inner_momentum"]:
                v = 0.0 * v
        return np.stack([x, y, m, v, w])
