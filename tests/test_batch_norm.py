"""Batch norm at the anchor: the statistics that an evaluation sees, and that training never sees them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optim_runs import METHODS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import deeprelax_cuda as dr

BATCHES, SIZE = 5, 8
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    **METHODS,
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
}

pytestmark = pytest.mark.usefixtures("one_thread")


class Network(nn.Module):
    """Dropout before and after batch norm, one layer that is called twice, and one that nothing reaches."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.conv = nn.Conv1d(2, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.twice = nn.BatchNorm1d(4, momentum=None, affine=False)
        self.untracked = nn.BatchNorm1d(4, track_running_stats=False)
        self.unreached = nn.BatchNorm1d(3)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(self.conv(self.drop(x))).relu())
        h = self.untracked(self.twice(self.twice(h).square()))
        return self.out(h.mean(2))


def network(dropout: float = 0.5) -> Network:
    """A network in training mode whose buffers are those of a few steps of training."""
    torch.manual_seed(0)
    model = Network(dropout)
    for t in data()[:3]:
        model(3.0 * t)
    return model


def data(batches: int = BATCHES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SIZE, 2, 6, generator=generator) * (i + 1) + i for i in range(batches)]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.named_buffers()}


def assert_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert got[name].dtype == t.dtype, name
        assert torch.equal(got[name].view(torch.uint8), t.view(torch.uint8)) if t.dim() else got[name] == t, name


def modes(model: nn.Module) -> list[tuple[Any, ...]]:
    return [(m.training, getattr(m, "momentum", 0), len(m._forward_hooks)) for m in model.modules()]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel, in float64."""
    values = x.double().transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1)


def normalized(x: Tensor) -> Tensor:
    mean, var = moments(x)
    n = x.numel() // x.shape[1]
    return (x.double() - mean[:, None]) / (var[:, None] * (n - 1) / n + 1e-5).sqrt()


@torch.no_grad()
def by_hand(model: Network, loader: list[Tensor]) -> dict[str, Tensor]:
    """The statistics at the present weights without dropout, from the definition, in float64."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"norm": [], "twice": []}
    weight, bias = (t.double()[:, None] for t in (model.norm.weight, model.norm.bias))
    for x in loader:
        h = nn.functional.conv1d(x.double(), model.conv.weight.double(), model.conv.bias.double())
        found["norm"].append(moments(h))
        h = (normalized(h) * weight + bias).relu()
        found["twice"].append(moments(h))
        h = normalized(h).square()
        found["twice"].append(moments(h))
    return {
        f"{layer}.running_{kind}": torch.stack([both[i] for both in batches]).mean(0)
        for layer, batches in found.items()
        for i, kind in enumerate(("mean", "var"))
    }


# What the body sees.


