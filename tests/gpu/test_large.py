"""More than 2^31 elements in one tensor: indices, counters of noise and blocks need more than 32 bits."""

from __future__ import annotations

import pytest
import torch
from device_runs import DEVICE, KERNELS, NEEDS_GPU
from step_lists import BF16, F32, LANGEVIN
from torch import Tensor

from deeprelax_cuda import functional
from deeprelax_cuda.steps import compute_type

pytestmark = [*NEEDS_GPU, pytest.mark.large]

NUMEL = 2**31 + 5
#: Where to look: at the beginning, on both sides of the last index of 31 bits and of 2^30, at the end.
WINDOWS = [(0, 1000), (2**30 - 500, 2**30 + 500), (2**31 - 1000, NUMEL)]


def needs(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes:.0f} GB of free device memory, there are {free / 1e9:.0f}")


@pytest.fixture(autouse=True)
def _memory() -> object:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("label", KERNELS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_step(dtype: torch.dtype, label: str) -> None:
    """The windows equal short tensors in their places on the CPU, and every element has moved."""
    state = compute_type(dtype)
    needs(1.15 * NUMEL * (3 * dtype.itemsize + 2 * state.itemsize) / 1e9)
    torch.manual_seed(0)
    y, g, x, m = (torch.empty(NUMEL, dtype=kind, device=DEVICE).normal_() for kind in (dtype, dtype, state, state))
    short = [[t[lo:hi].cpu() for t in (y, g, x, m)] for lo, hi in WINDOWS]
    before = y.clone()
    numbers = {**LANGEVIN, "momentum": 0.0, "nesterov": False, "dampening": 0.0, "maximize": False, "lr": 0.3}
    functional.langevin_step_([y], [g], [x], [m], **numbers, streams=[9], backend=label)
    for (lo, hi), (a, b, c, d) in zip(WINDOWS, short, strict=True):
        functional.langevin_step_([a], [b], [c], [d], **numbers, streams=[9], places=[lo], backend="cpu")
        for name, want, tensor in zip("ygxm", (a, b, c, d), (y, g, x, m), strict=True):
            assert torch.equal(tensor[lo:hi].cpu(), want), f"{name} from element {lo} on"
    still = sum(int((old == new).sum()) for old, new in zip(before.split(2**28), y.split(2**28), strict=True))
    assert still < NUMEL * (0.1 if dtype == BF16 else 1e-5)


@pytest.mark.parametrize("label", KERNELS)
def test_normals(label: str) -> None:
    needs(1.1 * 4 * NUMEL / 1e9)
    options = {"seed": 2**63 + 1, "step": 5, "stream": 3}
    z = functional.gaussian(NUMEL, **options, offset=3, device=DEVICE, backend=label)
    for lo, hi in WINDOWS:
        assert torch.equal(z[lo:hi].cpu(), functional.gaussian(hi - lo, **options, offset=3 + lo, backend="cpu"))
    assert int(sum((part == 0).sum() for part in z.split(2**28))) < 1000


@pytest.mark.parametrize("label", KERNELS)
def test_tensors_of_any_total_in_one_list(label: str) -> None:
    """Each is short, all together are not: a launch numbers their blocks one after the other."""
    sizes = [2**29, 2**29 + 3, 2**29, 2**29 + 1, 2**20]
    needs(1.15 * sum(sizes) * 2 * 4 / 1e9)
    torch.manual_seed(0)
    lists: list[list[Tensor]] = [[torch.empty(n, device=DEVICE).normal_() for n in sizes] for _ in range(2)]
    params, grads = lists
    tails = [[t[-1001:].cpu() for t in role] for role in lists]
    options = {"lr": 0.3, "stiffness": 0.0, "averaging": 0.0, "noise_std": 0.1, "seed": 5, "step": 6}
    functional.langevin_step_(params, grads, None, None, **options, backend=label)
    for i, n in enumerate(sizes):
        y, g = tails[0][i], tails[1][i]
        functional.langevin_step_([y], [g], None, None, **options, streams=[i], places=[n - 1001], backend="cpu")
        assert torch.equal(params[i][-1001:].cpu(), y), i
