"""The optimizers in the loops that people write: scaled, accumulated, clipped, scheduled, compiled, checkpointed.

Most tests hold a loop against a twin that is given by hand what the loop's tools made of gradients or options: equal bits.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optim_runs import METHODS, ONE, L, Method, assert_equal, backward, counters, small_model, snapshot, those, with_options
from torch import Tensor, nn
from torch.optim import lr_scheduler as lrs
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from deeprelax_cuda import derive_seed
from deeprelax_cuda.optim.base import RelaxationOptimizer

Run = tuple[nn.Module, RelaxationOptimizer]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=METHODS)
def make(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


def runs(make: Method, count: int, dtype: torch.dtype = torch.float32, **options: Any) -> Iterator[Run]:
    """Yield equal models, each with its optimizer."""
    for _ in range(count):
        model = small_model(dtype)
        yield model, make(model.parameters(), **options)


def batch(step: int, size: int = 8) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def give_gradients(source: nn.Module, target: nn.Module) -> None:
    for p, q in zip(source.parameters(), target.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()


def assert_same(run: Run, other: Run) -> None:
    assert_equal(snapshot(*run), snapshot(*other))
    assert counters(run[1]) == counters(other[1])


# Gradient scaling.


def scaled_step(run: Run, scaler: torch.amp.GradScaler, step: int, clip: float | None = None, spoil: bool = False) -> None:
    model, optimizer = run
    optimizer.zero_grad()
    scaler.scale(loss_of(model, batch(step))).backward()
    if spoil:
        next(model.parameters()).grad[0, 0] = math.inf
    if clip is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()


def test_scale_of_a_power_of_two_changes_no_bit(make: Method) -> None:
    plain, scaled = runs(make, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for step in range(3 * L + 1):
        backward(plain[0], step)
        plain[1].step()
        scaled_step(scaled, scaler, step)
        assert_same(scaled, plain)
    assert scaler.get_scale() > 2.0**10
    assert not getattr(plain[1], "_step_supports_amp_scaling", False), "nobody has opted in to fused scaling"


@with_options("kind", [{}, {"averaging": "linear"}])
@pytest.mark.parametrize("position", [0, 1, L - 1, L, 2 * L - 1])
def test_step_with_infinite_gradients_is_skipped_whole(make: Method, kind: dict[str, Any], position: int) -> None:
    plain, scaled = runs(make, 2, **kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3 * L):
        if step == position:
            before, numbers = snapshot(*scaled), counters(scaled[1])
            for bad in (100, 101):
                scaled_step(scaled, scaler, bad, spoil=True)
                assert_equal(snapshot(*scaled), before)
                assert counters(scaled[1]) == numbers, "gamma and all counters stand still"
            assert scaler.get_scale() == 2.0**8
        backward(plain[0], step)
        plain[1].step()
        scaled_step(scaled, scaler, step)
        assert_same(scaled, plain)


def test_unscaling_before_clipping(make: Method) -> None:
    plain, scaled = runs(make, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(2 * L + 1):
        backward(plain[0], step)
        assert nn.utils.clip_grad_norm_(plain[0].parameters(), 0.01) > 0.01
        plain[1].step()
        scaled_step(scaled, scaler, step, clip=0.01)
        assert_same(scaled, plain)


def test_scaler_and_optimizer_resume_together(make: Method) -> None:
    run, other = runs(make, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(L + 1):
        scaled_step(run, scaler, step, spoil=step == 1)
    file = io.BytesIO()
    torch.save([run[0].state_dict(), run[1].state_dict(), scaler.state_dict()], file)
    file.seek(0)
    resumed = torch.amp.GradScaler("cpu")
    for target, state in zip((*other, resumed), torch.load(file, weights_only=True), strict=True):
        target.load_state_dict(state)
    for step in range(L + 1, 3 * L):
        scaled_step(run, scaler, step, spoil=step == 2 * L)
        scaled_step(other, resumed, step, spoil=step == 2 * L)
        assert_same(other, run)
        assert resumed.get_scale() == scaler.get_scale()


def test_scaler_takes_no_closure_but_none(make: Method) -> None:
    """torch's rule; Accelerate passes None by position."""
    scaled, plain = runs(make, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(scaled[0], batch(0))).backward()
    before = snapshot(*scaled)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(scaled[1], closure=lambda: None)
    assert_equal(snapshot(*scaled), before)
    scaler.step(scaled[1], None)
    backward(plain[0], 0)
    plain[1].step()
    assert_same(scaled, plain)


