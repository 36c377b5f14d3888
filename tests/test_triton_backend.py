"""When the triton backend serves and when it says no, in words; what is compiled ahead of the first step."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract_cases import TRITON
from lone_replicas import LoneElasticSGD, LoneParle
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import deeprelax_cuda as dr
from deeprelax_cuda import backends, doctor
from deeprelax_cuda.backends import cuda, triton

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

interprets = pytest.mark.skipif(not TRITON, reason="Triton's interpreter does not serve here")


def python(code: str, **environment: str) -> str:
    """Run a program in a process of its own, without Triton's interpreter where ``environment`` does not ask for it."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "DEEPRELAX_BACKEND")}
    command = [sys.executable, "-c", code]
    # Elsewhere, so that it is the package that is installed, and not the sources that lie here.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**inherited, **environment}, cwd=tempfile.gettempdir()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A GPU, a Triton that compiles for it, and no kernels in CUDA C++."""
    target = SimpleNamespace(backend="cuda", arch=90)
    active = SimpleNamespace(get_current_target=lambda: target)
    runtime = SimpleNamespace(driver=SimpleNamespace(active=active))
    monkeypatch.setattr(triton, "_load", lambda: (SimpleNamespace(step_kernel=SimpleNamespace(device_caches={})), None))
    monkeypatch.setitem(sys.modules, "triton.runtime", runtime)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    monkeypatch.setattr(cuda, "unavailable", lambda device, dtype: "the native module was built without CUDA code")
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.delenv("DEEPRELAX_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton._no_driver.cache_clear()
    yield target
    triton._no_driver.cache_clear()


# ---- Who serves --------------------------------------------------------------------------------------------------------------


def test_the_order_of_gpu_backends() -> None:
    assert backends.ORDER["cuda"] == ("cuda", "triton", "eager")
    assert "triton" not in backends.ORDER["cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_serves_where_there_are_no_cuda_kernels(gpu: SimpleNamespace, dtype: torch.dtype) -> None:
    with pytest.warns(RuntimeWarning, match=f"backend triton serves {dtype} on cuda:0, because cuda cannot: the native module"):
        chosen = backends.select(GPU, dtype)
    assert chosen == backends.Selection("triton", "cuda cannot: the native module was built without CUDA code")
    assert backends.available(GPU) == ["triton", "eager"]
    assert backends.select(GPU, dtype, "triton").reason == 'asked for by backend="triton"'


def test_it_is_not_even_loaded_where_there_are_cuda_kernels(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda device, dtype: None)
    monkeypatch.setattr(triton, "unavailable", lambda device, dtype: pytest.fail("it was asked"))
    assert backends.select(GPU, torch.float32) == backends.Selection("cuda", "preferred for cuda tensors")


def test_it_serves_hip_tensors(gpu: SimpleNamespace) -> None:
    gpu.backend, gpu.arch = "hip", "gfx942"
    assert triton.unavailable(GPU, torch.float32) is None


def test_what_is_missing_is_said(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(reason: str, device: torch.device = GPU, dtype: torch.dtype = torch.float32) -> None:
        triton._no_driver.cache_clear()
        assert triton.unavailable(device, dtype) == reason
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            backends.select(device, dtype, "triton")

    refused("the triton backend has no torch.int32", dtype=torch.int32)
    refused("the triton backend serves CUDA and HIP tensors, not xpu", torch.device("xpu"))
    refused("the triton backend serves CPU tensors only with TRITON_INTERPRET=1, to test its kernels", CPU)
    gpu.arch = 75
    refused("triton compiles for compute capability 8.0 and later, this device has 7.5")
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    refused("TRITON_INTERPRET was set when the kernels were loaded")
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refused("TRITON_INTERPRET was not set when the kernels were loaded", CPU)
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace())
    refused("triton cannot use the device: AttributeError: 'types.SimpleNamespace' object has no attribute 'driver'")
    monkeypatch.setattr(triton, "_load", lambda: (None, "triton cannot be imported: no such module"))
    refused("triton cannot be imported: no such module")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("torch finds no CUDA or HIP device")


@interprets
def test_cpu_tensors_are_served_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPRELAX_BACKEND", raising=False)
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert "triton" not in backends.available(CPU)
    assert backends.select(CPU, torch.float32).name != "triton"
    assert backends.select(CPU, torch.float32, "triton").name == "triton"
    p = torch.nn.Parameter(torch.ones(5))
    opt = dr.EntropySGD([p], seed=0, backend="triton")
    p.grad = torch.ones(5)
    opt.step()
    assert not torch.equal(p, torch.ones(5))
    assert opt.explain() == 'triton for float32 parameters on cpu: asked for by backend="triton"'


# ---- Without Triton, and with one that is broken -----------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_imports_triton_before_it_is_asked_for() -> None:
    said = python(
        "import sys, torch, deeprelax_cuda as dr\n"
        "dr.functional.gaussian(5, seed=0, step=0); dr.backends.available('cpu'); dr.backends.warm_up(torch.ones(3))\n"
        "print(dr.backends.load('triton').unavailable(torch.device('cpu'), torch.float32))\n"
        "print('triton' in sys.modules)\n"
        "p = torch.nn.Parameter(torch.ones(5)); p.grad = torch.ones(5)\n"
        "opt = dr.EntropySGD([p], seed=0); opt.step(); opt.explain(); dr.backends.warm_up(opt)\n"  # torch's own part imports it
        "print([name for name in sys.modules if name.startswith('deeprelax_cuda.triton_kernels')])"
    )
    assert said.splitlines() == [
        "the triton backend serves CPU tensors only with TRITON_INTERPRET=1, to test its kernels",
        "False",
        "[]",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libodd.so: no such file')", "triton cannot be imported: libodd.so: no such file"),
        ("raise RuntimeError('half of it is missing')", "triton cannot be imported: RuntimeError: half of it is missing"),
        ("", "the triton kernels cannot be loaded: "),
    ],
    ids=["ImportError", "RuntimeError", "empty"],
)
def test_a_broken_triton_breaks_nobody_else(code: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(code + "\n")
    said = python(
        "import torch, deeprelax_cuda as dr\n"
        "print(dr.backends.load('triton').unavailable(torch.device('cpu'), torch.float32))\n"
        "p = torch.ones(5)\n"
        "dr.functional.langevin_step_([p], [p * 2], None, None, lr=0.5, stiffness=0.0, noise_std=0.0, averaging=0.0)\n"
        "print(p.tolist())\n"
        "try: dr.functional.gaussian(5, seed=0, step=0, backend='triton')\n"
        "except RuntimeError as error: print(error)",
        TRITON_INTERPRET="1",
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    )
    why, stepped, refused = said.splitlines()
    assert why.startswith(reason)
    assert stepped == str([0.0] * 5)
    assert refused == f'backend="triton" cannot serve torch.float32 on cpu: {why}'


def test_a_triton_that_cannot_serve_a_gpu_is_a_problem_to_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(doctor, "_why_not_imported", lambda module, *path: "ImportError: libodd.so")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cuda, "unavailable", lambda device, dtype: "no kernels")
    monkeypatch.delenv("DEEPRELAX_BACKEND", raising=False)
    with pytest.warns(RuntimeWarning):
        findings = doctor._backends()
    reason = "the triton kernels cannot be loaded: ImportError: libodd.so"
    assert findings.facts["devices"]["cuda"]["unavailable"]["triton"] == reason
    assert findings.problems == [f"backends: Triton is installed, but cannot serve cuda tensors: {reason}"]
    monkeypatch.setattr(cuda, "unavailable", lambda device, dtype: None)
    assert doctor._backends().problems == [], "nobody needs it there"
    monkeypatch.setattr(cuda, "unavailable", lambda device, dtype: "no kernels")
    monkeypatch.setattr(doctor, "_why_not_imported", lambda module, *path: None)
    monkeypatch.setattr(triton, "unavailable", lambda device, dtype: "triton compiles for compute capability 8.0 and later")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert doctor._backends().problems == [], "the device is older"


# ---- Warming up --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The scalars of the steps that plans take."""
    taken: list[Any] = []
    module = backends.load("cpu")
    known = module.make_plan

    def make_plan(tensors: Any) -> Any:
        plan = known(tensors)
        run = plan.run

        def noted(grads: Any, scalars: Any, *others: Any, **named: Any) -> None:
            taken.append((tensors, scalars))
            run(grads, scalars, *others, **named)

        return SimpleNamespace(run=noted, CAPTURABLE=False)

    monkeypatch.setattr(module, "make_plan", make_plan)
    return taken


def test_warming_up_parameters_takes_the_everyday_steps_of_each_type(steps: list[Any]) -> None:
    params = [torch.ones(3), {"params": [torch.ones(2, dtype=torch.bfloat16), torch.ones(7)]}]
    before = [torch.ones(3), torch.ones(2, dtype=torch.bfloat16), torch.ones(7)]
    seconds = backends.warm_up(iter(params))
    assert 0 < seconds < math.inf
    assert [(t.params[0].dtype, s.outer) for t, s in steps] == [
        (dtype, outer) for dtype in (torch.float32, torch.bfloat16) for outer in (False, True)
    ]
    assert all(torch.equal(a, b) for a, b in zip([params[0], *params[1]["params"]], before, strict=True))
    assert backends.warm_up([]) < seconds
    opt = dr.EntropySGD([torch.nn.Parameter(torch.ones(3))], seed=0)
    (p,) = opt.param_groups[0]["params"]
    everyday = [s for _, s in steps[:2]]
    steps.clear()
    for _ in range(20):
        p.grad = torch.ones(3)
        opt.step()
    terms = ("eta", "k", "s", "a", "c", "wd", "mu", "mu_o", "wd_o", "kr", "inner", "nesterov", "nesterov_o", "maximize")

    def kind(scalars: Any) -> Any:
        return [bool(getattr(scalars, name)) for name in terms], scalars.a == 1.0, scalars.outer

    assert [kind(steps[0][1]), kind(steps[-1][1])] == [kind(s) for s in everyday], "as the optimizer takes them by default"


@pytest.mark.parametrize(
    "options", [{}, {"averaging": "linear"}, {"inner_steps": 1}, {"closure_mode": "inner_loop"}, {"capturable": True}]
)
def test_warming_up_an_optimizer_takes_its_own_steps_and_leaves_it_alone(options: dict[str, Any], steps: list[Any]) -> None:
    def run(warm: bool) -> list[Any]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(4).bfloat16())]
        opt = dr.EntropySGD(
            [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}], seed=0, **{"inner_steps": 3, **options}
        )
        found = []
        for step in range(5):
            if warm and step in (0, 2):
                assert backends.warm_up(opt) > 0
            for p in params:
                p.grad = torch.full_like(p, 0.1)
            steps.clear()
            opt.step(lambda: 0.0) if "closure_mode" in options else opt.step()
            found += [p.detach().clone() for p in params]
        return [*found, opt.state_dict()]

    cold, warm = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(cold[:-1], warm[:-1], strict=True))
    assert cold[-1]["param_groups"] == warm[-1]["param_groups"]


