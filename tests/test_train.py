"""`deeprelax train`: what it computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from train_runs import METHODS, PER_EPOCH, images, settings, state_of, untimed

from deeprelax_cuda.cli import UsageError
from deeprelax_cuda.train import compare, loop, methods
from deeprelax_cuda.train.data import Batches, batches_per_epoch
from deeprelax_cuda.train.datasets import digits
from deeprelax_cuda.train.measures import MEASURES
from deeprelax_cuda.train.models import MODELS, Model
from deeprelax_cuda.train.progress import Progress
from deeprelax_cuda.train.schedules import Schedule
from deeprelax_cuda.train.stopping import Stopped
from deeprelax_cuda.train.stopwatch import PARTS, Stopwatch

pytestmark = pytest.mark.usefixtures("one_thread")

DIGITS = digits()


def whole(run: loop.Run) -> loop.Run:
    """Take all steps of a run."""
    for _ in run.steps(Progress(), lambda: None):
        pass
    return run


def advanced(run: loop.Run, steps: int) -> loop.Run:
    """Take some steps of a run."""
    for _ in zip(range(steps), run.steps(Progress(), lambda: None), strict=False):
        pass
    return run


@pytest.fixture
def normed(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a network with batch norm and dropout."""

    def build(shape: Any, classes: int) -> torch.nn.Module:
        layers = [torch.nn.Flatten(), torch.nn.Linear(math.prod(shape), 32), torch.nn.BatchNorm1d(32)]
        return torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(32, classes))

    monkeypatch.setitem(MODELS, "normed", Model(build))
    return "normed"


# The data order.


def test_an_epoch_shows_each_image_at_most_once_in_full_batches() -> None:
    batches = Batches(DIGITS, 32, seed=3)
    epochs = [[batches[step] for step in range(first, first + PER_EPOCH)] for first in (0, PER_EPOCH)]
    for epoch in epochs:
        inputs = torch.cat([inputs for inputs, _ in epoch])
        assert [len(targets) for _, targets in epoch] == [32] * PER_EPOCH
        assert len(inputs.flatten(1).unique(dim=0)) == len(inputs)
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])


def test_batches_depend_on_seed_and_step_alone() -> None:
    """Not on the batches before, nor on any generator; and inputs stay with their targets."""
    there, jumped, other = Batches(DIGITS, 32, seed=3), Batches(DIGITS, 32, seed=3), Batches(DIGITS, 32, seed=4)
    for step in range(2 * PER_EPOCH):
        inputs, targets = there[step]
        for image, target in zip(inputs[:2], targets[:2], strict=True):
            place = (DIGITS.train_inputs == image).flatten(1).all(dim=1)
            assert (DIGITS.train_targets[place] == target).any()
    torch.rand(5)
    assert torch.equal(jumped[2 * PER_EPOCH - 1][0], inputs)
    assert not torch.equal(other[0][0], there[0][0])


def test_data_moves_as_a_whole_and_targets_keep_their_type() -> None:
    moved = DIGITS.to(torch.device("meta"), torch.bfloat16)
    tensors = [moved.train_inputs, moved.train_targets, moved.val_inputs, moved.val_targets]
    assert [tensor.dtype for tensor in tensors] == [torch.bfloat16, torch.int64] * 2
    assert all(tensor.is_meta for tensor in tensors)
    assert (moved.classes, moved.digest) == (10, DIGITS.digest)


# The runs of a comparison.