def test_statistics_are_the_plain_means_at_these_weights() -> None:
    model = network()
    before = buffers(model)
    want = by_hand(model, data())
    with dr.recalibrate_batch_norm(model, data()):
        found = buffers(model)
        for name, statistic in want.items():
            torch.testing.assert_close(found[name].double(), statistic, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(found[name], before[name], rtol=1e-3)


def test_predictions_are_those_of_a_model_with_these_statistics() -> None:
    model = network()
    other = copy.deepcopy(model)
    other.load_state_dict({**other.state_dict(), **by_hand(other, data())})
    x = data(7)[-1]
    with torch.no_grad(), dr.recalibrate_batch_norm(model, data()):
        got = model.eval()(x)
    torch.testing.assert_close(got, other.eval()(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, model(x), rtol=0.1), "with the buffers of training"


def test_dropout_is_off_in_the_pass_alone() -> None:
    with_dropout, without = network(), network(dropout=0.0)
    without.load_state_dict(with_dropout.state_dict())
    with dr.recalibrate_batch_norm(with_dropout, data()), dr.recalibrate_batch_norm(without, data()):
        assert_bits(buffers(with_dropout), buffers(without))
        assert with_dropout.drop.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_mean_of_many_batches_in_other_types(dtype: torch.dtype) -> None:
    """A mean that runs in bfloat16 buffers would be off by a third here."""
    generator = torch.Generator().manual_seed(0)
    loader = [(torch.randn(64, 8, generator=generator) * 2 + 3).to(dtype) for _ in range(300)]
    layer = nn.BatchNorm1d(8).to(dtype)
    each = [moments(x) for x in loader]
    tolerance = 2.0 * torch.finfo(dtype).eps
    with dr.recalibrate_batch_norm(layer, loader):
        for i, statistic in enumerate((layer.running_mean, layer.running_var)):
            assert statistic is not None
            want = torch.stack([both[i] for both in each]).mean(0)
            assert statistic.dtype == dtype
            torch.testing.assert_close(statistic.double(), want, rtol=max(tolerance, 1e-12), atol=0)


def test_buffers_of_training_have_no_part_in_it() -> None:
    model, diverged = network(), network()
    with torch.no_grad():
        for name, t in diverged.named_buffers():
            if "unreached" not in name and t.is_floating_point():
                t.fill_(float("nan"))
    before = buffers(diverged)
    with dr.recalibrate_batch_norm(model, data()), dr.recalibrate_batch_norm(diverged, data()):
        assert_bits(buffers(diverged), buffers(model))
    assert_bits(buffers(diverged), before)


def test_layer_that_the_pass_does_not_reach_keeps_its_statistics() -> None:
    model = network()
    model.unreached(torch.randn(4, 3) + 5.0)
    before = buffers(model)
    with dr.recalibrate_batch_norm(model, data()):
        found = buffers(model)
        assert_bits(*({name: t for name, t in tensors.items() if "unreached" in name} for tensors in (found, before)))
    assert_bits(buffers(model), before)


def test_frozen_layer_keeps_its_statistics() -> None:
    model = network()
    model.norm.eval()
    before, states = buffers(model), modes(model)
    with dr.recalibrate_batch_norm(model, data()):
        within = buffers(model)
        for name, t in before.items():
            assert torch.equal(within[name], t) == (not name.startswith("twice")), name
        assert modes(model) == states


def test_all_layers_are_computed_where_the_model_is_in_eval_mode() -> None:
    model, other = network(), network()
    other.eval()
    states = modes(other)
    with dr.recalibrate_batch_norm(model, data()), dr.recalibrate_batch_norm(other, data()):
        assert_bits(buffers(other), buffers(model))
        assert modes(other) == states


@pytest.mark.parametrize("pack", [lambda x: (x, None), lambda x: [x, torch.zeros(())]], ids=["tuple", "list"])
def test_inputs_are_the_first_item(pack: Callable[[Tensor], Any]) -> None:
    model, other = network(), network()
    with dr.recalibrate_batch_norm(model, data()), dr.recalibrate_batch_norm(other, map(pack, data()), device="cpu"):
        assert_bits(buffers(other), buffers(model))


def test_inputs_are_moved_to_the_device() -> None:
    model, seen = nn.Sequential(nn.BatchNorm1d(2)), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].device.type) or (torch.zeros(3, 2),))
    with dr.recalibrate_batch_norm(model, [torch.zeros(3, 2)], device="meta"):
        assert seen == ["meta"]


# What is left behind.


@pytest.mark.parametrize("training", [True, False])
def test_everything_is_as_it_was(training: bool) -> None:
    model = network()
    model.train(training)
    model.drop.train(not training)
    before, states = buffers(model), modes(model)
    places = {name: (id(t), t.data_ptr()) for name, t in model.named_buffers()}
    params = {name: t.detach().clone() for name, t in model.named_parameters()}
    with dr.recalibrate_batch_norm(model, data()):
        assert modes(model) == states
        assert torch.is_grad_enabled()
        model.train()(data()[0]).sum().backward()  # whatever the body does
    assert_bits(buffers(model), before)
    assert {name: (id(t), t.data_ptr()) for name, t in model.named_buffers()} == places
    assert_bits({name: t.detach() for name, t in model.named_parameters()}, params)


def test_pass_takes_no_gradients() -> None:
    model, grad_enabled = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), []
    model.register_forward_hook(lambda *_: grad_enabled.append(torch.is_grad_enabled()))
    with dr.recalibrate_batch_norm(model, [torch.randn(4, 2)]):
        assert grad_enabled == [False]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_error_in_the_pass(error: type[BaseException]) -> None:
    def breaking() -> Iterator[Tensor]:
        yield from data()[:2]
        raise error

    model = network()
    before, states = buffers(model), modes(model)
    with pytest.raises(error), dr.recalibrate_batch_norm(model, breaking()):
        pytest.fail("the body ran")
    assert_bits(buffers(model), before)
    assert modes(model) == states
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_in_the_body(error: type[BaseException]) -> None:
    model = network()
    before, states = buffers(model), modes(model)
    with pytest.raises(error), dr.recalibrate_batch_norm(model, data()):
        raise error
    assert_bits(buffers(model), before)
    assert modes(model) == states


def test_refused_loaders() -> None:
    model = network()
    before, states = buffers(model), modes(model)
    with pytest.raises(ValueError, match="loader: expected at least one batch, got none"):
        dr.recalibrate_batch_norm(model, []).__enter__()
    assert_bits(buffers(model), before)

    single = nn.BatchNorm1d(2)
    of_training = buffers(single)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        dr.recalibrate_batch_norm(single, [torch.ones(4, 2), torch.ones(1, 2)]).__enter__()
    assert_bits(buffers(single), of_training)
    assert modes(model) == states


def test_model_without_statistics_takes_nothing_from_the_loader() -> None:
    frozen = nn.Sequential(nn.BatchNorm1d(2))
    frozen[0].eval()
    loader = iter(data())
    for model in (nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False), frozen):
        with dr.recalibrate_batch_norm(model, loader):
            pass
    assert len(list(loader)) == BATCHES