MAKERS: dict[str, Callable[..., Optimizer]] = {
    "EntropySGD": partial(dr.EntropySGD, inner_steps=4),
    "averaging linear": partial(dr.EntropySGD, averaging="linear", inner_steps=4),
    "HamiltonJacobi": dr.HamiltonJacobi,
    "averaging last": partial(dr.HamiltonJacobi, averaging="last"),
    "prox": partial(dr.HamiltonJacobi, inner="prox"),
    "HeatSGD": dr.HeatSGD,
    "two steps": partial(dr.HeatSGD, inner_steps=2),
    "SGLD": partial(dr.SGLD, lr=0.1, temperature=1e-3),
    "Parle": partial(LoneParle, inner_steps=4, temperature=1e-3),
    "ElasticSGD": LoneElasticSGD,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_optimizer_is_warmed_up_for_all_its_kinds_of_steps(make: Callable[..., Optimizer], steps: list[Any]) -> None:
    def kinds() -> set[Any]:
        return {(t.params[0].dtype, s.outer, s.a == 0.0, s.a == 1.0, s.s != 0.0, s.c != 0.0, s.wd != 0.0) for t, s in steps}

    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))]
    opt = make([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}], seed=0)
    backends.warm_up(opt)
    warmed = kinds()
    steps.clear()
    for _ in range(11):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    assert warmed == kinds()


