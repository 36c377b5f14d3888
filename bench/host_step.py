"""The host's time of a step on many tiny tensors: EntropySGD beside torch.optim.SGD, interleaved, ratios of medians.

The tensors are so small that nearly all of a step is finding them and checking them. Gradients are either the same tensors at
each step, or new ones, as ``zero_grad(set_to_none=True)`` leaves them. In the third part there are as few tensors as in a small
network, and matrix products between the steps empty the caches of all that a step needs, as the passes of a network do.

The last part is the host's time of the CUDA and the Triton backend up to their launches, for which no GPU is needed, beside
that of a plan that does nothing: what is left then is the validation that every backend's step begins with. Neither asks for
the current device and stream, as there are none, and what Triton itself does to launch a kernel that is ready is left out too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.optim import Optimizer

import deeprelax_cuda as dr
from deeprelax_cuda import backends, machine, native
from deeprelax_cuda.backends import cpu, cuda, triton, triton_launch
from deeprelax_cuda.steps import Plan, Tensors

OURS, THEIRS = "EntropySGD", "SGD, fused"
#: Tensors of the network whose step is measured with cold caches, and the side of the square matrices that cool them.
FEW, SIDE = 10, 1200


def optimizers(count: int, numel: int) -> dict[str, Optimizer]:
    """Return the contenders, each with parameters of its own."""

    def params() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.ones(numel)) for _ in range(count)]

    return {
        OURS: dr.EntropySGD(params(), temperature=0.0, seed=0),
        f"{OURS}, noise": dr.EntropySGD(params(), temperature=1e-8, seed=0),
        "HamiltonJacobi": dr.HamiltonJacobi(params(), seed=0),
        "HeatSGD": dr.HeatSGD(params(), seed=0),
        "SGLD": dr.SGLD(params(), lr=0.1, temperature=1e-6, seed=0),
        THEIRS: torch.optim.SGD(params(), lr=0.1, momentum=0.9, fused=True),
        "SGD, foreach": torch.optim.SGD(params(), lr=0.1, momentum=0.9, foreach=True),
    }


def measure(count: int, numel: int, rounds: int, *, new_grads: bool, cold: bool = False) -> dict[str, float]:
    """Return the median seconds of a step of each contender."""
    contenders = optimizers(count, numel)
    matrix = torch.ones(SIDE, SIDE)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 3):
        for name, optimizer in contenders.items():
            if new_grads or round_ == 0:
                for p in optimizer.param_groups[0]["params"]:
                    p.grad = torch.full_like(p, 1e-3)
            if cold:
                torch.mm(torch.mm(matrix, matrix), matrix)
            start = time.perf_counter()
            optimizer.step()
            if round_ >= 3:  # the first rounds make state and plans
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


class NoWork:
    """A plan that does nothing, so that a step is its validation; it does not move a clock either."""

    CAPTURABLE: ClassVar[bool] = False

    def __init__(self, tensors: Tensors) -> None:
        pass

    def run(self, *args: object, **kwargs: object) -> None:
        """Do nothing."""


class Timed:
    """A plan that notes how long each of its runs takes: a step's own time differs more from step to step than a run takes."""

    CAPTURABLE: ClassVar[bool] = True

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.seconds: list[float] = []

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Run the plan."""
        start = time.perf_counter()
        self._plan.run(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)


@contextmanager
def not_launched() -> Iterator[None]:
    """Have the Triton backend find its kernels, as if all were ready, and launch none."""
    with mock.patch.object(triton, "start", triton_launch.find):
        yield


def plans() -> dict[str, Callable[[Tensors], Plan]]:
    """Return what is measured up to its launches, by name; a line says why one is left out."""
    made: dict[str, Callable[[Tensors], Plan]] = {"no work": NoWork, "CPU": cpu.make_plan}
    if hasattr(native.module, "cuda_unavailable"):
        made["CUDA, not launched"] = cuda.make_plan
    else:
        print("CUDA is left out: the native module has no CUDA code")
    _, reason = triton._load()
    if reason is None:
        made["Triton, not launched"] = triton.make_plan
    else:
        print(f"Triton is left out: {reason}")
    return made


@not_launched()
def measure_plans(count: int, numel: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median seconds of a step with each plan, and of the plan's part in it; the gradients are the same tensors."""
    makes = plans()
    kinds = [(name, capturable) for name in makes for capturable in (False, True)]
    # One parameter of each in turn, so that all lie in memory alike.
    rows = [[torch.nn.Parameter(torch.ones(numel)) for _ in kinds] for _ in range(count)]
    steppers: dict[str, Callable[[], object]] = {}
    timed: dict[str, Timed] = {}
    for (name, capturable), params in zip(kinds, zip(*rows, strict=True), strict=True):
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        optimizer = dr.EntropySGD(params, temperature=1e-8, seed=0, capturable=capturable)
        label, make = f"{name}{', capturable' if capturable else ''}", makes[name]

        def make_timed(_: str, tensors: Tensors, label: str = label, make: Callable[[Tensors], Plan] = make) -> Timed:
            timed[label] = Timed(make(tensors))
            return timed[label]

        with mock.patch.object(backends, "make_plan", make_timed):
            optimizer.step()  # makes state and plan
        steppers[label] = optimizer.step
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for round_ in range(rounds):
        for name, step in random.Random(round_).sample(list(steppers.items()), len(steppers)):
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    runs = {name: statistics.median(plan.seconds) for name, plan in timed.items()}
    return {name: statistics.median(times) for name, times in seconds.items()}, runs


def main() -> None:
    """Measure, print the table and the ratios, keep them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=1000, help="tensors (default 1000)")
    parser.add_argument("--numel", type=int, default=4, help="elements of each (default 4)")
    parser.add_argument("--rounds", type=int, default=101, help="timed rounds (default 101)")
    parser.add_argument("--threads", type=int, default=1, help="torch.set_num_threads (default 1)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count, numel, rounds = options.count, options.numel, options.rounds
    rows = {
        "the same gradients": measure(count, numel, rounds, new_grads=False),
        "new gradients": measure(count, numel, rounds, new_grads=True),
        f"cold, {FEW} tensors": measure(FEW, numel, rounds, new_grads=True, cold=True),
    }
    for kind, medians in rows.items():
        for name, median in medians.items():
            print(f"{kind:20} {name:20} {1e3 * median:7.2f} ms {median / medians[THEIRS]:6.2f} of {THEIRS}")
    steps, runs = measure_plans(count, numel, rounds)
    for name, median in steps.items():
        print(f"{'plans':20} {name:34} {1e6 * median:7.1f} us a step, {1e6 * runs[name]:6.1f} us beside its validation")
    if options.out:
        settings = {name: getattr(options, name) for name in ("count", "numel", "rounds", "threads")}
        result = {
            "versions": machine.versions(),
            "platform": machine.platform(),
            "build": cpu.build_info(),
            "settings": settings,
            "median_s": rows,
            "plans_median_s": steps,
            "plans_run_median_s": runs,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
