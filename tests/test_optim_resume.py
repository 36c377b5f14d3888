"""Resuming: who goes on from a checkpoint takes the steps that would have been taken, bit for bit, wherever that is done.

Run as a program, this file is the other process: it goes on from every checkpoint in the folder that it is given.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from contract_cases import CPU_SETS, backend, same
from optim_runs import KINDS, METHODS, ONE, L, counters, snapshot
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import deeprelax_cuda
from deeprelax_cuda import backends

END = 3 * L + 1  # inner steps of a whole run
POSITIONS = range(2 * L + 1)
#: The backends of the other process: the reference one, and of the C++ one the instruction set that is not the usual choice.
OTHER_BACKENDS = list(dict.fromkeys(("eager", *(f"cpu-{name}" for name in CPU_SETS[-1:]))))
SHAPES = {"weight": (5, 4), "bias": (5,), "kernel": (2, 3, 2, 2), "scale": (), "none": (0, 3)}


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@dataclass(frozen=True)
class Kind:
    """What a run is made of; parameters take the ``dtypes`` in turn and are dealt out to the ``groups``."""

    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    groups: tuple[dict[str, Any], ...] = ({},)
    scheduled: bool = False
    large: int = 0
    positions: Sequence[int] = POSITIONS
    has_gradient: Callable[[str, int], bool] = lambda name, step: True
    method: str = ONE


def with_gaps(name: str, step: int) -> bool:
    return name != "scale" and (name != "bias" or step % 3 != 1)


RUNS = {
    **{
        " ".join(map(str, kind.values())).replace("torch.", ""): Kind(
            {key: value for key, value in kind.items() if key != "dtype"}, (kind["dtype"],)
        )
        for kind in KINDS
    },
    "float16": Kind(dtypes=(torch.float16,)),
    "mixed": Kind({"master_weights": True}, (torch.float32, torch.bfloat16, torch.float64, torch.float16)),
    "reset_inner_momentum": Kind({"reset_inner_momentum": True, "coupling_in_momentum": False, "dampening": 0.25}),
    "last": Kind({"averaging": "last", "weight_decay": 0.01}),
    "groups": Kind(
        {"outer_weight_decay": 0.01},
        groups=(
            {"lr": 0.5, "gamma": 4.0, "averaging": "linear"},
            {"inner_lr": 0.05, "scoping": 0.0, "momentum": 0.0},
            {"inner_momentum": 0.5, "nesterov": False, "temperature": 0.01, "maximize": True},
        ),
    ),
    "scheduler": Kind(scheduled=True, groups=({"lr": 0.5}, {"lr": 0.25})),
    "late": Kind({"averaging": "linear"}, has_gradient=lambda name, step: name not in ("weight", "scale") or step > L),
    "gaps": Kind({"averaging": "linear"}, has_gradient=with_gaps),
    "large": Kind(large=32_768, positions=(0, L + 1)),  # two threads of the C++ backend take part in its steps
    # Of the other methods, each in a kind of its own.
    "HamiltonJacobi": Kind(method="HamiltonJacobi", has_gradient=with_gaps, scheduled=True),
    "HamiltonJacobi linear": Kind(
        {"averaging": "linear", "rounding": "stochastic"}, (torch.bfloat16,), method="HamiltonJacobi"
    ),
    "prox": Kind({"master_weights": True}, (torch.float16, torch.float64), method="HamiltonJacobi prox"),
    "HeatSGD": Kind(method="HeatSGD", groups=({"lr": 0.5}, {"temperature": 0.1, "momentum": 0.0}), has_gradient=with_gaps),
    "HeatSGD stochastic": Kind({"rounding": "stochastic"}, (torch.bfloat16,), method="HeatSGD"),
    "SGLD": Kind({"master_weights": True}, (torch.bfloat16, torch.float32), method="SGLD"),
    "SGLD free": Kind(
        {"weight_decay": 0.01}, method="SGLD free", has_gradient=lambda name, step: name != "bias" or step % 3 != 1
    ),
    "Parle": Kind(
        {"consensus": "anchors", "averaging": "linear"},
        groups=({"lr": 0.5, "rho": 4.0}, {"momentum": 0.0}),
        method="Parle",
        has_gradient=with_gaps,
        scheduled=True,
    ),
    "Parle stochastic": Kind({"rounding": "stochastic"}, (torch.bfloat16, torch.float64), method="Parle"),
    "ElasticSGD": Kind({"master_weights": True}, (torch.bfloat16, torch.float32), method="ElasticSGD"),
    "ElasticSGD gaps": Kind({"nesterov": False}, method="ElasticSGD", has_gradient=with_gaps),
}
#: Other numbers throughout: what a run goes on with has to come from the checkpoint.
OTHER_OPTIONS = {
    "lr": 0.7,
    "inner_lr": 0.02,
    "inner_steps": 7,
    "gamma": 9.0,
    "scoping": 0.5,
    "temperature": 0.3,
    "averaging": 0.1,
    "momentum": 0.3,
    "inner_momentum": 0.2,
    "rho": 5.0,
    "rho_scoping": 0.4,
    "consensus": "averages",
    "seed": 12345,
}


def build(kind: Kind, options: dict[str, Any] | None = None) -> SimpleNamespace:
    """Return the run at its start; with ``options``, which are used in place of the kind's, its weights are others too."""
    torch.manual_seed(0 if options is None else 1)
    shapes = {**SHAPES, "large": (kind.large,)} if kind.large else SHAPES
    dtypes = {name: kind.dtypes[i % len(kind.dtypes)] for i, name in enumerate(shapes)}
    model = nn.ParameterDict({name: torch.randn(shape).to(dtypes[name]) for name, shape in shapes.items()})
    model["kernel"].data = model["kernel"].data.to(memory_format=torch.channels_last)
    params = list(model.values())
    own = [{} for _ in kind.groups] if options else kind.groups
    groups = [{"params": params[i :: len(own)], **numbers} for i, numbers in enumerate(own)]
    method = METHODS[kind.method]
    optimizer = method(groups, **(kind.options if options is None else method.of(options)))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=END) if kind.scheduled else None
    return SimpleNamespace(kind=kind, model=model, optimizer=optimizer, scheduler=scheduler)


