"""What the tests on a GPU share: when they run, and copies of tensors and optimizers on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from contract_cases import Case, run, same
from lone_replicas import LoneElasticSGD, LoneParle
from step_lists import Lists
from torch import Tensor

import deeprelax_cuda as dr
from deeprelax_cuda.backends import triton
from deeprelax_cuda.replicas.base import ReplicaOptimizer

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")
NO_TRITON = triton.unavailable(DEVICE, torch.float32)
NEEDS_TRITON = pytest.mark.skipif(NO_TRITON is not None, reason=NO_TRITON or "")
TRITON = pytest.param("triton", marks=NEEDS_TRITON)
#: Of our kernels, and of what the tests compare with the CPU's C++ backend.
KERNELS = ("cuda", TRITON)
BACKENDS = (*KERNELS, "eager")
#: Cycles for which a stream is kept busy: half a second or so, in which a host that does not wait gets far ahead.
LONG = 10**9
#: Inner steps of a period of `optimizer_on`.
L = 3
#: Settings under which everything moves; a method without "inner_steps" has no periods.
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "EntropySGD": (dr.EntropySGD, {"inner_steps": L, "gamma": 2.0, "scoping": 0.1, "temperature": 1e-3}),
    "HamiltonJacobi": (dr.HamiltonJacobi, {"inner_steps": L, "gamma": 0.5, "scoping": 0.1}),
    "HeatSGD": (dr.HeatSGD, {"inner_steps": L, "gamma": 2.0, "scoping": 0.1, "temperature": 1e-3}),
    "SGLD": (dr.SGLD, {"lr": 0.05, "gamma": 2.0, "temperature": 1e-3}),
    "Parle": (LoneParle, {"inner_steps": L, "gamma": 2.0, "scoping": 0.1, "temperature": 1e-3, "rho": 2.0}),
    "ElasticSGD": (LoneElasticSGD, {"lr": 0.05, "rho": 2.0, "temperature": 1e-3}),
}
#: Those whose step is one launch, which a graph may capture: an exchange of replicas is the host's.
CAPTURABLE = [name for name, (kind, _) in METHODS.items() if not issubclass(kind, ReplicaOptimizer)]


def optimizer_of(params: Iterable[Any], method: str = "EntropySGD", **options: Any) -> Any:
    make, settings = METHODS[method]
    return make(params, **{**settings, "seed": 11, **options})


def has_periods(optimizer: Any) -> bool:
    return optimizer.param_groups[0]["inner_steps"] is not None


def lists_on(lists: Lists, device: torch.device | str) -> Lists:
    """Copy lists to a device; strides stay."""
    return Lists(**{role: [t.to(device, copy=True) for t in items] for role, items in vars(lists).items()})


def assert_lists_equal(got: Lists, want: Lists) -> None:
    for role, items in vars(want).items():
        for i, (a, b) in enumerate(zip(getattr(got, role), items, strict=True)):
            assert torch.equal(a.cpu(), b), f"{role}[{i}] of shape {tuple(b.shape)}"


def state_of(optimizer: Any) -> list[Tensor]:
    """Return copies of all parameters and their state on the CPU, in order; numbers are tensors too."""
    tensors: list[Any] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            tensors += [p, *(value for _, value in sorted(optimizer.state.get(p, {}).items()))]
    return [torch.as_tensor(t).detach().cpu().clone() for t in tensors]


def assert_states_equal(got: Any, want: Any) -> None:
    ours, theirs = state_of(got), state_of(want)
    assert len(ours) == len(theirs) > 0
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), i
        assert torch.equal(a, b), f"tensor {i} of the state"


def on_both(
    case: Case, dtype: torch.dtype, label: str, *call: Sequence[Any], **options: Any
) -> list[tuple[str, Tensor, Tensor]]:
    """Take one step with the C++ backend on the CPU and with ``label`` on the device; return (name, expected, got).

    Raises:
        AssertionError: memory around a tensor was written.
    """
    wanted, _ = run("cpu", case, dtype, *call, **options)
    outputs, guards = run(label, case, dtype, *call, device=DEVICE, **options)
    assert all(guard.intact() for guard in guards), "memory around a tensor was written"
    return [
        (f"{key} of tensor {i} with {want.numel()} elements", want, out[key].cpu())
        for i, (out, wants) in enumerate(zip(outputs, wanted, strict=True))
        for key, want in wants.items()
    ]


def differences(triples: Iterable[tuple[str, Tensor, Tensor]]) -> list[str]:
    """Return the names of the tensors that differ in any bit."""
    return [name for name, want, got in triples if not same(got, want)]
