"""The coupling of replicas in words: rho, how far it lets a step go, and what an exchange costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from deeprelax_cuda.optim.constants import Momentum, momentum_gain, noise_std, stability_limit, steps_until_below
from deeprelax_cuda.optim.describe import (
    Notes,
    Seen,
    count,
    digits_notes,
    drift_notes,
    number,
    outer_step,
    setting,
    width_notes,
)
from deeprelax_cuda.optim.describe_langevin import KEEPS_DIGITS
from deeprelax_cuda.optim.options import warn_user
from deeprelax_cuda.optim.scoping import rho_of

PARLE_LEGEND = "y live weights, x anchor, m average of y, c consensus (the answer), L inner_steps, h a curvature"
ELASTIC_LEGEND = "y live weights, x mean of the replicas (the answer), h a curvature"


def parle_step(group: dict[str, Any], rho: float) -> float:
    """Return what an outer step of Parle takes off x - c, where m is at c: lr*(1 + 1/rho)."""
    return float(group["lr"]) * (1.0 + 1.0 / rho) if rho else math.inf


def elastic_step(group: dict[str, Any], rho: float) -> float:
    """Return what the coupling alone takes off y - x in a step of Elastic-SGD: lr/rho."""
    return float(group["lr"]) / rho if rho else math.inf


def momentum_of(group: dict[str, Any]) -> Momentum:
    """Return the momentum that the coupling to the consensus goes through: of Parle the outer one, of Elastic-SGD its own."""
    return Momentum(
        mu=float(group["momentum"]),
        damp1=1.0 if "inner_momentum" in group else 1.0 - group["dampening"],
        nesterov=bool(group["nesterov"]),
        sees_coupling="inner_momentum" in group or bool(group["coupling_in_momentum"]),
    )


def is_alone(group: dict[str, Any]) -> bool:
    """Return whether rho does nothing, as what the one replica is pulled to is what it is pulled from.

    One replica of Parle that takes the mean of averages is pulled from x to its own m.
    """
    return group["replicas"] == 1 and group.get("consensus") != "averages"


def overshoot(group: dict[str, Any], step: Callable[[dict[str, Any], float], float]) -> str | None:
    """Return a warning where the coupling of replicas makes their steps diverge, now or at the floor of rho."""
    limit = stability_limit(momentum_of(group), coupling=True)
    now = float(group["rho"])
    last = float(group["rho_min"]) if group["rho_scoping"] and now < math.inf else now
    if is_alone(group) or last == math.inf or step(group, last) < limit:
        return None
    first = steps_until_below(lambda n: -limit if step(group, _rho_after(group, n)) >= limit else 0.0, -limit)
    when = "" if not first else f" from {outer_step(first, group['inner_steps'])} on"
    formula = "lr*(1 + 1/rho)" if step is parle_step else "lr/rho"
    return (
        f"rho={setting(last)}: the coupling of the replicas makes their steps diverge{when}, as {formula} = "
        f"{number(step(group, last))} is not below {number(limit)}; set {'rho_min' if when else 'rho'} higher or lr lower"
    )


def warn_of_overshoot(groups: Sequence[dict[str, Any]], step: Callable[[dict[str, Any], float], float]) -> None:
    """Warn of the first group whose coupling makes steps diverge."""
    for group in groups:
        if said := overshoot(group, step):
            warn_user(said)
            return


def coupling_notes(group: dict[str, Any], step: Callable[[dict[str, Any], float], float]) -> Notes:
    """Say what the options of a group amount to between the replicas."""
    notes = Notes()
    n, rho, length = group["replicas"], float(group["rho"]), group["inner_steps"]
    every = "every step" if length == 1 else f"every {length} steps"
    words = f"the mean is taken {every}, over {count(n, 'replica')}"
    if n > 1:
        times = number(2.0 * (n - 1) / n)
        words += f"; over ranks each sends 2(n - 1)/n = {times} times its parameters for it, 4 bytes each (float64: 8)"
    notes.line("replicas", f"{n:,}", words)
    notes += width_notes(group, "rho", "rho_scoping", lambda k: _rho_after(group, k))
    notes.advise(rho < math.inf and is_alone(group), "rho does nothing, as there is one replica.")
    if rho < math.inf and not is_alone(group):
        formula = "lr*(1 + 1/rho)" if step is parle_step else "lr/rho"
        limit = stability_limit(momentum_of(group), coupling=True)
        words = f"{formula}, what a step takes off the way to the consensus; stable below {number(limit)}"
        notes.line("pull", number(step(group, rho)), words)
    said = overshoot(group, step)
    notes.advise(said is not None, f"{said}.")
    notes.advise(rho == math.inf and n > 1, "rho=inf: nothing couples the replicas.")
    return notes


def elastic_notes(group: dict[str, Any], seen: Seen) -> Notes:
    """Say what the options of a group of Elastic-SGD amount to, next to the gradients where there are some."""
    notes = Notes()
    lr, temperature, momentum = float(group["lr"]), float(group["temperature"]), momentum_of(group)
    whole = lr * momentum_gain(momentum)
    words = "lr, the step along the gradient" + (f"; with momentum effectively {number(whole)}" if momentum.mu else "")
    limit = stability_limit(momentum, coupling=False)
    if lr and math.isfinite(limit):
        words += f"; stable for curvatures of the loss up to {number(limit / lr)}"
    notes.line("step", number(lr), words)
    if decay := group["weight_decay"]:
        notes.line("weight decay", number(decay), f"in the gradient: a part {number(whole * decay)} of y a step, with momentum")
    notes += drift_notes(seen, lr, whole, "a step, lr")
    std, drift = noise_std(lr, temperature), whole * seen.gradient_rms
    words = f"standard deviation a step, sqrt(2*lr*T) for temperature T = 1/beta = {number(temperature)}"
    notes.line("noise", number(std), words if std else "none")
    notes.advise(lr == 0.0, "lr=0: the replicas stand still.")
    notes.advise(whole == 0.0 < lr, "dampening=1 without nesterov: no gradient ever reaches y; lower dampening.")
    notes.advise(bool(group["dampening"]) and not momentum.mu, "dampening: without effect, as momentum=0.")
    notes.advise(momentum.nesterov and not momentum.mu, "nesterov=True is ignored, as momentum is 0.")
    sizes = {"noise": std, "drift": drift if seen.gradients else 0.0}
    return notes + digits_notes(sizes, seen.held, KEEPS_DIGITS, "it wants a larger lr") + coupling_notes(group, elastic_step)


def _rho_after(group: dict[str, Any], n: int) -> float:
    """Return rho after n outer steps from the start: by its rule, or the value that stands if they have been taken."""
    return float(group["rho"]) if n <= group["outer_steps"] else rho_of({**group, "outer_steps": n})
