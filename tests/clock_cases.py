"""Steps with a clock: rules and laws for one, and a run of calls that share it, on several backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from contract_cases import BY_NAME, DTYPES, assert_equal, plan_inputs, scales

from deeprelax_cuda.clock import COUPLED, NUMBERS, Clock, Law, Rule
from deeprelax_cuda.noise import Place
from deeprelax_cuda.steps import Plan, Tensors

F32, F64, BF16, F16 = DTYPES
START = 2**32 - 9  # the clock's step number at first
RULES = {
    "scoping": Rule(3, 2.0, 0.1, 0.5, 0.0, 0.1),
    "to the minimum": Rule(2, 2.0, 0.7, 1.1, 0.0, 0.1),
    "total": Rule(3, 3.0, 0.0, 0.5, 3.0, 0.2),
    "constant": Rule(4, 1.7, 0.0, 0.0, 0.0, 0.1),
    "infinite": Rule(3, float("inf"), 0.1, 0.5, 0.0, 0.1),
    "one": Rule(1, 2.0, 0.1, 0.5, 0.0, 0.1),
}
ENDLESS = Rule(0, float("inf"), 0.0, 0.0, 0.0, 0.1)
TO_ZERO = Rule(2, 1.9, 0.0, 0.0, 0.5, 0.3)
TO_NOTHING = TO_ZERO._replace(gamma_min=1e-92)  # c and s are 0 in float32, but neither is in float64


@dataclass(frozen=True)
class Timing:
    """What there is to say of a run of calls; ``constant`` is what they are told of numbers that their clock brings."""

    name: str  # of a Case
    rule: Rule
    law: Law = COUPLED
    dtype: torch.dtype = F32
    lr: torch.dtype = F64
    counted: bool = False
    first: int = 0  # period_steps at the start
    constant: float = 9.0


#: Laws, together with rules, types, methods and counts: not all with all, but each pair of what may meet in one branch.
LAWS = {
    "drift": Timing("gradient-average-fused", RULES["scoping"], Law("drift", average="restart"), F32, F64, True),
    "drift to nothing": Timing("gradient-average-fused", TO_NOTHING, Law("drift"), BF16, F32, True, -1, 0.0),
    "drift to zero": Timing("gradient-average-drift", TO_ZERO, Law("drift"), F64, F32),
    "variance": Timing("heat", RULES["total"], Law("variance", temperature=0.7), F32, F32, True, -1, 0.0),
    "variance to nothing": Timing(
        "gradient-average-fused", TO_NOTHING, Law("variance", "outer", "restart", 1e-3), F16, F64, True, -2
    ),
    "variance to zero": Timing("heat", TO_ZERO, Law("variance", temperature=0.7), F64, F64, True, -2, 0.0),
    "cold variance": Timing("gradient-average-fused", RULES["scoping"], Law("variance"), BF16, F32),
    "one step, not counted": Timing("heat", RULES["one"], Law("variance", temperature=0.7), BF16, F64, True, -1),
    "inner": Timing("no-average", ENDLESS, Law(lr="inner", temperature=0.7), F32, F64, constant=0.0),
    "inner, with periods": Timing("fused-outer", RULES["scoping"], Law("stiffness", "inner", "restart", 0.7), F64, F32, True),
    "cold inner": Timing("langevin", ENDLESS, Law(lr="inner"), F16, F32),
    "inner and variance": Timing("fused-outer", RULES["total"], Law("variance", "inner", "mean", 0.7), F32, F64, True, -2),
}


def a_clock(rule: Rule, lr: torch.dtype, linear: bool, law: Law = COUPLED, first: int = 0) -> Clock:
    def whole_number(value: int) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.int64)

    return Clock(
        step=whole_number(START),
        position=whole_number(0),
        outer_steps=whole_number(0),
        gamma=torch.tensor(rule.initial_gamma, dtype=torch.float64),
        lr=torch.tensor(0.3, dtype=lr),
        period_steps=whole_number(first) if linear else None,
        numbers=torch.zeros(NUMBERS, dtype=torch.uint8),
        counts=True,
        rule=rule,
        law=law,
    )


def compare(makers: Mapping[str, Callable[[Tensors], Plan]], timing: Timing) -> None:
    """Compare plans with those of "cpu", one of ``makers``, in tensors and clocks after each step.

    Over two periods and more: two calls that share a clock, one of them at times without gradients, the other on a shard; and
    skipped steps. Before each there are elements that tell a term that is absent from one that is multiplied by 0.
    """
    case, size, law, dtype = BY_NAME[timing.name], [[5, 0, 70], [33]], timing.law, timing.dtype
    inputs = {label: [plan_inputs(timing.name, dtype, sizes) for sizes in size] for label in makers}
    for label in makers:
        inputs[label][1][1].places = [Place(2**34 - 30, 7, 64)]
    plans = {label: [makers[label](tensors) for _, tensors in inputs[label]] for label in makers}
    clocks = {label: a_clock(timing.rule, timing.lr, timing.counted, law, timing.first) for label in makers}
    own = {label: torch.tensor(timing.first) if timing.counted else None for label in makers}  # the first call's period_steps
    open_numbers = dict.fromkeys(law.numbers(1.0, 1.0), timing.constant)
    for step in range(2 * (timing.rule.inner_steps or 2) + 2):
        found_inf = torch.tensor({2: 2.0, 5: float("nan")}.get(step, 0.0))
        inner = step % 3 != 1
        for label in makers:
            shared = clocks[label]
            shared.lr.fill_(0.0 if step == 3 and law.lr == "inner" else 0.3 / (step + 1))
            calls = (replace(shared, counts=False, period_steps=own[label]), shared)
            for i, (plan, now) in enumerate(zip(plans[label], calls, strict=True)):
                for t in inputs[label][i][0]:
                    t["x"][:4] = t["y"][:4] = -0.0
                    t["g"][4:5] = t["m" if "m" in t else "p"][3:4] = float("inf")
                scalars = replace(case.rounded(dtype), **open_numbers, outer=False, step=1, inner=inner or i == 1)
                grads = [t["g"] for t in inputs[label][i][0]] if scalars.inner else []
                plan.run(grads, scalars, *scales(dtype, 0.5 if step == 3 else None, None)[:1], found_inf, clock=now)
        for label in set(makers) - {"cpu"}:
            for i in range(2):
                assert_equal(inputs[label][i][0], inputs["cpu"][i][0], f"step {step}, {label} and cpu")
            for part in ("step", "position", "outer_steps", "gamma", "period_steps"):
                a, b = getattr(clocks[label], part), getattr(clocks["cpu"], part)
                assert a is b is None or torch.equal(a, b), f"{part} after step {step}: {a} and {b}"
            assert own[label] == own["cpu"]
    assert (int(clocks["cpu"].outer_steps) >= 1) == (timing.rule.inner_steps > 0)
