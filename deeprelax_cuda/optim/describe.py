"""The constants of an optimizer in words and numbers, with advice where a setting does nothing or does harm.

`describe` puts the text together: what all methods share is here, the rest are the `Notes` of the method. Nothing is changed.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from deeprelax_cuda.optim.clocks import in_numbers
from deeprelax_cuda.optim.constants import Momentum, half_life, half_ulp, momentum_gain, steps_until_below
from deeprelax_cuda.optim.scoping import gamma_of
from deeprelax_cuda.steps import compute_type

if TYPE_CHECKING:
    from deeprelax_cuda.optim.base import RelaxationOptimizer

WIDTH = 108
#: How the formulas write the state of a parameter.
SYMBOLS = {"anchor": "x", "average": "m", "gradient_average": "p", "momentum": "v", "outer_momentum": "w", "consensus": "c"}
#: What `eval` shows, by its role.
ANSWERS = {"anchor": "the anchor x", "consensus": "the consensus c of the replicas"}
#: What the letters stand for, where m is the average and where p is.
LEGEND = "y live weights, x anchor (the answer), m average of y, L inner_steps, h a curvature"
GRADIENT_LEGEND = "y live weights, x anchor (the answer), p average gradient, L inner_steps, h a curvature"
#: Scoping that needs more outer steps than this to halve gamma does nothing in a training.
SLOWEST_HALF_LIFE = 1e5


@dataclass
class Notes:
    """What is to be said of a group: lines of a name, a number and words, and sentences of advice."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def line(self, name: str, number: str, words: str) -> None:
        """Add a line."""
        self.lines.append((name, number, words))

    def advise(self, holds: bool, sentence: str) -> None:
        """Add advice where it holds."""
        if holds:
            self.advice.append(sentence)

    def __add__(self, other: Notes) -> Notes:
        return Notes(self.lines + other.lines, self.advice + other.advice)


@dataclass(frozen=True)
class Seen:
    """What was measured on the parameters of a group.

    ``gradients`` of them hold a gradient, of root mean square ``gradient_rms``: NaN where one is not finite. ``held`` gives the
    root mean square of the live weights for each type to which they are rounded to nearest, ``shown`` for each type in which
    the model computes with them, ``coarsest`` that of the parameter in which it is largest.
    """

    parameters: int
    gradients: int
    gradient_rms: float
    held: dict[torch.dtype, float]
    shown: dict[torch.dtype, float]
    coarsest: dict[torch.dtype, float]


def number(value: float) -> str:
    """Write a quantity with 3 significant digits: 4.47e-5, 0.125, 13,900, 2.5e7."""
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if 1e3 <= abs(rounded) < 1e6 else setting(rounded)


def setting(value: float) -> str:
    """Write the value of an option as one may type it."""
    mantissa, exponent, power = f"{value:g}".partition("e")
    return mantissa + (f"e{int(power)}" if exponent else "")


def suggestion(value: float) -> str:
    """Write a value that an option may be given, with 3 significant digits."""
    return setting(float(f"{value:.3g}"))


