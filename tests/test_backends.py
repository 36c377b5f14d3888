"""The registry: which backends there are, which one serves, and that a fallback is loud."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from deeprelax_cuda import backends
from deeprelax_cuda.backends import cpu, eager
from deeprelax_cuda.functional import gaussian, langevin_step_
from deeprelax_cuda.noise import Place
from deeprelax_cuda.steps import STORED, Scalars, Tensors

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No choice in the environment, nothing said yet, and a native module that counts as built."""
    monkeypatch.delenv("DEEPRELAX_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setattr(cpu, "unavailable", lambda device, dtype: None)


@pytest.fixture
def unbuilt(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda device, dtype: "the native module was not built (no compiler)")


def test_every_backend_is_whole():
    for name in backends.NAMES:
        module = backends.load(name)
        assert name == module.NAME
        assert callable(module.make_plan)
        assert callable(module.gaussian)
        assert callable(module.unavailable)


def test_importing_the_package_loads_no_backend_and_touches_no_device():
    code = (
        "import sys, torch, deeprelax_cuda.functional\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(sorted(m for m in sys.modules if m.startswith('deeprelax_cuda.backends.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_available_names_who_can_serve_the_preferred_one_first():
    assert backends.available("cpu") == ["cpu", "eager"]
    assert backends.available(CPU) == ["cpu", "eager"]


def test_available_leaves_out_who_cannot_serve(unbuilt):
    assert backends.available("cpu") == ["eager"]


def test_auto_takes_the_preferred_backend_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in STORED:
            chosen = backends.select("cpu", dtype)
            assert chosen.name == "cpu"
            assert "preferred" in chosen.reason


def test_an_argument_is_honoured_and_goes_before_the_environment(monkeypatch):
    assert backends.select("cpu", torch.float32, "eager") == ("eager", 'asked for by backend="eager"')
    monkeypatch.setenv("DEEPRELAX_BACKEND", "eager")
    assert backends.select("cpu", torch.float32, "cpu").name == "cpu"


@pytest.mark.parametrize("value", ["", "auto"])
def test_an_environment_without_a_choice(monkeypatch, value):
    monkeypatch.setenv("DEEPRELAX_BACKEND", value)
    assert backends.select("cpu", torch.float32).name == "cpu"


def test_the_environment_is_honoured(monkeypatch):
    monkeypatch.setenv("DEEPRELAX_BACKEND", "eager")
    assert backends.select("cpu", torch.float32) == ("eager", "asked for by DEEPRELAX_BACKEND=eager")


def test_an_unknown_name_is_refused_with_the_names_there_are(monkeypatch):
    with pytest.raises(ValueError, match='backend="gpu": expected one of auto, cpu, eager'):
        backends.select("cpu", torch.float32, "gpu")
    monkeypatch.setenv("DEEPRELAX_BACKEND", "gpu")
    with pytest.raises(ValueError, match="DEEPRELAX_BACKEND=gpu: expected one of auto, cpu, eager"):
        backends.select("cpu", torch.float32)


def test_a_choice_that_cannot_serve_raises_with_the_reason(unbuilt, monkeypatch):
    with pytest.raises(
        RuntimeError, match=r'backend="cpu" cannot serve torch\.float32 on cpu: the native module was not built'
    ):
        backends.select("cpu", torch.float32, "cpu")
    monkeypatch.setenv("DEEPRELAX_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match=r"DEEPRELAX_BACKEND=cpu cannot serve .* the native module was not built"):
        backends.select("cpu", torch.float32)


def test_a_fallback_is_said_once_a_reason_and_stays_visible(unbuilt, monkeypatch):
    with pytest.warns(RuntimeWarning, match="backend eager serves torch.float32 on cpu, because cpu cannot: the native module"):
        first = backends.select("cpu", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = backends.select("cpu", torch.float32)
    assert first == again == ("eager", "cpu cannot: the native module was not built (no compiler)")
    monkeypatch.setattr(cpu, "unavailable", lambda device, dtype: "another reason")
    with pytest.warns(RuntimeWarning, match="another reason"):
        backends.select("cpu", torch.float32)


def test_a_fallback_is_loud_in_a_call(unbuilt):
    with pytest.warns(RuntimeWarning, match="eager serves"):
        z = gaussian(5, seed=1, step=2)
    assert torch.equal(z, gaussian(5, seed=1, step=2, backend="eager"))


def test_a_fallback_is_said_at_the_line_of_the_caller(unbuilt, monkeypatch):
    for call in (
        lambda: backends.select("cpu", torch.float32),
        lambda: gaussian(5, seed=1, step=2),
        lambda: langevin_step_([torch.ones(2)], [torch.ones(2)], None, None, lr=1, stiffness=0, noise_std=0, averaging=0),
    ):
        monkeypatch.setattr(backends, "_said", set())
        with pytest.warns(RuntimeWarning, match="eager serves") as said:
            call()
        assert [(w.filename, w.lineno) for w in said] == [(__file__, call.__code__.co_firstlineno)]


def test_no_backend_at_all_raises_with_every_reason(unbuilt, monkeypatch):
    monkeypatch.setattr(eager, "unavailable", lambda device, dtype: "out of patience")
    with pytest.raises(RuntimeError, match=r"cpu cannot: the native module .*; eager cannot: out of patience"):
        backends.select("cpu", torch.float32)


@pytest.mark.filterwarnings("ignore:deeprelax_cuda. backend eager serves")
@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_other_devices_have_an_order_too(device):
    assert backends.select(device, torch.float32).name == "eager"


def test_make_plan_makes_the_plan_of_the_backend_named():
    y, x = torch.ones(3), torch.zeros(3)
    tensors = Tensors([y], [x], [torch.zeros(3)], numbers=[0], places=[Place(0, 3, 3)])
    plan = backends.make_plan("eager", tensors)
    assert type(plan) is eager.EagerPlan
    plan.run([torch.ones(3)], Scalars(eta=0.5))
    assert torch.equal(y, torch.full((3,), 0.5))
