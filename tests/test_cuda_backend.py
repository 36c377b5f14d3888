"""The CUDA backend where there is no GPU: when it says no and why, and the host's part of its steps."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deeprelax_cuda import backends, doctor
from deeprelax_cuda.backends import cpu, cuda
from deeprelax_cuda.noise import Place
from deeprelax_cuda.steps import Scalars, Tensors

GPU = torch.device("cuda", 0)

needs_cuda_code = pytest.mark.skipif(not hasattr(cuda._native, "cuda_unavailable"), reason="built without nvcc")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything be there that the backend needs."""
    monkeypatch.setattr(cuda, "missing", None)
    monkeypatch.setattr(cuda, "_native", SimpleNamespace(cuda_unavailable=lambda index: ""))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    cuda._no_kernels.cache_clear()
    yield
    cuda._no_kernels.cache_clear()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_it_is_what_serves_cuda_tensors(device: str) -> None:
    assert backends.select(device, torch.bfloat16) == backends.Selection("cuda", "preferred for cuda tensors")
    assert backends.available(device) == ["cuda", "eager"]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("owner", "name", "value", "reason"),
    [
        (torch.version, "cuda", None, "torch is not built for CUDA"),
        (cuda, "missing", "no module", "the native module was not built or does not load: no module"),
        (cuda, "_native", SimpleNamespace(), "the native module was built without CUDA code (DEEPRELAX_BUILD_CUDA=1 says why)"),
        (torch.cuda, "is_available", lambda: False, "torch finds no CUDA device"),
        (cuda, "_native", SimpleNamespace(cuda_unavailable=lambda index: "no kernel image"), "no kernel image"),
    ],
)
def test_what_is_missing_is_said(owner: Any, name: str, value: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, value)
    assert cuda.unavailable(GPU, torch.float32) == reason
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        backends.select(GPU, torch.float32, "cuda")


@pytest.mark.usefixtures("gpu")
def test_tensors_of_others_are_refused() -> None:
    assert cuda.unavailable(torch.device("cpu"), torch.float32) == "the cuda backend serves CUDA tensors, not cpu"
    assert cuda.unavailable(GPU, torch.int32) == "the cuda backend has no torch.int32"


@pytest.mark.usefixtures("gpu")
def test_kernels_that_cannot_run_are_a_problem_to_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(cpu, "build_info", lambda: {"nvcc": "13.0"})
    monkeypatch.delenv("DEEPRELAX_BACKEND", raising=False)
    assert doctor._backends().problems == []
    monkeypatch.setattr(cuda, "unavailable", lambda device, dtype: "no kernel image")
    with pytest.warns(RuntimeWarning, match="cuda cannot: no kernel image"):
        findings = doctor._backends()
    assert findings.problems == ["backends: this build has CUDA kernels, but cannot use them: no kernel image"]
    assert findings.facts["devices"]["cuda"]["auto"] == "eager"


@needs_cuda_code
def test_without_a_driver_the_reason_is_in_words() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    assert cuda._native.cuda_unavailable(0).startswith("deeprelax: cuda")


@needs_cuda_code
@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_in_place_of_a_device_there_may_be_none(dtype: torch.dtype, inner: bool) -> None:
    """How the host's part of a step is timed: nothing is launched, so nothing is written."""
    sizes = [0, 1, 5000, *[3] * 600]
    state = torch.float64 if dtype == torch.float64 else torch.float32
    params = [torch.ones(n, dtype=dtype) for n in sizes]
    anchors, averages = ([torch.ones(n, dtype=state) for n in sizes] for _ in range(2))
    places = [Place(0, max(n, 1), max(n, 1)) for n in sizes]
    plan = cuda.CudaPlan(Tensors(params, anchors, averages, numbers=range(len(sizes)), places=places))
    grads = [torch.ones_like(p) for p in params] if inner else []
    plan.run(grads, Scalars(inner=inner, outer=not inner, eta=0.1, s=0.1, a=0.5, lr=0.5))
    assert all(bool((t == 1).all()) for t in [*params, *anchors, *averages])
    with pytest.raises(ValueError, match="one address per tensor"):
        plan.run([] if inner else [torch.ones(1)], Scalars(inner=inner, outer=not inner))