def test_nested_blocks() -> None:
    model = network()
    before = buffers(model)
    with dr.recalibrate_batch_norm(model, data()):
        outer = buffers(model)
        with dr.recalibrate_batch_norm(model, data()[:1]):
            assert not torch.allclose(buffers(model)["norm.running_mean"], outer["norm.running_mean"])
        assert_bits(buffers(model), outer)
    assert_bits(buffers(model), before)


# Generators, and training with and without.


@pytest.mark.parametrize("own", ["none", "loader", "sampler", "batch sampler"])
def test_no_generator_moves(own: str) -> None:
    dataset = TensorDataset(torch.randn(24, 2, 6))
    generator = torch.Generator().manual_seed(3)
    sampler = torch.utils.data.RandomSampler(dataset, generator=generator)
    options: dict[str, Any] = {
        "none": {"batch_size": SIZE, "shuffle": True},
        "loader": {"batch_size": SIZE, "shuffle": True, "generator": generator},
        "sampler": {"batch_size": SIZE, "sampler": sampler},
        "batch sampler": {"batch_sampler": torch.utils.data.BatchSampler(sampler, SIZE, drop_last=False)},
    }[own]
    loader = DataLoader(dataset, **options)
    model = network()
    states = [g.get_state() for g in (torch.default_generator, generator)]
    with dr.recalibrate_batch_norm(model, loader):
        after = [g.get_state() for g in (torch.default_generator, generator)]
    list(loader)
    assert all(map(torch.equal, states, after))
    moved = [g.get_state() for g in (torch.default_generator, generator)]
    assert not all(map(torch.equal, states, moved)), "this loader does draw"


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_training_is_the_same_with_and_without_evaluations(method: str) -> None:
    def trained(evaluate: bool) -> dict[str, Tensor]:
        model = network()
        optimizer = OPTIMIZERS[method](model.parameters())
        loader = DataLoader(TensorDataset(torch.cat(data())), batch_size=SIZE, shuffle=True)
        for _ in range(3):
            for step, (x,) in enumerate(loader):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
                if evaluate and step % 2:
                    evaluation(model, optimizer, loader)
        return {**dict(model.named_parameters()), **buffers(model)}

    def evaluation(model: nn.Module, optimizer: Any, loader: Any) -> None:
        if method != "SGD":
            optimizer.eval()
        with torch.no_grad(), dr.recalibrate_batch_norm(model, loader):
            model.eval()(data()[0])
        model.train()
        if method != "SGD":
            optimizer.train()

    assert_bits(trained(evaluate=True), trained(evaluate=False))


# Models in wrappers.


class Block(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inside(x)).relu()


@pytest.mark.parametrize("how", ["the whole", "in place", "a part in place"])
def test_compiled_model(how: str) -> None:
    """The pass needs hooks, which code that was compiled before does not know."""
    plain, model = (Block(Block(nn.Linear(2, 3))) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    outer: Any = model
    if how == "the whole":
        outer = torch.compile(model, backend="eager", fullgraph=True)
    else:
        (model if how == "in place" else model.inside).compile(backend="eager", fullgraph=True)
    loader = [torch.randn(8, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for network in (plain, outer):
        network(loader[0])
    before = buffers(model)
    with dr.recalibrate_batch_norm(plain, loader), dr.recalibrate_batch_norm(outer, loader):
        assert_bits(buffers(model), buffers(plain))
        torch.testing.assert_close(outer.eval()(loader[0]), plain.eval()(loader[0]))
    assert_bits(buffers(model), before)


def test_distributed_model_exchanges_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        model, plain = network(), network()
        del model.unreached, plain.unreached
        parallel = nn.parallel.DistributedDataParallel(model)
        monkeypatch.setattr(parallel, "_sync_buffers", lambda: pytest.fail("buffers were exchanged"))
        before = buffers(model)
        for outer in (parallel, torch.compile(parallel, backend="eager")):
            with dr.recalibrate_batch_norm(plain, data()), dr.recalibrate_batch_norm(outer, data()):
                assert_bits(buffers(model), buffers(plain))
                assert parallel.training
        assert_bits(buffers(model), before)
    finally:
        torch.distributed.destroy_process_group()


def test_layers_of_every_kind() -> None:
    model = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)])
    shapes = [(4, 2), (4, 2, 1, 1), (4, 2, 1, 1, 1), (4, 2, 1)]
    model.forward = lambda x: [layer(x.reshape(shape)) for layer, shape in zip(model, shapes, strict=True)]
    with dr.recalibrate_batch_norm(model, [torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 1.0], [2.0, 5.0]])]):
        for layer in model:
            torch.testing.assert_close(layer.running_mean, torch.tensor([1.0, 2.0]))
            torch.testing.assert_close(layer.running_var, torch.tensor([4 / 3, 4.0]))
