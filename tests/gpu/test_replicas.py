"""Replicas on GPUs: the bits of replicas on the CPU, in one process and over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rank_programs as programs
import torch
from device_runs import BACKENDS, DEVICE, NEEDS_GPU
from ranks import run_ranks
from replica_runs import DTYPES, L, Mixed, answer, differences, make, numbers, snapshot, walk

pytestmark = NEEDS_GPU

STEPS = 3 * L + 1
CASES: list[programs.Case] = [
    ("Parle", "float32", {}),
    ("Parle", "mixed", {"master_weights": True, "averaging": "linear"}),
    ("ElasticSGD", "mixed", {"rounding": "stochastic"}),
]


def in_one_process(case: programs.Case, devices: list[Any], **options: Any) -> list[dict[str, Any]]:
    method, dtypes, own = case
    models = {replica: Mixed(DTYPES[dtypes]).to(device) for replica, device in enumerate(devices)}
    optimizer = make(method, list(models.values()), **own, **options)
    walk(models, optimizer, range(STEPS))
    return [
        {**snapshot(model, optimizer), **answer(model, optimizer), **numbers(optimizer, replica)}
        for replica, model in models.items()
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_replicas_on_a_gpu_have_the_bits_of_the_cpu(case: programs.Case, backend: str) -> None:
    got, want = in_one_process(case, [DEVICE] * 3, backend=backend), in_one_process(case, ["cpu"] * 3)
    for ours, theirs in zip(got, want, strict=True):
        assert [name for name in differences(ours, theirs) if not name.endswith(" backend")] == []


def test_replicas_may_lie_on_several_devices() -> None:
    devices = ["cpu", DEVICE, torch.device("cuda", torch.cuda.device_count() - 1)]
    for case in CASES:
        for ours, theirs in zip(in_one_process(case, devices), in_one_process(case, ["cpu"] * 3), strict=True):
            assert differences(ours, theirs) == []


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_ranks_on_gpus_have_the_bits_of_the_cpu(tmp_path: Path, backend: str) -> None:
    """With gloo two ranks share a device, and exchange by way of the host."""
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL wants a device for each rank")
    devices = ["cuda:0", "cuda:0" if backend == "gloo" else "cuda:1"]
    found = run_ranks(tmp_path, 2, programs.histories, CASES, STEPS, devices, backend=backend)
    for i, case in enumerate(CASES):
        for replica, want in enumerate(in_one_process(case, ["cpu"] * 2)):
            assert differences(found[replica][i], want) == []
