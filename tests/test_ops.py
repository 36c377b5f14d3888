"""The operators as torch sees them: schemas, fakes, version counters, autograd, torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deeprelax_cuda import functional
from deeprelax_cuda.functional import OuterStep

OPS = torch.ops.deeprelax
SHAPES = ((5, 3), (7,), ())
LANGEVIN = {"lr": 0.1, "stiffness": 0.5, "noise_std": 0.25, "averaging": 0.25}
AVERAGE = {"averaging": 0.25, "drift": 0.5, "noise_std": 0.25}
OUTER = {"outer": True, "outer_lr": 0.5, "outer_momentum": 0.9, "outer_nesterov": True, "replica_stiffness": 0.125}
NOISE = {"seed": -3, "step": 4, "streams": [3, 1, 2], "places": [0, 15, 15, 9, 2, 5, 1, 1, 1]}


def some(dtype: torch.dtype = torch.float32, grad: bool = False) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in SHAPES]


def langevin(dtype=torch.float32, outer=False, masters=False, grad=False):
    """The operator, arguments by name with every term on, and keywords."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = {
        "params": some(dtype, grad),
        "grads": some(dtype),
        "anchors": [] if outer else some(wide),
        "averages": some(wide),
        "momenta": some(wide),
        "masters": some(wide) if masters else [],
        "outer_anchors": some(wide) if outer else [],
        "outer_momenta": some(wide) if outer else [],
        "consensus": some(wide) if outer else [],
        "inv_scale": torch.tensor(0.5, dtype=wide),
        "found_inf": torch.tensor(0.0),
    }
    return OPS.langevin_step_, arguments, {**LANGEVIN, "momentum": 0.9, **NOISE, **(OUTER if outer else {})}


def gradient_average(dtype=torch.float32, outer=False, masters=False, grad=False):
    _, arguments, keywords = langevin(dtype, outer, masters, grad)
    arguments["gradient_averages"] = arguments["averages"]
    order = ("params", "grads", "anchors", "gradient_averages", "masters")
    order += ("outer_anchors", "outer_momenta", "consensus", "inv_scale", "found_inf")
    keywords = {k: v for k, v in keywords.items() if k not in (*LANGEVIN, "momentum")}
    return OPS.gradient_average_step_, {k: arguments[k] for k in order}, {**AVERAGE, **keywords}


def outer_step(dtype=torch.float32, family="langevin", masters=False, grad=False):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = {
        "params": some(dtype, grad),
        "anchors": some(wide),
        "averages": some(wide) if family == "langevin" else [],
        "gradient_averages": some(wide) if family != "langevin" else [],
        "outer_momenta": some(wide),
        "masters": some(wide) if masters else [],
        "consensus": some(wide),
        "found_inf": torch.tensor(0.0),
    }
    return OPS.outer_step_, arguments, {"lr": 0.5, "momentum": 0.9, "replica_stiffness": 0.125, "noise_std": 0.25, **NOISE}


CALLS = {
    "langevin": langevin,
    "langevin, fused": lambda **k: langevin(outer=True, **k),
    "langevin, masters": lambda **k: langevin(torch.bfloat16, masters=True, outer=True, **k),
    "langevin, float64": lambda **k: langevin(torch.float64, **k),
    "gradient average": gradient_average,
    "gradient average, fused": lambda **k: gradient_average(outer=True, **k),
    "gradient average, masters": lambda **k: gradient_average(torch.float16, masters=True, **k),
    "outer": outer_step,
    "outer of gradient average": lambda **k: outer_step(family="gradient_average", **k),
    "outer, masters": lambda **k: outer_step(torch.bfloat16, masters=True, **k),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def tensors_of(arguments: dict) -> dict[str, Tensor]:
    """Every tensor among the arguments, by the name an error gives it."""
    named = {}
    for role, value in arguments.items():
        if isinstance(value, Tensor):
            named[role] = value
        elif value is not None:
            named |= {f"{role}[{i}]": t for i, t in enumerate(value)}
    return named


@pytest.mark.parametrize("grad", [False, True], ids=["", "requires_grad"])
@calls
def test_opcheck(call, grad):
    op, arguments, keywords = call(grad=grad)
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if grad:  # this one has nothing to look at otherwise
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(op, tuple(arguments.values()), keywords, test_utils=checks)


def test_opcheck_gaussian():
    keywords = {"seed": -1, "step": 3, "stream": 2**32 - 1, "offset": 2**40, "device": torch.device("cpu")}
    torch.library.opcheck(
        OPS.gaussian, (7,), keywords, test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    )


@calls
def test_the_schema_and_the_version_counters_say_what_is_written(call):
    op, arguments, keywords = call()
    before = {name: (t.clone(), t._version) for name, t in tensors_of(arguments).items()}
    op(*arguments.values(), **keywords)
    written = {name for name, t in tensors_of(arguments).items() if not torch.equal(t, before[name][0])}
    counted = {name for name, t in tensors_of(arguments).items() if t._version > before[name][1]}
    declared = {a.name for a in op.default._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert "params[0]" in written
    # A momentum the size of the noise could by chance move a number onto itself, a whole role could not.
    assert {name.split("[")[0] for name in written} == {role for role in declared if arguments[role]}
    assert written <= counted
    assert {name.split("[")[0] for name in counted} <= declared


def test_terms_that_are_off_leave_their_lists_and_version_counters_alone():
    op, arguments, keywords = langevin()
    before = {name: (t.clone(), t._version) for name, t in tensors_of(arguments).items()}
    arguments["found_inf"] = None
    op(*arguments.values(), **{**keywords, "averaging": 0.0, "momentum": 0.0})
    for name, t in tensors_of(arguments).items():
        if not name.startswith("params"):
            assert torch.equal(t, before[name][0]), name
            assert t._version == before[name][1], name


def test_autograd_sees_that_a_saved_parameter_was_written():
    y = torch.ones(3, requires_grad=True)
    loss = (y * y).sum()
    functional.langevin_step_([y], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], **LANGEVIN)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_that_require_grad_stay_leaves():
    y = [torch.ones(3, requires_grad=True)]
    plain = [torch.ones(3)]
    rest = [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)]
    for params in (y, plain):
        functional.langevin_step_(params, *([t.clone() for t in role] for role in rest), **LANGEVIN)
    assert y[0].is_leaf
    assert y[0].grad_fn is None
    assert torch.equal(y[0].detach(), plain[0])


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda function: torch.compile(function, fullgraph=True)
    torch._dynamo.reset()


