"""A comparison: every method at every seed, from the same weights and over the same batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from deeprelax_cuda.cli import UsageError
from deeprelax_cuda.noise import derive_seed
from deeprelax_cuda.train.data import Data, batches, batches_per_epoch
from deeprelax_cuda.train.loop import Curve, gradient_step, train
from deeprelax_cuda.train.methods import METHODS, backend_of, settings_of
from deeprelax_cuda.train.models import MODELS
from deeprelax_cuda.train.progress import make_progress


@dataclass(frozen=True)
class Settings:
    """What a comparison is made of. ``options`` are the optimizers' options that were given, for the methods that take them."""

    data: str
    model: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    eval_every: int
    levels: tuple[float, ...]
    options: dict[str, Any]


@dataclass
class Trained:
    """A method's part of a comparison: its optimizer's settings, who computed the steps, and a curve for each seed."""

    settings: dict[str, Any]
    backend: str
    curves: dict[int, Curve]


@dataclass
class Comparison:
    """The settings of a comparison and what came out of it, by the methods' names."""

    settings: Settings
    methods: dict[str, Trained]


def rehearse(settings: Settings, data: Data) -> Comparison:
    """Return a comparison without curves, after each method has taken a step that is thrown away.

    Wrong options and an absent backend show here, before any work, and the costs of a process's first step stay out of the
    measured seconds.

    Raises:
        UsageError: an optimizer refuses its options, or the backend asked for cannot serve.
    """
    comparison = Comparison(settings, {})
    for name in settings.methods:
        try:
            model, optimizer = build(name, settings.seeds[0], settings, data)
            inputs, targets = next(batches(data, settings.batch_size, data_order(settings.seeds[0])))
            gradient_step(model, optimizer, inputs, targets)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{name}: {error}") from error
        comparison.methods[name] = Trained(settings_of(optimizer), backend_of(optimizer), {})
    return comparison


def compare(comparison: Comparison, data: Data, *, quiet: bool) -> None:
    """Add the curve of every method at every seed, showing progress on standard error unless ``quiet``."""
    settings = comparison.settings
    runs = [(name, seed) for seed in settings.seeds for name in settings.methods]
    steps = len(runs) * settings.epochs * batches_per_epoch(data, settings.batch_size)
    progress = make_progress(steps=steps, epochs=settings.epochs, quiet=quiet)
    try:
        for name, seed in runs:
            progress.run(f"{name}, seed {seed}")
            model, optimizer = build(name, seed, settings, data)
            comparison.methods[name].curves[seed] = train(
                model,
                optimizer,
                data,
                order=data_order(seed),
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                eval_every=settings.eval_every,
                progress=progress,
            )
    finally:
        progress.close()


def build(method: str, seed: int, settings: Settings, data: Data) -> tuple[nn.Module, Optimizer]:
    """Return the network, with the weights that belong to ``seed``, and the method's optimizer of it."""
    torch.manual_seed(seed)
    model = MODELS[settings.model](data.train_inputs.shape[1:], data.classes)
    taken = {name: value for name, value in settings.options.items() if name in METHODS[method].options}
    return model, METHODS[method].make(model.parameters(), seed, **taken)


def data_order(seed: int) -> torch.Generator:
    """Return the generator of the data order that belongs to ``seed``, whatever the method."""
    return torch.Generator().manual_seed(derive_seed(seed, 0))