def advance(run: SimpleNamespace, steps: range) -> None:
    """Take the steps of these numbers; no library's sum or product, whose order is its own, goes into a gradient."""
    for step in steps:
        for number, (name, p) in enumerate(run.model.items()):
            y = p.detach()
            tilt = ((7 * step + 3 * number) % 5 - 2) / 8
            p.grad = (y * y * y - y).clamp(-2.0, 2.0) + tilt if run.kind.has_gradient(name, step) else None
        run.optimizer.step()
        if run.scheduler is not None:
            run.scheduler.step()


def state_of(run: SimpleNamespace) -> dict[str, Any]:
    parts = {"model": run.model, "optimizer": run.optimizer, "scheduler": run.scheduler}
    return {name: part.state_dict() for name, part in parts.items() if part is not None}


def load(run: SimpleNamespace, saved: dict[str, Any], order: tuple[str, ...] = ("model", "optimizer", "scheduler")) -> None:
    for name in order:
        if name in saved:
            getattr(run, name).load_state_dict(saved[name])


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def facts(run: SimpleNamespace) -> dict[str, Any]:
    """Copies of all that a run is: the tensors, and the numbers of the groups."""
    return {"tensors": snapshot(run.model, run.optimizer), "numbers": counters(run.optimizer)}


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got["numbers"] == want["numbers"]
    assert got["tensors"].keys() == want["tensors"].keys()
    for name, tensor in want["tensors"].items():
        assert same(got["tensors"][name], tensor), name


def whole_run(kind: Kind) -> dict[str, Any]:
    run = build(kind)
    advance(run, range(END))
    return facts(run)


def at(kind: Kind, position: int, in_eval: bool = False) -> SimpleNamespace:
    run = build(kind)
    advance(run, range(position))
    if in_eval:
        run.optimizer.eval()
    return run


# In a fresh process.


def go_on_from_all(folder: Path, threads: int) -> None:
    """Go on from every checkpoint in ``folder`` to the end of its run, and leave what came out beside them."""
    torch.set_num_threads(threads)
    report: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "hash": hash("deeprelax"),
        "runs": {},
    }
    for file in sorted(folder.glob("*.pt")):
        name, position, _ = file.stem.split("-")
        for label in OTHER_BACKENDS:
            try:
                report["runs"][f"{file.stem} {label}"] = go_on(
                    RUNS[name], torch.load(file, weights_only=True), int(position), label
                )
            except Exception:  # one failure is one test's
                report["runs"][f"{file.stem} {label}"] = traceback.format_exc()
    torch.save(report, folder / "report")


