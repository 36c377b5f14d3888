"""`step` goes through torch's wrapper when a profiler or hooks want to know of it, and past it otherwise."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from optim_runs import METHODS, ONE, Method
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import deeprelax_cuda as dr


class Louder(dr.EntropySGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


#: One method a class, and a subclass of a user's.
KINDS = [*{method.kind: method for method in METHODS.values()}.values(), replace(METHODS[ONE], kind=Louder)]


def ready(make: Method = METHODS[ONE]) -> Any:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return make([p])


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.kind.__name__)
def test_a_profiler_sees_the_step_under_the_name_torch_gives_it(make: Method) -> None:
    optimizer = ready(make)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = [event.name for event in profile.events()]
    assert names.count(f"Optimizer.step#{make.kind.__name__}.step") == 1


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.kind.__name__)
def test_each_hook_is_called_once_a_step(make: Method) -> None:
    ready().step()  # torch has wrapped the class by now
    optimizer, called = ready(make), []

    def note(name: str) -> Any:
        return lambda hooked, args, kwargs: called.append((name, hooked, args[1:], kwargs))

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        assert optimizer.step(lambda: 5.0) == 5.0
    finally:
        for handle in handles:
            handle.remove()
    assert [name for name, *_ in called] == ["global pre", "pre", "post", "global post"]
    assert all(hooked is optimizer and len(args) == 1 and kwargs == {} for _, hooked, args, kwargs in called)
    optimizer.step()
    assert len(called) == 4


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.kind.__name__)
def test_hooks_are_called_though_a_program_replaced_the_step_of_the_class(
    make: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As programs that log or trace do."""
    owner = make.kind if make.kind is not Louder else dr.EntropySGD
    step = owner.step

    @functools.wraps(step)
    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append("traced")
        return step(self, *args, **kwargs)

    called: list[str] = []
    monkeypatch.setattr(owner, "step", traced)
    optimizer = ready(make)
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    optimizer.step()
    assert sorted(called) == ["post", "pre", "traced"]


def test_a_pre_hook_may_change_the_arguments() -> None:
    optimizer = ready()
    optimizer.register_step_pre_hook(lambda hooked, args, kwargs: ((hooked, lambda: 7.0), kwargs))
    assert optimizer.step() == 7.0


def test_nothing_is_recorded_while_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening the profiler's range costs as much as the rest of a step's host time."""
    opened: list[str] = []
    real = torch.autograd.profiler.record_function

    def record(name: str) -> Any:
        opened.append(name)
        return real(name)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", record)
    optimizer = ready()
    optimizer.step()
    assert opened == []
    optimizer.register_step_post_hook(lambda *_: None)
    optimizer.step()
    assert opened == ["Optimizer.step#EntropySGD.step"]


def test_torch_still_has_what_tells_whether_somebody_watches() -> None:
    """None of it is public; without it every step goes through the wrapper."""
    assert torch.autograd.profiler._is_profiler_enabled is False
    assert all(hooks is not None for hooks in dr.optim.watched._GLOBAL_HOOKS)
