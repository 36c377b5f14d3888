"""One training run: replicas of a model, an optimizer, and the curve that comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from deeprelax_cuda.batch_norm import recalibrate_batch_norm
from deeprelax_cuda.train.data import Batches, Data, batches_per_epoch
from deeprelax_cuda.train.generators import Generators
from deeprelax_cuda.train.measures import Measure
from deeprelax_cuda.train.progress import Progress
from deeprelax_cuda.train.ranks import Alone
from deeprelax_cuda.train.stopwatch import PARTS, Stopwatch

#: Examples per forward pass of an evaluation: bounds its memory.
EVALUATION_CHUNK = 1000


@dataclass
class Curve:
    """What was seen along one run, one entry per evaluation."""

    gradient_evaluations: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    """Mean cross-entropy, in nats, over the batches since the evaluation before, as they were trained on by all replicas."""
    validation: list[float] = field(default_factory=list)
    """The data's measure, at the method's answer."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of training, without evaluations and checkpoints."""
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    """The seconds of the whole run by what they went to."""

    def reached(self, level: float) -> int | None:
        """Return the place of the first evaluation with a value of at most ``level``, or None."""
        return next((i for i, value in enumerate(self.validation) if value <= level), None)


@dataclass
class Replica:
    """A copy of the network with its own order of the data and its own random numbers; most methods have one."""

    model: nn.Module
    batches: Batches
    generators: Generators
    loss_sum: float = 0.0
    """That of the losses since the last evaluation, but for ``losses``."""
    losses: list[Tensor] = field(default_factory=list)
    """Those not in the sum yet: adding them up at each step would cost more than the loss."""

    def summed_loss(self) -> float:
        """Return the sum of the losses since the last evaluation, added up one by one, whenever that is done."""
        for loss in torch.stack(self.losses).tolist() if self.losses else ():
            self.loss_sum += loss
        self.losses.clear()
        return self.loss_sum

    def state_dict(self) -> dict[str, Any]:
        """Return what it is, but for what the optimizer has of it."""
        return {"loss_sum": self.summed_loss(), "model": self.model.state_dict(), **self.generators.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.loss_sum, self.losses = state["loss_sum"], []
        self.model.load_state_dict(state["model"])
        self.generators.load_state_dict(state)


@runtime_checkable
class HasAnswer(Protocol):
    """An optimizer whose answer is not the live weights: eval() shows the answer, train() brings the live weights back."""

    def eval(self) -> None: ...
    def train(self) -> None: ...


@contextmanager
def at_answer(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Let ``model`` compute with the method's answer, in evaluation mode; leave it as it was, bit for bit."""
    model.eval()
    if isinstance(optimizer, HasAnswer):
        optimizer.eval()
    try:
        yield
    finally:
        if isinstance(optimizer, HasAnswer):
            optimizer.train()
        model.train()


def predictions(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs, float32 of shape (predictions, classes), and targets, (predictions,); a text has many in an example."""
    return outputs.flatten(0, -2).float(), targets.flatten()


class Run:
    """One training run, which can be left after any step and gone on with in another process, to the bit.

    A step is one gradient evaluation of each replica, and one step of the optimizer, which has those in this process. Whatever
    the method, an epoch is one gradient evaluation of each replica for each of its batches. After every ``eval_every`` epochs,
    which need not be whole, and at the end, the method's answer is validated, with batch norm's statistics taken anew there.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        optimizer: Optimizer,
        scheduler: LRScheduler,
        data: Data,
        measure: Measure,
        ranks: Alone,
        *,
        epochs: int,
        batch_size: int,
        eval_every: float,
    ) -> None:
        self.replicas, self.optimizer, self.scheduler = replicas, optimizer, scheduler
        self.data, self.measure, self.ranks = data, measure, ranks
        self.per_epoch = batches_per_epoch(data, batch_size)
        self.last_step = epochs * self.per_epoch
        self.due = evaluation_steps(self.last_step, eval_every * self.per_epoch)
        self.stopwatch = Stopwatch(data.train_targets.device)
        self.curve = Curve()
        self.step = 0

    @property
    def model(self) -> nn.Module:
        """The network that is validated; all replicas have the same answer."""
        return self.replicas[0].model

    def steps(self, progress: Progress, check: Callable[[], None]) -> Iterator[None]:
        """Take the steps that are left, yielding after each, when the run may be saved or left.

        ``check`` is called between the batches of an evaluation and may raise; the evaluation is then made anew in due time.
        """
        while True:
            if self.step in self.due and self.step != self._evaluated:
                self._evaluate(progress, check)
            elif self.step % self.per_epoch == 0 and self.step != self._evaluated:
                progress.epoch(self.step // self.per_epoch, self._mean_loss())
            if self.step == self.last_step:
                return
            self.stopwatch.start()
            batches = [replica.batches[self.step] for replica in self.replicas]
            self.stopwatch.lap("data")
            self.optimizer.zero_grad()
            for replica, (inputs, targets) in zip(self.replicas, batches, strict=True):
                with replica.generators:
                    loss = cross_entropy(*predictions(replica.model(inputs), targets))
                    torch.autograd.backward(loss)
                replica.losses.append(loss.detach())
            self.stopwatch.lap("forward_backward")
            self.optimizer.step()
            self.stopwatch.lap("optimizer")
            self.step += 1
            if self.step % self.per_epoch == 0:
                self.scheduler.step()
            progress.step()
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return what the run is after this step in this process, the state of torch's generators included."""
        scheduler = {name: value for name, value in self.scheduler.state_dict().items() if name not in BY_GROUP}
        return {
            "step": self.step,
            "curve": asdict(self.curve),
            "seconds": self.stopwatch.read(),
            "replicas": [replica.state_dict() for replica in self.replicas],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": scheduler,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned for the same settings."""
        self.step = state["step"]
        self.curve = Curve(**state["curve"])
        self.stopwatch.set(state["seconds"])
        for replica, own in zip(self.replicas, state["replicas"], strict=True):
            replica.load_state_dict(own)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])

    @property
    def _evaluated(self) -> int:
        """The step of the last evaluation, or 0."""
        return self.curve.gradient_evaluations[-1] if self.curve.gradient_evaluations else 0

    def _mean_loss(self) -> float:
        """Return the mean over all replicas, on every rank."""
        sums = self.ranks.gather([replica.summed_loss() for replica in self.replicas])
        of_all = [loss for of_rank in sums for loss in of_rank]
        return sum(of_all) / (len(of_all) * (self.step - self._evaluated))

    def _evaluate(self, progress: Progress, check: Callable[[], None]) -> None:
        def value_at_answer() -> float:
            with at_answer(self.model, self.optimizer):
                return validate(self.model, self.data, self.measure, check)

        value = self.ranks.from_first(value_at_answer)
        seconds, loss = self.stopwatch.read(), self._mean_loss()
        self.curve.gradient_evaluations.append(self.step)
        self.curve.train_loss.append(loss)
        self.curve.validation.append(value)
        self.curve.seconds.append(sum(seconds.values()))
        self.curve.parts = seconds
        for replica in self.replicas:
            replica.loss_sum = 0.0
        progress.evaluated(self.step / self.per_epoch, loss, self.measure.say(value))


#: What a scheduler has for each param group: the run's settings and the optimizer's state tell it.
BY_GROUP = ("base_lrs", "_last_lr")


def whole_of(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the state of a run in one process with all replicas, from those of its ranks, each of them with one."""
    replicas = [replica for part in parts for replica in part["replicas"]]
    state, groups, before = {}, [], 0
    for optimizer in (part["optimizer"] for part in parts):
        state.update({before + number: own for number, own in optimizer["state"].items()})
        for group in optimizer["param_groups"]:
            groups.append({**group, "params": [before + number for number in group["params"]]})
        before = sum(len(group["params"]) for group in groups)
    return {**parts[0], "replicas": replicas, "optimizer": {"state": state, "param_groups": groups}}


def part_of(whole: dict[str, Any], here: range) -> dict[str, Any]:
    """Return of the state of a run with all replicas that of a process that has those ``here``."""
    replicas, optimizer = [whole["replicas"][number] for number in here], whole["optimizer"]
    groups = [group for group in optimizer["param_groups"] if group.get("replica", 0) in here]
    numbers = {number for group in groups for number in group["params"]}
    state = {number: own for number, own in optimizer["state"].items() if number in numbers}
    return {**whole, "replicas": replicas, "optimizer": {"state": state, "param_groups": groups}}


def evaluation_steps(last: int, interval: float) -> set[int]:
    """Return the gradient evaluations after which to validate: the whole numbers nearest to each interval, and the last."""
    interval = max(1.0, interval)  # a shorter one means every step too, by ever more numbers
    return {round(i * interval) for i in range(1, int(last / interval) + 1)} | {last}


@torch.no_grad()
def validate(model: nn.Module, data: Data, measure: Measure, check: Callable[[], None] = lambda: None) -> float:
    """Return the measure of ``model``, in evaluation mode, over all validation data; the model is left as it was.

    Batch norm's statistics are those of all training inputs at the present weights.
    """

    def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        count = math.ceil(len(tensors[0]) / EVALUATION_CHUNK)  # near-equal ones, as each counts alike in batch norm's means
        for chunk in zip(*(torch.tensor_split(tensor, count) for tensor in tensors), strict=True):
            check()
            yield chunk

    total = 0.0
    with recalibrate_batch_norm(model, chunks(data.train_inputs)):
        for inputs, targets in chunks(data.val_inputs, data.val_targets):
            total += measure.sum(*predictions(model(inputs), targets)).item()
    return measure.of_mean(total / data.val_targets.numel())