def test_scaler_skips_each_optimizer_for_itself(make: Method) -> None:
    (good, first), (bad, second), plain = runs(make, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(L):
        for model, optimizer in ((good, first), (bad, second)):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch(step))).backward()
        next(bad.parameters()).grad.fill_(math.nan)
        scaler.step(first)
        scaler.step(second)
        scaler.update()
        backward(plain[0], step)
        plain[1].step()
        assert_same((good, first), plain)
    assert (second.stats()["steps"], len(second.state)) == (0, 0)


# Accumulating, clipping, clearing.


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulated_micro_batches_are_one_batch(make: Method, set_to_none: bool) -> None:
    """With one gradient for all three the bits are equal; the sum over micro-batches itself rounds otherwise."""
    whole, accumulated, given = runs(make, 3)
    for step in range(2 * L + 1):
        x = batch(step, 12)
        accumulated[1].zero_grad(set_to_none=set_to_none)
        for part in x.chunk(3):
            before = snapshot(*accumulated)
            (loss_of(accumulated[0], part) / 3).backward()
            assert_equal(snapshot(*accumulated), before)
        whole[1].zero_grad(set_to_none=set_to_none)
        loss_of(whole[0], x).backward()
        for p, q in zip(accumulated[0].parameters(), whole[0].parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        give_gradients(accumulated[0], given[0])
        for _, optimizer in (whole, accumulated, given):
            optimizer.step()
        assert_same(accumulated, given)
    assert whole[1].stats() == accumulated[1].stats() == make.stats(2 * L + 1)
    for p, q in zip(accumulated[0].parameters(), whole[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [{}, {"maximize": True, "weight_decay": 0.1}], ids=str)
def test_zero_grad_of_either_kind_and_gradients_that_are_left_alone(make: Method, kind: dict[str, Any]) -> None:
    cleared, zeroed = runs(make, 2, **kind)
    for step in range(2 * L + 1):
        for (model, optimizer), set_to_none in ((cleared, True), (zeroed, False)):
            optimizer.zero_grad(set_to_none=set_to_none)
            assert all((p.grad is None) == (set_to_none or step == 0) for p in model.parameters())
            loss_of(model, batch(step)).backward()
            grads = [p.grad for p in model.parameters()]
            copies = [grad.clone() for grad in grads]
            optimizer.step()
            for p, grad, was in zip(model.parameters(), grads, copies, strict=True):
                assert p.grad is grad
                assert torch.equal(grad, was), "the step reads gradients and writes none"
        assert_same(zeroed, cleared)


CLIPPING: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "norm": lambda params: nn.utils.clip_grad_norm_(params, 0.01),
    "norm, foreach": lambda params: nn.utils.clip_grad_norm_(params, 0.01, foreach=True),
    "largest": lambda params: nn.utils.clip_grad_norm_(params, 0.001, norm_type=math.inf),
    "value": lambda params: nn.utils.clip_grad_value_(params, 0.001),
}


@pytest.mark.parametrize("clip", CLIPPING.values(), ids=CLIPPING.keys())
def test_clipped_gradients_are_those_of_the_step(make: Method, clip: Callable[..., Any]) -> None:
    clipped, given, unclipped = runs(make, 3)
    for step in range(2 * L + 1):
        for model, _ in (clipped, unclipped):
            backward(model, step)
        clip(list(clipped[0].parameters()))
        give_gradients(clipped[0], given[0])
        for _, optimizer in (clipped, given, unclipped):
            optimizer.step()
        assert_same(clipped, given)
    assert not torch.equal(clipped[0][0].weight, unclipped[0][0].weight)


# Schedulers.

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda n: min(n, 3) / 3 * 0.95**n),  # a warm-up from 0
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, step_size=2, gamma=0.7),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, milestones=[2, 5, 5, 9], gamma=0.7),
    "ConstantLR": lambda o: lrs.ConstantLR(o, factor=0.5, total_iters=4),
    "LinearLR": lambda o: lrs.LinearLR(o, start_factor=0.25, total_iters=5),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, total_iters=9, power=2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, T_max=4, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "CyclicLR": lambda o: lrs.CyclicLR(o, base_lr=0.1, max_lr=0.5, step_size_up=3, mode="triangular2"),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, max_lr=0.5, total_steps=20),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.ConstantLR(o, factor=0.5, total_iters=9), lrs.ExponentialLR(o, gamma=0.9)], milestones=[4]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, factor=0.5, total_iters=3), lrs.ExponentialLR(o, gamma=0.9)], optimizer=o
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=6),
}
#: Those that move the outer momentum too, along with lr.
CYCLE_MOMENTUM = {"CyclicLR", "OneCycleLR"}


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    found = {
        name
        for module in (lrs, swa_utils)
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, lrs.LRScheduler) and name.strip("_") != "LRScheduler"
    }
    assert found == set(SCHEDULERS)


