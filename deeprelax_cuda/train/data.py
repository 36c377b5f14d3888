"""A data set in memory, and the order in which a run sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deeprelax_cuda.noise import derive_seed


@dataclass(frozen=True)
class Data:
    """A data set to predict classes in, held in memory.

    Images: inputs are floating, of shape (examples, channels, height, width), targets int64 class numbers of shape (examples,).
    Text: inputs and targets are int64 characters of shape (examples, length), a target being the character after its input.
    """

    train_inputs: Tensor
    train_targets: Tensor
    val_inputs: Tensor
    val_targets: Tensor
    classes: int
    digest: str
    """SHA-256 of the content as it was read, in hexadecimal: whether two runs saw the same data."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Data:
        """Return the data on ``device``, inputs that are floating in ``dtype``."""
        moved = {
            name: getattr(self, name).to(device) for name in ("train_inputs", "train_targets", "val_inputs", "val_targets")
        }
        for name in ("train_inputs", "val_inputs"):
            if moved[name].is_floating_point():
                moved[name] = moved[name].to(dtype)
        return replace(self, **moved)


class Batches:
    """The batches of every epoch: each a fresh order of the training examples, which ``seed`` and the epoch alone determine.

    Batches are full: the examples that are left over wait for another epoch.
    """

    def __init__(self, data: Data, batch_size: int, seed: int) -> None:
        self._data = data
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._chosen: tuple[Tensor, ...] = ()
        self._targets: tuple[Tensor, ...] = ()

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of gradient evaluation ``step``, counted from 0 over all epochs."""
        epoch, place = divmod(step, batches_per_epoch(self._data, self._batch_size))
        if epoch != self._epoch:
            self._begin(epoch)
        return self._data.train_inputs.index_select(0, self._chosen[place]), self._targets[place]

    def _begin(self, epoch: int) -> None:
        """Cut an epoch into batches, ahead of them: between two passes each operation costs what it costs with cold caches."""
        generator = torch.Generator().manual_seed(derive_seed(self._seed, epoch))
        targets = self._data.train_targets
        order = torch.randperm(len(targets), generator=generator).to(targets.device)
        self._epoch = epoch
        self._chosen = torch.split(order, self._batch_size)
        self._targets = torch.split(targets.index_select(0, order), self._batch_size)


def batches_per_epoch(data: Data, batch_size: int) -> int:
    """Return the number of gradient evaluations in an epoch."""
    return len(data.train_targets) // batch_size
