"""The Langevin step on a GPU beside what torch makes of it: one interleaved run, times between events, medians.

On each list of tensors every contender takes its step in turn, on one of two sets of tensors, the L2 cache flushed before; the
device is kept busy until the host has queued the step, so that the time between the two events is the device's and not the
host's. The host's own time, the first call's (which compiles) and the number of launches have columns of their own. A
contender whose result is wrong is told, and ends the program with status 1, as one of ours does that does not run; one of our
backends that cannot serve here is left out with a line that says why.

Bandwidths count the contract's bytes: 24 an element of the float32 step, 32 with momentum, 18 for bfloat16 with float32 state.
`fraction_of_copy` compares them with a copy of as many bytes in the same rounds. `over_cuda` and `over_compile` are a row's
time over that of our CUDA kernels and of the faster torch.compile, `host_over_cuda` is the host's: below 1 is faster.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deeprelax_cuda import backends, machine
from deeprelax_cuda.backends import cpu
from deeprelax_cuda.bench.formulas import Roles, Terms, wrong
from deeprelax_cuda.bench.gpu_workloads import (
    COMPILED,
    CONTRACT,
    COPY,
    FUSED,
    OPTIMIZER,
    OPTIMIZERS,
    OTHERS,
    OURS,
    SGD,
    TRITON,
    Make,
    Workload,
    bytes_per_element,
    contenders,
    is_ours,
    make_roles,
    workloads,
)
from deeprelax_cuda.bench.timing import rates, summary, write_rows

#: Elements of a tensor, and tensors of a list, that are looked at when a contender's result is checked.
LOOK_AT, LOOK_AT_TENSORS = 2**16, 16
#: More launches than this do not fit in a stream's queue ahead of the device.
QUEUE = 900
#: Seconds of the host above which a step's launches are not counted.
MOST_TO_COUNT = 0.02
CYCLES_PER_SECOND = 2e9
FLUSH_BYTES = 2**28


class Contender:
    """A contender with its step for each set of tensors, and its samples."""

    def __init__(self, name: str, steps: Sequence[Callable[[], object]]) -> None:
        self.name, self.steps = name, steps
        self.first_call = self.head_start = 0.0
        self.launches: int | None = None
        self.said: str | None = None
        self.device_seconds: list[float] = []
        self.host_seconds: list[float] = []


def look(roles: Roles) -> list[Tensor]:
    """Return a copy of what a check looks at, one flat tensor a role."""
    none = roles.y[0].new_empty(0)
    parts = ([t.flatten()[:LOOK_AT].clone() for t in role[:LOOK_AT_TENSORS]] for role in roles)
    return [torch.cat(part) if part else none for part in parts]


def check(contender: Contender, roles: Roles, terms: Terms) -> None:
    """Take the first step, timed, and note what is wrong with it."""
    before = look(roles)
    _wait(roles.y[0].device)
    start = time.perf_counter()
    contender.steps[0]()
    _wait(roles.y[0].device)
    contender.first_call = time.perf_counter() - start
    if contender.name == COPY:
        return
    after = look(roles)
    # Optimizers' own anchors and averages are new, and their momenta are zero.
    whole = contender.name not in (*OPTIMIZERS.values(), *SGD)
    y, g, x, m, v = before
    if not whole:
        v = torch.zeros_like(v)
    if contender.name in SGD:
        terms = Terms(noise=False)  # the first momentum is the gradient
    contender.said = wrong([y, g, x, m, v], [after[0], after[3] if whole else m[:0]], terms, coupling=whole)


def count_launches(step: Callable[[], object]) -> int | None:
    """Return how many kernels, copies and fills a step starts; None where the profiler does not work.

    Not for the slow: it takes the profiler seconds to tell of 100,000 launches.
    """
    kinds = torch.profiler.ProfilerActivity
    try:
        with torch.profiler.profile(activities=[kinds.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        events = [event for event in profiler.events() or [] if event.device_type.name == "CUDA"]
    except RuntimeError:
        return None
    return sum(not event.is_user_annotation for event in events) or None


def sample(contender: Contender, step: Callable[[], object], flush: Callable[[], object]) -> None:
    """Time one step."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    flush()
    torch.cuda._sleep(int(contender.head_start * CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]
    start.record()
    began = time.perf_counter()
    step()
    host = time.perf_counter() - began
    end.record()
    end.synchronize()
    contender.device_seconds.append(1e-3 * start.elapsed_time(end))
    contender.host_seconds.append(host)


def prepare(name: str, make: Make, sets: Sequence[Roles], terms: Terms) -> Contender:
    """Return a contender that has been checked and warmed up."""
    contender = Contender(name, [make(roles) for roles in sets])
    check(contender, sets[0], terms)
    for step in contender.steps:  # the second set's first step
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    contender.steps[0]()
    host = time.perf_counter() - began
    contender.launches = count_launches(contender.steps[0]) if host < MOST_TO_COUNT else None
    contender.head_start = 2 * host + 1e-4 if contender.launches is not None and contender.launches <= QUEUE else 0.0
    return contender


def serving(device: torch.device) -> dict[str, str | None]:
    """Return why those of our backends that are measured cannot serve on the device, None for who can."""
    return {backend: backends.load(backend).unavailable(device, torch.float32) for backend in FUSED}


def measure(
    workload: Workload, served: Mapping[str, str], seconds: float, most: int, flush: Callable[[], object]
) -> tuple[list[Contender], list[str]]:
    """Check all contenders of a workload, then time them in turn for about so many seconds, at least three rounds.

    One that does not run, such as torch.compile without a compiler, is left out with a line that says why, so that the others
    are measured all the same. Returned are those that were, and the names of ours among those that were not.
    """
    device = torch.device("cuda")
    sets = [make_roles(workload, device, seed) for seed in range(2)]
    measured, broken = [], []
    for name, make in contenders(workload, device, served).items():
        try:
            measured.append(prepare(name, make, sets, workload.terms))
        except Exception as error:  # whatever another's code may raise
            if name == COPY:
                raise
            print(f"{workload.name}: {name} is left out: {type(error).__name__}: {str(error).splitlines()[:1]}")
            if is_ours(name):
                traceback.print_exc()
                broken.append(name)
    until = time.monotonic() + seconds
    for round_ in range(most):
        if round_ >= 3 and time.monotonic() > until:
            break
        for i, contender in enumerate(measured):
            sample(contender, contender.steps[(round_ + i) % 2], flush)
    return measured, broken


def rows_of(workload: Workload, measured: Sequence[Contender], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each contender, in the form in which it is kept."""
    rows = []
    for contender in measured:
        cost = bytes_per_element(contender.name, workload.dtype, workload.terms)
        middle = summary(contender.device_seconds)
        rows.append(
            {
                **facts,
                "workload": workload.name,
                "contender": contender.name,
                "shape": workload.describe_shape(),
                "tensors": len(workload.shapes),
                "elements": workload.elements,
                "dtype": str(workload.dtype).removeprefix("torch."),
                **workload.terms._asdict(),
                "bytes_per_element": cost,
                **middle,
                "rounds": len(contender.device_seconds),
                "host_median_s": statistics.median(contender.host_seconds),
                "first_call_s": contender.first_call,
                "launches": contender.launches,
                **rates(workload.elements, cost, middle["median_s"]),
                "wrong": contender.said,
            }
        )
    by_name = {row["contender"]: row for row in rows}
    rivals = [row for row in rows if not is_ours(row["contender"]) and row["contender"] not in (*OTHERS, CONTRACT)]
    compiled = [by_name[name] for name in COMPILED if name in by_name]
    for row in rows:
        cuda = by_name.get(OPTIMIZER if row["contender"] in OPTIMIZERS.values() else OURS)
        row["fraction_of_copy"] = row["bytes_per_s"] / by_name[COPY]["bytes_per_s"]
        row["fastest_contender_over_this"] = _over(min(rivals, key=_median, default=None), row)
        row["over_cuda"] = _over(row, cuda)
        row["over_compile"] = _over(row, min(compiled, key=_median, default=None))
        row["host_over_cuda"] = _over(row, cuda, "host_median_s")
    return rows


def _median(row: dict[str, Any]) -> float:
    return float(row["median_s"])


def _over(row: dict[str, Any] | None, other: dict[str, Any] | None, what: str = "median_s") -> float | None:
    return None if row is None or other is None else row[what] / other[what]


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    launches = "?" if row["launches"] is None else row["launches"]
    return (
        f"{_step(row)} {row['contender']:28} {1e3 * row['median_s']:9.4f} {row['bytes_per_s'] / 1e9:8.0f} "
        f"{row['fraction_of_copy']:6.3f} {_ratio(row['fastest_contender_over_this']):>7} {1e6 * row['host_median_s']:9.0f} "
        f"{launches:>8} {row['first_call_s']:8.2f}{'  WRONG: ' + row['wrong'] if row['wrong'] else ''}"
    )


def _step(row: dict[str, Any]) -> str:
    terms = f"{row['dtype']}{'' if row['noise'] else ', quiet'}{', momentum' if row['momentum'] else ''}"
    return f"{row['workload']:12} {terms:18}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


HEADER = (
    f"{'tensors':12} {'step':18} {'contender':28} {'ms':>9} {'GB/s':>8} {'copy':>6} {'fastest':>7} {'host us':>9} "
    f"{'launches':>8} {'first s':>8}"
)


def device_facts(commit: str | None) -> dict[str, Any]:
    """Return what every row carries: the GPU, the versions, the commit."""
    gpu = torch.cuda.get_device_properties(0)
    versions = machine.versions()
    facts = {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "sms": gpu.multi_processor_count}
    return {"machine": facts, "versions": {**versions, "commit": commit or versions["commit"]}}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timed rounds for each list of tensors (default 3)")
    parser.add_argument("--rounds", type=int, default=51, help="at most (default 51)")
    parser.add_argument("--budget", type=float, default=170.0, help="seconds after which no list is begun (default 170)")
    parser.add_argument("--commit", help="what the sources are, where neither git nor the build says it")
    parser.add_argument("--out", type=Path, help="JSON file, written after each list of tensors")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, keep it as JSON; return the exit status."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("gpu_step: torch finds no CUDA device", file=sys.stderr)
        return 1
    began = time.monotonic()
    reasons = serving(torch.device("cuda"))
    for backend, reason in reasons.items():
        if reason is not None:
            print(f"{FUSED[backend]} is left out: {reason}")
    served = {backend: backend for backend, reason in reasons.items() if reason is None}
    if not served:
        print("gpu_step: none of our backends can serve", file=sys.stderr)
        return 1
    facts = device_facts(options.commit)
    settings = {"rounds": options.rounds, "seconds": options.seconds}
    head = {"platform": machine.platform(), "build": cpu.build_info(), "settings": settings, "left_out": reasons}
    cache = torch.ones(FLUSH_BYTES // 4, device="cuda")
    total = torch.empty((), device="cuda")
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    print(HEADER)
    for workload in workloads():
        if time.monotonic() - began > options.budget:
            print(f"{workload.name}: not measured, as the time is up")
            continue
        # Read, not written: lines that still have to go to memory would cost the next step.
        measured, failed = measure(workload, served, options.seconds, options.rounds, lambda: torch.sum(cache, 0, out=total))
        broken += [f"{workload.name}: {name}" for name in failed]
        new = rows_of(workload, measured, facts)
        rows += new
        print("\n".join(map(line, new)), flush=True)
        if options.out:
            write_rows(options.out, {**head, "seconds": round(time.monotonic() - began, 1)}, rows)
        del measured
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    print_summary(rows, broken)
    return int(bool(broken) or any(row["wrong"] for row in rows))


def print_summary(rows: Sequence[dict[str, Any]], broken: Sequence[str]) -> None:
    """Print our rows once more: fractions of a copy, ratios to the fastest contender; then Triton's rows beside the others'."""
    print(f"\nours\n{HEADER}")
    for row in rows:
        if is_ours(row["contender"]):
            print(line(row))
    print(f"\n{TRITON}: its time over that of our CUDA kernels and of torch.compile, its host time over theirs")
    for row in rows:
        if row["contender"] in (TRITON, OPTIMIZERS["triton"]):
            ratios = [_ratio(row[name]) for name in ("over_cuda", "over_compile", "host_over_cuda")]
            print(f"{_step(row)} {row['contender']:28} {ratios[0]:>6} cuda {ratios[1]:>6} compile {ratios[2]:>6} host")
    for name in broken:
        print(f"DOES NOT RUN {name}")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