def go_on(kind: Kind, saved: dict[str, Any], position: int, label: str) -> dict[str, Any]:
    run = build(kind, OTHER_OPTIONS)
    load(run, saved)
    loaded = facts(run)
    run.optimizer.train()
    with backend(label) as os.environ["DEEPRELAX_BACKEND"]:
        advance(run, range(position, END))
        served = {line.partition(" ")[0] for line in run.optimizer.explain().splitlines()}
    return {"loaded": loaded, "end": facts(run), "served": sorted(served)}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the other process reports, with what each run was when it was saved and what it is when nobody saves it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    saved = {}
    for name, kind in RUNS.items():
        run = build(kind)
        for position in kind.positions:
            advance(run, range(run.optimizer.stats()["steps"], position))
            for mode in ("train", "eval"):
                getattr(run.optimizer, mode)()
                torch.save(state_of(run), folder / f"{name}-{position}-{mode}.pt")
                saved[f"{name}-{position}-{mode}"] = facts(run)
            run.optimizer.train()
    environment = {**os.environ, "PYTHONHASHSEED": "7", "ATEN_CPU_CAPABILITY": "default"}
    environment["PYTHONPATH"] = str(Path(deeprelax_cuda.__file__).parents[1])
    command = [sys.executable, __file__, str(folder), str(torch.get_num_threads() + 1)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = torch.load(folder / "report", weights_only=True)
    return {**report, "saved": saved, "whole": {name: whole_run(kind) for name, kind in RUNS.items()}}


def test_the_other_process_is_another(resumed: dict[str, Any]) -> None:
    assert resumed["threads"] == torch.get_num_threads() + 1
    assert resumed["hash"] != hash("deeprelax")
    assert resumed["capability"] == "DEFAULT"
    for key, result in resumed["runs"].items():
        assert not isinstance(result, dict) or result["served"] == [key.rpartition(" ")[2].partition("-")[0]]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("name", "position"), [(name, position) for name, kind in RUNS.items() for position in kind.positions])
def test_resume_in_a_fresh_process_is_bitwise(resumed: dict[str, Any], name: str, position: int, mode: str) -> None:
    key = f"{name}-{position}-{mode}"
    for label in OTHER_BACKENDS:
        result = resumed["runs"][f"{key} {label}"]
        assert isinstance(result, dict), result
        assert_same(result["loaded"], resumed["saved"][key])
        assert_same(result["end"], resumed["whole"][name])


# In the ways that users load.


@pytest.fixture(
    params=[
        "float32 linear",
        "bfloat16 stochastic",
        "mixed",
        "groups",
        "scheduler",
        "gaps",
        "HamiltonJacobi",
        "HeatSGD",
        "SGLD",
        "SGLD free",
        "Parle",
        "ElasticSGD gaps",
    ]
)
def kind(request: pytest.FixtureRequest) -> Kind:
    return RUNS[request.param]


