"""What the options of an optimizer may be; every refusal begins with the name of the option."""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deeprelax_cuda import backends
from deeprelax_cuda.noise import check_seed

#: Options of the periods and of the outer steps, at the values that they have in the groups of a method without any.
NO_PERIODS: dict[str, Any] = {
    "inner_steps": None,
    "scoping": 0.0,
    "gamma_min": 0.0,
    "gamma_total": None,
    "momentum": 0.0,
    "nesterov": False,
    "outer_weight_decay": 0.0,
    "closure_mode": "once",
}


def arguments(scope: dict[str, Any]) -> dict[str, Any]:
    """Return the options among the ``locals()`` of a constructor, which it must not have added to; not what holds tensors."""
    held = ("self", "params", "replicas", "group", "__class__")
    return {name: value for name, value in scope.items() if name not in held}


def check_number(name: str, value: Any, interval: str) -> float:
    """Return ``value`` as a float in ``interval``, such as "[0, 1)"; a one-element tensor is a number too."""
    low, high = map(float, interval[1:-1].split(", "))
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        number = math.nan
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise ValueError(f"{name}: expected a number in {interval}, got {value!r}")
    return number


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse a ``value`` that is none of ``choices``."""
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Refuse a ``value`` that is not an int of at least 1."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {value!r}") from None
    if count < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {count}")


def warn_user(message: str) -> None:
    """Warn at the line that called into this package, whatever wrappers of torch lie between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("deeprelax_cuda", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def check_loop_options(group: dict[str, Any], method: str, without: Mapping[str, Any], gammas: str) -> None:
    """Refuse an option of the loop that all methods share, in a group that is complete with defaults.

    Args:
        group: the group.
        method: its method.
        without: the options that the method has not, and their values.
        gammas: the interval of its gamma.
    """
    check_absent(group, method, without)
    check_number("lr", group["lr"], "[0, inf)")
    check_number("gamma", group["gamma"], gammas)
    if "inner_steps" not in without:
        check_count("inner_steps", group["inner_steps"])
    check_gamma_rule(group)
    check_number("momentum", group["momentum"], "[0, 1)")
    check_number("weight_decay", group["weight_decay"], "[0, inf)")
    check_number("outer_weight_decay", group["outer_weight_decay"], "[0, inf)")
    check_choice("rounding", group["rounding"], ("nearest", "stochastic"))
    if group["master_weights"] and group["rounding"] == "stochastic":
        raise ValueError('master_weights: master weights and rounding="stochastic" exclude each other')
    check_choice("closure_mode", group["closure_mode"], ("once", "inner_loop"))
    check_choice("capturable", group["capturable"], (False, True))
    if group["capturable"] and group["closure_mode"] == "inner_loop":
        raise ValueError('closure_mode: "inner_loop" goes by the host\'s count of steps; with capturable=True expected "once"')
    if group["differentiable"]:
        raise ValueError("differentiable: expected False, as the step is fused and in place")
    check_backend(group)


def check_absent(group: dict[str, Any], method: str, without: Mapping[str, Any]) -> None:
    """Refuse a value of an option that the method has not, also one that was put into the group by hand."""
    for name, value in without.items():
        if group[name] != value:
            hint = "; does a scheduler cycle it?" if name == "momentum" else ""
            raise ValueError(f"{name}: {method} has no such option, got {group[name]!r}{hint}")


def check_gamma_rule(group: dict[str, Any]) -> None:
    """Refuse the options of a schedule of gamma that name no number."""
    check_number("scoping", group["scoping"], "[0, inf)")
    check_number("gamma_min", group["gamma_min"], "[0, inf)")
    if group["gamma_total"] is not None:
        total = check_number("gamma_total", group["gamma_total"], "(0, inf)")
        if not 0.0 < group["gamma_min"] < total:
            raise ValueError(f"gamma_min: with gamma_total={total:g} expected it in (0, {total:g}), got {group['gamma_min']!r}")


def check_backend(group: dict[str, Any]) -> None:
    """Refuse a ``backend`` of no known name, or one that ``foreach`` or ``fused`` contradicts."""
    name = group["backend"]
    check_choice("backend", name, ("auto", *backends.NAMES))
    check_choice("foreach", group["foreach"], (None, False, True))
    check_choice("fused", group["fused"], (None, False, True))
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach, fused: expected at most one of them to be True")
    if group["foreach"] and name not in ("auto", "eager"):
        raise ValueError(f'foreach: True asks for the eager backend, but backend="{name}"')
    if group["fused"] and name == "eager":
        raise ValueError('fused: True refuses the eager backend, but backend="eager"')


def select_backend(group: dict[str, Any], device: torch.device, dtype: torch.dtype) -> backends.Selection:
    """Return the backend that serves the group's parameters of type ``dtype`` on ``device``, and why.

    Raises:
        RuntimeError: none can, or ``fused=True`` where only the eager backend can.
    """
    selection = backends.select(device, dtype, "eager" if group["foreach"] else group["backend"])
    if group["foreach"]:
        return backends.Selection(selection.name, "asked for by foreach=True")
    if group["fused"] and selection.name == "eager":
        raise RuntimeError(f"fused: True refuses the eager backend, which alone serves {dtype} on {device}: {selection.reason}")
    return selection


def resolve_seed(seed: int | None) -> int:
    """Return ``seed``, checked, or torch's initial seed where it is None; no generator is read.

    Raises:
        ValueError: None in a process group of several ranks, whose initial seeds may differ.
    """
    if seed is not None:
        return check_seed(seed)
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError("seed: pass seed=, the same on all data-parallel ranks")
    return check_seed(torch.initial_seed())
