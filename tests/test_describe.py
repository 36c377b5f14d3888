"""describe(): the words against what they claim, of EntropySGD and of what all methods share."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest
import torch
from described import read
from optim_runs import KINDS, METHODS, L, assert_equal, backward, counters, small_model, snapshot, walk
from torch import nn

from deeprelax_cuda.optim import EntropySGD
from deeprelax_cuda.optim import constants as c
from deeprelax_cuda.optim.base import RelaxationOptimizer
from deeprelax_cuda.optim.describe import number
from deeprelax_cuda.optim.scoping import gamma_of

pytestmark = pytest.mark.filterwarnings("ignore:lr=")


#: Settings of which nothing is to be said.
QUIET: dict[str, Any] = {"gamma": 1.0, "scoping": 0.0, "temperature": 0.0, "inner_momentum": 0.0, "seed": 0}


def told(grad: float | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[dict[str, Any], list[str]]:
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    p.grad = None if grad is None else torch.full_like(p, grad)
    return read(EntropySGD([p], **{**QUIET, **options}).describe())


BF16, HALF, SINGLE = {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"dtype": torch.float32}
SEEN = {"inner_momentum": 0.5, "temperature": 1e-4}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("lr=0.0099 hardly moves the anchor", {"lr": 0.0099}, {"lr": 0.01}),
    ("lr=5e-5 hardly moves the anchor", {"lr": torch.tensor(5e-5, dtype=torch.float64)}, {"lr": torch.tensor(0.1)}),
    ("lr=0.21 with momentum=0.9 goes 2.1 times .*lr=0.1 goes it once", {"lr": 0.21}, {"lr": 0.2}),
    ("gamma=2.01: .*hardly acts.*act with gamma=2.$", {"gamma": 2.01}, {"gamma": 2.0}),
    (
        "gamma=21: .*hardly acts.*act with gamma=20.$",
        {"gamma": 21.0, "inner_momentum": 0.9},
        {"gamma": 20.0, "inner_momentum": 0.9},
    ),
    (
        "gamma=3: .*hardly acts.*act with gamma=2.$",
        {"gamma": 3.0, "inner_momentum": 0.9, "coupling_in_momentum": False},
        {"gamma": 2.0, "inner_momentum": 0.9, "coupling_in_momentum": False},
    ),
    (
        "gamma=3: .*gamma=2, where scoping=0.1 brings it at outer step 5 .gradient evaluation 100.",
        {"gamma": 3.0, "scoping": 0.1, "gamma_min": 0.5},
        {"gamma": 2.0, "scoping": 0.1, "gamma_min": 0.5},
    ),
    (
        "gamma=3: .*gamma=2, where gamma_total=3 brings it at outer step 1 .gradient evaluation 20.",
        {"gamma_total": 3.0, "gamma_min": 0.5},
        {"gamma_total": 2.0, "gamma_min": 0.5},
    ),
    ("gamma=inf: nothing couples", {"gamma": math.inf}, {"gamma": 2.0}),
    ("gamma=0.05: the coupling makes.*diverge.*is not below 2. Set gamma=0.1 or more", {"gamma": 0.05}, {"gamma": 0.0509}),
    ("gamma=0.0507: .*y swings about x for 35.7 .*has 20; gamma=2 would", {"gamma": 0.0507}, {"gamma": 0.0509}),
    (
        "Set gamma_min=0.1 or more",
        {"gamma": 0.05, "scoping": 0.01},
        {"gamma": 0.06, "scoping": 0.01, "gamma_min": 0.0501},
    ),
    (
        "scoping=0.01: .*diverge from outer step 302 .*passes 2. .*set gamma_min=0.1 or more",
        {"scoping": 0.01, "gamma_min": 0.0499},
        {"scoping": 0.01, "gamma_min": 0.0501},
    ),
    (
        "gamma_total=0.5: .*diverge from outer step 1 .gradient evaluation 5.* on",
        {"gamma_total": 0.5, "gamma_min": 0.04, "inner_steps": 5, "gamma": 0.5, "averaging": 0.5, "inner_lr": 0.1},
        {"gamma_total": 0.5, "gamma_min": 0.06, "inner_steps": 5, "gamma": 0.5, "averaging": 0.5, "inner_lr": 0.1},
    ),
    ("scoping=6.9e-6 does nothing", {"scoping": 6.9e-6, "gamma_min": 0.5}, {"scoping": 7e-6, "gamma_min": 0.5}),
    ("gamma is at its floor, gamma_min=1", {"scoping": 0.01, "gamma_min": 1.0}, {"scoping": 0.01, "gamma_min": 0.99}),
    ("gamma_min=0.5 does nothing", {"gamma_min": 0.5}, {"gamma_min": 0.5, "scoping": 0.1}),
    ("averaging=0: nothing is averaged", {"averaging": 0.0}, {"averaging": 0.01}),
    ('averaging="last": nothing is averaged', {"averaging": "last"}, {"averaging": "linear"}),
    (
        "^inner_steps=1: nothing is averaged",
        {"inner_steps": 1, "gamma": 0.1, "averaging": "linear"},
        {"inner_steps": 2, "gamma": 0.1, "averaging": "linear"},
    ),
    ("averaging=0.966: .*still 50.1 % x", {"averaging": 0.966}, {"averaging": 0.965}),
    ("nesterov=True is ignored", {"momentum": 0.0}, {"momentum": 0.0, "nesterov": False}),
    ("^dampening: without effect", {"dampening": 0.5}, {"dampening": 0.5, "inner_momentum": 0.5}),
    (
        "^dampening and reset_inner_momentum: without effect",
        {"reset_inner_momentum": True, "dampening": 1.0},
        {"reset_inner_momentum": True, "inner_momentum": 0.5},
    ),
    (
        "dampening=1 without nesterov: no gradient",
        {"dampening": 1.0, "inner_momentum": 0.5, "nesterov": False},
        {"dampening": 1.0, "inner_momentum": 0.5, "nesterov": True},
    ),
    (
        "reset_inner_momentum: .*ends before inner_momentum=0.96 has built up, which takes 25",
        {"reset_inner_momentum": True, "inner_momentum": 0.96, "coupling_in_momentum": False},
        {"reset_inner_momentum": True, "inner_momentum": 0.95, "coupling_in_momentum": False},
    ),
    ("inner_momentum=0.5: temperature is that of u only", SEEN, {**SEEN, "inner_momentum": 0.0}),
    ("inner_momentum=0.5: temperature is that of u only", SEEN, {**SEEN, "temperature": 0.0}),
    (
        "inner_momentum=0.9 is remembered for .* inner steps and a period has 5",
        {"inner_momentum": 0.9, "inner_steps": 5},
        {"inner_momentum": 0.9, "inner_steps": 15},
    ),
    ("inner_lr=0: the inner loop stands still", {"inner_lr": 0.0, "temperature": 1.0, "grad": 1.0}, {"grad": 1.0}),
    (
        "temperature=4.9e-8: .* 0.00099 of its drift; it might as well be 0. temperature=0.0005 ",
        {"grad": 1.0, "temperature": 4.9e-8},
        {"grad": 1.0, "temperature": 5.1e-8},
    ),
    (
        "temperature=0.051: .* 1.01 of its drift; y wanders.*temperature=0.0005 ",
        {"grad": 1.0, "temperature": 0.051},
        {"grad": 1.0, "temperature": 0.049},
    ),
    (
        "the noise .0.00387. of.*bfloat16 is 0.00391; rounding=",
        {**BF16, "temperature": 7.5e-5},
        {**BF16, "temperature": 7.7e-5},
    ),
    ("the noise .*bfloat16", {**BF16, "temperature": 7.5e-5}, {**BF16, "temperature": 7.5e-5, "rounding": "stochastic"}),
    ("the noise .*bfloat16", {**BF16, "temperature": 7.5e-5}, {**BF16, "temperature": 7.5e-5, "master_weights": True}),
    ("the drift .*bfloat16", {**BF16, "grad": 0.038}, {**BF16, "grad": 0.04}),
    (
        "the noise .0.000775. and drift .0.001. of",
        {**BF16, "grad": 0.01, "temperature": 3e-6},
        {**BF16, "grad": 1.0, "temperature": 1e-3},
    ),
    ("the noise .*float16 is 0.000488; master_weights=True", {**HALF, "temperature": 1.1e-6}, {**HALF, "temperature": 1.3e-6}),
    ("the noise .*float32 is 5.96e-8; it wants", {**SINGLE, "temperature": 1e-15}, {**SINGLE, "temperature": 1e-13}),
    (
        "the noise .*float32",
        {**BF16, "temperature": 1e-15, "master_weights": True},
        {**BF16, "temperature": 1e-13, "master_weights": True},
    ),
]


@pytest.mark.parametrize(("sentence", "holds", "does_not"), CASES, ids=[case[0][:40] for case in CASES])
def test_advice_is_given_exactly_where_it_holds(sentence: str, holds: dict[str, Any], does_not: dict[str, Any]) -> None:
    _, advice = told(**holds)
    assert len(advice) == 1
    assert re.search(sentence, advice[0]), advice[0]
    assert told(**does_not)[1] == []


def test_nothing_to_say_is_said() -> None:
    p = nn.Parameter(torch.ones(4))
    assert EntropySGD([p], **QUIET).describe().splitlines()[-1].startswith("Advice: none")
    assert EntropySGD([p]).describe().count("Advice\n") == 1


def test_numbers_of_the_defaults() -> None:
    p, q = nn.Parameter(torch.ones(30)), nn.Parameter(torch.ones(10))
    p.grad, q.grad = torch.full((30,), 0.02), torch.zeros(10)
    lines, advice = read(EntropySGD([p, q]).describe())
    assert lines["run"] == ("0 of 20", "inner steps of this period taken, 0 in all; 0 outer steps done")
    assert lines["group 0"][1] == "2 parameters, 40 elements, float32"
    assert lines["inner step"][0] == "0.1"
    assert "with Nesterov momentum 0.9 effectively 1; stable for curvatures of the loss up to 13.6" in lines["inner step"][1]
    rms = 0.02 * math.sqrt(0.75)
    assert lines["drift"][0] == number(0.1 * rms) == "0.00173"
    assert f"root mean square {number(rms)} of the gradients; with momentum up to 0.0173" in lines["drift"][1]
    assert lines["noise"][0] == "4.47e-5"
    for part in ("1/beta = 1e-8", "sqrt(T) = 0.0001", "sqrt(L) = 0.0002 a period", "0.00258 of the drift with momentum"):
        assert part in lines["noise"][1]
    assert lines["T_eff"] == ("1e-9", "= 0.1 T, the temperature of y in the end where inner_lr*h << (1-inner_momentum)^2")
    for mark, q_h in (("'", 0.01), ("''", 0.1), ("'''", 1.0)):
        ratio = c.effective_temperature(c.Momentum(0.9, nesterov=True), q_h, 1e-5)
        h = number(q_h / 0.1)
        assert lines["T_eff" + mark] == (number(1e-8 * ratio), f"= {number(ratio)} T at h = {q_h:g}/inner_lr = {h}")
    assert lines["coupling"] == ("0.0001", "stiffness 1/gamma; its step is inner_lr/gamma = 1e-5, stable below 1.36")
    assert lines["relaxation"][0] == "9,990"
    assert "gamma*(1-inner_momentum)/inner_lr where it is weak; a period has 20" in lines["relaxation"][1]
    assert lines["average"] == ("4", "inner steps count in m, 1/(1 - averaging) for averaging=0.75")
    assert lines["gamma"] == ("10,000", "halves in 693 outer steps, ln 2/ln(1 + scoping) for scoping=0.001; no floor")
    assert lines["outer step"][0] == "0.1"
    assert lines["outer step"][1].endswith("with momentum 0.9 effectively 1")
    assert lines["cost"] == ("20", "gradient evaluations an outer step")
    assert lines["state"][0] == "16"
    assert "x 4, m 4, w 4, v 4; 640 bytes in all; eval() adds 4 for the copy of y" in lines["state"][1]
    assert [s.split(":")[0] for s in advice] == ["inner_momentum=0.9", "scoping=0.001", "gamma=10000"]


@pytest.mark.parametrize("rule", [{"scoping": 0.003}, {"gamma_total": 50.0, "gamma_min": 0.05}], ids=str)
def test_outer_steps_until_something_happens_are_those_of_the_schedule(rule: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(1))
    optimizer = EntropySGD([p], gamma=30.0, inner_steps=4, **rule)
    text = " ".join(optimizer.describe().split())
    group, limit = optimizer.param_groups[0], c.stability_limit(c.Momentum(0.9, nesterov=True), coupling=True)
    gammas = [gamma_of({**group, "outer_steps": n}) for n in range(4000)]
    diverges = next(n for n, gamma in enumerate(gammas) if 0.1 / gamma >= limit)
    acts = next(n for n, gamma in enumerate(gammas) if gamma <= 4.0)
    assert f"diverge from outer step {diverges:,} (gradient evaluation {4 * diverges:,}) on" in text
    assert f"brings it at outer step {acts:,} (gradient evaluation {4 * acts:,})" in text
    if "gamma_total" in rule:
        floor = next(n for n, gamma in enumerate(gammas) if gamma == 0.05)
        assert (
            f"less 0.4 an outer step; gamma, scoping are ignored; at the floor gamma_min=0.05 from outer step {floor} " in text
        )


def test_gamma_that_was_set_by_hand_is_the_one_described() -> None:
    optimizer = EntropySGD([nn.Parameter(torch.ones(1))], **QUIET)
    optimizer.param_groups[0]["gamma"] = 0.5
    lines, _ = read(optimizer.describe())
    assert lines["gamma"] == ("0.5", "fixed: scoping=0")
    assert lines["coupling"][0] == "2"
    optimizer.param_groups[0].update(gamma=3.0, scoping=0.1, gamma_min=0.5)  # until the next outer step
    assert "where scoping=0.1 brings it at outer step 1 (gradient evaluation 20)" in " ".join(optimizer.describe().split())


def test_other_settings_have_their_lines() -> None:
    assert told(weight_decay=0.01)[0]["weight decay"] == ("0.01", "in the gradient: a part 0.001 of y a step, with momentum")
    assert told(outer_weight_decay=0.01)[0]["outer decay"][0] == "0.01"
    assert told(averaging="linear")[0]["average"] == ("20", "inner steps in m, the plain mean of the period: L/2 = 10 old")
    assert told(averaging="last")[0]["average"][0] == "1"
    assert "gamma/(inner_lr*5.5) where" in told(inner_momentum=0.9, dampening=0.5)[0]["relaxation"][1]
    free = told(inner_momentum=0.96, coupling_in_momentum=False)[0]["relaxation"]
    assert free == told()[0]["relaxation"], "momentum that does not see the coupling has no part in it"
    assert "gamma/inner_lr where" in told()[0]["relaxation"][1]
    assert told(gamma=0.01)[0]["relaxation"][0] == "inf"
    assert told(temperature=1.0, inner_lr=0.4, gamma=0.25)[0]["T_eff'''"] == ("inf", "diverges at h = 1/inner_lr = 2.5")
    assert "were the momentum not reset" in told(**SEEN, reset_inner_momentum=True)[0]["T_eff"][1]
    assert told()[0]["noise"] == ("0", "none: temperature=0")
    assert told(temperature=1.0, inner_lr=0.0)[0]["noise"] == ("0", "none: inner_lr=0")


# What is read, and that nothing is written.


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("steps", [0, L - 1, L])
def test_nothing_is_changed(kind: dict[str, Any], mode: str, steps: int) -> None:
    options = dict(kind)
    model = small_model(options.pop("dtype"))
    optimizer = METHODS["EntropySGD"](model.parameters(), **options)
    walk(model, optimizer, range(steps))
    backward(model, steps)
    next(model.parameters()).grad = None
    if mode == "eval":
        optimizer.eval()
    before, numbers, states = snapshot(model, optimizer), counters(optimizer), len(optimizer.state)
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    versions = [t._version for p in model.parameters() for t in (p, p.grad) if t is not None]
    generator, other = torch.get_rng_state(), random.getstate()
    optimizer.describe()
    assert_equal(snapshot(model, optimizer), before)
    assert (counters(optimizer), len(optimizer.state)) == (numbers, states)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) if grad is None else torch.equal(p.grad, grad)
    assert [t._version for p in model.parameters() for t in (p, p.grad) if t is not None] == versions
    assert torch.equal(torch.get_rng_state(), generator)
    assert random.getstate() == other


@pytest.mark.parametrize("kind", [*KINDS, {"dtype": torch.float16}, {"dtype": torch.float32, "inner_momentum": 0.0}], ids=str)
def test_bytes_of_the_state_are_those_it_has(kind: dict[str, Any]) -> None:
    options = dict(kind)
    model = small_model(options.pop("dtype"))
    model[2].bias.requires_grad_(False)
    optimizer = METHODS["EntropySGD"](model.parameters(), **options)

    def said() -> tuple[int, int]:
        figure, words = read(optimizer.describe())[0]["state"]
        return int(figure), int(re.search(r"([\d,]+) bytes in all", words)[1].replace(",", ""))

    def real() -> int:
        states = optimizer.state.values()
        return sum(t.nbytes for state in states for role, t in state.items() if role != "period_steps")

    predicted = said()
    walk(model, optimizer, range(1))
    stepped = sum(p.numel() for p in optimizer.state)
    assert stepped == sum(p.numel() for p in model.parameters()) - 2
    assert predicted == said() == (real() // stepped, real())
    optimizer.eval()
    assert said() == (real() // stepped, real())
    assert said() > predicted


def test_where_the_run_is() -> None:
    model = small_model()
    optimizer = METHODS["EntropySGD"](model.parameters())
    walk(model, optimizer, range(L + 2))
    lines, _ = read(optimizer.describe())
    assert lines["run"] == ("2 of 3", "inner steps of this period taken, 5 in all; 1 outer step done")
    assert lines["mode"] == ("train", "the parameters hold the live weights y; eval() shows the anchor x")
    assert lines["gamma"][0] == number(2.0 / 1.1)
    optimizer.eval()
    assert read(optimizer.describe())[0]["mode"] == (
        "eval",
        "the parameters hold the anchor x; train() brings the live weights y back",
    )
    optimizer.train()
    walk(model, optimizer, range(1))
    assert read(optimizer.describe())[0]["mode"] == ("train", "the parameters hold y = x: a period begins")
    assert f"{optimizer.explain().split()[0]} " in optimizer.describe()


def test_live_weights_are_measured_in_eval_mode_too() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = EntropySGD([p], **{**QUIET, "temperature": 1e-6})
    p.grad = torch.full_like(p, -100.0)
    optimizer.step()
    (said,) = [s for s in read(optimizer.describe())[1] if s.startswith("Most")]
    assert "weights of size 11 in bfloat16 is 0.0312" in said
    optimizer.eval()
    assert float(p.detach()[0]) == 1.0
    assert said in read(optimizer.describe())[1]


def test_gradients_are_read_as_they_are() -> None:
    ps = [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.float16, torch.float64, torch.float32)]
    optimizer = EntropySGD(ps, **QUIET)
    assert read(optimizer.describe())[0]["drift"][0] == "?"
    ps[0].grad = torch.full((2,), 3e30)  # their squares are beyond float32
    ps[1].grad = torch.zeros(2, dtype=torch.float16)
    words = read(optimizer.describe())[0]["drift"]
    assert words[0] == number(0.1 * 3e30 / math.sqrt(2.0))
    assert "(of 2 of 4 parameters)" in words[1]
    ps[0].grad = None
    assert read(optimizer.describe())[0]["drift"][0] == "0"
    for value in (math.nan, math.inf):
        ps[2].grad = torch.tensor([1.0, value], dtype=torch.float64)
        lines, advice = read(optimizer.describe())
        assert lines["drift"] == ("nan", "gradients hold inf or nan: they are compared with nothing")
        assert advice == []
    ps[2].grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, dtype=torch.float64), (2,), check_invariants=True)
    assert read(optimizer.describe())[0]["drift"][0] == "0"


def test_groups_of_equal_numbers_share_a_block() -> None:
    ps = [nn.Parameter(torch.ones(i + 1)) for i in range(5)]
    lrs = [0.1, 0.001, torch.tensor(0.1, dtype=torch.float64), 0.1, 0.001]
    groups = [{"params": [(f"p{i}", p)], "lr": lr} for i, (p, lr) in enumerate(zip(ps, lrs, strict=True))]
    optimizer = EntropySGD(groups, **QUIET)
    for p in ps:
        p.grad = torch.full_like(p, float(len(p)))
    text = optimizer.describe()
    lines, advice = read(text)
    assert [line for line in text.splitlines() if line.startswith("group")] == [
        "groups 0, 2 to 3: 3 parameters, 8 elements, float32",
        "groups 1, 4: 2 parameters, 7 elements, float32",
    ]
    assert lines["drift"][0] == number(0.1 * math.sqrt((2 * 2**2 + 5 * 5**2) / 7)), "the block that comes last"
    assert len(advice) == 1
    assert advice[0].startswith("groups 1, 4: lr=0.001 hardly moves")
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
        group["nesterov"] = False
        group["averaging"] = "last"
    assert [s.split(":")[0] for s in read(optimizer.describe())[1]] == ['averaging="last"', "groups 1, 4"]


def test_empty_tensors_and_types_have_their_lines() -> None:
    ps = [
        nn.Parameter(torch.ones(0, 3)),
        nn.Parameter(torch.ones((), dtype=torch.bfloat16)),
        nn.Parameter(torch.ones(2, device="meta")),
    ]
    ps[0].grad = torch.ones(0, 3)
    text = EntropySGD(ps, backend="eager", **QUIET).describe()
    assert "3 parameters, 3 elements, float32, bfloat16" in text
    assert len([line for line in text.splitlines() if line.startswith("  state")]) == 2
    assert read(text)[0]["drift"][0] == "0"


def test_backend_that_cannot_serve_is_described_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPRELAX_BACKEND", "eager")
    optimizer = EntropySGD([nn.Parameter(torch.ones(2))], fused=True, **QUIET)
    number_, words = read(optimizer.describe())[0]["backend"]
    assert number_ == "none"
    assert words.startswith("fused: True refuses the eager backend")


def test_method_without_words_of_its_own_is_described() -> None:
    class Bare(EntropySGD):
        _notes = RelaxationOptimizer._notes

    lines, _ = read(Bare([nn.Parameter(torch.ones(2))], **QUIET).describe())
    assert "outer step" in lines
    assert "noise" not in lines