def test_methods_start_from_the_same_weights_and_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[torch.Tensor]] = []
    real_build, real_batch = compare.build, Batches.__getitem__

    def build(*args: Any) -> loop.Run:
        run = real_build(*args)
        seen.append([p.detach().clone() for p in run.model.parameters()])
        return run

    def batch(batches: Batches, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = real_batch(batches, step)
        seen[-1].extend(found)
        return found

    one = {method: {"replicas": 1} for method in ("elastic-sgd", "parle")}  # several see each their own
    both = settings(seeds=(0, 1), epochs=1, options=one)
    comparison = compare.rehearse(both, DIGITS)
    monkeypatch.setattr(compare, "build", build)
    monkeypatch.setattr(Batches, "__getitem__", batch)
    compare.compare(comparison, DIGITS, quiet=True)
    assert len(seen) == 2 * len(METHODS)
    for of_seed in (seen[: len(METHODS)], seen[len(METHODS) :]):
        assert len(of_seed[0]) == 6 + 2 * PER_EPOCH
        assert all(torch.equal(a, b) for other in of_seed[1:] for a, b in zip(of_seed[0], other, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen[0][6:], seen[-1][6:], strict=True))


def test_the_same_comparison_again_gives_the_same_curves() -> None:
    curves = []
    for numbers in (3, 5):
        torch.rand(numbers)  # the global generator is elsewhere each time, and that must not matter
        comparison = compare.rehearse(settings(options={"entropy-sgd": {"gamma": 500.0}}), DIGITS)
        compare.compare(comparison, DIGITS, quiet=True)
        curves.append({name: untimed(comparison.methods[name].curves[0]) for name in METHODS})
    assert curves[0] == curves[1]
    assert curves[0]["sgd"] != curves[0]["entropy-sgd"]


def test_averaged_sgd_trains_as_sgd_and_is_evaluated_elsewhere() -> None:
    sgd, averaged = (whole(compare.build(name, 0, settings(), DIGITS)) for name in ("sgd", "sgd-ema"))
    assert all(torch.equal(a, b) for a, b in zip(sgd.model.parameters(), averaged.model.parameters(), strict=True))
    assert sgd.curve.train_loss == averaged.curve.train_loss
    assert sgd.curve.validation != averaged.curve.validation


def test_every_part_of_a_step_is_timed_and_evaluations_are_not() -> None:
    curve = whole(compare.build("entropy-sgd", 0, settings(), DIGITS)).curve
    assert set(curve.parts) == set(PARTS)
    assert all(seconds > 0 for seconds in curve.parts.values())
    assert sum(curve.parts.values()) == pytest.approx(curve.seconds[-1])
    assert 0 < curve.seconds[0] < curve.seconds[1]


def test_laps_on_a_gpu_are_events_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the device that computes, which need not be the current one; read in bulk, in the middle of a step too."""
    now, recorded, waited = 0.0, [], 0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object) -> None:
            recorded.append(stream)
            self.at = now

        def synchronize(self) -> None:
            nonlocal waited
            waited += 1

        def elapsed_time(self, after: Event) -> float:
            return 1e3 * (after.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(Stopwatch, "BULK", 6)
    stopwatch = Stopwatch(torch.device("cuda:1"))
    for _ in range(10):
        now += 100.0  # of an evaluation, say
        stopwatch.start()
        for seconds, part in zip((1.0, 2.0, 4.0), PARTS, strict=True):
            now += seconds
            stopwatch.lap(part)
    assert 40 / 6 - 1 < waited < 40 / 4
    assert stopwatch.read() == stopwatch.read() == {"data": 10.0, "forward_backward": 20.0, "optimizer": 40.0}
    assert set(recorded) == {"stream of cuda:1"}


def test_bfloat16_trains_with_either_rounding_and_with_master_weights() -> None:
    losses = []
    for options in ({}, {"rounding": "stochastic"}, {"master_weights": True}):
        made = settings(methods=("entropy-sgd",), dtype="bfloat16", epochs=3, options={"entropy-sgd": options})
        data = DIGITS.to(torch.device("cpu"), torch.bfloat16)
        run = whole(compare.build("entropy-sgd", 0, made, data))
        assert all(p.dtype == torch.bfloat16 for p in run.model.parameters())
        losses.append(run.curve.train_loss[-1])
    assert len(set(losses)) == 3
    assert all(0 < loss < 1 for loss in losses)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (Schedule(), [0.1, 0.1, 0.1, 0.1]),
        (Schedule("step", (1, 3), 0.5), [0.1, 0.05, 0.05, 0.025]),
        (Schedule("cosine"), [0.05 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]),
    ],
    ids=["constant", "step", "cosine"],
)
@pytest.mark.parametrize("method", METHODS)
def test_learning_rate_follows_its_schedule(method: str, schedule: Schedule, rates: list[float]) -> None:
    run = compare.build(method, 0, settings(epochs=4, schedule=schedule), DIGITS)
    seen = []
    for _ in run.steps(Progress(), lambda: None):
        if run.step % PER_EPOCH == 1:
            seen.append(run.optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx(rates)
    if method == "entropy-sgd":
        assert run.optimizer.param_groups[0]["inner_lr"] == 0.1


# Evaluation.


@pytest.mark.parametrize("method", METHODS)
def test_training_is_bit_identical_with_and_without_evaluation(method: str, normed: str) -> None:
    often, once = (
        whole(compare.build(method, 0, settings(model=normed, epochs=3, eval_every=every), DIGITS)) for every in (0.1, 3.0)
    )
    assert len(often.curve.validation) == 30
    assert once.curve.gradient_evaluations == [3 * PER_EPOCH]
    assert once.curve.validation == often.curve.validation[-1:]
    assert len(state_of(often)) > 8
    assert all(torch.equal(a, b) for a, b in zip(state_of(often), state_of(once), strict=True))


def test_entropy_sgd_is_evaluated_at_its_anchor_in_evaluation_mode() -> None:
    run = advanced(compare.build("entropy-sgd", 0, settings(), DIGITS), 27)
    parameters = list(run.model.parameters())
    live = [p.detach().clone() for p in parameters]
    anchors = [run.optimizer.state[p]["anchor"].clone() for p in parameters]
    assert not any(torch.equal(y, x) for y, x in zip(live, anchors, strict=True))
    with loop.at_answer(run.model, run.optimizer):
        assert not run.model.training
        assert all(torch.equal(p, x) for p, x in zip(parameters, anchors, strict=True))
    assert run.model.training
    assert all(torch.equal(p, y) for p, y in zip(parameters, live, strict=True))


def test_batch_norm_is_evaluated_with_statistics_of_the_whole_training_data(
    normed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one chunk: the mean and the unbiased variance of what the layer gets from all training inputs, without dropout."""
    monkeypatch.setattr(loop, "EVALUATION_CHUNK", 10_000)
    run = advanced(compare.build("entropy-sgd", 0, settings(model=normed), DIGITS), 27)
    with loop.at_answer(run.model, run.optimizer), torch.no_grad():
        value = loop.validate(run.model, DIGITS, MEASURES["error"])
        flatten, linear, norm, *rest = run.model
        hidden = linear(flatten(DIGITS.train_inputs))
        scale = norm.weight / torch.sqrt(hidden.var(dim=0) + norm.eps)
        outputs = (linear(flatten(DIGITS.val_inputs)) - hidden.mean(dim=0)) * scale + norm.bias
        for layer in rest:
            outputs = layer(outputs)
    wrong = int((outputs.argmax(dim=1) != DIGITS.val_targets).sum())
    assert value == 100 * wrong / 540
    assert 0 < wrong < 540


def test_validation_counts_every_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "EVALUATION_CHUNK", 7)

    class AlwaysThree(torch.nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[3].expand(len(inputs), 10)

    value = loop.validate(AlwaysThree(), DIGITS, MEASURES["error"])
    assert value == 100.0 * int((DIGITS.val_targets != 3).sum()) / 540


def test_whole_errors_are_whole_numbers() -> None:
    """A level of 7 % is reached with 7 of 100 wrong, though 100 * (7 / 100) is above it in binary."""
    measure, targets = MEASURES["error"], torch.zeros(100, dtype=torch.int64)
    for wrong in range(101):
        outputs = torch.eye(2)[(torch.arange(100) < wrong).long()]
        assert measure.of_mean(measure.sum(outputs, targets).item() / 100) == wrong


def test_perplexity_is_the_number_of_equally_likely_choices() -> None:
    """Of a text, where an example has many predictions: all count alike."""
    targets = torch.randint(8, (6, 9))
    outputs = torch.zeros(6, 9, 50)
    outputs[..., 8:] = -math.inf  # eight are left, each as likely
    measure = MEASURES["perplexity"]
    nats = measure.sum(*loop.predictions(outputs, targets))
    assert measure.of_mean(nats.item() / targets.numel()) == pytest.approx(8.0)
    assert measure.of_mean(1e4) == math.inf
    assert math.isnan(measure.of_mean(math.nan))


@pytest.mark.parametrize(
    ("last", "interval", "steps"),
    [
        (10, 5.0, {5, 10}),
        (10, 4.0, {4, 8, 10}),
        (10, 2.5, {2, 5, 8, 10}),
        (3, 9.0, {3}),
        (3, 0.2, {1, 2, 3}),
        (3, 1e-9, {1, 2, 3}),
    ],
)
def test_evaluations_are_at_the_nearest_steps_and_at_the_end(last: int, interval: float, steps: set[int]) -> None:
    assert loop.evaluation_steps(last, interval) == steps


def test_an_evaluation_that_is_broken_off_leaves_training_as_it_was(normed: str) -> None:
    """In the pass for batch norm and in the validation; it is then made anew, and nothing is different."""
    made = settings(model=normed, epochs=1, eval_every=0.5)
    undisturbed = whole(compare.build("entropy-sgd", 0, made, DIGITS))
    for at_call in (1, 2, 3):
        run, calls = compare.build("entropy-sgd", 0, made, DIGITS), 0

        def check(at_call: int = at_call) -> None:
            nonlocal calls
            calls += 1
            if calls == at_call:
                raise Stopped(2)

        steps = run.steps(Progress(), check)
        with pytest.raises(Stopped, match="SIGINT"):
            list(steps)
        assert run.model.training
        assert run.curve.validation == []
        state = run.state_dict()
        again = compare.build("entropy-sgd", 0, made, DIGITS)
        again.load_state_dict(state)
        whole(again)
        assert untimed(again.curve) == untimed(undisturbed.curve)
        assert all(torch.equal(a, b) for a, b in zip(state_of(again), state_of(undisturbed), strict=True))


# Rehearsal.


def test_rehearsal_names_the_method_whose_options_are_wrong() -> None:
    with pytest.raises(UsageError, match=r"^entropy-sgd: .*frobnicate"):
        compare.rehearse(settings(options={"entropy-sgd": {"frobnicate": 1}}), DIGITS)


def test_rehearsal_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of CUDA have several."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1")

    monkeypatch.setattr(loop, "cross_entropy", fail)
    with pytest.raises(UsageError, match=r"^sgd: CUDA error: out of memory For debugging [^\n]*$"):
        compare.rehearse(settings(), DIGITS)


