"""torch's own cases for its optimizers, restated for ours: a method joins all of them by one entry in `INFOS`.

torch keeps them in test/test_optim.py of its repository, not in the wheel; the wheel has the types that describe an optimizer
to them (`OptimizerInfo` and its inputs), which are used here. Where torch compares within a tolerance, bits are compared here.

Left out of torch's cases:

* several GPUs, moving between CPU and CUDA, mixed devices, peak memory, "the default is foreach": they need a GPU,
* tensors of 2^32 elements: 72 GB,
* complex parameters and sparse gradients: both are refused, and that is what is tested,
* differentiable steps: refused,
* capturable steps: test_capturable, and tests/gpu where there is a graph to capture,
* ``optimizer.grad_scale`` and ``found_inf``: they belong to fused AMP, which this version does not offer; see the GradScaler
  in test_training_loops,
* a number where a tensor "step" is expected: the counters belong to the param group,
* what is there for LBFGS alone, and the compiled optimizers,
* schedulers and `AveragedModel`: test_training_loops.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from lone_replicas import LoneElasticSGD, LoneParle
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LinearLR, PolynomialLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from deeprelax_cuda.optim import SGLD, EntropySGD, HamiltonJacobi, HeatSGD
from deeprelax_cuda.optim.base import RelaxationOptimizer
from deeprelax_cuda.steps import compute_type

# torch's test modules forbid the whole process to set flags such as torch.backends.cudnn.benchmark: other tests may want to.
torch.backends.__allow_nonbracketed_mutation_flag = True  # type: ignore[attr-defined]

pytestmark = pytest.mark.filterwarnings("ignore:rho=.*make their steps diverge")  # of runs that end long before

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


# The methods.


# The first input of each is the plain one: what the constructor needs, and a state that holds something.


def in_short_periods(options: dict[str, dict[str, Any]]) -> list[OptimizerInput]:
    return [OptimizerInput(None, {"inner_steps": 3, **kwargs}, desc) for desc, kwargs in options.items()]


def entropy_sgd_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    options: dict[str, dict[str, Any]] = {
        "non-default lr": {"lr": 0.5},
        "tensor lr": {"lr": torch.tensor(0.25)},
        "inner_lr": {"inner_lr": 0.03},
        "no momenta": {"momentum": 0.0, "inner_momentum": 0.0},
        "momentum": {"momentum": 0.5, "inner_momentum": 0.3, "nesterov": False},
        "dampening": {"dampening": 0.2},
        "nothing inside": {"inner_momentum": 0.0, "weight_decay": 0.1},
        "weight_decay": {"weight_decay": 0.1},
        "outer_weight_decay": {"outer_weight_decay": 0.1},
        "maximize": {"maximize": True},
        "maximize, weight_decay": {"maximize": True, "weight_decay": 0.1},
        "scoping": {"gamma": 2.0, "scoping": 0.1, "gamma_min": 0.5},
        "gamma_total": {"gamma_total": 3.0, "gamma_min": 0.5},
        "no coupling": {"gamma": torch.inf},
        "cold": {"temperature": 0.0},
        "warm": {"temperature": 1e-4, "gamma": 5.0},
        "averaging 0": {"averaging": 0.0},
        "averaging linear": {"averaging": "linear"},
        "averaging last": {"averaging": "last"},
        "public Entropy-SGD": {"coupling_in_momentum": False, "reset_inner_momentum": True, "gamma": 10.0},
        "master_weights": {"master_weights": True},
    }
    if dtype != F16:  # refused there
        options["stochastic rounding"] = {"rounding": "stochastic", "temperature": 0.0}
    return [OptimizerInput(None, {}, "default"), *in_short_periods(options)]


def hamilton_jacobi_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    options: dict[str, dict[str, Any]] = {
        "linear, tensor lr": {"averaging": "linear", "lr": torch.tensor(0.25)},
        "last, decays": {"averaging": "last", "weight_decay": 0.1, "outer_weight_decay": 0.1, "nesterov": False},
        "maximize, scoping": {"maximize": True, "momentum": 0.0, "scoping": 0.1, "gamma_min": 0.05, "master_weights": True},
        "prox": {"inner": "prox", "inner_momentum": 0.5, "gamma": 2.0},
    }
    if dtype != F16:
        options["stochastic rounding"] = {"rounding": "stochastic"}
    return [OptimizerInput(None, {}, "default"), *in_short_periods(options)]


def heat_sgd_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    options: dict[str, dict[str, Any]] = {
        "warm, decays": {"gamma": 2.0, "temperature": 1e-3, "weight_decay": 0.1, "outer_weight_decay": 0.1, "momentum": 0.0},
        "cold, maximize": {"temperature": 0.0, "maximize": True, "master_weights": True, "inner_steps": 2},
    }
    if dtype != F16:
        options["stochastic rounding"] = {"rounding": "stochastic", "scoping": 0.1}
    # With a momentum of 0.9, the default, the anchor swings for longer than runs take here.
    return [OptimizerInput(None, {"momentum": 0.5}, "default"), *in_short_periods(options)]


def sgld_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    options: dict[str, dict[str, Any]] = {
        "about an anchor": {"lr": 0.1, "temperature": 1e-6, "gamma": 2.0},
        "free": {"lr": 0.1, "temperature": 1e-6},
        "maximize": {"lr": torch.tensor(0.1), "temperature": 1e-6, "maximize": True, "gamma": 5.0, "master_weights": True},
    }
    if dtype != F16:
        options["stochastic rounding"] = {"lr": 0.1, "temperature": 0.0, "rounding": "stochastic", "weight_decay": 0.1}
    return [OptimizerInput(None, kwargs, desc) for desc, kwargs in options.items()]


def parle_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    options: dict[str, dict[str, Any]] = {
        "anchors, tensor lr": {"consensus": "anchors", "lr": torch.tensor(0.25), "rho": 2.0, "gamma": 5.0},
        "rho_scoping, decays": {"rho": 3.0, "rho_scoping": 0.1, "weight_decay": 0.1, "outer_weight_decay": 0.1},
        "warm, linear": {"temperature": 1e-4, "averaging": "linear", "nesterov": False, "reset_inner_momentum": True},
        "maximize, no coupling": {"rho": torch.inf, "maximize": True, "momentum": 0.0, "master_weights": True},
    }
    if dtype != F16:
        options["stochastic rounding"] = {"rounding": "stochastic", "consensus": "anchors"}
    # Within the 25 steps of a period, the default, the answer stays where it is.
    return [OptimizerInput(None, {"inner_steps": 5}, "default"), *in_short_periods(options)]


def elastic_sgd_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "no momentum, tensor lr": {"lr": torch.tensor(0.25), "momentum": 0.0, "weight_decay": 0.1},
        "warm, scoping": {"temperature": 1e-6, "rho": 3.0, "rho_scoping": 0.1, "nesterov": False, "dampening": 0.2},
        "maximize": {"maximize": True, "rho": torch.inf, "coupling_in_momentum": False, "master_weights": True},
    }
    if dtype != F16:
        options["stochastic rounding"] = {"rounding": "stochastic"}
    return [OptimizerInput(None, kwargs, desc) for desc, kwargs in options.items()]


def with_grad(p: Tensor, grad: Tensor) -> nn.Parameter:
    p = nn.Parameter(p)
    p.grad = grad
    return p


def refused(desc: str, message: str, error: type = ValueError, params: Any = None, **options: Any) -> ErrorOptimizerInput:
    params = [nn.Parameter(torch.ones(2))] if params is None else params
    return ErrorOptimizerInput(OptimizerInput(params, options, desc), error_type=error, error_regex=message)


def refused_group(desc: str, message: str, **options: Any) -> ErrorOptimizerInput:
    groups = [{"params": [nn.Parameter(torch.ones(2))], **options}]
    return ErrorOptimizerInput(OptimizerInput(groups, {}, desc), error_type=ValueError, error_regex=message)


def refused_step(desc: str, params: list[nn.Parameter], message: str, error: type = ValueError, **options: Any) -> Any:
    wrong, on_step = OptimizerInput(params, options, desc), OptimizerErrorEnum.STEP_ERROR
    return ErrorOptimizerInput(wrong, error_on=on_step, error_type=error, error_regex=message)


def common_errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """What every method refuses."""
    good, flat = with_grad(torch.ones(2), torch.ones(2)), torch.ones(8)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (2,), check_invariants=True)
    return [
        *(e for e in get_error_inputs_for_all_optims(device, dtype) if "1-element" not in e.error_regex),
        refused("lr of two elements", "^lr: expected a number", lr=torch.tensor([0.001, 0.001])),
        refused("negative lr", "^lr: expected a number", lr=-1e-2),
        refused("negative decay", "^weight_decay: expected a number", weight_decay=-0.5),
        refused("gamma of 0", "^gamma: expected a number", gamma=0.0),
        refused("foreach and fused", "^foreach, fused: expected at most one", foreach=True, fused=True),
        refused("differentiable", "^differentiable: expected False", differentiable=True),
        refused("capturable", "^capturable: ", capturable="yes"),
        refused("unknown option", "nosuch", TypeError, nosuch=1),
        refused_step(
            "complex",
            [good, with_grad(torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64))],
            r"^params\[1\] .*expected a real floating dtype",
            TypeError,
        ),
        refused_step("sparse", [good, with_grad(torch.ones(2), sparse)], r"^grads\[1\] .*strided"),
        refused_step("gappy", [good, with_grad(torch.ones(4)[::2], torch.ones(2))], r"^params\[1\] .*expected a dense"),
        refused_step("expanded", [good, with_grad(torch.ones(1).expand(2), torch.ones(2))], r"^params\[1\] .*a dense"),
        refused_step(
            "shared memory",
            [with_grad(flat[:5], torch.ones(5)), with_grad(flat[4:], torch.ones(4))],
            r"^params\[1\] .*shares memory with params\[0\]",
        ),
        refused_step(
            "stochastic float16",
            [good, with_grad(torch.ones(2, dtype=F16), torch.ones(2, dtype=F16))],
            "^rounding: ",
            rounding="stochastic",
        ),
    ]


def loop_errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """What every method with periods and an outer step refuses."""
    return [
        *common_errors(device, dtype),
        refused("negative momentum", "^momentum: expected a number", momentum=-0.5),
        refused("negative outer decay", "^outer_weight_decay: expected a number", outer_weight_decay=-0.5),
        refused("no steps", "^inner_steps: expected an int", inner_steps=0),
    ]


def entropy_sgd_errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    return [
        *loop_errors(device, dtype),
        refused("momentum of 1", "^inner_momentum: expected a number", inner_momentum=1.0),
        refused("unknown averaging", '^averaging: expected one of .*"mean"|^averaging: expected one of', averaging="mean"),
    ]


def hamilton_jacobi_errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    return [
        *loop_errors(device, dtype),
        refused("gamma of inf", r"^gamma: expected a number in \(0, inf\)", gamma=torch.inf),
        refused("gamma_total", "gamma_total", TypeError, gamma_total=3.0),
        refused_group("gamma_total of a group", "^gamma_total: HamiltonJacobi has no such option", gamma_total=3.0),
        refused("unknown loop", "^inner: expected one of", inner="newton"),
        refused("unknown averaging", "^averaging: expected one of", averaging="mean"),
        refused("averaging of 1", "^averaging: expected a number", averaging=1.0),
        refused("averaging of prox", '^averaging: inner="prox" averages nothing', inner="prox", averaging=0.75),
        refused("momentum of 1", "^inner_momentum: expected a number", inner="prox", inner_momentum=1.0),
        refused("nothing to check", "^check_contraction: expected False", inner="prox", check_contraction=True),
        refused("too short to check", "^check_contraction: expected False", inner_steps=2, check_contraction=True),
    ]


def heat_sgd_errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    return [
        *loop_errors(device, dtype),
        refused("gamma of inf", r"^gamma: expected a number in \(0, inf\)", gamma=torch.inf),
        refused("negative temperature", "^temperature: expected a number", temperature=-1e-4),
        refused("a period of one", "^inner_steps: expected at least 2", inner_steps=1),
        refused_group("gamma_total of a group", "^gamma_total: HeatSGD has no such option", gamma_total=3.0),
    ]


def sgld_errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    absent = {"inner_steps": 3, "scoping": 0.1, "momentum": 0.9, "nesterov": True, "closure_mode": "inner_loop"}
    return [
        *common_errors(device, dtype),
        refused("negative temperature", "^temperature: expected a number", temperature=-1e-4),
        *(refused(name, name, TypeError, **{name: value}) for name, value in absent.items()),
        *(refused_group(f"{k} of a group", f"^{k}: SGLD has no such option", **{k: v}) for k, v in absent.items()),
    ]


def replica_errors(errors: list[ErrorOptimizerInput]) -> list[ErrorOptimizerInput]:
    """What they refuse, where torch says that one tensor is no list of parameters in words of its own."""
    return [
        *(e for e in errors if "params argument given" not in e.error_regex),
        refused("capturable", "^capturable: expected False, as the host", capturable=True),
        refused("rho of 0", "^rho: expected a number", rho=0.0),
        refused("negative rho_min", "^rho_min: expected a number", rho_min=-0.1),
        refused("negative rho_scoping", "^rho_scoping: expected a number", rho_scoping=-0.1),
        refused("negative temperature", "^temperature: expected a number", temperature=-1e-4),
        refused(
            "one tensor",
            r"^replicas\[0\]: expected the parameters of a replica, got one tensor",
            TypeError,
            params=torch.ones(2),
        ),
    ]


def parle_errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    return [
        *replica_errors(loop_errors(device, dtype)),
        refused("momentum of 1", "^inner_momentum: expected a number", inner_momentum=1.0),
        refused("unknown averaging", "^averaging: expected one of", averaging="mean"),
        refused("unknown consensus", "^consensus: expected one of", consensus="median"),
    ]


def elastic_sgd_errors(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    absent = {"inner_steps": 3, "gamma": 2.0, "scoping": 0.1, "outer_weight_decay": 0.1, "closure_mode": "inner_loop"}
    common = [e for e in common_errors(device, dtype) if "^gamma" not in e.error_regex]
    return [
        *replica_errors(common),
        refused("momentum of 1", "^momentum: expected a number", momentum=1.0),
        refused("dampening of 2", "^dampening: expected a number", dampening=2.0),
        *(refused(name, name, TypeError, **{name: value}) for name, value in absent.items()),
        *(refused_group(f"{k} of a group", f"^{k}: ElasticSGD has no such option", **{k: v}) for k, v in absent.items()),
    ]


SCHEDULES: list[list[Callable[[Any], Any]]] = [
    [lambda o: StepLR(o, gamma=0.9, step_size=10)],
    [lambda o: LinearLR(o, start_factor=0.4, total_iters=4)],
    [lambda o: StepLR(o, gamma=0.9, step_size=10), lambda o: LinearLR(o, start_factor=0.4, total_iters=4)],
    [lambda o: ConstantLR(o, factor=0.4, total_iters=4), lambda o: ExponentialLR(o, gamma=0.9)],
    [lambda o: StepLR(o, gamma=0.9, step_size=10), ReduceLROnPlateau],
    [lambda o: PolynomialLR(o, power=0.9, total_iters=40)],
]

#: What a state of any age has.
EVER = {"lr", "gamma", "inner_lr", "seed", "rho", "replicas"}


def info_of(method: Any, inputs: Callable[..., list[OptimizerInput]], errors: Callable[..., Any]) -> OptimizerInfo:
    plain = inputs("cpu")[0].kwargs
    return OptimizerInfo(
        method,
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        scheduler_inputs=tuple(SCHEDULES),
        supported_impls=("foreach", "fused"),
        supports_fused_on=("cpu",),
        # All options: the state of an older version may lack any of them.
        not_og_supported_flags=tuple(method([torch.ones(1)], **{"seed": 0, **plain}).defaults.keys() - EVER),
        supports_complex=False,
    )


INFOS = [
    info_of(EntropySGD, entropy_sgd_inputs, entropy_sgd_errors),
    info_of(HamiltonJacobi, hamilton_jacobi_inputs, hamilton_jacobi_errors),
    info_of(HeatSGD, heat_sgd_inputs, heat_sgd_errors),
    info_of(SGLD, sgld_inputs, sgld_errors),
    info_of(LoneParle, parle_inputs, parle_errors),
    info_of(LoneElasticSGD, elastic_sgd_inputs, elastic_sgd_errors),
]


# The cases of a method, and the small runs that they share.


class Case(NamedTuple):
    """A method and its options; a call constructs, with options that are nobody else's."""

    info: OptimizerInfo
    options: dict[str, Any]

    def __call__(self, params: Any, **changes: Any) -> RelaxationOptimizer:
        optimizer: RelaxationOptimizer = self.info.optim_cls(params, **copy.deepcopy({**self.options, **changes}))
        return optimizer

    def climbs(self) -> bool:
        return bool(self.options.get("maximize", False))

    def known(self, **options: Any) -> dict[str, Any]:
        """Return those of the options that the method has."""
        return {name: value for name, value in options.items() if name in inspect.signature(self.info.optim_cls).parameters}


