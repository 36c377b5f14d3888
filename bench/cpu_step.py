"""The Langevin step on the CPU beside what eager torch and torch.compile make of it: one interleaved run, ratios of medians.

Each contender takes the same step (gradient, coupling, noise, running average; no momentum) on float32 tensors in place. Rounds
go through all contenders in turn, each call on the other of two sets of buffers; the ratios are those of medians over rounds.
Bandwidths count the contract's bytes: 24 an element for the step, 12 for `torch.add(a, b, out=c)`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import deeprelax_cuda as dr
from deeprelax_cuda import machine
from deeprelax_cuda.backends import cpu
from deeprelax_cuda.bench.formulas import ETA, A, K, S, compiled, in_place_eager, naive_eager
from deeprelax_cuda.bench.timing import rates, summary

Step = Callable[[Tensor, Tensor, Tensor, Tensor], object]

FUSED, NOISE_FREE, COPY = "fused cpu", "fused cpu, no noise", "torch.add(a, b, out=c)"


def fused(backend: str, noise_std: float) -> Step:
    """Return our step on one backend."""
    count = itertools.count()

    def step(y: Tensor, g: Tensor, x: Tensor, m: Tensor) -> None:
        dr.functional.langevin_step_(
            [y], [g], [x], [m], lr=ETA, stiffness=K, noise_std=noise_std, averaging=A, seed=1, step=next(count), backend=backend
        )

    return step


def contenders() -> dict[str, Step]:
    """Return what is measured, by name."""
    return {
        FUSED: fused("cpu", S),
        NOISE_FREE: fused("cpu", 0.0),
        "naive eager": naive_eager,
        "in-place eager": in_place_eager,
        "torch.compile": compiled(aten_noise=False),
        "torch.compile, ATen noise": compiled(aten_noise=True),
        "contract in eager torch": fused("eager", S),
        COPY: lambda y, g, x, m: torch.add(y, g, out=m),
    }


def measure(numel: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Time all contenders in turn, and their first call (which compiles) apart."""
    generator = torch.Generator().manual_seed(0)
    sets = [tuple(torch.randn(numel, generator=generator) for _ in range(4)) for _ in range(2)]
    rows: dict[str, dict[str, Any]] = {}
    steps = contenders()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for i, (name, step) in enumerate(steps.items()):
            y, g, x, m = sets[(round_ + i) % 2]
            start = time.perf_counter()
            step(y, g, x, m)
            seconds[name].append(time.perf_counter() - start)
    for name, (first, *times) in seconds.items():
        middle = summary(times)
        speed = rates(numel, 12 if name == COPY else 24, middle["median_s"])
        rows[name] = {**middle, "first_call_s": first, **speed}
    return rows


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the three figures that are promised."""
    rivals = ("naive eager", "in-place eager", "torch.compile", "torch.compile, ATen noise")
    return {
        "noise / fastest contender": rows[FUSED]["elements_per_s"] / max(rows[name]["elements_per_s"] for name in rivals),
        "noise / noise-free": rows[FUSED]["elements_per_s"] / rows[NOISE_FREE]["elements_per_s"],
        "noise-free bandwidth / torch.add": rows[NOISE_FREE]["bytes_per_s"] / rows[COPY]["bytes_per_s"],
    }


def main() -> None:
    """Measure, print the table and the ratios, keep them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--numel", type=int, default=2**25, help="elements of each tensor (default 2**25)")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds (default 11)")
    parser.add_argument("--threads", type=int, default=2, help="torch.set_num_threads (default 2)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.numel, options.rounds)
    print(f"{'':28} {'G elements/s':>12} {'GB/s':>8} {'first call s':>12}")
    for name, row in rows.items():
        print(f"{name:28} {row['elements_per_s'] / 1e9:12.3f} {row['bytes_per_s'] / 1e9:8.1f} {row['first_call_s']:12.2f}")
    figures = ratios(rows)
    for name, ratio in figures.items():
        print(f"{name:40} {ratio:6.2f}")
    if options.out:
        settings = {"numel": options.numel, "rounds": options.rounds, "threads": options.threads, "dtype": "float32"}
        result = {
            "versions": machine.versions(),
            "platform": machine.platform(),
            "build": cpu.build_info(),
            "settings": settings,
            "contenders": rows,
            "ratios": figures,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