def test_rehearsal_takes_no_curves_and_knows_the_data() -> None:
    data = images()
    comparison = compare.rehearse(settings(model="mlp"), data)
    assert batches_per_epoch(data, 32) == 3
    assert comparison.data == {"digest": "images", "train_examples": 96, "val_examples": 32}
    assert all(trained.curves == {} for trained in comparison.methods.values())
    assert comparison.methods["sgd"].settings["lr"] == 0.1
    assert "seed" not in comparison.methods["entropy-sgd"].settings


@pytest.mark.slow
def test_the_methods_learn_digits() -> None:
    comparison = compare.rehearse(settings(seeds=(0, 1), epochs=30), DIGITS)
    compare.compare(comparison, DIGITS, quiet=True)
    finals = {name: [c.validation[-1] for c in trained.curves.values()] for name, trained in comparison.methods.items()}
    assert all(error < 5.0 for errors in finals.values() for error in errors), finals


def test_controlled_sgd_takes_the_length_of_the_run_for_its_time() -> None:
    made = settings(methods=("controlled-sgd",), epochs=3, options={"controlled-sgd": {"inner_lr": 0.05, "gamma_min": 0.5}})
    run = compare.build("controlled-sgd", 0, made, DIGITS)
    total = 0.5 + 3 * PER_EPOCH * 0.05
    assert run.optimizer.defaults["gamma_total"] == pytest.approx(total)
    for _ in run.steps(Progress(), lambda: None):
        pass
    group = run.optimizer.param_groups[0]
    assert group["outer_steps"] == 3 * PER_EPOCH // 20
    assert group["gamma"] == pytest.approx(total - group["outer_steps"] * 20 * 0.05)
    given = settings(methods=("controlled-sgd",), options={"controlled-sgd": {"gamma_total": 7.0}})
    assert compare.build("controlled-sgd", 0, given, DIGITS).optimizer.defaults["gamma_total"] == 7.0


def test_every_method_is_compared_by_the_tests_of_training() -> None:
    assert set(METHODS) == set(methods.METHODS)


@pytest.mark.parametrize("hooked", [False, True])
def test_sgd_is_torchs_bit_for_bit_and_its_hooks_are_called(hooked: bool) -> None:
    def run(make: type[torch.optim.SGD]) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 50)), torch.nn.Parameter(torch.ones(3, 3))]
        optimizer, calls = make(params, lr=0.1, momentum=0.9, nesterov=True, fused=True), []
        if hooked:
            optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
            optimizer.register_step_post_hook(lambda *_: calls.append("after"))

        def closure() -> float:
            optimizer.zero_grad()
            loss = sum((p**4).sum() for p in params)
            loss.backward()
            return float(loss.detach())

        for _ in range(3):
            optimizer.step(closure)
        assert calls == ["before", "after"] * 3 * hooked
        return [p.detach() for p in params]

    assert all(map(torch.equal, run(methods.SGD), run(torch.optim.SGD)))