#: Who takes the step: the default, the eager backend, or what is fused. Nobody but the tests sets these flags.
FLAGS: tuple[dict[str, Any], ...] = ({}, {"foreach": True}, {"fused": True})


def inputs_of(info: OptimizerInfo, dtype: torch.dtype = F32) -> list[OptimizerInput]:
    return list(info.optim_inputs_func(device="cpu", dtype=dtype))


def plain(info: OptimizerInfo) -> Case:
    return Case(info, inputs_of(info)[0].kwargs)


def cases(flags: tuple[dict[str, Any], ...] = ({},)) -> list[Any]:
    """Return every method with each of its inputs and each of the flags, as parameters of a test.

    Of a replica alone the first input is quick: it takes the steps of Entropy-SGD, with which all are.
    """
    return [
        pytest.param(
            Case(info, {**one.kwargs, **flag}),
            id=" ".join((info.name, one.desc, *flag)),
            marks=[pytest.mark.slow] if i and info.optim_cls in (LoneParle, LoneElasticSGD) else [],
        )
        for info in INFOS
        for i, one in enumerate(inputs_of(info))
        for flag in flags
    ]


over_cases = pytest.mark.parametrize("case", cases())
over_implementations = pytest.mark.parametrize("case", cases(FLAGS))
over_methods = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Problem:
    """A weight, a bias and their loss, of curvature 2 at most."""

    def __init__(self, dtype: torch.dtype = F32, make: Callable[..., Tensor] = torch.randn) -> None:
        self.weight, self.bias = nn.Parameter(make(10, 5).to(dtype)), nn.Parameter(make(10).to(dtype))
        self.input = torch.randn(5).to(dtype)

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def named(self, names: bool) -> list[Any]:
        return [(f"name{i}", p) for i, p in enumerate(self.params)] if names else self.params

    def twin(self) -> Problem:
        """Return another problem that stands where this one does."""
        other = copy.copy(self)
        other.weight, other.bias = (nn.Parameter(p.detach().clone()) for p in self.params)
        return other

    def loss(self) -> Tensor:
        for p in self.params:
            p.grad = None
        loss = (self.weight.mv(self.input) + self.bias).square().mean()
        loss.backward()
        return loss

    def walk(self, optimizer: RelaxationOptimizer, steps: int) -> None:
        for _ in range(steps):
            self.loss()
            optimizer.step()

    def improved(self, case: Case, before: float) -> bool:
        return self.loss().item() > before if case.climbs() else self.loss().item() < before


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, tensors in type and bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def same_run(a: Problem, of_a: RelaxationOptimizer, b: Problem, of_b: RelaxationOptimizer) -> bool:
    """Whether two runs hold equal parameters and state."""
    states = [state_of(of_a, p) for p in a.params], [state_of(of_b, p) for p in b.params]
    return same([*a.params], [*b.params]) and same(*states)


