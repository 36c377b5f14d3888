"""Which backend serves a call: names, what can serve where, and the choice among them.

A backend is a module of this package with the members of `Backend`. It is imported when first asked about, so that importing
the package needs torch alone and touches no device.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from deeprelax_cuda.noise import Place
from deeprelax_cuda.steps import Plan, Scalars, Tensors, compute_type

#: For each type of device, the backends that may serve it, the preferred one first.
ORDER = {
    "cpu": ("cpu", "eager"),
    "cuda": ("cuda", "triton", "eager"),
}
_ELSEWHERE = ("eager",)
NAMES = tuple(dict.fromkeys(name for names in (*ORDER.values(), _ELSEWHERE) for name in names))

_said: set[str] = set()


class Backend(Protocol):
    """What the module of a backend offers."""

    NAME: str

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return None where parameters of type ``dtype`` on ``device`` can be served, else the reason why not."""

    def make_plan(self, tensors: Tensors) -> Plan:
        """Return the backend's plan for the tensors of a call, which have been checked."""

    def gaussian(self, numel: int, *, seed: int, step: int, stream: int, offset: int, device: torch.device) -> Tensor:
        """Return float32 standard normals, shape ``(numel,)``: elements offset, offset + 1, ... of the word ``stream``."""


class Selection(NamedTuple):
    """The backend that serves a call, and why it is this one, in words."""

    name: str
    reason: str


def load(name: str) -> Backend:
    """Return the module of the backend ``name``, one of `NAMES`."""
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


def available(device: torch.device | str) -> list[str]:
    """Return the names of the backends that can serve float32 tensors on ``device``, the preferred one first."""
    device = torch.device(device)
    return [name for name in _order(device) if load(name).unavailable(device, torch.float32) is None]


def select(device: torch.device | str, dtype: torch.dtype, name: str = "auto") -> Selection:
    """Choose the backend that serves parameters of type ``dtype`` on ``device``.

    ``name`` names one, or is "auto": then the environment variable ``DEEPRELAX_BACKEND`` may name one, and otherwise it is the
    first of the device's order of preference that can serve. Each reason to pass over a preferred backend is said once, as a
    RuntimeWarning, and stays in ``Selection.reason``.

    Raises:
        ValueError: a name that is none of the backends'.
        RuntimeError: the backend that was named, or without a name every one, cannot serve; the message says why.
    """
    device = torch.device(device)
    named_by = f'backend="{name}"'
    if name == "auto" and (name := os.environ.get("DEEPRELAX_BACKEND", "") or "auto") != "auto":
        named_by = f"DEEPRELAX_BACKEND={name}"
    if name != "auto":
        if name not in NAMES:
            raise ValueError(f"{named_by}: expected one of {', '.join(('auto', *NAMES))}")
        if reason := load(name).unavailable(device, dtype):
            raise RuntimeError(f"{named_by} cannot serve {dtype} on {device}: {reason}")
        return Selection(name, f"asked for by {named_by}")

    passed_over = ""
    for name in _order(device):
        reason = load(name).unavailable(device, dtype)
        if reason is None:
            if not passed_over:
                return Selection(name, f"preferred for {device.type} tensors")
            _say_once(f"deeprelax_cuda: backend {name} serves {dtype} on {device}, because {passed_over}")
            return Selection(name, passed_over)
        passed_over += f"{'; ' if passed_over else ''}{name} cannot: {reason}"
    raise RuntimeError(f"no backend serves {dtype} on {device}: {passed_over}")


def make_plan(name: str, tensors: Tensors) -> Plan:
    """Return the plan of the backend ``name`` for the tensors of a call, which have been checked."""
    return load(name).make_plan(tensors)


# The inner step of EntropySGD at its defaults. What matters of the numbers is which are 0; these need no rounding.
_EVERYDAY = Scalars(eta=0.125, k=2.0**-13, s=2.0**-14, a=0.25, mu=0.5, nesterov=True, lr=0.125, mu_o=0.5, nesterov_o=True)


def warm_up(params: Any, *, backend: str = "auto") -> float:
    """Do now what the first steps would otherwise wait for: compile kernels (Triton) and load them. Return its seconds.

    Parameters, gradients and state are left alone: the steps are taken on tensors of one element. Triton keeps what it has
    compiled on disk, so that the next process waits less. What a process has waited for is in ``optimizer.explain()``.

    Args:
        params: an optimizer of this package, whose own steps are made ready; or tensors, named ones or param groups, of any
            number: then the steps of `deeprelax_cuda.EntropySGD` at its defaults are, for each type and device among them.
        backend: for parameters, the backend that is to serve them; an optimizer has an option of that name.

    Raises:
        TypeError: something else.
        ValueError, RuntimeError: as `select`.
    """
    began = time.perf_counter()
    if hasattr(params, "rehearse"):
        params.rehearse()
        return time.perf_counter() - began
    kinds = dict.fromkeys((p.device, p.dtype) for p in _tensors_of(params))
    for device, dtype in kinds:
        plan_of = load(select(device, dtype, backend).name).make_plan

        def one(dtype: torch.dtype, device: torch.device = device) -> list[Tensor]:
            return [torch.zeros(1, dtype=dtype, device=device)]

        y, g = one(dtype), one(dtype)
        x, m, v, w = (one(compute_type(dtype)) for _ in range(4))
        inner = Tensors(y, anchors=x, averages=m, momenta=v, numbers=[0], places=[Place(0, 1, 1)])
        plan_of(inner).run(g, _EVERYDAY)
        plan_of(replace(inner, outer_momenta=w)).run(g, replace(_EVERYDAY, outer=True))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _tensors_of(params: Any) -> list[Tensor]:
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, dict) and "params" in params:
        return _tensors_of(params["params"])
    if isinstance(params, tuple) and len(params) == 2 and isinstance(params[0], str):
        return _tensors_of(params[1])
    if isinstance(params, (str, bytes)) or not isinstance(params, Iterable):
        expected = "an optimizer of deeprelax_cuda, tensors, named tensors or param groups"
        raise TypeError(f"params: expected {expected}, got {type(params).__name__}")
    return [p for item in params for p in _tensors_of(item)]


def waited(name: str) -> str:
    """Return how long this process has waited for the kernels of a backend, in words; empty where there was no waiting."""
    seconds = getattr(load(name), "compiled", [])
    return f"{len(seconds)} kernels compiled in {sum(seconds):.1f} s" if seconds else ""


def _order(device: torch.device) -> tuple[str, ...]:
    return ORDER.get(device.type, _ELSEWHERE)


def _say_once(message: str) -> None:
    """Warn at the line of the caller: the first outside this package and outside torch, through which the operators come."""
    if message in _said:
        return
    _said.add(message)
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals["__name__"].partition(".")[0] in ("deeprelax_cuda", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