def grouped_runs(make: Method, count: int, tensor_lr: bool = False) -> Iterator[Run]:
    """Yield equal models whose weights and biases have learning rates of their own."""
    for _ in range(count):
        model = small_model()
        lr = [torch.tensor(value, dtype=torch.float64) if tensor_lr else value for value in (0.4, 0.2)]
        groups = [[model[0].weight, model[2].weight], [model[0].bias, model[2].bias]]
        yield model, make([{"params": ps, "lr": value} for ps, value in zip(groups, lr, strict=True)])


def advance(scheduler: Any, step: int) -> None:
    plateau = isinstance(scheduler, lrs.ReduceLROnPlateau)
    scheduler.step(*([(2.0, 1.5, 1.6, 1.7)[step % 4]] if plateau else []))


#: All with one method, and with the others a warm-up from 0, one that moves the momentum too, and one that is no LRScheduler.
SCHEDULED = [
    (method, name)
    for method in METHODS
    for name in (SCHEDULERS if method == ONE else ("LambdaLR", "OneCycleLR", "ReduceLROnPlateau"))
    if METHODS[method].takes("momentum") or name not in CYCLE_MOMENTUM
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize(("make", "name"), SCHEDULED, indirect=["make"])
def test_scheduler_is_setting_lr_by_hand(make: Method, name: str, tensor_lr: bool) -> None:
    """It moves lr, per group, and momentum where it says so; gamma, inner_lr and all else go their own way."""
    (scheduled,) = grouped_runs(make, 1, tensor_lr)
    by_hand, fixed_lr, fixed_momentum = grouped_runs(make, 3)
    options = set(scheduled[1].param_groups[0]) - {"params"}
    scheduler = SCHEDULERS[name](scheduled[1])
    moved: set[str] = set()
    for step in range(5 * L):
        for i, group in enumerate(scheduled[1].param_groups):
            by_hand[1].param_groups[i].update(lr=float(group["lr"]), momentum=group["momentum"])
            fixed_lr[1].param_groups[i].update(momentum=group["momentum"])
            fixed_momentum[1].param_groups[i].update(lr=float(group["lr"]))
        for model, optimizer in (scheduled, by_hand, fixed_lr, fixed_momentum):
            backward(model, step)
            optimizer.step()
        assert_equal(snapshot(*scheduled), snapshot(*by_hand))
        before = copy.deepcopy(counters(scheduled[1]))
        advance(scheduler, step)
        for was, group in zip(before, scheduled[1].param_groups, strict=True):
            moved |= {option for option in options if group[option] != was[option]}
    assert moved == ({"lr", "momentum"} if name in CYCLE_MOMENTUM else {"lr"})
    for p, *others in zip(*(model.parameters() for model, _ in (scheduled, fixed_lr, fixed_momentum)), strict=True):
        assert [torch.equal(p, q) for q in others] == [False, "momentum" not in moved], "what has moved is in force"
    assert scheduled[1].stats() == by_hand[1].stats() == make.stats(5 * L)


@those(lambda method: not method.takes("momentum"))
@pytest.mark.parametrize("name", sorted(CYCLE_MOMENTUM))
def test_scheduler_that_moves_a_momentum_that_is_not_there(make: Method, name: str) -> None:
    (run,) = grouped_runs(make, 1)
    SCHEDULERS[name](run[1])
    before = snapshot(*run)
    backward(run[0], 0)
    with pytest.raises(ValueError, match=r"^momentum: .* has no such option, .*scheduler"):
        run[1].step()
    assert_equal(snapshot(*run), before)
    assert run[1].stats()["steps"] == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("make", "name"), SCHEDULED, indirect=["make"])
def test_scheduler_resumes_with_the_optimizer(make: Method, name: str) -> None:
    run, other = grouped_runs(make, 2)
    scheduler = SCHEDULERS[name](run[1])
    for step in range(L + 2):
        backward(run[0], step)
        run[1].step()
        advance(scheduler, step)
    saved = copy.deepcopy([run[0].state_dict(), run[1].state_dict(), scheduler.state_dict()])
    resumed = SCHEDULERS[name](other[1])
    for target, state in zip((*other, resumed), saved, strict=True):
        target.load_state_dict(state)
    for step in range(L + 2, 4 * L):
        for (model, optimizer), one in ((run, scheduler), (other, resumed)):
            backward(model, step)
            optimizer.step()
            advance(one, step)
        assert_same(other, run)