def state_of(optimizer: RelaxationOptimizer, p: Tensor) -> dict[str, Any]:
    """Return the state of a parameter; how many samples there are is the same in a tensor and in a number."""
    return {role: int(value) if role == "period_steps" else value for role, value in optimizer.state[p].items()}


def nameless(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


# The update.


@pytest.mark.parametrize("with_lrsched", [False, True])
@pytest.mark.parametrize("make", [torch.randn, lambda *shape: torch.randn(*reversed(shape)).t()], ids=["whole", "transposed"])
@over_cases
def test_goes_in_the_right_direction(case: Case, make: Callable[..., Tensor], with_lrsched: bool) -> None:
    for makers in case.info.scheduler_inputs if with_lrsched else [[]]:
        problem = Problem(make=make)
        optimizer = case(problem.params)
        schedulers = [maker(optimizer) for maker in makers]
        before = problem.loss().item()
        for _ in range(20):
            loss = problem.loss()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step(*([loss.detach()] if isinstance(scheduler, ReduceLROnPlateau) else []))
        assert problem.improved(case, before)
        optimizer.eval()
        assert problem.improved(case, before), "so does the answer"


@over_cases
def test_weights_with_gaps_in_memory_are_refused(case: Case) -> None:
    """torch's optimizers serve views such as ``t[..., 0]``; a fused pass over memory refuses them by name."""
    problem = Problem(make=lambda *shape: torch.randn(*shape, 2)[..., 0])
    before = problem.weight.detach().clone()
    with pytest.raises(ValueError, match=r"^params\[0\] .*expected a dense tensor"):
        problem.walk(case(problem.params), 1)
    assert torch.equal(problem.weight, before)


@pytest.mark.parametrize("makers", SCHEDULES, ids=["step", "linear", "step linear", "constant exponential", "plateau", "poly"])
@over_methods
def test_param_group_with_lrscheduler_goes_in_the_right_direction(info: OptimizerInfo, makers: list[Any]) -> None:
    problem = Problem()
    groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.05}]
    optimizer = plain(info)(groups, **plain(info).known(inner_steps=3))
    schedulers = [maker(optimizer) for maker in makers]
    before = problem.loss().item()
    for _ in range(20):
        loss = optimizer.step(problem.loss)
        for scheduler in schedulers:
            scheduler.step(*([loss.detach()] if isinstance(scheduler, ReduceLROnPlateau) else []))
    assert problem.loss().item() < before


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@over_implementations
def test_tensor_lr_is_its_number(case: Case, dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    other = problem.twin()
    optimizer, tensor_lr = case(problem.params, lr=0.25), case(other.params, lr=torch.tensor(0.25))
    for _ in range(7):
        problem.walk(optimizer, 1)
        other.walk(tensor_lr, 1)
        assert same_run(problem, optimizer, other, tensor_lr)


def implementation_run(case: Case, dtype: torch.dtype, **flags: bool) -> list[Any]:
    """Return the tensors after each step of a run in which a layer is frozen for a while and one step has no gradients."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(dtype)
    scalar, empty = nn.Parameter(torch.rand(()).to(dtype)), nn.Parameter(torch.empty(0, 3, dtype=dtype))
    scalar.grad, empty.grad = torch.rand_like(scalar), torch.empty_like(empty)
    params = [*model.parameters(), scalar, empty]
    optimizer = case(params, **flags)
    x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype).reshape(3, 2)
    seen = []
    for i in range(9):
        for p in model.parameters():
            p.grad = None
        if i in (3, 5):
            model[2].requires_grad_(i == 5)
        if i != 2:
            model(x).sum().backward()
        optimizer.step()
        seen.append([(p.detach().clone(), copy.deepcopy(optimizer.state[p])) for p in params])
    return seen


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@over_methods
@pytest.mark.slow
def test_foreach_and_fused_match_the_default(info: OptimizerInfo, dtype: torch.dtype) -> None:
    for one in inputs_of(info, dtype):
        case = Case(info, one.kwargs)
        default = implementation_run(case, dtype)
        for flags in ({"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
            assert same(implementation_run(case, dtype, **flags), default), (one.desc, flags)


@over_cases
def test_types_may_be_mixed(case: Case) -> None:
    """Types in one group, in groups of their own, and among them a parameter that cannot have a gradient."""
    dtypes = [F64, F32, BF16] if case.options.get("rounding") == "stochastic" else [F64, F32, F16, BF16]
    start, grads = ([torch.rand(2, 3).to(dtype) for dtype in dtypes] for _ in range(2))
    results = []
    for flags, grouped in [*((flags, False) for flags in FLAGS), ({}, True)]:
        params = [nn.Parameter(t.clone()) for t in start]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        integer = nn.Parameter(torch.arange(6), requires_grad=False)
        members = [*params, integer]
        optimizer = case([{"params": [p]} for p in members] if grouped else members, **flags)
        for _ in range(7):
            optimizer.step()
        results.append([[p.detach(), optimizer.state[p]] for p in params])
        assert integer not in optimizer.state
        assert torch.equal(integer, torch.arange(6))
    for result in results[1:]:
        assert same(result, results[0])
    for (p, state), before in zip(results[0], start, strict=True):
        moved = (p != before).float().mean().item()
        assert moved >= (0.5 if p.dtype.itemsize == 2 else 1.0), "narrow ones may be rounded back"
        held = {t.dtype for role, t in state.items() if role != "period_steps"}
        assert held == ({compute_type(p.dtype)} if state else set())


@pytest.mark.parametrize("default_dtype", [F64, F16], ids=str)
@over_cases
def test_default_dtype_of_torch_changes_no_bit(case: Case, default_dtype: torch.dtype) -> None:
    problem = Problem()
    other = problem.twin()
    optimizer = case(problem.params)
    problem.walk(optimizer, 4)
    torch.set_default_dtype(default_dtype)
    try:
        under = case(other.params)
        other.walk(under, 4)
    finally:
        torch.set_default_dtype(F32)
    assert same_run(problem, optimizer, other, under)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@over_methods
def test_parameters_without_memory_are_refused_as_what_they_are(info: OptimizerInfo, flags: dict[str, bool]) -> None:
    model = nn.Linear(2, 3, device="meta")
    optimizer = plain(info)(model.parameters(), **flags)
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    with pytest.raises((ValueError, TypeError, RuntimeError), match="meta"):
        optimizer.step()
    assert optimizer.stats()["steps"] == 0
    assert len(optimizer.state) == 0


# Errors.


@over_methods
def test_errors(info: OptimizerInfo) -> None:
    for error in info.optim_error_inputs_func(device="cpu", dtype=F32):
        params, options = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
        expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        if error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
            with expected(error.error_type, match=error.error_regex):
                plain(info)(params, **options)
            continue
        optimizer = plain(info)(params, **options)
        before = [p.detach().clone() for p in params]
        with expected(error.error_type, match=error.error_regex):
            optimizer.step()
        assert optimizer.stats()["steps"] == 0
        assert len(optimizer.state) == 0
        assert all(torch.equal(p, t) for p, t in zip(params, before, strict=True))


@over_methods
def test_invalid_params(info: OptimizerInfo) -> None:
    p = nn.Parameter(torch.ones(2))
    for params, error, message in (
        ([], ValueError, "empty parameter list|expected parameters, got none"),
        (iter(()), ValueError, "empty parameter list|expected parameters, got none"),
        ([p * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ([1.0], TypeError, "can only optimize Tensors"),
        ([{"params": {p}}], TypeError, "ordered collections"),
    ):
        with pytest.raises(error, match=message):
            plain(info)(params)


@over_methods
def test_add_param_group_errors(info: OptimizerInfo) -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = plain(info)([p])
    before = copy.deepcopy(optimizer.state_dict())
    for group, error, message in (
        ({"params": [p]}, ValueError, "some parameters appear in more than one parameter group"),
        ({"params": [q, p]}, ValueError, "some parameters appear in more than one parameter group"),
        ({"params": [("named", q)]}, ValueError, "cannot add param group with names"),
        ({"params": [q], "lr": -1.0}, ValueError, "^lr: "),
        ({"params": [q * 2]}, ValueError, "non-leaf"),
    ):
        with pytest.raises(error, match=message):
            optimizer.add_param_group(group)
        assert same(optimizer.state_dict(), before)


@over_methods
def test_param_group_that_is_no_dict_is_refused_as_such(info: OptimizerInfo) -> None:
    optimizer = plain(info)([nn.Parameter(torch.ones(2))])
    for group in ([nn.Parameter(torch.ones(2))], nn.Parameter(torch.ones(2))):
        with pytest.raises(TypeError, match=r"^param_group: expected a dict"):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@over_methods
def test_duplicate_parameters_warn_and_their_step_is_refused(info: OptimizerInfo) -> None:
    p = with_grad(torch.ones(2), torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = plain(info)([p, p])
    with pytest.raises(ValueError, match=r"^params\[1\] .*shares memory with params\[0\]"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2))


# Parameters and groups.


@over_cases
def test_param_groups_weight_decay(case: Case) -> None:
    problem = Problem()
    optimizer = case([{"params": [problem.weight], "weight_decay": 0.05}, {"params": [problem.bias], "weight_decay": 0.0}])
    before = problem.loss().item()
    problem.walk(optimizer, 20)
    assert problem.improved(case, before)

    decayed, bare = (problem.twin() for _ in range(2))
    groups = [{"params": [decayed.weight], "weight_decay": 0.5}, {"params": [decayed.bias]}]
    with_decay, without = case(groups), case([{"params": [bare.weight]}, {"params": [bare.bias]}])
    for _ in range(5):  # the same gradients for both, over a whole period of those whose weights follow only its end
        for p, q in zip(decayed.params, bare.params, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        with_decay.step()
        without.step()
    assert not torch.equal(decayed.weight, bare.weight)
    assert torch.equal(decayed.bias, bare.bias), "each group has its own"


@over_cases
def test_param_groups_lr(case: Case) -> None:
    """lr is of the anchor, where one moves; what should stay where it is needs an inner_lr of 0 too, where there is one."""
    problem, still, wandering = Problem(), nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))
    start = still.detach().clone(), wandering.detach().clone()
    groups = [
        {"params": problem.params, "lr": case.options.get("lr", 0.1)},
        {"params": [still], **case.known(inner_lr=0.0, outer_weight_decay=0.0)},
        {"params": [wandering], **case.known(outer_weight_decay=0.0)},
    ]
    moves_anchors = bool(case.known(inner_steps=3))
    said = pytest.warns(UserWarning, match="lr=1e-28 hardly moves the anchor") if moves_anchors else contextlib.nullcontext()
    with said:
        optimizer = case(groups, lr=1e-28)
    before = problem.loss().item()
    for _ in range(20):
        problem.loss()
        still.grad, wandering.grad = torch.rand(2), torch.rand(2)
        optimizer.step()
    assert problem.improved(case, before)
    if not moves_anchors:  # lr is of the weights themselves
        assert same([still, wandering], [*start])
        return
    assert same([optimizer.state[p]["anchor"] for p in (still, wandering)], [*start])
    around_the_anchor = "gradient_average" in optimizer.state[still]  # the weights of each step are, whatever they were before
    assert around_the_anchor or torch.equal(still, start[0])
    if case.info.optim_cls is HeatSGD:  # about the anchor with noise, and at it without
        assert torch.equal(wandering, start[1]) == (case.options.get("temperature") == 0.0)
    else:
        assert not torch.equal(wandering, start[1]) or optimizer.at_outer_boundary


@over_cases
def test_groups_are_as_good_as_one(case: Case) -> None:
    problem = Problem()
    other = problem.twin()
    one, two = case(problem.params), case([{"params": p} for p in other.params])
    for _ in range(4):
        problem.walk(one, 1)
        other.walk(two, 1)
        assert same_run(problem, one, other, two)


@over_cases
def test_step_is_a_noop_when_params_have_no_grad(case: Case) -> None:
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [p.clone() for p in params]
    optimizer = case(params)
    assert optimizer.step(lambda: 1.0) == 1.0
    assert same(params, before)
    assert len(optimizer.state) == 0
    assert optimizer.stats()["steps"] == 0


@over_implementations
def test_step_is_a_noop_for_zero_grads(case: Case) -> None:
    """Apart from decay and noise: so both are switched off."""
    param = nn.Parameter(torch.randn(5, 1))
    before = param.detach().clone()
    optimizer = case([param], **case.known(weight_decay=0.0, outer_weight_decay=0.0, temperature=0.0))
    for _ in range(4):
        param.grad = torch.zeros_like(param)
        optimizer.step(lambda: torch.tensor([1.0]))
        assert torch.equal(param, before)
    assert optimizer.stats()["steps"] == 4


def ways_to_pass(model: nn.Module) -> Iterator[Any]:
    yield list(model.parameters())
    yield tuple(model.parameters())
    yield model.parameters()
    yield (p for p in model.parameters())
    yield dict.fromkeys(model.parameters())
    yield model.named_parameters()
    yield [{"params": model.parameters()}]
    yield iter([{"params": list(model.parameters())}])
    yield ({"params": tuple(model.parameters())},)
    yield [{"params": model.named_parameters()}]
    yield [{"params": model.weight}, {"params": (model.bias,)}]


@over_methods
def test_ways_to_pass_parameters(info: OptimizerInfo) -> None:
    results = []
    for way in range(len(list(ways_to_pass(nn.Linear(5, 2))))):
        torch.manual_seed(3)
        model = nn.Linear(5, 2)
        params = list(ways_to_pass(model))[way]
        if isinstance(params, dict):  # torch reads a dict as an iterable of its keys
            params = params.keys()
        optimizer = plain(info)(params, **plain(info).known(inner_steps=2, temperature=1e-3))
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(5)).sum().backward()
            optimizer.step()
        results.append([[p.detach(), optimizer.state[p]] for p in model.parameters()])
    assert all(same(result, results[0]) for result in results)


@over_cases
def test_plain_and_frozen_tensors(case: Case) -> None:
    """Leaf tensors that are no `nn.Parameter`; beside them frozen ones, which get neither a step nor state."""
    problem = Problem()
    other = problem.twin()
    plain = [p.detach().clone().requires_grad_() for p in problem.params]
    other.weight, other.bias = plain
    frozen = torch.ones(3)
    optimizer, of_plain = case(problem.params), case([*plain, frozen])
    for _ in range(4):
        problem.walk(optimizer, 1)
        other.walk(of_plain, 1)
        assert same_run(problem, optimizer, other, of_plain)
    assert torch.equal(frozen, torch.ones(3))
    assert frozen not in of_plain.state
    assert not any(t.requires_grad for t in of_plain.state[plain[0]].values() if isinstance(t, Tensor))


@pytest.mark.parametrize("swap", [False, True], ids=["data", "swap"])
@pytest.mark.parametrize("dtype", [F64, BF16, F16], ids=str)
@over_methods
def test_made_before_or_after_the_model_moves(info: OptimizerInfo, dtype: torch.dtype, swap: bool) -> None:
    results = []
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for before in (True, False):
            torch.manual_seed(2)
            model = nn.Linear(5, 2)
            if before:
                optimizer = plain(info)(model.parameters(), **plain(info).known(inner_steps=2, temperature=1e-3))
            model.to(dtype)
            if not before:
                optimizer = plain(info)(model.parameters(), **plain(info).known(inner_steps=2, temperature=1e-3))
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(5, dtype=dtype)).sum().backward()
                optimizer.step()
            results.append([[p.detach(), optimizer.state[p]] for p in model.parameters()])
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert same(*results)
    assert results[0][0][0].dtype == dtype


@over_methods
def test_model_that_moves_in_mid_training(info: OptimizerInfo) -> None:
    """To a narrow type and back the state fits as it is; to float64 it is refused by name, and loading the state casts it."""
    problem = Problem()
    optimizer = plain(info)(problem.params, **plain(info).known(inner_steps=2))
    problem.walk(optimizer, 3)

    def move(dtype: torch.dtype) -> None:
        problem.input = problem.input.to(dtype)
        for p in problem.params:
            p.grad, p.data = None, p.data.to(dtype)

    for dtype in (BF16, F16, F32):
        move(dtype)
        problem.walk(optimizer, 3)
        assert optimizer.state[problem.weight]["anchor"].dtype == F32
    move(F64)
    before = optimizer.stats()
    with pytest.raises(TypeError, match=r"^anchors\[0\] .*expected torch.float64, got torch.float32"):
        problem.walk(optimizer, 1)
    assert optimizer.stats() == before
    optimizer.load_state_dict(optimizer.state_dict())
    problem.walk(optimizer, 3)
    assert optimizer.state[problem.weight]["anchor"].dtype == F64


# Saving and loading.


@pytest.mark.parametrize("named", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@over_implementations
def test_state_dict_deterministic(case: Case, named: tuple[bool, bool]) -> None:
    problem = Problem()
    optimizer = case(problem.named(named[0]))
    problem.walk(optimizer, 4)
    other = problem.twin()
    loaded = case(other.named(named[1]))
    saved = optimizer.state_dict()
    as_it_was = copy.deepcopy(saved)
    loaded.load_state_dict(saved)
    assert same(saved, as_it_was), "loading changes nothing of what is loaded"
    for _ in range(4):
        problem.walk(optimizer, 1)
        other.walk(loaded, 1)
        assert same_run(problem, optimizer, other, loaded)
    ours, theirs = (nameless(o.state_dict()) for o in (optimizer, loaded))
    assert same(ours, theirs)
    if any(named):
        assert loaded.param_groups[0]["param_names"] == ["name0", "name1"]
    loaded.param_groups.extend(loaded.param_groups)  # a repeated parameter keeps its number
    assert same(ours["param_groups"][-1], nameless(loaded.state_dict())["param_groups"][-1])


@over_cases
def test_can_load_older_state_dict(case: Case) -> None:
    problem = Problem()
    optimizer = case(problem.params)
    problem.walk(optimizer, 4)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in case.info.not_og_supported_flags:
            del group[flag]
    other = problem.twin()
    loaded = case(other.params)
    loaded.load_state_dict(old)
    for _ in range(4):
        problem.walk(optimizer, 1)
        other.walk(loaded, 1)
        assert same_run(problem, optimizer, other, loaded), "what is missing is the optimizer's own"


@over_methods
def test_loads_the_state_of_an_instance_with_other_options(info: OptimizerInfo) -> None:
    """From every input to every third: the loaded options are in force, whatever the instance was made with."""
    inputs = [one.kwargs for one in inputs_of(info)]
    for i, theirs in enumerate(inputs):
        ours = inputs[(i + 3) % len(inputs)]
        problem = Problem()
        optimizer = Case(info, theirs)(problem.params, seed=5)
        problem.walk(optimizer, 4)
        other = problem.twin()
        loaded = Case(info, ours)(other.params, seed=6)
        loaded.load_state_dict(optimizer.state_dict())
        for _ in range(4):
            problem.walk(optimizer, 1)
            other.walk(loaded, 1)
            assert same_run(problem, optimizer, other, loaded)


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}], ids=str)
@over_cases
def test_state_saved_under_a_flag_goes_on_without_it(case: Case, flags: dict[str, bool]) -> None:
    problem = Problem()
    optimizer = case(problem.params, **flags)
    problem.walk(optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group.update(foreach=None, fused=None)
    other = problem.twin()
    loaded = case(other.params)
    loaded.load_state_dict(saved)
    problem.walk(optimizer, 4)
    other.walk(loaded, 4)
    assert same_run(problem, optimizer, other, loaded)


@pytest.mark.parametrize("named", [False, True], ids=["plain", "named"])
@over_implementations
def test_save_load_equality_with_weights_only(case: Case, named: bool) -> None:
    problem = Problem()
    optimizer = case(problem.named(named))
    problem.walk(optimizer, 4)
    saved = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    for weights_only in (False, True):
        file.seek(0)
        assert same(torch.load(file, weights_only=weights_only), saved)


@over_cases
def test_load_lr_as_number_or_tensor(case: Case) -> None:
    """torch's case is the state's "step"; here the number that may come as a tensor is lr."""
    problem = Problem()
    optimizer = case(problem.params, lr=0.25)
    problem.walk(optimizer, 4)
    for lr in (0.25, torch.tensor(0.25)):
        other = problem.twin()
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["lr"] = lr
        loaded = case(other.params, lr=torch.tensor(0.5) if isinstance(lr, float) else 0.5)
        loaded.load_state_dict(saved)
        goes_on = problem.twin()
        reference = case(goes_on.params)
        reference.load_state_dict(optimizer.state_dict())
        other.walk(loaded, 3)
        goes_on.walk(reference, 3)
        assert same_run(other, loaded, goes_on, reference)


@pytest.mark.filterwarnings("ignore:state_dict, params.* no master")  # float32 parameters have none
@pytest.mark.parametrize("dtype", [BF16, F16, F64], ids=str)
@over_cases
def test_state_dict_with_casting_params(case: Case, dtype: torch.dtype) -> None:
    problem = Problem()
    optimizer = case(problem.params)
    problem.walk(optimizer, 4)
    saved = optimizer.state_dict()
    as_it_was = copy.deepcopy(saved)
    cast = problem.twin()
    cast.weight, cast.bias, cast.input = (
        *(nn.Parameter(p.detach().to(dtype)) for p in problem.params),
        problem.input.to(dtype),
    )
    loaded = case(cast.params)
    loaded.load_state_dict(saved)
    assert same(saved, as_it_was)
    for p, q in zip(problem.params, cast.params, strict=True):
        for role, value in state_of(optimizer, p).items():
            wanted = value.to(compute_type(dtype)) if isinstance(value, Tensor) else value
            assert same(loaded.state[q][role], wanted), "narrow parameters keep the float32 of the state bit for bit"
    if dtype == F16 and case.options.get("rounding") == "stochastic":
        with pytest.raises(ValueError, match=r"^rounding: .*float16"):
            cast.walk(loaded, 1)
        return
    cast.walk(loaded, 4)
    assert loaded.stats()["steps"] == 8


@over_cases
def test_deepcopy_copies_all_public_attrs(case: Case) -> None:
    problem = Problem()
    optimizer = case(problem.params)
    problem.walk(optimizer, 3)

    def public(o: RelaxationOptimizer) -> set[str]:
        return {name for name in vars(o) if not name.startswith("_")}

    other, copied = copy.deepcopy((problem, optimizer))
    assert public(copied) == public(optimizer)
    for _ in range(4):
        problem.walk(optimizer, 1)
        other.walk(copied, 1)
        assert same_run(problem, optimizer, other, copied)


@over_cases
def test_non_empty_state(case: Case) -> None:
    problem = Problem()
    optimizer = case(problem.params)
    problem.walk(optimizer, 1)
    ours, theirs = (optimizer.state[p] for p in problem.params)
    assert len(optimizer.state) == 2
    assert ours is not theirs, "what a user puts into one is not in the other"
    has_state = case.info.optim_cls is not SGLD or "gamma" in case.options
    assert bool(ours) == bool(theirs) == has_state


@over_cases
def test_optimizer_can_be_printed(case: Case) -> None:
    text = repr(case([nn.Parameter(torch.randn(2, 3)) for _ in range(2)]))
    assert text.startswith(f"{case.info.name} (\nParameter Group 0\n")
    for name, value in case.options.items():
        assert f"    {name}: {value}\n" in text


# Hooks.


def mark_state(optimizer: Any) -> None:
    optimizer.state["test"] = 1


def unmark_state(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "state": {}, "marked": state_dict["state"].pop("test", None)}


@over_methods
def test_state_dict_hooks(info: OptimizerInfo) -> None:
    problem = Problem()
    optimizer = plain(info)(problem.params)
    before = optimizer.register_state_dict_pre_hook(mark_state)
    assert optimizer.state_dict()["state"]["test"] == 1
    after = optimizer.register_state_dict_post_hook(unmark_state)
    assert optimizer.state_dict()["marked"] == 1
    before.remove()
    del optimizer.state["test"]
    assert optimizer.state_dict()["marked"] is None
    after.remove()
    assert "marked" not in optimizer.state_dict()


@over_cases
def test_key_that_a_hook_leaves_in_the_state_is_no_parameter(case: Case) -> None:
    problem = Problem()
    other = problem.twin()
    optimizer, marked = case(problem.params), case(other.params)
    marked.register_state_dict_pre_hook(mark_state)
    for _ in range(4):
        problem.walk(optimizer, 1)
        other.walk(marked, 1)
        marked.load_state_dict(marked.state_dict())
        marked.eval()
        marked.train()
        assert marked.state["test"] == 1
        assert same_run(problem, optimizer, other, marked)


def set_lr(lr: float, replace: bool) -> Callable[..., Any]:
    def hook(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        changed = copy.deepcopy(state_dict) if replace else state_dict
        changed["param_groups"][0]["lr"] = lr
        return changed if replace else None

    return hook


@over_methods
def test_load_state_dict_pre_hook_and_prepend(info: OptimizerInfo) -> None:
    optimizer = plain(info)([nn.Parameter(torch.rand(2, 3))])
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(set_lr(0.2, replace=False))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.2
    optimizer.register_load_state_dict_pre_hook(set_lr(0.3, replace=True), prepend=True)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.2, "the prepended one came first"
    optimizer.register_load_state_dict_pre_hook(set_lr(0.4, replace=True))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.4


@over_methods
def test_load_state_dict_pre_post_hook(info: OptimizerInfo) -> None:
    optimizer = plain(info)([nn.Parameter(torch.rand(2, 3))])
    seen: list[Any] = []
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(float(o.param_groups[0]["lr"])))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("first"), prepend=True)
    handle = optimizer.register_load_state_dict_pre_hook(set_lr(0.3, replace=True))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["first", 0.3]
    handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["first", 0.3] * 2


@over_methods
def test_step_pre_and_post_hook(info: OptimizerInfo) -> None:
    params = [torch.tensor([1.0, 1.0])]
    for register in ("register_step_pre_hook", "register_step_post_hook"):
        optimizer = plain(info)(params)
        calls: list[Any] = []
        handle = getattr(optimizer, register)(lambda *arguments, calls=calls: calls.append(arguments))
        optimizer.step()
        optimizer.step()
        assert calls == [(optimizer, (optimizer,), {})] * 2
        handle.remove()
        optimizer.step()
        assert len(calls) == 2


@over_methods
def test_step_all_hooks(info: OptimizerInfo) -> None:
    params = [torch.tensor([1.0, 1.0])]
    optimizer, other = plain(info)(params), SGD(params, lr=0.1)
    calls: list[int] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append(0)),
        register_optimizer_step_post_hook(lambda *_: calls.append(5)),
    ]
    for o in (optimizer, other):
        handles.append(o.register_step_pre_hook(lambda *_: calls.append(1)))
        handles.append(o.register_step_post_hook(lambda *_: calls.append(2)))
    try:
        for o in (optimizer, other, optimizer):
            calls.clear()
            o.step()
            assert calls == [0, 1, 2, 5]
    finally:
        for handle in handles:
            handle.remove()
    calls.clear()
    optimizer.step()
    other.step()
    assert calls == []


@over_cases
def test_step_pre_hook_may_change_the_gradients(case: Case) -> None:
    problem = Problem()
    other = problem.twin()
    optimizer, hooked = case(problem.params), case(other.params)

    def double(o: Any, *_: Any) -> None:
        for p in o.param_groups[0]["params"]:
            p.grad *= 2.0

    hooked.register_step_pre_hook(double)
    for _ in range(4):
        problem.loss()
        for p, q in zip(problem.params, other.params, strict=True):
            q.grad = p.grad.clone()
            p.grad *= 2.0
        optimizer.step()
        hooked.step()
        assert same_run(problem, optimizer, other, hooked)


def test_no_warning_on_the_way() -> None:
    """The default options, a scheduler, saving and loading: nothing to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for info in INFOS:
            problem = Problem()
            optimizer = plain(info)(problem.params)
            scheduler = StepLR(optimizer, step_size=1)
            for _ in range(3):
                problem.walk(optimizer, 1)
                scheduler.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