def count(n: int, noun: str) -> str:
    """Write a whole number of things."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def outer_step(n: int, inner_steps: int) -> str:
    """Write the number of an outer step, counted from the start of training, and of its last gradient evaluation."""
    return f"outer step {n:,} (gradient evaluation {n * inner_steps:,})"


def describe(optimizer: RelaxationOptimizer) -> str:
    """Return the text of `RelaxationOptimizer.describe`."""
    text = [f"{type(optimizer).__name__}: {optimizer._legend(optimizer.param_groups[0])}"]
    text += _write(_run(optimizer))
    everyone = list(range(len(optimizer.param_groups)))
    advice: dict[str, list[int]] = {}
    for numbers, group in _alike(optimizer):
        roles_of = {p.dtype: optimizer._roles(group, p.dtype) for p in group["params"]}
        notes = optimizer._notes(group, _look(optimizer, group, roles_of)) + _cost(optimizer, group, roles_of)
        text += [f"{_which(numbers)}: {_size(group['params'])}", *_write(notes)]
        for sentence in notes.advice:
            advice.setdefault(sentence, []).extend(numbers)
    text.append("Advice" if advice else "Advice: none; every setting does something and none does harm")
    for sentence, numbers in advice.items():
        where = "" if sorted(numbers) == everyone else f"{_which(sorted(numbers))}: "
        text += textwrap.wrap(where + sentence, WIDTH, initial_indent="  * ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(text)


def drift_notes(seen: Seen, step: float, whole: float, words: str) -> Notes:
    """Say how far a step goes along the gradients: ``step`` times their size, up to ``whole`` times it with momentum."""
    notes = Notes()
    if not seen.gradients:
        notes.line("drift", "?", "no gradients are present: describe() after backward() says it")
    elif math.isnan(seen.gradient_rms):
        notes.line("drift", "nan", "gradients hold inf or nan: they are compared with nothing")
    else:
        words += f" times the root mean square {number(seen.gradient_rms)} of the gradients"
        words += "" if seen.gradients == seen.parameters else f" (of {seen.gradients} of {count(seen.parameters, 'parameter')})"
        words += f"; with momentum up to {number(whole * seen.gradient_rms)}, where they agree" if whole != step else ""
        notes.line("drift", number(step * seen.gradient_rms), words)
    return notes


def digits_notes(
    sizes: dict[str, float], weights: dict[torch.dtype, float], remedies: dict[torch.dtype, str], other: str
) -> Notes:
    """Advise where weights have too few digits for what a step adds to them.

    Args:
        sizes: what it adds, by its name.
        weights: the root mean square of the weights of each type.
        remedies: what to do about it, by the type.
        other: what to do in the other types.
    """
    notes = Notes()
    for dtype, weight in weights.items():
        least = coarseness(weight, dtype)
        lost = [f"{name} ({number(size)})" for name, size in sizes.items() if 0.0 < size < least]
        notes.advise(
            bool(lost),
            f"Most of the {' and '.join(lost)} of a step is rounded away: half a unit in the last place of weights of size "
            f"{number(weight)} in {type_name(dtype)} is {number(least)}; {remedies.get(dtype, other)}.",
        )
    return notes


def gamma_notes(group: dict[str, Any]) -> Notes:
    """Say how gamma goes on: the rule that is on, and when it ends."""
    total = group["gamma_total"]
    if total is None:
        return width_notes(group, "gamma", "scoping", lambda n: gamma_after(group, n))
    loss = group["inner_steps"] * group["initial_inner_lr"]
    rule = f"time reversal: gamma_total={setting(total)} less {number(loss)} an outer step; gamma, scoping are ignored"
    return width_notes(group, "gamma", "scoping", lambda n: gamma_after(group, n), rule)


def width_notes(group: dict[str, Any], name: str, rate: str, after: Callable[[int], float], rule: str = "") -> Notes:
    """Say how a width goes on: by the option called ``rate``, or another ``rule``, to what it is ``after`` n outer steps."""
    notes = Notes()
    width, floor, scoping, done = group[name], group[f"{name}_min"], group[rate], group["outer_steps"]
    by_rate = not rule
    fixed = by_rate and scoping == 0.0
    reached = None if not floor or fixed else steps_until_below(after, floor, start=done)
    if fixed:
        rule = f"fixed: {rate}=0"
    elif by_rate and width == math.inf:
        rule = f"fixed: there is no coupling, whatever {rate} is"
    elif by_rate:
        rule = f"halves in {number(half_life(scoping))} outer steps, ln 2/ln(1 + {rate}) for {rate}={setting(scoping)}"
        rule += "" if floor else "; no floor"
    if reached is not None and reached > done:
        rule += f"; at the floor {name}_min={setting(floor)} from {outer_step(reached, group['inner_steps'])} on"
    notes.line(name, number(width), rule)
    at_floor = reached is not None and reached == done
    notes.advise(at_floor, f"{name} is at its floor, {name}_min={setting(floor)}: its rule does nothing any more.")
    notes.advise(fixed and floor > 0.0, f"{name}_min={setting(floor)} does nothing, as {rate}=0.")
    notes.advise(
        by_rate and math.isfinite(width) and SLOWEST_HALF_LIFE < half_life(scoping) < math.inf,
        f"{rate}={setting(scoping)} does nothing: {name} halves in {number(half_life(scoping))} outer steps.",
    )
    return notes


def gamma_after(group: dict[str, Any], n: int) -> float:
    """Return gamma after n outer steps from the start: by its rule, or the value that stands if they have been taken."""
    return float(group["gamma"]) if n <= group["outer_steps"] else gamma_of({**group, "outer_steps": n})


def outer_notes(group: dict[str, Any], words: str, meaning: str, smallest_lr: float) -> Notes:
    """Say how far an outer step goes: ``words`` say what lr is, ``meaning`` says it to who has set it below ``smallest_lr``."""
    notes = Notes()
    lr, mu = float(group["lr"]), float(group["momentum"])
    whole = lr * momentum_gain(Momentum(mu, nesterov=group["nesterov"]))
    notes.line("outer step", number(lr), words + (f"; with momentum {setting(mu)} effectively {number(whole)}" if mu else ""))
    if group["outer_weight_decay"]:
        pull = whole * group["outer_weight_decay"]
        notes.line("outer decay", number(pull), "the part of x that an outer step takes off, with momentum")
    notes.advise(
        lr < smallest_lr,
        f"lr={setting(lr)} hardly moves the anchor, which is the answer: lr is {meaning} (trainers pass other optimizers' "
        "5e-5; a warm-up passes 0).",
    )
    return notes


def overshoot_notes(group: dict[str, Any]) -> Notes:
    """Say whether an outer step goes beyond the average."""
    notes = Notes()
    lr, mu = float(group["lr"]), float(group["momentum"])
    whole = lr * momentum_gain(Momentum(mu, nesterov=group["nesterov"]))
    notes.advise(
        whole > 2.0 * (1.0 + 1e-9),
        f"lr={setting(lr)} with momentum={setting(mu)} goes {number(whole)} times the way from x to m and overshoots (lr=1 "
        f"with momentum=0.9 diverges on LeNet): lr={suggestion(1.0 - mu)} goes it once.",
    )
    return notes


def _run(optimizer: RelaxationOptimizer) -> Notes:
    """Say where the run is, and who serves it."""
    notes, first = Notes(), in_numbers(optimizer.param_groups[0])
    position, length, done = first["position"], first["inner_steps"], first["outer_steps"]
    if length is None:
        notes.line("run", f"{first['step']:,}", "steps taken; the parameters hold y, in eval mode too")
    else:
        answer = ANSWERS[optimizer._answer()]
        words = f"inner steps of this period taken, {first['step']:,} in all; {count(done, 'outer step')} done"
        notes.line("run", f"{position} of {length}", words)
        if not first["train_mode"]:
            notes.line("mode", "eval", f"the parameters hold {answer}; train() brings the live weights y back")
        elif position or not optimizer.ENDS_AT_ANCHOR:
            notes.line("mode", "train", f"the parameters hold the live weights y; eval() shows {answer}")
        else:
            notes.line("mode", "train", "the parameters hold y = x: a period begins")
    try:
        served = [line.partition(" for ") for line in optimizer.explain().splitlines()]
    except (RuntimeError, ValueError) as refusal:
        served = [("none", "", str(refusal))]
    for name, _, why in served:
        notes.line("backend", name, why)
    return notes


def _cost(optimizer: RelaxationOptimizer, group: dict[str, Any], roles_of: dict[torch.dtype, list[str]]) -> Notes:
    """Say what an outer step and the state cost, by the options: the state need not exist yet."""
    notes = Notes()
    if group["inner_steps"] is None:
        notes.line("cost", "1", "gradient evaluation a step")
    else:
        notes.line("cost", f"{group['inner_steps']:,}", "gradient evaluations an outer step")
    for dtype, roles in roles_of.items():
        size, live = compute_type(dtype).itemsize, dtype.itemsize
        tensors = [SYMBOLS.get(role, role) for role in roles if role != "period_steps"]
        each = ", ".join(f"{symbol} {size}" for symbol in tensors)
        stepped = (p for p in group["params"] if p.dtype == dtype and (p.requires_grad or optimizer.state.get(p)))
        total = size * len(tensors)
        copy = f"eval() adds {live} for the copy of y" if group["inner_steps"] else "eval() adds nothing"
        each = each or "none"
        if not optimizer._is_training():
            total, each, copy = total + live, f"{each}, the copy of y {live}", "train() frees the copy"
        whole = total * sum(p.numel() for p in stepped if not is_lazy(p))
        notes.line("state", str(total), f"bytes per {type_name(dtype)} element: {each}; {whole:,} bytes in all; {copy}")
    return notes


def _alike(optimizer: RelaxationOptimizer) -> list[tuple[list[int], dict[str, Any]]]:
    """Return the groups, those of equal numbers as one that holds the parameters of all, with the numbers of the groups."""
    found: dict[Any, tuple[list[int], dict[str, Any]]] = {}
    for i, group in enumerate(map(in_numbers, optimizer.param_groups)):
        names = [name for name in group if name in optimizer.defaults or name.startswith("initial_")]
        plain = {name: float(group[name]) if isinstance(group[name], Tensor) else group[name] for name in names}
        numbers, merged = found.setdefault(tuple(sorted(plain.items())), ([], {**group, **plain, "params": []}))
        numbers.append(i)
        merged["params"].extend(group["params"])
    return list(found.values())


@torch.no_grad()
def _look(optimizer: RelaxationOptimizer, group: dict[str, Any], roles_of: dict[torch.dtype, list[str]]) -> Seen:
    grads = [p.grad for p in group["params"] if p.grad is not None]
    weights: dict[torch.dtype, list[Tensor]] = {}
    shown: dict[torch.dtype, list[Tensor]] = {}
    for p in group["params"]:
        has_master = "master" in roles_of[p.dtype]
        if p.is_floating_point() and (has_master or p.dtype != torch.bfloat16 or group["rounding"] == "nearest"):
            state = optimizer.state.get(p, {})
            y = state.get("master", state.get("live", p))
            weights.setdefault(torch.float32 if has_master else p.dtype, []).append(y)
        shown.setdefault(p.dtype, []).append(p)
    held, seen = ({dtype: rms(ys) for dtype, ys in by_type.items()} for by_type in (weights, shown))
    coarsest = {dtype: max(sizes(ys)) for dtype, ys in shown.items()}
    return Seen(len(group["params"]), len(grads), rms(grads), held, seen, coarsest)


def rms(tensors: Sequence[Tensor]) -> float:
    """Return the root mean square of all elements together; 0 where there are none."""
    squares = [(size * size * t.numel(), t.numel()) for size, t in zip(sizes(tensors), tensors, strict=True) if _is_readable(t)]
    total = sum(square for square, _ in squares)
    return math.sqrt(total / (sum(n for _, n in squares) or 1)) if math.isfinite(total) else math.nan


def sizes(tensors: Sequence[Tensor]) -> list[float]:
    """Return the root mean square of each tensor, 0 where there is nothing to read; the host waits once for each device."""
    found = [0.0] * len(tensors)
    by_device: dict[torch.device, list[int]] = {}
    for i, t in enumerate(tensors):
        if _is_readable(t):
            by_device.setdefault(t.device, []).append(i)
    for device, at in by_device.items():
        wide = torch.float32 if device.type == "mps" else torch.float64  # the former has no float64
        norms = torch.stack([torch.linalg.vector_norm(tensors[i].detach(), dtype=wide) for i in at])
        for i, norm in zip(at, norms.tolist(), strict=True):
            found[i] = norm / math.sqrt(tensors[i].numel())
    return found


def _is_readable(t: Tensor) -> bool:
    there = not is_lazy(t) and not t.is_meta
    return there and t.layout == torch.strided and t.is_floating_point() and t.numel() > 0


def coarseness(size: float, dtype: torch.dtype) -> float:
    """Return half a unit in the last place of weights of a size; 0 where they have none."""
    return half_ulp(size, dtype) if 0.0 < size < math.inf else 0.0


def _size(params: Sequence[Tensor]) -> str:
    names = ", ".join(type_name(dtype) for dtype in dict.fromkeys(p.dtype for p in params))
    elements = sum(p.numel() for p in params if not is_lazy(p))
    return f"{count(len(params), 'parameter')}, {count(elements, 'element')}" + (names and f", {names}")


def type_name(dtype: torch.dtype) -> str:
    """Write a type without the name of torch."""
    return str(dtype).removeprefix("torch.")


def _which(numbers: Sequence[int]) -> str:
    """Write the numbers of groups, neighbours as a range."""
    runs = [[first, first] for first in numbers[:1]]
    for i in numbers[1:]:
        if i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    written = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
    return f"group{'s' if len(numbers) > 1 else ''} {written}"


def _write(notes: Notes) -> Iterator[str]:
    for name, value, words in notes.lines:
        head = f"  {name:<13} {value:<9}  "
        yield from textwrap.wrap(words, WIDTH, initial_indent=head, subsequent_indent=" " * 27, break_on_hyphens=False)