@pytest.mark.parametrize("in_eval", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("order", [("optimizer", "model", "scheduler"), ("scheduler", "optimizer", "model")], ids=" ".join)
def test_model_and_optimizer_load_in_any_order(kind: Kind, order: tuple[str, ...], in_eval: bool) -> None:
    saved = through_a_file(state_of(at(kind, L + 1, in_eval)))
    run = build(kind, OTHER_OPTIONS)
    load(run, saved, order)
    run.optimizer.train()
    advance(run, range(L + 1, END))
    assert_same(facts(run), whole_run(kind))


@pytest.mark.parametrize("in_eval", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("before", ["loaded", "loaded and gone on", "other run", "other run in eval mode"])
def test_loading_replaces_whatever_was_there(kind: Kind, before: str, in_eval: bool) -> None:
    """Also the plans and the live weights of the run that it was."""
    saved = through_a_file(state_of(at(kind, L + 1, in_eval)))
    run = build(kind, OTHER_OPTIONS)
    if "loaded" in before:
        load(run, saved)
    if before != "loaded":
        run.optimizer.train()
        advance(run, range(100, 100 + L + 1))
    if "eval" in before:
        run.optimizer.eval()
    load(run, saved)
    assert_same(facts(run), facts(at(kind, L + 1, in_eval)))
    run.optimizer.train()
    advance(run, range(L + 1, END))
    assert_same(facts(run), whole_run(kind))


def test_resume_of_a_resume(kind: Kind) -> None:
    """A new process after every step, by turns in train and in eval mode."""
    run = build(kind)
    for step in range(END):
        if step % 2:
            run.optimizer.eval()
        saved, run = through_a_file(state_of(run)), build(kind, OTHER_OPTIONS)
        load(run, saved)
        run.optimizer.train()
        advance(run, range(step, step + 1))
    assert_same(facts(run), whole_run(kind))


@pytest.mark.skipif(len(backends.available("cpu")) < 2, reason="there is one backend only")
@pytest.mark.parametrize("saving", ["cpu", "eager"])
def test_checkpoint_goes_on_under_another_backend(kind: Kind, saving: str) -> None:
    """The option ``backend`` is loaded like every other; who wants another one sets it then."""
    run = build(kind)
    for group in run.optimizer.param_groups:
        group["backend"] = saving
    advance(run, range(L + 1))
    other = build(kind, {**OTHER_OPTIONS, "backend": "eager" if saving == "cpu" else "cpu"})
    load(other, through_a_file(state_of(run)))
    assert {group["backend"] for group in other.optimizer.param_groups} == {saving}
    assert other.optimizer.explain().startswith(saving)
    for group in other.optimizer.param_groups:
        group["backend"] = "eager" if saving == "cpu" else "cpu"
    advance(run, range(L + 1, END))
    advance(other, range(L + 1, END))
    for group in other.optimizer.param_groups:
        group["backend"] = saving
    assert_same(facts(other), facts(run))


def test_loading_leaves_the_constructor_its_defaults() -> None:
    """What a group that is added later does not say is the new constructor's, but for what all groups share."""
    run = build(RUNS["float32"], OTHER_OPTIONS)
    load(run, state_of(at(RUNS["float32"], L + 1)))
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    first, added = counters(run.optimizer)
    assert (first["lr"], added["lr"], added["momentum"]) == (0.1, 0.7, 0.3)
    for name in ("seed", "inner_steps", "step", "position", "outer_steps"):
        assert added[name] == first[name] != 0
    assert (first["seed"], first["inner_steps"], first["step"]) == (11, L, L + 1)


# With hooks that move the state.


def in_one_buffer(tensors: list[Tensor]) -> list[Tensor]:
    """Copies side by side in one allocation, in the order of their elements."""
    buffer = torch.cat([t.reshape(-1) for t in tensors])
    return [piece.view(t.shape) for piece, t in zip(buffer.split([t.numel() for t in tensors]), tensors, strict=True)]


def moved(state: dict[Any, dict[str, Any]], move: Callable[[list[Tensor]], list[Tensor]]) -> dict[Any, dict[str, Any]]:
    """The state of an optimizer, each parameter's tensors being moved by ``move``."""
    result = {}
    for key, values in state.items():
        tensors = {role: value for role, value in values.items() if isinstance(value, Tensor) and role != "live"}
        result[key] = {**values, **dict(zip(tensors, move(list(tensors.values())), strict=True))} if tensors else values
    return result


def laid_out_backwards(tensors: list[Tensor]) -> list[Tensor]:
    backwards = [tuple(range(t.ndim))[::-1] for t in tensors]
    return [t.permute(dims).contiguous().permute(dims) for t, dims in zip(tensors, backwards, strict=True)]


def widened(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


@pytest.mark.parametrize("in_eval", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("move", [in_one_buffer, laid_out_backwards, widened])
@pytest.mark.parametrize("hook", ["state_dict_post", "load_state_dict_pre"])
def test_state_moved_on_its_way_is_the_same_state(kind: Kind, hook: str, move: Callable[..., Any], in_eval: bool) -> None:
    def move_dict(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "state": moved(state_dict["state"], move)}

    source, run = at(kind, L + 1, in_eval), build(kind, OTHER_OPTIONS)
    if hook == "state_dict_post":
        source.optimizer.register_state_dict_post_hook(move_dict)
    else:
        run.optimizer.register_load_state_dict_pre_hook(move_dict)
    load(run, through_a_file(state_of(source)))
    assert_same(facts(run), facts(source))
    for p, values in run.optimizer.state.items():
        assert {value.stride() for value in values.values() if isinstance(value, Tensor)} <= {p.stride()}
    run.optimizer.train()
    advance(run, range(L + 1, END))
    assert_same(facts(run), whole_run(kind))


@pytest.mark.parametrize("move", [in_one_buffer, laid_out_backwards])
def test_state_moved_after_loading_is_what_the_run_goes_on_with(kind: Kind, move: Callable[..., Any]) -> None:
    """The optimizer has had plans for other tensors at the time."""
    run = build(kind, OTHER_OPTIONS)
    advance(run, range(2))
    seen: list[torch.dtype] = []

    def move_state(optimizer: torch.optim.Optimizer) -> None:
        for p, values in moved(optimizer.state, move).items():
            optimizer.state[p] = values
            seen.extend(value.dtype for value in values.values() if isinstance(value, Tensor))

    run.optimizer.register_load_state_dict_post_hook(move_state)
    load(run, state_of(at(kind, L + 1)))
    assert set(seen) <= {torch.float32, torch.float64}, "a user's hook sees the state as it was saved"
    advance(run, range(L + 1, END))
    assert_same(facts(run), whole_run(kind))


# Through torch.distributed.checkpoint, which allocates the state by a phantom step and reads what it finds there.


@pytest.fixture
def quiet() -> Iterator[None]:
    """It says that it was meant for several processes, and how it will be called in other versions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(torch.distributed|TypedStorage|deprecat)")
        yield


def dcp_state(run: SimpleNamespace, options: StateDictOptions) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(run.model, options=options),
        "optimizer": get_optimizer_state_dict(run.model, run.optimizer, options=options),
    }


def dcp_restore(run: SimpleNamespace, folder: Path, options: StateDictOptions) -> None:
    saved = dcp_state(run, options)
    dcp.load(saved, checkpoint_id=folder)
    set_model_state_dict(run.model, saved["model"], options=options)
    set_optimizer_state_dict(run.model, run.optimizer, saved["optimizer"], options=options)


def options_of(kind: Kind) -> dict[str, Any]:
    """Other numbers, but the same tensors in the state: they are what this kind of checkpoint looks for."""
    decisive = (
        "averaging",
        "momentum",
        "inner_momentum",
        "master_weights",
        "rounding",
        *(["gamma"] * (kind.method == "SGLD free")),
    )
    options = {**METHODS[kind.method].settings, **kind.options}
    return {**OTHER_OPTIONS, **{name: options[name] for name in decisive if name in options}}


DCP_RUNS = ("float32", "float32 linear", "bfloat16 stochastic", "bfloat16 True", "float64 3.0 0.5", "mixed")
#: The new optimizer's state comes from a phantom step, with what a method counts at its beginning.
DCP_OTHERS = ("HamiltonJacobi linear", "prox", "HeatSGD stochastic", "SGLD", "SGLD free", "Parle stochastic", "ElasticSGD")


@pytest.fixture(params=[False, True], ids=["nested", "flat"])
def dcp_options(request: pytest.FixtureRequest) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=request.param)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("name", "position"),
    [
        *((name, position) for name in DCP_RUNS for position in POSITIONS),
        *((name, at) for name in DCP_OTHERS for at in (1, L, L + 2)),
    ],
)
def test_distributed_checkpoint_resumes(name: str, position: int, dcp_options: StateDictOptions, tmp_path: Path) -> None:
    kind = RUNS[name]
    source, run = at(kind, position), build(kind, options_of(kind))
    dcp.save(dcp_state(source, dcp_options), checkpoint_id=tmp_path)
    dcp_restore(run, tmp_path, dcp_options)
    assert_same(facts(run), facts(source))
    run.optimizer.zero_grad()
    dcp_state(run, dcp_options)  # asked for at once, without a gradient
    assert_same(facts(run), facts(source))
    advance(run, range(position, END))
    assert_same(facts(run), whole_run(kind))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("position", [1, L, L + 1])
@pytest.mark.parametrize("name", [*DCP_RUNS, "prox", "HeatSGD stochastic", "SGLD", "Parle stochastic", "ElasticSGD"])
def test_distributed_checkpoint_resumes_in_eval_mode_where_there_are_live_weights(
    name: str, position: int, dcp_options: StateDictOptions, tmp_path: Path
) -> None:
    kind = RUNS[name]
    source, run = at(kind, position, in_eval=True), build(kind, options_of(kind))
    dcp.save(dcp_state(source, dcp_options), checkpoint_id=tmp_path)
    dcp_state(run, dcp_options)  # allocates the state
    run.optimizer.eval()
    dcp_restore(run, tmp_path, dcp_options)
    assert_same(facts(run), facts(source))
    run.optimizer.train()
    advance(run, range(position, END))
    assert_same(facts(run), whole_run(kind))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", ["float32", "bfloat16 stochastic", "mixed"])
def test_distributed_checkpoint_resumes_in_eval_mode(name: str, dcp_options: StateDictOptions, tmp_path: Path) -> None:
    """To be in the mode in which the run was saved is all that is asked of the new optimizer."""
    kind = RUNS[name]
    for position in POSITIONS:
        source, run = at(kind, position, in_eval=True), build(kind, options_of(kind))
        dcp.save(dcp_state(source, dcp_options), checkpoint_id=tmp_path / str(position))
        run.optimizer.eval()
        dcp_restore(run, tmp_path / str(position), dcp_options)
        assert_same(facts(run), facts(source))
        run.optimizer.train()
        advance(run, range(position, END))
        assert_same(facts(run), whole_run(kind))


@pytest.mark.usefixtures("quiet")
def test_asking_for_the_state_leaves_eval_mode_alone(dcp_options: StateDictOptions, recwarn: pytest.WarningsRecorder) -> None:
    run = build(RUNS["float32"])
    run.optimizer.eval()
    get_optimizer_state_dict(run.model, run.optimizer, options=dcp_options)
    assert run.optimizer.param_groups[0]["train_mode"] is False
    assert not [warning for warning in recwarn if "eval mode" in str(warning.message)]


@pytest.mark.usefixtures("quiet")
def test_distributed_checkpoint_without_live_weights_is_refused(dcp_options: StateDictOptions, tmp_path: Path) -> None:
    """Saved in eval mode, read by an optimizer in train mode: that the live weights are missing is said, and nothing loaded."""
    kind = RUNS["float32"]
    source, run = at(kind, L + 1, in_eval=True), build(kind, OTHER_OPTIONS)
    dcp.save(dcp_state(source, dcp_options), checkpoint_id=tmp_path)
    dcp_state(run, dcp_options)
    before = counters(run.optimizer)
    with pytest.raises(ValueError, match=r'^state_dict, params\[0\]: expected "live" in its state.*call eval\(\)'):
        dcp_restore(run, tmp_path, dcp_options)
    assert counters(run.optimizer) == before


@pytest.mark.usefixtures("quiet")
def test_weights_loaded_after_the_state_was_allocated_are_the_ones_to_start_from(dcp_options: StateDictOptions) -> None:
    """Say a pretrained model, loaded by the same tools without a checkpoint of the optimizer."""
    run, other = build(RUNS["float32"]), build(RUNS["float32"])
    get_optimizer_state_dict(run.model, run.optimizer, options=dcp_options)
    for model in (run.model, other.model):
        for p in model.parameters():
            p.data.add_(5.0)
    for each in (run, other):
        advance(each, range(END))
    assert_same(facts(run), facts(other))


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("saved", "role"),
    [({"master_weights": True}, "master"), ({"averaging": "linear"}, "period_steps"), ({"momentum": 0.5}, "outer_momentum")],
    ids=["masters", "linear", "momentum"],
)
def test_state_that_a_template_of_other_options_lost_is_missed(
    saved: dict[str, Any], role: str, dcp_options: StateDictOptions, tmp_path: Path
) -> None:
    """DCP reads the keys of the new optimizer's state and no others."""
    kind = RUNS["bfloat16 True"]
    base = {**kind.options, "master_weights": False, "averaging": 0.75, "momentum": 0.0}
    source, run = build(kind, {**base, **saved}), build(kind, base)
    advance(source, range(2))
    dcp.save(dcp_state(source, dcp_options), checkpoint_id=tmp_path)
    with pytest.warns(UserWarning, match=rf"^state_dict, params\[0\]: no {role} in its state"):
        dcp_restore(run, tmp_path, dcp_options)


def test_counted_steps_without_any_state_are_refused() -> None:
    source, run = at(RUNS["float32"], 2), build(RUNS["float32"])
    state = source.optimizer.state_dict()
    before = counters(run.optimizer)
    with pytest.raises(ValueError, match=r"^state_dict: expected the state of its parameters after 2 steps, got none"):
        run.optimizer.load_state_dict({**state, "state": {}})
    assert counters(run.optimizer) == before


if __name__ == "__main__":
    go_on_from_all(Path(sys.argv[1]), int(sys.argv[2]))
