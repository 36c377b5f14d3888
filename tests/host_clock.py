"""Steps with a clock, on a host in the place of the GPU: see host_program.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from contract_cases import DTYPES, scales
from host_module import BY_NAME, F32, F64, Test, assert_equal, plan_inputs

from deeprelax_cuda.backends import cpu, cuda, eager
from deeprelax_cuda.clock import NUMBERS, Clock, Rule

START = 2**32 - 9  # the clock's step number at first
RULES = {
    "scoping": Rule(3, 2.0, 0.1, 0.5, 0.0, 0.1),
    "to the minimum": Rule(2, 2.0, 0.7, 1.1, 0.0, 0.1),
    "total": Rule(3, 3.0, 0.0, 0.5, 3.0, 0.2),
    "constant": Rule(4, 1.7, 0.0, 0.0, 0.0, 0.1),
    "infinite": Rule(3, float("inf"), 0.1, 0.5, 0.0, 0.1),
    "one": Rule(1, 2.0, 0.1, 0.5, 0.0, 0.1),
}


def a_clock(rule: Rule, lr: torch.dtype, linear: bool) -> Clock:
    def whole_number(value: int) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.int64)

    return Clock(
        step=whole_number(START),
        position=whole_number(0),
        outer_steps=whole_number(0),
        gamma=torch.tensor(rule.initial_gamma, dtype=F64),
        lr=torch.tensor(0.3, dtype=lr),
        period_steps=whole_number(0) if linear else None,
        numbers=torch.zeros(NUMBERS, dtype=torch.uint8),
        counts=True,
        rule=rule,
    )


def clock() -> Iterator[Test]:
    for rule, dtype, lr, linear in product(RULES, DTYPES, (F32, F64), (False, True)):
        for name in ("fused-outer-all", "gradient-average-fused"):
            label = f"{name}, {rule}, {dtype}, lr {lr}{', linear' if linear else ''}"
            yield label, partial(clocked, name, RULES[rule], dtype, lr, linear)


def clocked(name: str, rule: Rule, dtype: torch.dtype, lr: torch.dtype, linear: bool) -> None:
    """Over two periods and more: two calls that share a clock, one of them at times without gradients, and skipped steps."""
    case, size = BY_NAME[name], [[5, 0, 70], [33]]
    makers = {"cuda": cuda.make_plan, "cpu": cpu.make_plan, "eager": eager.make_plan}
    inputs = {label: [plan_inputs(name, dtype, sizes) for sizes in size] for label in makers}
    plans = {label: [makers[label](tensors) for _, tensors in inputs[label]] for label in makers}
    clocks = {label: a_clock(rule, lr, linear) for label in makers}
    own = {label: torch.tensor(0) if linear else None for label in makers}  # the first call's period_steps
    for step in range(2 * rule.inner_steps + 2):
        found_inf = torch.tensor({2: 2.0, 5: float("nan")}.get(step, 0.0))
        inner = step % 3 != 1
        for label in makers:
            shared = clocks[label]
            shared.lr.fill_(0.3 / (step + 1))
            calls = (replace(shared, counts=False, period_steps=own[label]), shared)
            for i, (plan, now) in enumerate(zip(plans[label], calls, strict=True)):
                # What the clock says goes before these.
                scalars = replace(case.rounded(dtype), k=9.0, lr=9.0, outer=False, step=1, inner=inner or i == 1)
                grads = [t["g"] for t in inputs[label][i][0]] if scalars.inner else []
                plan.run(grads, scalars, *scales(dtype, 0.5 if step == 3 else None, None)[:1], found_inf, clock=now)
        for label in ("cuda", "eager"):
            for i in range(2):
                assert_equal(inputs[label][i][0], inputs["cpu"][i][0], f"step {step}, {label} and cpu")
            for part in ("step", "position", "outer_steps", "gamma", "period_steps"):
                a, b = getattr(clocks[label], part), getattr(clocks["cpu"], part)
                assert a is b is None or torch.equal(a, b), f"{part} after step {step}: {a} and {b}"
            assert own[label] == own["cpu"]
    assert int(clocks["cuda"].outer_steps) >= 1