@pytest.mark.filterwarnings("error")
def test_scheduler_beside_a_scaler_and_evaluations(make: Method) -> None:
    """A skipped step still advances the scheduler, as with torch's optimizers; nothing warns."""
    run, by_hand = runs(make, 2, lr=0.4)
    scheduler, scaler = lrs.ExponentialLR(run[1], gamma=0.9), torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3 * L):
        scaled_step(run, scaler, step, spoil=step == 2)
        run[1].eval()
        run[1].train()
        if step != 2:
            by_hand[1].param_groups[0]["lr"] = run[1].param_groups[0]["lr"]
            backward(by_hand[0], step)
            by_hand[1].step()
        assert_equal(snapshot(*run), snapshot(*by_hand))
        scheduler.step()


def test_averaged_model_beside_it(make: Method) -> None:
    """Taken in eval mode, the average is that of the anchors, if there are any; the training does not notice."""
    alone, run = runs(make, 2)
    averaged = swa_utils.AveragedModel(run[0])
    shown: list[list[Tensor]] = []
    for step in range(4 * L):
        for model, optimizer in (alone, run):
            backward(model, step)
            optimizer.step()
        if step % 2:
            run[1].eval()
            averaged.update_parameters(run[0])
            shown.append([(run[1].state[p]["anchor"] if make.has_periods else p.detach()).clone() for p in run[0].parameters()])
            run[1].train()
        assert_same(run, alone)
    for p, *seen in zip(averaged.parameters(), *shown, strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(seen).mean(0))
    loader = [batch(step) for step in range(2)]
    swa_utils.update_bn(loader, averaged)
    assert_same(run, alone)


# Compiling.


def assert_as_with_its_gradients(run: Run, given: Run) -> None:
    """Whoever computed the gradients of ``run``, which has taken its step: ``given`` takes the same one with them."""
    give_gradients(run[0], given[0])
    given[1].step()
    assert_same(run, given)


#: What a compiler sees of the optimizer is a step that breaks the graph, whichever method's.
COMPILED = [
    *((method, "eager") for method in METHODS),
    (ONE, "aot_eager"),
    pytest.param(ONE, "inductor", marks=pytest.mark.slow),
]


@pytest.fixture
def compiler(request: pytest.FixtureRequest) -> Iterator[str]:
    torch._dynamo.reset()
    with warnings.catch_warnings():  # of the compiler about itself
        warnings.simplefilter("ignore")
        yield request.param
    torch._dynamo.reset()


@pytest.mark.parametrize(("make", "compiler"), COMPILED, indirect=True)
def test_compiled_model_with_a_step_outside(make: Method, compiler: str) -> None:
    (model, optimizer), given = runs(make, 2)
    compiled = torch.compile(model, backend=compiler)
    for step in range(2 * L + 1):
        optimizer.zero_grad()
        loss_of(compiled, batch(step)).backward()
        optimizer.step()
        assert_as_with_its_gradients((model, optimizer), given)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "compiler"), COMPILED, indirect=True)
