"""The inner loop of Langevin steps in words: its drift, noise, temperature, coupling and average, and advice on them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from deeprelax_cuda.optim.constants import (
    Momentum,
    averaging_window,
    effective_temperature,
    momentum_gain,
    noise_std,
    relaxation_time,
    stability_limit,
    steps_until_below,
    temperature_of_noise,
    weight_of_anchor,
)
from deeprelax_cuda.optim.describe import (
    Notes,
    Seen,
    count,
    digits_notes,
    drift_notes,
    gamma_after,
    number,
    outer_step,
    setting,
    suggestion,
)

#: Noise that is a smaller part of the drift might as well be absent; the advice names the T that makes it the other part.
FAINT_NOISE, USEFUL_NOISE = 1e-3, 0.1
#: Curvatures, times inner_lr, at which the effective temperature is given.
CURVATURES = (0.01, 0.1, 1.0)
#: What a coupling that hardly acts comes to, in a loop that averages and in one that descends.
AVERAGES = "m is not the average under the local-entropy measure, and the method behaves like Lookahead with averaging"
DESCENDS = "y does not come to the proximal point, and the method behaves like Lookahead"
#: What keeps small additions to weights of a narrow type.
KEEPS_DIGITS = {
    torch.bfloat16: 'rounding="stochastic" or master_weights=True keeps it',
    torch.float16: "master_weights=True keeps it",
}


def inner_momentum(group: dict[str, Any]) -> Momentum:
    """Return the momentum of the inner loop of a group."""
    return Momentum(
        mu=float(group["inner_momentum"]),
        damp1=1.0 - group["dampening"],
        nesterov=bool(group["nesterov"]),
        sees_coupling=bool(group["coupling_in_momentum"]),
    )


def divergence(groups: Iterable[tuple[int, dict[str, Any]]]) -> str | None:
    """Return a warning of the first group, of those with their numbers, whose coupling alone makes the inner steps diverge.

    inner_lr/gamma is at its stability limit then, or above.
    """
    for index, group in groups:
        if float(group["inner_lr"]) >= stability_limit(inner_momentum(group), coupling=True) * float(group["gamma"]):
            return (
                f"gamma={group['gamma']:.3g} in group {index}: so stiff a coupling makes the inner steps diverge from now on; "
                f"set {'gamma_min' if _has_rule(group) else 'gamma'}, describe() says to what"
            )
    return None


def langevin_notes(group: dict[str, Any], seen: Seen) -> Notes:
    """Say what the options of a group amount to in its inner loop, next to the gradients where there are some."""
    momentum = inner_momentum(group)
    notes = _step(group, momentum) + _drift(group, momentum, seen) + _noise(group, momentum, seen)
    notes += _digits(group, momentum, seen) + _temperature(group, momentum)
    return notes + _coupling(group, momentum, AVERAGES) + _average(group)


def proximal_notes(group: dict[str, Any], seen: Seen) -> Notes:
    """Say it of a loop without noise and average, which descends to the proximal point."""
    momentum = inner_momentum(group)
    notes = _step(group, momentum) + _drift(group, momentum, seen) + _digits(group, momentum, seen)
    notes += _coupling(group, momentum, DESCENDS)
    notes.advise(
        group["inner_steps"] == 1,
        "inner_steps=1: y is one gradient step from x, where there is no coupling yet, and the method is SGD.",
    )
    return notes


def _step(group: dict[str, Any], momentum: Momentum) -> Notes:
    notes = Notes()
    inner_lr, mu, length, reset = float(group["inner_lr"]), momentum.mu, group["inner_steps"], group["reset_inner_momentum"]
    whole = inner_lr * momentum_gain(momentum)
    words = "inner_lr, the step along the gradient"
    if mu:
        kind = "Nesterov momentum" if momentum.nesterov else "momentum"
        words += f"; with {kind} {setting(mu)} effectively {number(whole)}"
    limit = stability_limit(momentum, coupling=False)
    if inner_lr and math.isfinite(limit):
        words += f"; stable for curvatures of the loss up to {number(limit / inner_lr)}"
    notes.line("inner step", number(inner_lr), words)
    if decay := group["weight_decay"]:
        notes.line("weight decay", number(decay), f"in the gradient: a part {number(whole * decay)} of y a step, with momentum")

    notes.advise(inner_lr == 0.0, "inner_lr=0: the inner loop stands still, and with it everything.")
    notes.advise(momentum_gain(momentum) == 0.0, "dampening=1 without nesterov: no gradient ever reaches y; lower dampening.")
    idle = [name for name in ("dampening", "reset_inner_momentum") if group[name] and not mu]
    notes.advise(bool(idle), f"{' and '.join(idle)}: without effect, as inner_momentum=0.")
    notes.advise(momentum.nesterov and not mu and not group["momentum"], "nesterov=True is ignored, as both momenta are 0.")
    notes.advise(
        bool(reset) and length * (1.0 - mu) < 1.0,
        f"reset_inner_momentum: a period of {count(length, 'inner step')} ends before inner_momentum={setting(mu)} has built "
        f"up, which takes {number(1.0 / (1.0 - mu))}: more inner_steps, or a smaller inner_momentum.",
    )
    return notes


def _sizes(group: dict[str, Any], momentum: Momentum, seen: Seen) -> tuple[float, float]:
    """Return the noise of a step, and its drift: with momentum, as the noise is outside it."""
    inner_lr = float(group["inner_lr"])
    return noise_std(inner_lr, float(group["temperature"])), inner_lr * seen.gradient_rms * momentum_gain(momentum)


def _drift(group: dict[str, Any], momentum: Momentum, seen: Seen) -> Notes:
    inner_lr, gain = float(group["inner_lr"]), momentum_gain(momentum) if momentum.mu else 1.0
    return drift_notes(seen, inner_lr, inner_lr * gain, "a step, inner_lr")


def _noise(group: dict[str, Any], momentum: Momentum, seen: Seen) -> Notes:
    notes = Notes()
    inner_lr, temperature = float(group["inner_lr"]), float(group["temperature"])
    std, drift = _sizes(group, momentum, seen)
    if std == 0.0:
        notes.line("noise", "0", "none: temperature=0" if not temperature else "none: inner_lr=0")
        return notes

    words = f"standard deviation a step, sqrt(2*inner_lr*T) for temperature T = 1/beta = {number(temperature)}, in published "
    words += f"code eps = sqrt(T) = {number(math.sqrt(temperature))}; "
    words += f"times sqrt(L) = {number(std * math.sqrt(group['inner_steps']))} a period"
    if drift > 0.0:  # not where it is NaN
        part = std / drift
        words += f"; {number(part)} of the drift" + (" with momentum" if momentum.mu else "")
        useful = suggestion(temperature_of_noise(USEFUL_NOISE * drift, inner_lr))
        ratio = f"temperature={setting(temperature)}: the noise of a step is {number(part)} of its drift"
        remedy = f"temperature={useful} makes it {USEFUL_NOISE}."
        notes.advise(part < FAINT_NOISE, f"{ratio}; it might as well be 0. {remedy}")
        notes.advise(part > 1.0, f"{ratio}; y wanders more than it descends. {remedy}")
    notes.line("noise", number(std), words)
    return notes


def _digits(group: dict[str, Any], momentum: Momentum, seen: Seen) -> Notes:
    std, drift = _sizes(group, momentum, seen)
    other = "it wants a larger temperature or inner_lr"
    return digits_notes({"noise": std, "drift": drift}, seen.held, KEEPS_DIGITS, other)


def _temperature(group: dict[str, Any], momentum: Momentum) -> Notes:
    notes = Notes()
    inner_lr, gamma, temperature = float(group["inner_lr"]), float(group["gamma"]), float(group["temperature"])
    if not inner_lr * temperature:
        return notes
    if gain := momentum_gain(momentum):
        words = f"= {number(1.0 / gain)} T, the temperature of y in the end where inner_lr*h << "
        words += "(1-inner_momentum)^2" if momentum.mu else "1"
        words += ", were the momentum not reset" if group["reset_inner_momentum"] and momentum.mu else ""
        notes.line("T_eff", number(temperature / gain), words)
    q_k = inner_lr / gamma if gamma > 0.0 else math.inf
    for q in CURVATURES:
        ratio = effective_temperature(momentum, q, q_k)
        words = f"= {number(ratio)} T" if math.isfinite(ratio) else "diverges"
        notes.line("", number(ratio * temperature), f"{words} at h = {setting(q)}/inner_lr = {number(q / inner_lr)}")
    notes.advise(
        momentum.mu > 0.0,
        f"inner_momentum={setting(momentum.mu)}: temperature is that of u only for inner_momentum=0; y has T_eff, which "
        "depends on the curvature.",
    )
    return notes


def _coupling(group: dict[str, Any], momentum: Momentum, too_weak: str) -> Notes:
    notes = Notes()
    inner_lr, gamma = float(group["inner_lr"]), float(group["gamma"])
    if gamma == math.inf:
        notes.line("coupling", "0", "stiffness 1/gamma: y is free")
        notes.advise(True, "gamma=inf: nothing couples y to x, as in Lookahead, but with averaging.")
        return notes
    stiffness = 1.0 / gamma if gamma > 0.0 else math.inf
    limit = stability_limit(momentum, coupling=True)
    words = "stiffness 1/gamma"
    if inner_lr:
        words += f"; its step is inner_lr/gamma = {number(inner_lr * stiffness)}, stable below {number(limit)}"
    notes.line("coupling", number(stiffness), words)
    if inner_lr == 0.0:
        return notes

    has_rule = _has_rule(group)
    lowest = inner_lr / limit  # gamma there is no longer stable
    first = steps_until_below(lambda n: gamma_after(group, n), lowest, start=group["outer_steps"])
    safe = f"={suggestion(2.0 * lowest)} or more, or a smaller inner_lr"
    if inner_lr * stiffness >= limit:
        notes.line("relaxation", "inf", "never: the coupling alone makes the inner steps diverge")
        notes.advise(
            True,
            f"gamma={setting(gamma)}: the coupling makes the inner steps diverge, as inner_lr/gamma = "
            f"{number(inner_lr * stiffness)} is not below {number(limit)}. Set {'gamma_min' if has_rule else 'gamma'}{safe}.",
        )
        return notes
    if first is not None:
        notes.advise(
            True,
            f"{_rule(group)}: the coupling makes the inner steps diverge from {outer_step(first, group['inner_steps'])} "
            f"on, when inner_lr/gamma passes {number(limit)}. If the run may be that long, set gamma_min{safe}.",
        )
    return notes + _relaxation(group, momentum, too_weak)


def _relaxation(group: dict[str, Any], momentum: Momentum, too_weak: str) -> Notes:
    """Hold the time in which the coupling acts against the length of a period."""
    notes = Notes()
    inner_lr, gamma, length = float(group["inner_lr"]), float(group["gamma"]), group["inner_steps"]
    seen_by_momentum = bool(momentum.mu) and momentum.sees_coupling
    time = relaxation_time(momentum if seen_by_momentum else Momentum(), 0.0, inner_lr / gamma)
    gain = momentum_gain(momentum) if seen_by_momentum else 1.0
    formula = "gamma/inner_lr"
    if seen_by_momentum:  # 1 - inner_momentum, where there is no dampening
        formula = f"gamma/(inner_lr*{number(gain)})" if group["dampening"] else "gamma*(1-inner_momentum)/inner_lr"
    words = f"inner steps in which the coupling alone brings y to x, {formula} where it is weak; a period has {length}"
    notes.line("relaxation", number(time), words)
    acting = length * inner_lr * gain  # gamma whose relaxation is a period
    if gamma <= acting:
        stiff = 2.0 * inner_lr / gamma > stability_limit(momentum, coupling=True)
        notes.advise(
            stiff and time > 1.5 * length,
            f"gamma={setting(gamma)}: the coupling is so stiff that y swings about x for {number(time)} inner steps and a "
            f"period has {length}; gamma={suggestion(acting)} would be soft enough.",
        )
        notes.advise(
            not stiff and time > 1.5 * length,
            f"inner_momentum={setting(momentum.mu)} is remembered for {number(time)} inner steps and a period has {length}: y "
            "does not settle within one, whatever gamma is. More inner_steps or a smaller inner_momentum would let it.",
        )
        return notes
    n = steps_until_below(lambda n: gamma_after(group, n), acting, start=group["outer_steps"])
    remedy = "" if n is None else f", where {_rule(group)} brings it at {outer_step(n, length)}"
    notes.advise(
        acting > 0.0,  # else the momentum lets nothing through, which is said elsewhere
        f"gamma={setting(gamma)}: the coupling hardly acts within a period, as y relaxes to x in {number(time)} inner steps "
        f"and a period has {length}. So {too_weak}. It would act with gamma={suggestion(acting)}{remedy}.",
    )
    return notes


def _has_rule(group: dict[str, Any]) -> bool:
    return group["scoping"] != 0.0 or group["gamma_total"] is not None


def _rule(group: dict[str, Any]) -> str:
    total = group["gamma_total"]
    return f"scoping={setting(group['scoping'])}" if total is None else f"gamma_total={setting(total)}"


def _average(group: dict[str, Any]) -> Notes:
    notes = Notes()
    averaging, length = group["averaging"], group["inner_steps"]
    window = averaging_window(averaging, length)
    if averaging == "linear":
        given, words = 'averaging="linear"', f"inner steps in m, the plain mean of the period: L/2 = {number(length / 2)} old"
    elif averaging == "last":
        given, words = 'averaging="last"', "inner step in m: m = y"
    else:
        given = f"averaging={setting(averaging)}"
        words = f"inner steps count in m, 1/(1 - averaging) for {given}"
    notes.line("average", number(window), words)
    nothing = [given] if window == 1.0 and averaging != "linear" else []
    nothing += ["inner_steps=1"] if length == 1 else []
    notes.advise(bool(nothing), f"{' and '.join(nothing)}: nothing is averaged; an outer step goes towards the last y.")
    stays = weight_of_anchor(averaging, length)
    notes.advise(
        stays > 0.5,
        f"{given}: m, at the end of a period of {count(length, 'inner step')}, is still {number(100.0 * stays)} % x, where it "
        'began, and an outer step is that much shorter: averaging="linear", or a smaller number.',
    )
    return notes
