"""The data sets that `deeprelax train` knows, and the settings that suit each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from deeprelax_cuda.train.data import Data


@dataclass(frozen=True)
class Dataset:
    """How to get a data set, and the settings with which to train on it when none are given."""

    load: Callable[[Path | None], Data]
    """Reads it, from files under the folder given if it has any."""
    model: str
    epochs: int
    batch_size: int
    levels: tuple[float, ...]
    """Values of the measure worth saying when they were reached."""
    measure: str = "error"
    """What a validation gives, a name of `deeprelax_cuda.train.measures.MEASURES`."""
    threads: int | None = None
    """CPU threads, None for torch's own number. Tiny batches gain nothing by a second, and suffer where cores are shared."""


def digits(root: Path | None = None) -> Data:
    """Return the 1,797 images of 8x8 handwritten digits that come with scikit-learn: 1,257 to train, 540 to validate.

    Pixels are in [0, 1]. The split is stratified by class and always the same; the seed of a run does not touch it.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    images = pixels.reshape(-1, 1, 8, 8) / 16.0
    parts = train_test_split(images, labels, test_size=540, stratify=labels, random_state=0)
    train_inputs, val_inputs = (torch.as_tensor(part, dtype=torch.float32) for part in parts[:2])
    train_targets, val_targets = (torch.as_tensor(part, dtype=torch.int64) for part in parts[2:])
    return Data(train_inputs, train_targets, val_inputs, val_targets, classes=10, digest=digest)


DATASETS = {"digits": Dataset(digits, model="mlp", epochs=30, batch_size=32, levels=(5.0, 3.0), threads=1)}
