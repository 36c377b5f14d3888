"""The networks that `deeprelax train` knows.

Those with a name from the papers are the ones of Chaudhari et al., "Entropy-SGD: Biasing gradient descent into wide valleys",
ICLR 2017, section 5, with the same numbers of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from deeprelax_cuda.cli import UsageError


@dataclass(frozen=True)
class Model:
    """How to build a network, and the methods' options that it needs: published ones, or else measured here."""

    build: Callable[[Sequence[int], int], nn.Module]
    """(shape of one input, number of classes) -> the network, its weights drawn from torch's global generator.

    Raises UsageError where the network does not take inputs of that shape.
    """
    options: Mapping[str, Any] = field(default_factory=dict)
    """By their command-line names; one that is given on the command line goes before."""


def mlp(shape: Sequence[int], classes: int) -> nn.Module:
    """Return a network of two hidden ReLU layers of 128, the form of the papers' mnistfc at the size of small images."""
    _check_images("mlp", shape, side=1)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def mnistfc(shape: Sequence[int], classes: int) -> nn.Module:
    """Return the fully connected network of the papers: two hidden layers of 1,024, 1,867,786 parameters for MNIST."""
    _check_images("mnistfc", shape, side=1)

    def hidden(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Dropout(0.2)]

    return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), *hidden(math.prod(shape)), *hidden(1024), nn.Linear(1024, classes))


def lenet(shape: Sequence[int], classes: int) -> nn.Module:
    """Return the papers' LeNet: two convolutions of 5x5 and a hidden layer of 500, 131,220 parameters for MNIST."""
    _check_images("lenet", shape, side=22)
    height, width = (((size - 4) // 3 - 4) // 2 for size in shape[1:])

    def convolution(inputs: int, outputs: int, pool: int) -> list[nn.Module]:
        # Pooled first, batch norm and ReLU have 1/pool^2 of the work.
        layer = nn.Conv2d(inputs, outputs, 5)
        return [layer, nn.MaxPool2d(pool), nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout(0.25)]

    return nn.Sequential(
        *convolution(shape[0], 20, pool=3),
        *convolution(20, 50, pool=2),
        nn.Flatten(),
        nn.Linear(50 * height * width, 500),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(500, classes),
    )


def allcnn(shape: Sequence[int], classes: int) -> nn.Module:
    """Return All-CNN-C with batch norm: nine convolutions, strides in place of pooling, 1,667,166 parameters for CIFAR-10.

    The count needs what the papers leave open: biases in the convolutions, and batch norm (with ReLU) after the last one too.
    The average is over what is left of the image, 8x8 of 32x32.

    Source: Springenberg et al., "Striving for simplicity: the all convolutional net", 2014.
    """
    # Below 16 the last layers see maps of less than 4x4, and their 3x3 windows mostly padding.
    _check_images("allcnn", shape, side=16)

    def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, size, stride, padding=size // 2), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        nn.Dropout(0.2),
        *convolution(shape[0], 96),
        *convolution(96, 96),
        *convolution(96, 96, stride=2),
        nn.Dropout(0.5),
        *convolution(96, 192),
        *convolution(192, 192),
        *convolution(192, 192, stride=2),
        nn.Dropout(0.5),
        *convolution(192, 192),
        *convolution(192, 192),
        *convolution(192, classes, size=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class Lstm(nn.Module):
    """A language model of characters: embedding, one LSTM layer, linear. Each window starts from a state of zeros."""

    def __init__(self, classes: int, *, embedding: int = 64, hidden: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, embedding)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, classes)

    def forward(self, characters: Tensor) -> Tensor:
        """Return the logits of the next characters, (batch, length, classes), for int64 ``characters``, (batch, length)."""
        states, _ = self.lstm(self.dropout(self.embedding(characters)))
        logits: Tensor = self.output(self.dropout(states))
        return logits


def lstm(shape: Sequence[int], classes: int) -> nn.Module:
    """Return a character language model of 119,207 parameters for a vocabulary of 103.

    On the text of `deeprelax_cuda.train.text` both SGD and Entropy-SGD are stable and far faster at steps of 0.5 than of 0.1.
    """
    if len(shape) != 1:
        raise UsageError(f"--model: lstm takes text, of shape (length,), got inputs of shape {tuple(shape)}")
    return Lstm(classes)


def _check_images(model: str, shape: Sequence[int], side: int) -> None:
    """Refuse what is no image of at least ``side`` x ``side`` pixels."""
    if len(shape) != 3:
        expected = "images, of shape (channels, height, width)"
    elif min(shape[1:]) < side:
        expected = f"images of at least {side} x {side} pixels"
    else:
        return
    raise UsageError(f"--model: {model} takes {expected}, got inputs of shape {tuple(shape)}")


MODELS = {
    "mlp": Model(mlp),
    "mnistfc": Model(mnistfc),
    "lenet": Model(lenet),
    "allcnn": Model(allcnn, options={"weight_decay": 1e-3}),
    "lstm": Model(lstm, options={"lr": 0.5, "inner_lr": 0.5}),
}
