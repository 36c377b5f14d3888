"""One training run: a model, an optimizer, a data order, and the curve that comes out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from deeprelax_cuda.train.data import Data, batches, batches_per_epoch
from deeprelax_cuda.train.progress import Progress

#: Examples per forward pass of an evaluation: bounds its memory, and has no part in its result.
EVALUATION_CHUNK = 1000


@dataclass
class Curve:
    """What was seen along one run, one entry per evaluation."""

    gradient_evaluations: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Seconds of training, evaluations left out."""
    train_loss: list[float] = field(default_factory=list)
    """Mean cross-entropy, in nats, over the batches of the epoch as they were trained on."""
    validation_error: list[float] = field(default_factory=list)
    """In %, at the method's answer."""

    def reached(self, level: float) -> int | None:
        """Return the place of the first evaluation with an error of at most ``level`` %, or None."""
        return next((i for i, error in enumerate(self.validation_error) if error <= level), None)


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


@torch.no_grad()
def validation_error(model: nn.Module, data: Data) -> float:
    """Return the part of all validation images, in %, that ``model`` gets wrong."""
    wrong = 0
    chunks = (torch.split(part, EVALUATION_CHUNK) for part in (data.val_inputs, data.val_targets))
    for inputs, targets in zip(*chunks, strict=True):
        wrong += int((model(inputs).argmax(dim=1) != targets).sum())
    return 100.0 * wrong / len(data.val_targets)


def gradient_step(model: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor) -> Tensor:
    """Take one step on one batch; return its mean loss, detached and still on its device."""
    loss = cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.detach()


def train(
    model: nn.Module,
    optimizer: Optimizer,
    data: Data,
    *,
    order: torch.Generator,
    epochs: int,
    batch_size: int,
    eval_every: int,
    progress: Progress,
) -> Curve:
    """Train ``model`` in place and return its curve.

    Whatever the method, an epoch is one gradient evaluation for each of its batches, in an order drawn from ``order``.
    There is an evaluation after every ``eval_every`` epochs and after the last one.
    """
    curve = Curve()
    per_epoch = batches_per_epoch(data, batch_size)
    seconds = 0.0
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        total = torch.zeros(())
        for inputs, targets in batches(data, batch_size, order):
            total += gradient_step(model, optimizer, inputs, targets)
            progress.step()
        loss = total.item() / per_epoch
        seconds += time.perf_counter() - start

        if epoch % eval_every == 0 or epoch == epochs:
            with at_answer(model, optimizer):
                error = validation_error(model, data)
            curve.gradient_evaluations.append(epoch * per_epoch)
            curve.seconds.append(seconds)
            curve.train_loss.append(loss)
            curve.validation_error.append(error)
            progress.evaluated(epoch, loss, error)
    return curve
