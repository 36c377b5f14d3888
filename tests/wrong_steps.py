"""How a wrong algorithm is put into an optimizer: its seams, between the host and the fused steps, and in its counts.

A mutation is taken with pytest's monkeypatch, so it ends with its test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

import deeprelax_cuda as dr
from deeprelax_cuda import backends
from deeprelax_cuda.clock import Law
from deeprelax_cuda.optim.base import RelaxationOptimizer
from deeprelax_cuda.optim.scoping import gamma_of
from deeprelax_cuda.steps import Plan, Scalars, Tensors

Mutation = Callable[[pytest.MonkeyPatch], None]
Step = Callable[..., None]


def step_as(change: Callable[[Step, Tensors, list[Tensor], Scalars], None]) -> Mutation:
    """Take each fused step of the optimizer as ``change(step, tensors, grads, scalars)`` does."""

    class Changed:
        def __init__(self, plan: Plan, tensors: Tensors) -> None:
            self.plan, self.tensors = plan, tensors

        def run(self, grads: list[Tensor], scalars: Scalars, addresses: bytes | None = None, clock: None = None) -> None:
            change(self.plan.run, self.tensors, grads, scalars)

    def mutate(patch: pytest.MonkeyPatch) -> None:
        make_plan = backends.make_plan
        patch.setattr(backends, "make_plan", lambda name, tensors: Changed(make_plan(name, tensors), tensors))

    return mutate


def numbers(change: Callable[[Scalars], dict[str, Any]]) -> Mutation:
    """Replace numbers of each fused step."""
    return step_as(lambda step, tensors, grads, h: step(grads, replace(h, **change(h))))


def noises(tensors: Tensors, h: Scalars) -> Iterator[tuple[int, Tensor]]:
    """Give the place in the call and the noise of each tensor."""
    for i, (p, number) in enumerate(zip(tensors.params, tensors.numbers, strict=True)):
        yield i, dr.functional.gaussian(p.numel(), seed=h.seed, step=h.step, stream=number)


def streams(change: Callable[[Tensors], list[int]]) -> Mutation:
    """Replace the numbers under which the tensors draw their noise."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        make_plan = backends.make_plan
        patch.setattr(backends, "make_plan", lambda name, t: make_plan(name, replace(t, numbers=change(t))))

    return mutate


def gamma_by(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Mutation:
    """After each inner step, replace what the rule of gamma reads in a group."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        count = RelaxationOptimizer._count

        def changed(self: RelaxationOptimizer, calls: Any, outer: bool) -> None:
            count(self, calls, outer)
            for group in self.param_groups:
                group["gamma"] = gamma_of({**group, **change(group)})

        patch.setattr(RelaxationOptimizer, "_count", changed)

    return mutate


def weight_by(change: Callable[[Callable[[int], float], int, float], float]) -> Mutation:
    """Weight the samples of a counted average as ``change(weight, count, constant)`` does, ``weight`` being the right one."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        weight = Law.weight

        def changed(self: Law, count: int, constant: float) -> float:
            return change(lambda n: weight(self, n, constant), count, constant)

        patch.setattr(Law, "weight", changed)

    return mutate


def count_over_periods(patch: pytest.MonkeyPatch) -> None:
    """Let the samples of a counted average be those since the start."""
    count = RelaxationOptimizer._count

    def changed(self: RelaxationOptimizer, launches: Any, outer: bool) -> None:
        counted = [(held, call.count) for call, *_ in launches if (held := call.period_steps) is not None]
        count(self, launches, outer)
        for held, n in counted:
            held.fill_(n)

    patch.setattr(RelaxationOptimizer, "_count", changed)
