"""Steps with a clock: rules for one, and a run of calls that share it, on several backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from contract_cases import BY_NAME, assert_equal, plan_inputs, scales

from deeprelax_cuda.clock import NUMBERS, Clock, Rule
from deeprelax_cuda.steps import Plan, Tensors

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
        gamma=torch.tensor(rule.initial_gamma, dtype=torch.float64),
        lr=torch.tensor(0.3, dtype=lr),
        period_steps=whole_number(0) if linear else None,
        numbers=torch.zeros(NUMBERS, dtype=torch.uint8),
        counts=True,
        rule=rule,
    )


def compare(
    makers: Mapping[str, Callable[[Tensors], Plan]], name: str, rule: Rule, dtype: torch.dtype, lr: torch.dtype, linear: bool
) -> None:
    """Compare plans with those of "cpu", one of ``makers``, in tensors and clocks after each step.

    Over two periods and more: two calls that share a clock, one of them at times without gradients, and skipped steps.
    """
    case, size = BY_NAME[name], [[5, 0, 70], [33]]
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
        for label in set(makers) - {"cpu"}:
            for i in range(2):
                assert_equal(inputs[label][i][0], inputs["cpu"][i][0], f"step {step}, {label} and cpu")
            for part in ("step", "position", "outer_steps", "gamma", "period_steps"):
                a, b = getattr(clocks[label], part), getattr(clocks["cpu"], part)
                assert a is b is None or torch.equal(a, b), f"{part} after step {step}: {a} and {b}"
            assert own[label] == own["cpu"]
    assert int(clocks["cpu"].outer_steps) >= 1
