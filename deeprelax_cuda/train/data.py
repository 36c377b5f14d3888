"""Data sets, held in memory, and the order in which a run sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Data:
    """A classification data set.

    ``train_inputs`` and ``val_inputs`` are float32 of shape (examples, channels, height, width), ``train_targets`` and
    ``val_targets`` int64 class numbers of shape (examples,).
    """

    train_inputs: Tensor
    train_targets: Tensor
    val_inputs: Tensor
    val_targets: Tensor
    classes: int


@dataclass(frozen=True)
class Dataset:
    """How to get a data set, and the settings with which to train on it when none are given."""

    load: Callable[[], Data]
    model: str
    epochs: int
    batch_size: int
    levels: tuple[float, ...]
    """Validation errors, in %, worth saying when they were reached."""
    threads: int | None = None
    """CPU threads, None for torch's own number. Tiny batches gain nothing by a second, and suffer where cores are shared."""


def digits() -> Data:
    """Return the 1,797 images of 8x8 handwritten digits that come with scikit-learn: 1,257 to train, 540 to validate.

    Pixels are in [0, 1]. The split is stratified by class and always the same; the seed of a run does not touch it.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = pixels.reshape(-1, 1, 8, 8) / 16.0
    parts = train_test_split(images, labels, test_size=540, stratify=labels, random_state=0)
    train_inputs, val_inputs = (torch.as_tensor(part, dtype=torch.float32) for part in parts[:2])
    train_targets, val_targets = (torch.as_tensor(part, dtype=torch.int64) for part in parts[2:])
    return Data(train_inputs, train_targets, val_inputs, val_targets, classes=10)


DATASETS = {"digits": Dataset(digits, model="mlp", epochs=30, batch_size=32, levels=(5.0, 3.0), threads=1)}


def batches_per_epoch(data: Data, batch_size: int) -> int:
    """Return the number of gradient evaluations in an epoch. Batches are full: what is left over waits for another epoch."""
    return len(data.train_targets) // batch_size


def batches(data: Data, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the (inputs, targets) of one epoch in a fresh order drawn from ``generator``."""
    order = torch.randperm(len(data.train_targets), generator=generator)
    for chosen in torch.split(order, batch_size)[: batches_per_epoch(data, batch_size)]:
        yield data.train_inputs[chosen], data.train_targets[chosen]
