"""What does not fit is refused in one line that names it, and changes nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from step_lists import BF16, F16, F32, F64, STEPS, Lists, langevin, same, some
from torch import Tensor

from deeprelax_cuda import functional
from deeprelax_cuda.checks import check_disjoint, check_grads, check_scale, check_tensors
from deeprelax_cuda.functional import OuterStep
from deeprelax_cuda.noise import Place
from deeprelax_cuda.steps import ROLES, Tensors


@pytest.mark.parametrize("shift", [0, 1, 7, -7])
def test_neighbours_in_memory_are_told_from_overlaps(shift):
    flat = torch.randn(64)
    lists = Lists.of(shapes=((8,),))
    lists.params, lists.averages = [flat[16:24]], [flat[16 + shift : 24 + shift]]
    with pytest.raises(ValueError, match="shares memory"):
        langevin(lists)
    for beside in (8, -8):
        lists.averages = [flat[16 + beside : 24 + beside]]
        langevin(lists)


def one(role: str, t: Tensor | Callable[[Tensor], Tensor], index: int = 1) -> Callable[[Lists], dict]:
    """A change of one tensor of a list: to another tensor, or to a function of the old one."""

    def change(lists: Lists) -> dict:
        items = vars(lists)[role]
        items[index] = t if isinstance(t, Tensor) else t(items[index])
        return {}

    return change


def both(role: str, other: str) -> Callable[[Lists], dict]:
    """The same tensor in two lists."""

    def change(lists: Lists) -> dict:
        vars(lists)[role][0] = vars(lists)[other][0]
        return {}

    return change


def saying(**changes: object) -> Callable[[Lists], dict]:
    return lambda lists: changes


def wrong_shape(t: Tensor) -> Tensor:
    return torch.zeros(t.numel() + 1, dtype=t.dtype)


# Each row: the steps it is for, how a call that fits is spoiled, the error, and how its message begins.
INNER = ("langevin", "gradient average")
ALL = ("langevin", "gradient average", "outer")
WRONG: list[tuple[tuple[str, ...], Callable[[Lists], dict], type[Exception], str]] = [
    # what is not a tensor, and lists that do not match
    (ALL, one("params", lambda t: t.tolist()), TypeError, "params[1]: expected a tensor, got list"),
    (INNER, one("grads", lambda t: None), TypeError, "grads[1]: expected a tensor, got NoneType"),
    (ALL, saying(params=torch.zeros(3)), TypeError, "params: expected a list of tensors, got a tensor"),
    (INNER, saying(grads=some()[:3]), ValueError, "grads: expected 4 of them, one a parameter, got 3"),
    (ALL, saying(anchors=[*some(), torch.zeros(1)]), ValueError, "anchors: expected 4 of them, one a parameter, got 5"),
    (ALL, saying(streams=[1]), ValueError, "streams: expected 4 of them, one a parameter, got 1"),
    (ALL, saying(places=[0, 0]), ValueError, "places: expected 4 of them, one a parameter, got 2"),
    (INNER, saying(grads=[]), ValueError, "grads: expected 4 of them, one a parameter, got 0"),
    # types
    (
        ALL,
        lambda t: saying(params=[*t.params[:3], torch.zeros(5, 3, dtype=torch.int64).t()])(t),
        TypeError,
        "params[3] (shape (3, 5), stride (1, 3), torch.int64): expected a floating dtype, got torch.int64",
    ),
    (
        ALL,
        one("params", lambda t: t.to(torch.complex64), 0),
        TypeError,
        "params[0] (shape (5, 3), stride (3, 1), torch.complex64)",
    ),
    (
        ALL,
        one("params", lambda t: t.to(torch.float8_e5m2)),
        TypeError,
        "params[1] (shape (7,), stride (1,), torch.float8_e5m2)",
    ),
    (
        ALL,
        one("params", lambda t: t.to(F64)),
        TypeError,
        "params[1] (shape (7,), stride (1,), torch.float64): expected torch.float32",
    ),
    (
        INNER,
        one("grads", lambda t: t.to(BF16)),
        TypeError,
        "grads[1] (shape (7,), stride (1,), torch.bfloat16): expected torch.float32",
    ),
    (
        ALL,
        one("anchors", lambda t: t.to(F64)),
        TypeError,
        "anchors[1] (shape (7,), stride (1,), torch.float64): expected torch.float32",
    ),
    (
        ("langevin", "outer"),
        one("averages", lambda t: t.to(F16)),
        TypeError,
        "averages[1] (shape (7,), stride (1,), torch.float16): expected torch.float32",
    ),
    (
        ("gradient average",),
        one("averages", lambda t: t.to(F16)),
        TypeError,
        "gradient_averages[1] (shape (7,), stride (1,), torch.float16): expected torch.float32",
    ),
    (
        ("gradient average",),
        saying(gradient_averages=some()[:3]),
        ValueError,
        "gradient_averages: expected 4 of them, one a parameter, got 3",
    ),
    # layouts
    (
        ALL,
        one("params", lambda t: t.to_sparse(), 0),
        ValueError,
        "params[0] (shape (5, 3), layout torch.sparse_coo, torch.float32)",
    ),
    (
        INNER,
        one("grads", lambda t: t.to_sparse(), 0),
        ValueError,
        "grads[0] (shape (5, 3), layout torch.sparse_coo, torch.float32)",
    ),
    (
        ALL,
        one("params", torch.zeros(14)[::2]),
        ValueError,
        "params[1] (shape (7,), stride (2,), torch.float32): expected a dense",
    ),
    (
        ALL,
        one("params", torch.zeros(1).expand(7)),
        ValueError,
        "params[1] (shape (7,), stride (0,), torch.float32): expected a dense",
    ),
    (
        ALL,
        one("anchors", torch.zeros(3, 5).t(), 0),
        ValueError,
        "anchors[0] (shape (5, 3), stride (1, 5), torch.float32): expected the",
    ),
    # shapes
    (
        ALL,
        one("params", wrong_shape),
        ValueError,
        "anchors[1] (shape (7,), stride (1,), torch.float32): expected the shape of its",
    ),
    (
        INNER,
        one("grads", wrong_shape),
        ValueError,
        "grads[1] (shape (8,), stride (1,), torch.float32): expected the shape of its",
    ),
    (
        ("langevin", "outer"),
        one("averages", wrong_shape),
        ValueError,
        "averages[1] (shape (8,), stride (1,), torch.float32): expected the shape of its",
    ),
    (
        ("outer",),
        one("outer_momenta", wrong_shape),
        ValueError,
        "outer_momenta[1] (shape (8,), stride (1,), torch.float32): expected",
    ),
    (("outer",), one("consensus", wrong_shape), ValueError, "consensus[1] (shape (8,), stride (1,), torch.float32): expected"),
    (("langevin",), one("momenta", wrong_shape), ValueError, "momenta[1] (shape (8,), stride (1,), torch.float32): expected"),
    # devices
    (
        ALL,
        one("params", lambda t: t.to("meta")),
        ValueError,
        "params[1] (shape (7,), stride (1,), torch.float32): expected a tensor on",
    ),
    (
        ALL,
        one("anchors", lambda t: t.to("meta")),
        ValueError,
        "anchors[1] (shape (7,), stride (1,), torch.float32): expected a tensor",
    ),
    (
        INNER,
        one("grads", lambda t: t.to("meta")),
        ValueError,
        "grads[1] (shape (7,), stride (1,), torch.float32): expected a tensor",
    ),
    # overlaps
    (
        ALL,
        both("anchors", "params"),
        ValueError,
        "anchors[0] (shape (5, 3), stride (3, 1), torch.float32): shares memory with params[0]",
    ),
    (
        INNER,
        both("grads", "params"),
        ValueError,
        "grads[0] (shape (5, 3), stride (3, 1), torch.float32): shares memory with params[0]",
    ),
    (
        ("langevin",),
        both("grads", "averages"),
        ValueError,
        "grads[0] (shape (5, 3), stride (3, 1), torch.float32): shares memory with averages[0]",
    ),
    (
        ("gradient average",),
        both("grads", "averages"),
        ValueError,
        "grads[0] (shape (5, 3), stride (3, 1), torch.float32): shares memory with gradient_averages[0]",
    ),
    (
        ("outer",),
        both("consensus", "anchors"),
        ValueError,
        "consensus[0] (shape (5, 3), stride (3, 1), torch.float32): shares memory",
    ),
    (
        ("langevin",),
        both("momenta", "averages"),
        ValueError,
        "momenta[0] (shape (5, 3), stride (3, 1), torch.float32): shares memory",
    ),
    (
        INNER,
        lambda t: {"inv_scale": t.averages[2]},
        ValueError,
        "inv_scale (shape (), stride (), torch.float32): shares memory with",
    ),
    (
        ALL,
        lambda t: {"found_inf": t.params[2]},
        ValueError,
        "found_inf (shape (), stride (), torch.float32): shares memory with",
    ),
    # lists that are needed
    (ALL, saying(anchors=None), ValueError, "anchors: expected 4 of them, one a parameter, where there is a stiffness"),
    (
        ("langevin", "outer"),
        saying(averages=None),
        ValueError,
        "averages: expected 4 of them, one a parameter, where there is an",
    ),
    (
        ("gradient average",),
        saying(gradient_averages=None, averaging=0.0),
        ValueError,
        "gradient_averages: expected 4 of them, one a",
    ),
    (
        ("langevin",),
        saying(momenta=None),
        ValueError,
        "momenta: expected 4 of them, one a parameter, where the momentum is not 0",
    ),
    (("outer",), saying(outer_momenta=None), ValueError, "outer_momenta: expected 4 of them, one a parameter, where the outer"),
    (
        ("outer",),
        saying(consensus=None),
        ValueError,
        "consensus: expected 4 of them, one a parameter, where the replica stiffness",
    ),
    (INNER, saying(outer=OuterStep(lr=0.1), anchors=None), ValueError, "anchors: expected 4 of them, one a parameter"),
    (INNER, saying(outer=OuterStep(lr=0.1, momentum=0.5)), ValueError, "outer_momenta: expected 4 of them, one a parameter"),
    # numbers
    (("langevin", "outer"), saying(lr="0.1"), TypeError, "lr: expected a number, got str"),
    (("langevin",), saying(averaging=None), TypeError, "averaging: expected a number, got NoneType"),
    (("gradient average",), saying(drift=torch.ones(2)), TypeError, "drift: expected a number, got Tensor"),
    (INNER, saying(outer=OuterStep(lr=[0.1])), TypeError, "outer_lr: expected a number, got list"),  # type: ignore[arg-type]
    *(
        (("langevin",), saying(**{key: math.nan}), ValueError, f"{key}: expected a number that is finite")
        for key in ("lr", "stiffness")
    ),
    (INNER, saying(noise_std=1e39), ValueError, "noise_std: expected a number that is finite in torch.float32, got inf"),
    (INNER, saying(weight_decay=-math.inf), ValueError, "weight_decay: expected a number that is finite"),
    (("gradient average",), saying(drift=math.inf), ValueError, "drift: expected a number that is finite"),
    (("outer",), saying(lr=math.nan), ValueError, "lr: expected a number that is finite"),
    (INNER, saying(outer=OuterStep(lr=math.inf)), ValueError, "outer_lr: expected a number that is finite"),
    (INNER, saying(inv_scale=math.inf), ValueError, "inv_scale: expected a number that is finite"),
    (
        INNER,
        saying(inv_scale=torch.ones(2)),
        ValueError,
        "inv_scale (shape (2,), stride (1,), torch.float32): expected one element",
    ),
    (
        ALL,
        saying(found_inf=torch.zeros(0)),
        ValueError,
        "found_inf (shape (0,), stride (1,), torch.float32): expected one element",
    ),
    (ALL, saying(seed=-1), ValueError, "seed: expected an int in [0, 2**64), got -1"),
    (ALL, saying(seed=2**64), ValueError, "seed: expected an int in [0, 2**64), got 18446744073709551616"),
    (ALL, saying(seed=1.5), TypeError, "seed: expected an int, got float"),
    (ALL, saying(step=2**32), ValueError, "step: expected an int in [0, 2**32), got 4294967296"),
    (ALL, saying(step=None), TypeError, "step: expected an int, got NoneType"),
    (ALL, saying(streams=[0, 1, 2, 2**28]), ValueError, "streams[3]: expected an int in [0, 2**28), got 268435456"),
    (ALL, saying(places=[0, -1, 0, 0]), ValueError, "places[1]: expected an int in [0, 2**63), got -1"),
    (ALL, saying(places=[(0, 4, 3), 0, 0, 0]), ValueError, "places[0]: runs of 4 elements at a pitch of 3 would overlap"),
    (ALL, saying(places=[0, 2**63 - 1, 0, 0]), ValueError, "places[1]: the last element's index does not fit in 63 bits"),
    # words
    (ALL, saying(rounding="up"), ValueError, 'rounding: expected "nearest" or "stochastic", got "up"'),
    (ALL, saying(backend="gpu"), ValueError, 'backend="gpu": expected one of auto, cpu, eager'),
    (("outer",), saying(family="heat"), ValueError, 'family: expected "langevin" or "gradient_average", got "heat"'),
]


@pytest.mark.parametrize(
    ("name", "spoil", "error", "message"),
    [pytest.param(name, *row, id=f"{name}-{row[-1]}") for names, *row in WRONG for name in names],
)
def test_a_call_that_does_not_fit_says_why_and_changes_nothing(name, spoil, error, message):
    lists = Lists.of()
    changes = spoil(lists)
    tensors = [t for items in vars(lists).values() for t in items if isinstance(t, Tensor) and t.device.type == "cpu"]
    before = [(t, t.clone(), t._version) for t in tensors]
    with pytest.raises(error, match=f"^{re.escape(message)}") as caught:
        STEPS[name](lists, **changes)
    assert "\n" not in str(caught.value)
    for t, kept, version in before:
        assert torch.equal(t.to_dense(), kept.to_dense())
        assert t._version == version


@pytest.mark.parametrize(
    ("dtype", "changes", "error", "message"),
    [
        (F16, {"rounding": "stochastic"}, ValueError, "rounding: stochastic rounding is to torch.bfloat16"),
        (BF16, {"rounding": "stochastic", "masters": True}, ValueError, "rounding: stochastic rounding and masters exclude"),
        (
            BF16,
            {"masters": BF16},
            TypeError,
            "masters[0] (shape (5, 3), stride (3, 1), torch.bfloat16): expected torch.float32",
        ),
    ],
)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_narrow_parameters(step, dtype, changes, error, message):
    lists = Lists.of(dtype, masters=True)
    wanted = changes.get("masters")
    masters = {True: lists.masters, BF16: some(BF16)}.get(wanted)
    before = lists.clone()
    with pytest.raises(error, match=re.escape(message)):
        step(lists, **{**changes, "masters": masters})
    assert same(lists, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numel": -1}, "numel: expected an int in [0, 2**63), got -1"),
        ({"seed": 2**64}, "seed: expected an int in [0, 2**64)"),
        ({"step": 2**32}, "step: expected an int in [0, 2**32)"),
        ({"stream": 2**32}, "stream: expected an int in [0, 2**32)"),
        ({"offset": 2**63 - 4}, "offset: element 9223372036854775804 + 5 - 1 does not fit in 63 bits"),
        ({"backend": "gpu"}, 'backend="gpu": expected one of auto'),
    ],
)
def test_gaussian_refuses(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        functional.gaussian(**{"numel": 5, "seed": 0, "step": 0, **changes})


def made(**lists: list[Tensor]) -> Tensors:
    return Tensors(some(), **lists, numbers=range(4), places=[Place(0, 15, 15)] * 4)


LAZY = {"negation": torch._neg_view, "zeros": lambda t: torch._efficientzerotensor(t.shape)}


@pytest.mark.parametrize("lazy", LAZY.values(), ids=LAZY.keys())
@pytest.mark.parametrize("role", ROLES)
def test_state_that_is_not_written_out_in_memory_is_refused(role, lazy):
    tensors = made(**{name: some() for name in ROLES if name not in ("params", "masters")})
    if role == "masters":
        tensors.params, tensors.masters = some(BF16), some()
    items = getattr(tensors, role)
    check_tensors(tensors, outer=True)
    items[1] = lazy(items[1])
    with pytest.raises(ValueError, match=rf"^{role}\[1\] \(shape \(7,\).*: expected the numbers in memory"):
        check_tensors(tensors, outer=True)


@pytest.mark.parametrize("lazy", LAZY.values(), ids=LAZY.keys())
@pytest.mark.parametrize("name", ["inv_scale", "found_inf"])
def test_a_scale_that_is_not_written_out_in_memory_is_refused(name, lazy):
    with pytest.raises(ValueError, match=rf"^{name} \(shape \(\),.*: expected the numbers in memory"):
        check_scale(name, lazy(torch.ones(())), made(), outer=False)


@pytest.mark.parametrize(("dtype", "expected"), [(F16, F32), (F32, F32), (F64, F64)])
def test_inv_scale_is_of_the_compute_type_and_found_inf_is_float32(dtype, expected):
    tensors = Tensors(some(dtype))
    for name, right in (("inv_scale", expected), ("found_inf", F32)):
        check_scale(name, torch.ones((), dtype=right), tensors, outer=False)
        wrong = F64 if right is F32 else F32
        with pytest.raises(TypeError, match=rf"^{name} .*: expected {right}, got {wrong}"):
            check_scale(name, torch.ones((), dtype=wrong), tensors, outer=False)


LABELS = ("stem.weight", "stem.bias", "scale", "head")


def test_labels_name_the_tensors_and_names_the_lists():
    tensors = made(averages=some())
    tensors.labels, tensors.names = LABELS, {"averages": "gradient_averages"}
    with pytest.raises(ValueError, match=r"^grads\[stem\.bias\] \(shape \(8,\)"):
        check_grads(tensors, [wrong_shape(t) if i == 1 else t for i, t in enumerate(some())])
    with pytest.raises(ValueError, match=r"^grads\[stem\.bias\] .* with gradient_averages\[stem\.bias\]"):
        check_grads(tensors, [tensors.averages[1] if i == 1 else t for i, t in enumerate(some())])
    with pytest.raises(ValueError, match=r"^found_inf .* with params\[scale\]"):
        check_scale("found_inf", tensors.params[2], tensors, outer=False)
    averages, tensors.averages = tensors.averages, [*tensors.averages[:3], torch.zeros(0, 3)]
    with pytest.raises(ValueError, match=r"^gradient_averages\[head\] \(shape \(0, 3\)"):
        check_tensors(tensors, outer=False)
    tensors.averages = averages[:3]
    with pytest.raises(ValueError, match=r"^gradient_averages: expected 4"):
        check_tensors(tensors, outer=False)
    tensors.averages, tensors.params[0] = averages, torch.zeros(5, 6)[:, ::2]
    with pytest.raises(ValueError, match=r"^params\[stem\.weight\] .*: expected a dense tensor"):
        check_tensors(tensors, outer=False)


def test_overlaps_may_be_left_to_a_later_check():
    tensors = made(averages=some())
    grads = [tensors.averages[0], *some()[1:]]
    assert check_grads(tensors, grads, disjoint=False) == grads
    with pytest.raises(ValueError, match=r"^grads\[0\] .* shares memory with averages\[0\]"):
        check_disjoint({"params": tensors.params, "averages": tensors.averages}, {"grads": grads})
    tensors.averages[0] = tensors.params[0]
    check_tensors(tensors, outer=False, disjoint=False)
    with pytest.raises(ValueError, match=r"^averages\[0\] .* shares memory with params\[0\]"):
        check_tensors(tensors, outer=False)


def test_masters_of_wide_parameters_are_refused_below_the_operators():
    tensors = Tensors(params=some(), masters=some(), numbers=range(4), places=[Place(0, 99, 99)] * 4)
    with pytest.raises(ValueError, match=r"masters: expected none, since torch\.float32 parameters are their own masters"):
        check_tensors(tensors, outer=False)


def test_an_overlap_is_found_among_thousands():
    flat = torch.randn(5000, 4)
    params = [flat[i] for i in range(5000)]
    lists = Lists(params, [torch.ones(4)] * 5000, *([torch.zeros(4) for _ in params] for _ in range(5)))
    langevin(lists)
    lists.averages[1234] = flat.flatten()[4 * 3000 + 3 : 4 * 3000 + 7]
    kept = flat.clone()
    with pytest.raises(ValueError, match=r"^averages\[1234\] .* shares memory with params\[3000\]"):
        langevin(lists)
    assert torch.equal(flat, kept)