def test_compiled_training_step_with_the_optimizer_inside(make: Method, compiler: str) -> None:
    """The step breaks the graph: most of it runs as plain Python, and all of it beyond the limit of recompilations."""
    (model, optimizer), given = runs(make, 2)

    @torch.compile(backend=compiler)
    def train(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        return loss

    for step in range(torch._dynamo.config.recompile_limit + L):
        train(batch(step))
        assert_as_with_its_gradients((model, optimizer), given)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager"], indirect=True)
def test_compiled_step_method(make: Method, compiler: str) -> None:
    """``torch.compile(optimizer.step)`` computes the same; as one graph it is refused, and nothing has moved."""
    run, given = runs(make, 2)
    backward(run[0], 0)
    before = snapshot(*run)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(run[1].step, backend=compiler, fullgraph=True)()
    assert_equal(snapshot(*run), before)
    assert run[1].stats()["steps"] == 0
    compiled = torch.compile(run[1].step, backend=compiler)
    for step in range(2 * L + 1):
        backward(run[0], step)
        compiled()
        assert_as_with_its_gradients(run, given)


# Precision, memory, sharing.


def test_autocast_leaves_float32_training_to_the_optimizer(make: Method) -> None:
    (model, optimizer), given = runs(make, 2)
    for step in range(2 * L + 1):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(batch(step))
        assert output.dtype == torch.bfloat16
        output.float().square().mean().backward()
        optimizer.step()
        assert_as_with_its_gradients((model, optimizer), given)
    found = {name: t.dtype for name, t in snapshot(model, optimizer).items() if not name.endswith(" period_steps")}
    assert set(found.values()) == {torch.float32}


@pytest.mark.parametrize("kind", [{}, {"rounding": "stochastic"}, {"master_weights": True}], ids=str)
def test_bfloat16_model_has_float32_state(make: Method, kind: dict[str, Any]) -> None:
    model = small_model().to(torch.bfloat16)
    optimizer = make(model.parameters(), **make.of({"temperature": 0.0}), **kind)
    losses = []
    for _ in range(10 * L):
        optimizer.zero_grad()
        losses.append(loss_of(model, batch(0).bfloat16()))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    for p in model.parameters():
        assert p.dtype == p.grad.dtype == torch.bfloat16
        roles = optimizer.state[p].keys() - {"period_steps"}
        assert {optimizer.state[p][role].dtype for role in roles} <= {torch.float32}
        assert set(make.roles) <= roles


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(make: Method, use_reentrant: bool) -> None:
    plain, checkpointed = runs(make, 2)
    for step in range(2 * L + 1):
        x = batch(step).requires_grad_()
        for model, optimizer in (plain, checkpointed):
            optimizer.zero_grad()
            hidden = checkpoint(model, x, use_reentrant=use_reentrant) if model is checkpointed[0] else model(x)
            hidden.square().mean().backward()
            optimizer.step()
        assert_same(checkpointed, plain)


def test_tied_weights_take_one_step(make: Method) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    alone = nn.Parameter(model[0].weight.detach().clone())
    optimizer, reference = make(nn.DataParallel(model).parameters()), make([alone])
    assert len(optimizer.param_groups[0]["params"]) == 1
    for step in range(2 * L + 1):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        alone.grad = model[0].weight.grad.clone()
        optimizer.step()
        reference.step()
        assert torch.equal(model[0].weight, alone)
        assert model[2].weight is model[0].weight
        for role in make.roles:
            assert torch.equal(optimizer.state[model[0].weight][role], reference.state[alone][role])


def test_second_backward_through_a_retained_graph_sees_the_step(make: Method) -> None:
    """Before the step a second backward adds its gradients; after it autograd refuses: the weights it saved have moved."""
    (model, optimizer), given = runs(make, 2)
    loss = loss_of(model, batch(0))
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward(retain_graph=True)
    for p, grad in zip(model.parameters(), once, strict=True):
        assert torch.equal(p.grad, 2 * grad)
    optimizer.step()
    assert_as_with_its_gradients((model, optimizer), given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def in_backward(model: nn.Module, make: Method) -> list[RelaxationOptimizer]:
    """Give each parameter an optimizer, which steps as soon as the gradient is there and frees it."""
    optimizers = [make([p], seed=derive_seed(11, i)) for i, p in enumerate(model.parameters())]
    for p, optimizer in zip(model.parameters(), optimizers, strict=True):

        def hook(_: Tensor, optimizer: RelaxationOptimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(hook)
    return optimizers


def test_optimizers_in_the_backward_pass(make: Method) -> None:
    model, other = small_model(), small_model()
    optimizers = in_backward(model, make)
    after = [make([p], seed=derive_seed(11, i)) for i, p in enumerate(other.parameters())]
    for step in range(2 * L + 1):
        loss_of(model, batch(step)).backward()
        assert all(p.grad is None for p in model.parameters())
        backward(other, step)
        for optimizer in after:
            optimizer.step()
        for p, q, ours, theirs in zip(model.parameters(), other.parameters(), optimizers, after, strict=True):
            assert torch.equal(p, q)
            assert_equal(ours.state[p], theirs.state[q])
            assert ours.stats() == theirs.stats()
    assert optimizers[0].stats()["steps"] == 2 * L + 1


@those(lambda method: method.takes("temperature"))
def test_optimizers_of_one_program_draw_their_own_noise(make: Method) -> None:
    """With derived seeds; with one seed the first parameter of each draws the same numbers."""

    def drift(seed: int) -> Tensor:
        p = nn.Parameter(torch.zeros(1000))
        optimizer = make([p], seed=seed)
        p.grad = torch.zeros(1000)
        optimizer.step()
        return p.detach()

    first, second = drift(derive_seed(11, 0)), drift(derive_seed(11, 1))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.15
    assert torch.equal(first, drift(derive_seed(11, 0)))