def test_a_learning_rate_that_begins_at_zero_is_warmed_up_alike(steps: list[Any]) -> None:
    kinds = []
    for lr in (0.1, 0.0):
        opt = dr.EntropySGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, seed=0, averaging="linear", inner_steps=4)
        opt.param_groups[0]["lr"] = lr
        steps.clear()
        backends.warm_up(opt)
        kinds.append([(s.outer, s.a == 1.0) for _, s in steps])
    assert kinds[0] == kinds[1] == [(False, True), (False, False), (False, False), (True, False)]


def test_warming_up_calls_nothing_of_the_user() -> None:
    class Own(dr.EntropySGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, seed=0, gamma=1e-3, inner_lr=10.0)
            self.extra = 1

        def step(self, closure: Any = None) -> Any:
            self.extra += 1
            return super().step(closure)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = Own([torch.nn.Parameter(torch.ones(3))])
    called: list[Any] = []
    handle = register_optimizer_step_pre_hook(lambda *args: called.append(args))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert backends.warm_up(opt) > 0
    finally:
        handle.remove()
    assert (called, opt.extra) == ([], 1)


def test_warming_up_takes_what_optimizers_take() -> None:
    model = torch.nn.Linear(3, 2)
    for params in (model.parameters(), model.named_parameters(), [{"params": model.named_parameters()}], model.weight, []):
        assert backends.warm_up(params) > 0
    for other in (model, torch.optim.SGD(model.parameters()), "weight", [1]):
        with pytest.raises(TypeError, match="params: expected an optimizer of deeprelax_cuda, tensors, named"):
            backends.warm_up(other)


@pytest.mark.parametrize("backend", ["cpu", "eager", *TRITON])
def test_a_default_device_changes_nothing(backend: str) -> None:
    def run() -> torch.Tensor:
        p = torch.nn.Parameter(torch.ones(5, device="cpu"))
        opt = dr.EntropySGD([p], seed=0, backend=backend, inner_steps=2)
        for _ in range(3):
            p.grad = torch.full((5,), 0.1, device="cpu")
            opt.step()
        return p.detach()

    want = run()
    with torch.device("meta"):
        assert torch.equal(run(), want)


def test_the_wait_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = dr.EntropySGD([torch.nn.Parameter(torch.ones(3))], seed=0, backend="eager")
    assert opt.explain() == 'eager for float32 parameters on cpu: asked for by backend="eager"'
    monkeypatch.setattr(backends.load("eager"), "compiled", [0.75, 1.5], raising=False)
    assert opt.explain().endswith("; 2 kernels compiled in 2.2 s")
