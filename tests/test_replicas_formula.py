"""Parle and Elastic-SGD against their formulas, over the oracle's steps, and the methods that they turn into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from contract_cases import to_torch
from torch import Tensor, nn

import deeprelax_cuda as dr

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:rho=")]

L = 3
STEPS = 4 * L + 1
SHAPES = {"matrix": ((3, 5), torch.float32), "wide": ((4,), torch.float64), "narrow": ((9,), torch.bfloat16)}
NAMES = {
    "anchor": "x",
    "average": "m",
    "momentum": "v",
    "outer_momentum": "w",
    "consensus": "consensus",
    "master": "master",
}
#: What the options are where a case has no others.
PARLE: dict[str, Any] = {
    **{"lr": 0.3, "inner_lr": 0.1, "inner_steps": L, "gamma": 2.0, "scoping": 0.1, "gamma_min": 1.7, "temperature": 1e-2},
    **{"rho": 2.0, "rho_scoping": 0.3, "rho_min": 1.1, "consensus": "averages", "averaging": 0.75, "momentum": 0.9},
    **{"inner_momentum": 0.8, "nesterov": True, "dampening": 0.0, "weight_decay": 0.0, "outer_weight_decay": 0.0},
    **{"coupling_in_momentum": True, "reset_inner_momentum": False, "maximize": False, "rounding": "nearest"},
    **{"master_weights": False, "seed": 2**63 + 5},
}
ELASTIC: dict[str, Any] = {
    **{"lr": 0.1, "rho": 1.0, "rho_scoping": 0.1, "rho_min": 0.5, "temperature": 1e-2, "momentum": 0.9, "nesterov": True},
    **{"dampening": 0.0, "weight_decay": 0.0, "coupling_in_momentum": True, "maximize": False, "rounding": "nearest"},
    **{"master_weights": False, "seed": 5},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Parle": ("Parle", {}),
    "Parle of anchors, heavy ball": ("Parle", {"consensus": "anchors", "nesterov": False, "dampening": 0.25}),
    "Parle, decays": ("Parle", {"weight_decay": 0.1, "outer_weight_decay": 0.2, "maximize": True, "rho_scoping": 0.0}),
    "Parle without momenta": ("Parle", {"momentum": 0.0, "inner_momentum": 0.0, "averaging": "last"}),
    "Parle uncoupled": ("Parle", {"rho": math.inf, "averaging": "linear", "gamma": math.inf}),
    "Parle cleared": ("Parle", {"reset_inner_momentum": True, "coupling_in_momentum": False, "rounding": "stochastic"}),
    "Parle with masters": ("Parle", {"master_weights": True, "averaging": "linear", "consensus": "anchors"}),
    "ElasticSGD": ("ElasticSGD", {}),
    "ElasticSGD, heavy ball": ("ElasticSGD", {"nesterov": False, "dampening": 0.25, "weight_decay": 0.1}),
    "ElasticSGD without momentum": ("ElasticSGD", {"momentum": 0.0, "maximize": True, "rho_scoping": 0.0}),
    "ElasticSGD uncoupled": ("ElasticSGD", {"rho": math.inf, "temperature": 0.0}),
    "ElasticSGD, coupling outside": ("ElasticSGD", {"coupling_in_momentum": False, "rounding": "stochastic"}),
    "ElasticSGD with masters": ("ElasticSGD", {"master_weights": True}),
}


def start(replica: int) -> list[nn.Parameter]:
    """The parameters of a replica, which begin elsewhere than those of another."""
    generator = torch.Generator().manual_seed(replica)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape, dtype in SHAPES.values()]


def give_gradients(replicas: Sequence[Sequence[nn.Parameter]], step: int) -> None:
    for replica, params in enumerate(replicas):
        generator = torch.Generator().manual_seed(1000 * replica + step + 100)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def to_numpy(t: Tensor) -> np.ndarray:
    flat = t.detach().clone().flatten()
    return (flat.view(torch.uint16) if t.dtype == torch.bfloat16 else flat).numpy()


class ByHand:
    """The replicas as arrays, and the steps of the formula."""

    def __init__(self, method: str, options: dict[str, Any], replicas: Sequence[Sequence[Tensor]]) -> None:
        self.elastic, self.options = method == "ElasticSGD", options
        self.taken = self.outer_steps = 0
        seed, n = options["seed"], len(replicas)
        self.seeds = [oracle.derive_seed(seed, replica) if n > 1 else seed for replica in range(n)]
        self.members = [[self.beginning(to_numpy(p)) for p in params] for params in replicas]

    def beginning(self, y: np.ndarray) -> dict[str, np.ndarray]:
        x = oracle.widen(y)
        momenta = {"v": "momentum"} if self.elastic else {"v": "inner_momentum", "w": "momentum"}
        arrays = {"y": y, "x": x} | ({} if self.elastic else {"m": x, "consensus": x})
        arrays |= {role: np.zeros_like(x) for role, option in momenta.items() if self.options[option]}
        return arrays | ({"master": x} if self.options["master_weights"] and y.dtype == np.uint16 else {})

    def width(self, name: str, rate: str) -> float:
        first = self.options[name]
        if first == math.inf or self.options[rate] == 0.0:
            return first
        return max(self.options[f"{name}_min"], first / (1.0 + self.options[rate]) ** self.outer_steps)

    def inner(self) -> dict[str, Any]:
        """The numbers of the coming Langevin step."""
        o = self.options
        eta = o["lr" if self.elastic else "inner_lr"]
        numbers = {
            "eta": eta,
            "k": 1.0 / (self.width("rho", "rho_scoping") if self.elastic else self.width("gamma", "scoping")),
            "s": math.sqrt(2.0 * eta * o["temperature"]),
            "mu": o["momentum" if self.elastic else "inner_momentum"],
            "damp1": 1.0 - o["dampening"],
            "wd": o["weight_decay"],
            **{name: o[name] for name in ("nesterov", "maximize", "coupling_in_momentum")},
        }
        if self.elastic:
            return numbers
        weights = {"linear": 1.0 / (self.taken % L + 1), "last": 1.0}
        return {**numbers, "a": weights[o["averaging"]] if o["averaging"] in weights else 1.0 - o["averaging"]}

    def outer(self) -> dict[str, Any]:
        """The numbers of the coming outer step."""
        o = self.options
        numbers = {"lr": o["lr"], "mu_o": o["momentum"], "wd_o": o["outer_weight_decay"], "nesterov_o": o["nesterov"]}
        return {**numbers, "kr": 1.0 / self.width("rho", "rho_scoping")}

    def step(self, replicas: Sequence[Sequence[Tensor]]) -> None:
        ends = self.elastic or (self.taken + 1) % L == 0
        for seed, own, params in zip(self.seeds, self.members, replicas, strict=True):
            for number, (arrays, p) in enumerate(zip(own, params, strict=True)):
                arrays["g"] = to_numpy(p.grad)
                rounding = self.options["rounding"] if p.dtype == torch.bfloat16 else "nearest"
                place = {"seed": seed, "step": self.taken, "number": number, "rounding": rounding}
                arrays |= oracle.update(arrays, "langevin", **self.inner(), **place)
        if ends:
            for tensors in zip(*self.members, strict=True):
                self.exchange(tensors)
        for seed, own, params in zip(self.seeds, self.members, replicas, strict=True):
            for number, (arrays, p) in enumerate(zip(own, params, strict=True)) if ends and not self.elastic else ():
                rounding = self.options["rounding"] if p.dtype == torch.bfloat16 else "nearest"
                place = {"seed": seed, "step": self.taken, "number": number, "rounding": rounding}
                arrays |= oracle.update(arrays, "langevin", inner=False, outer=True, **self.outer(), **place)
                if self.options["reset_inner_momentum"]:
                    arrays["v"] = np.zeros_like(arrays["v"])
        self.taken += 1
        self.outer_steps += ends

    def exchange(self, tensors: Sequence[dict[str, np.ndarray]]) -> None:
        """Take the mean over the replicas of one of their tensors, each given as its arrays."""
        if self.elastic:
            offered = [arrays.get("master", oracle.widen(arrays["y"])) for arrays in tensors]
        else:
            offered = [arrays["m" if self.options["consensus"] == "averages" else "x"] for arrays in tensors]
        total = offered[0]
        for array in offered[1:]:
            total = total + array
        for arrays in tensors:
            arrays["x" if self.elastic else "consensus"] = total * total.dtype.type(1.0 / len(offered))


def assert_follows(optimizer: Any, replicas: Sequence[Sequence[Tensor]], want: ByHand) -> None:
    for own, params in zip(want.members, replicas, strict=True):
        for arrays, p in zip(own, params, strict=True):
            state = {NAMES[role]: t for role, t in optimizer.state[p].items() if role in NAMES}
            assert {"y", *state} == arrays.keys() - {"g"}
            for name, t in {**state, "y": p}.items():
                assert torch.equal(t.detach().flatten(), to_torch(arrays[name])), name


@pytest.mark.parametrize("backend", ["cpu", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_steps_are_those_of_the_formula(case: str, n: int, backend: str) -> None:
    method, changes = CASES[case]
    options = {**(PARLE if method == "Parle" else ELASTIC), **changes}
    replicas = [start(replica) for replica in range(n)]
    optimizer = getattr(dr, method)(replicas=replicas, backend=backend, **options)
    want = ByHand(method, options, replicas)
    for step in range(STEPS):
        give_gradients(replicas, step)
        want.step(replicas)
        optimizer.step()
        assert_follows(optimizer, replicas, want)
        for group in optimizer.param_groups:
            assert group["rho"] == pytest.approx(want.width("rho", "rho_scoping"), rel=1e-15)
            assert group["outer_steps"] == want.outer_steps
    if options["rho"] < math.inf and options["rho_scoping"]:
        assert optimizer.param_groups[0]["rho"] == options["rho_min"], "the floor was reached"
    optimizer.eval()
    shown = "x" if n == 1 or method == "ElasticSGD" else "consensus"
    for i, params in enumerate(zip(*replicas, strict=True)):
        assert all(torch.equal(p, params[0]) for p in params), "all have one answer"
        assert torch.equal(params[0].detach().flatten(), to_torch(want.members[0][i][shown]).to(params[0].dtype))


def ran(optimizer: Any, replicas: Sequence[Sequence[nn.Parameter]], steps: int) -> list[list[Tensor]]:
    """Take steps, and return copies of the parameters after each and of what `eval` shows then."""
    seen = []
    for step in range(steps):
        give_gradients(replicas, step)
        optimizer.step()
        live = [p.detach().clone() for params in replicas for p in params]
        optimizer.eval()
        seen.append([*live, *(p.detach().clone() for params in replicas for p in params)])
        optimizer.train()
    return seen


def same(got: list[list[Tensor]], want: list[list[Tensor]]) -> bool:
    return len(got) == len(want) and all(all(map(torch.equal, a, b)) for a, b in zip(got, want, strict=True))


def of_entropy_sgd(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not name.startswith("rho") and name != "consensus"}


@pytest.mark.parametrize(
    "changes",
    [{}, {"averaging": "linear"}, {"rounding": "stochastic", "temperature": 0.0}, {"master_weights": True, "momentum": 0.0}],
    ids=["scoping", "linear", "stochastic", "masters"],
)
def test_one_uncoupled_replica_is_entropy_sgd_bit_for_bit(changes: dict[str, Any]) -> None:
    options = {**PARLE, "rho": math.inf, **changes}
    one, alone = start(0), start(0)
    parle, entropy_sgd = dr.Parle(replicas=[one], **options), dr.EntropySGD(alone, **of_entropy_sgd(options))
    assert same(ran(parle, [one], STEPS), ran(entropy_sgd, [alone], STEPS))
    for p, q in zip(one, alone, strict=True):
        assert parle.state[p].keys() - entropy_sgd.state[q].keys() == {"consensus"}
        for role, value in entropy_sgd.state[q].items():
            assert torch.equal(torch.as_tensor(parle.state[p][role]), torch.as_tensor(value)), role


def test_uncoupled_replicas_are_entropy_sgds_with_seeds_of_their_own() -> None:
    options = {**PARLE, "rho": math.inf}
    replicas, alone = ([start(replica) for replica in range(3)] for _ in range(2))
    parle = dr.Parle(replicas=replicas, **options)
    others = [
        dr.EntropySGD(params, **of_entropy_sgd({**options, "seed": dr.derive_seed(options["seed"], replica)}))
        for replica, params in enumerate(alone)
    ]
    for step in range(STEPS):
        give_gradients(replicas, step)
        give_gradients(alone, step)
        parle.step()
        for entropy_sgd in others:
            entropy_sgd.step()
        for params, of_one, entropy_sgd in zip(replicas, alone, others, strict=True):
            for p, q in zip(params, of_one, strict=True):
                assert torch.equal(p, q)
                assert torch.equal(parle.state[p]["anchor"], entropy_sgd.state[q]["anchor"])


def test_with_rho_of_lr_the_replicas_end_at_their_consensus_as_lr_vanishes() -> None:
    """x - c is lr*(m - x) after an outer step without momentum: what is left falls with lr."""
    left = []
    for lr in (1e-3, 1e-4, 1e-5):
        replicas = [[nn.Parameter(p.detach().double()) for p in start(replica)] for replica in range(3)]
        options = {"lr": lr, "rho": lr, "rho_scoping": 0.0, "rho_min": 0.0, "momentum": 0.0, "inner_steps": L, "seed": 0}
        with pytest.warns(UserWarning, match="lr=.* hardly moves the anchor"):
            optimizer = dr.Parle(replicas=replicas, **options)
        distances = []
        for step in range(3 * L):
            give_gradients(replicas, step)
            optimizer.step()
            if optimizer.at_outer_boundary:
                away = [(p.detach() - optimizer.state[p]["consensus"]).abs().max() for own in replicas for p in own]
                distances.append(float(max(away)))
        left.append(distances)
    for coarse, fine in pairwise(left):
        for a, b in zip(coarse, fine, strict=True):
            assert a / b == pytest.approx(10.0, rel=0.02)
    assert left[-1][-1] < 1e-4


@pytest.mark.parametrize("nesterov", [True, False])
def test_uncoupled_elastic_sgd_is_sgd_with_momentum_and_its_answer_the_mean(nesterov: bool) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.01}
    replicas, alone, theirs = ([start(replica) for replica in range(2)] for _ in range(3))
    elastic = dr.ElasticSGD(replicas=replicas, rho=math.inf, seed=0, **options)
    as_sgd = {"inner_steps": 1, "gamma": math.inf, "temperature": 0.0, "averaging": "last", "lr": 1.0, "momentum": 0.0}
    ours = [
        dr.EntropySGD(params, **as_sgd, inner_lr=0.1, inner_momentum=0.9, nesterov=nesterov, weight_decay=0.01, seed=0)
        for params in alone
    ]
    sgds = [torch.optim.SGD(params, **options) for params in theirs]
    for step in range(STEPS):
        for params in (replicas, alone, theirs):
            give_gradients(params, step)
        for optimizer in (elastic, *ours, *sgds):
            optimizer.step()
        for own, of_one, of_sgd in zip(replicas, alone, theirs, strict=True):
            assert all(map(torch.equal, own, of_one))
            torch.testing.assert_close(own[0], of_sgd[0])
        for p, q in zip(*replicas, strict=True):
            assert torch.equal(elastic.state[p]["anchor"], elastic.state[q]["anchor"])
            widest = elastic.state[p]["anchor"].dtype
            assert torch.equal(elastic.state[p]["anchor"], (p.detach().to(widest) + q.detach().to(widest)) * 0.5)


@pytest.mark.parametrize("tensors", [1, 4])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("method", ["Parle", "ElasticSGD"])
def test_defect_schedules_advance_once_for_each_tensor(method: str, n: int, tensors: int) -> None:
    """A published Parle lets gamma and rho shrink inside its loop over the tensors: faster, the more there are."""
    replicas = [[nn.Parameter(torch.ones(3)) for _ in range(tensors)] for _ in range(n)]
    options = {"rho": 8.0, "rho_scoping": 1.0, "seed": 0}
    options |= {"gamma": 8.0, "scoping": 1.0, "inner_steps": L} if method == "Parle" else {}
    groups = [[{"params": own[:1]}, *([{"params": own[1:]}] if tensors > 1 else [])] for own in replicas]
    optimizer = getattr(dr, method)(replicas=groups, **options)
    length = L if method == "Parle" else 1
    for step in range(2 * L):
        give_gradients(replicas, step)
        optimizer.step()
        for group in optimizer.param_groups:
            outer = (step + 1) // length
            assert group["outer_steps"] == outer
            assert group["rho"] == max(0.1, 8.0 / 2.0**outer)
            assert group["gamma"] == (max(1.0, 8.0 / 2.0**outer) if method == "Parle" else math.inf)


@pytest.mark.parametrize("method", ["Parle", "ElasticSGD"])
def test_noise_is_that_of_the_replica_and_of_the_place_within_it(method: str) -> None:
    """Wherever a tensor is dealt out to groups, and in whatever order the groups have come; no two have the same."""
    replicas = [[nn.Parameter(torch.zeros(100)) for _ in range(3)] for _ in range(3)]
    rates = {"lr": 1.0, "rho": 10.0} | ({"inner_lr": 1.0} if method == "Parle" else {})
    groups = [[{"params": own[:1]}, {"params": own[1:2]}] for own in replicas]
    optimizer = getattr(dr, method)(replicas=groups, temperature=0.5, seed=7, **rates)
    for replica in (2, 0, 1):
        optimizer.add_param_group({"params": replicas[replica][2:], "replica": replica})
    for p in (p for own in replicas for p in own):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    drawn = [p.detach() for own in replicas for p in own]
    places = [(replica, number) for replica in range(3) for number in range(3)]
    for noise, (replica, number) in zip(drawn, places, strict=True):
        assert torch.equal(noise, dr.functional.gaussian(100, seed=dr.derive_seed(7, replica), step=0, stream=number))
    assert len({tuple(noise.tolist()) for noise in drawn}) == len(drawn)


@pytest.mark.parametrize("method", ["Parle", "ElasticSGD"])
def test_the_mean_of_two_equal_replicas_is_what_they_are(method: str) -> None:
    replicas = [start(0), start(0)]
    settings = {**(PARLE if method == "Parle" else ELASTIC), "temperature": 0.0}
    settings |= {"consensus": "anchors"} if method == "Parle" else {}
    optimizer = getattr(dr, method)(replicas=replicas, **settings)
    for step in range(3 * L):
        give_gradients([replicas[0]], step)
        for p, q in zip(*replicas, strict=True):
            q.grad = p.grad.clone()
        anchors = {p: optimizer.state[p]["anchor"].clone() for p in replicas[0] if optimizer.state[p]}
        optimizer.step()
        assert all(map(torch.equal, *replicas))
        for p in replicas[0] if optimizer.at_outer_boundary else ():
            state = optimizer.state[p]
            agreed, own = (state["consensus"], anchors[p]) if method == "Parle" else (state["anchor"], p.detach())
            assert torch.equal(agreed, own.to(agreed.dtype))