@pytest.mark.parametrize("grad", [False, True], ids=["", "requires_grad"])
@pytest.mark.slow
def test_compiled_in_place_and_not_again_for_each_step(compiled, grad):
    def two_steps(y, g, x, m, p, w, step):
        functional.langevin_step_(y, g, x, m, seed=2**64 - 1, step=step, **LANGEVIN)
        end = OuterStep(lr=0.5, momentum=0.9, momenta=w)
        places = [(3, 2, 5), 4, 5]
        functional.gradient_average_step_(y, g, x, p, seed=1, step=step, places=places, outer=end, **AVERAGE)
        functional.outer_step_(y, x, m, lr=0.5)

    compiled_steps = compiled(two_steps)
    lists = [some(grad=grad), *(some() for _ in range(5))]
    addresses = [t.data_ptr() for role in lists for t in role]
    for step in range(4):
        twins = [[t.detach().clone() for t in role] for role in lists]
        versions = [t._version for t in lists[0]]
        compiled_steps(*lists, step)
        two_steps(*twins, step)
        for role, twin_role in zip(lists, twins, strict=True):
            assert all(map(torch.equal, role, twin_role))
        assert all(t._version > version for t, version in zip(lists[0], versions, strict=True))
    assert [t.data_ptr() for role in lists for t in role] == addresses
    # Torch makes its own graphs of 0 and of 1, and one of every other step.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_compiled_gaussian(compiled):
    noise = compiled(lambda numel, step: functional.gaussian(numel, seed=7, step=step) + 1)
    for step in range(2, 5):
        assert torch.equal(noise(9, step), functional.gaussian(9, seed=7, step=step) + 1)


def test_compiled_scales(compiled):
    def scaled(y, g, x, m, inv_scale, found_inf):
        functional.langevin_step_([y], [g], [x], [m], inv_scale=inv_scale, found_inf=found_inf, **LANGEVIN)

    y, g, x, m = (torch.randn(6) for _ in range(4))
    steps = compiled(scaled)
    for scales in ((torch.tensor([0.5]), torch.tensor([0.0])), (0.25, 0.0), (1.0, 2.0)):
        y2, m2 = y.clone(), m.clone()
        steps(y, g, x, m, *scales)
        scaled(y2, g, x, m2, *scales)
        assert torch.equal(y, y2)
        assert torch.equal(m, m2)


def test_compiled_clone_that_the_compiler_leaves_out_is_refused(compiled):
    """Inductor lets ``x = y.clone()`` be y itself, and the coupling to x would silently be one to y."""

    def step(y, g, m):
        functional.langevin_step_([y], [g], [y.clone()], [m], **LANGEVIN)

    y, g, m = (torch.randn(8) for _ in range(3))
    kept = y.clone()
    with pytest.raises(ValueError, match=r"anchors\[0\] .* shares memory with params\[0\]"):
        compiled(step)(y, g, m)
    assert torch.equal(y, kept)


@pytest.mark.parametrize("overlap", ["the same tensor", "two views"])
def test_compiled_aliases_are_refused(compiled, overlap):
    flat = torch.randn(12)
    y = flat[:8]
    x = y if overlap == "the same tensor" else flat[4:]
    kept = flat.clone()

    def step(y, g, x, m):
        functional.langevin_step_([y], [g], [x], [m], **LANGEVIN)

    with pytest.raises(ValueError, match="shares memory with"):
        compiled(step)(y, torch.randn(8), x, torch.randn(8))
    assert torch.equal(flat, kept)


def test_compiled_views_of_one_buffer(compiled):
    def step(y, g, x, m):
        functional.langevin_step_(y, g, x, m, **LANGEVIN)

    flats = [torch.randn(20) for _ in range(4)]
    twins = [flat.clone() for flat in flats]
    compiled(step)(*([flat[:8], flat[8:19]] for flat in flats))
    step(*([flat[:8], flat[8:19]] for flat in twins))
    assert all(map(torch.equal, flats, twins))
