"""The parameter lists that steps are measured on, as shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """Return the shapes of ResNet-50's 161 parameters, in their order: convolutions without bias, each with a batch norm."""

    def convolution(outputs: int, inputs: int, side: int) -> list[Shape]:
        return [(outputs, inputs, side, side), (outputs,), (outputs,)]

    shapes, inputs = convolution(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, inputs, 1) + convolution(width, width, 3) + convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def gpt2_small() -> list[Shape]:
    """Return the shapes of GPT-2 small's 148 parameters; the head is the embedding."""
    width = 768
    norm: list[Shape] = [(width,), (width,)]

    def linear(inputs: int, outputs: int) -> list[Shape]:
        return [(inputs, outputs), (outputs,)]

    attention = [*norm, *linear(width, 3 * width), *linear(width, width)]
    perceptron = [*norm, *linear(width, 4 * width), *linear(4 * width, width)]
    return [(50257, width), (1024, width), *(attention + perceptron) * 12, *norm]


def elements(shapes: Sequence[Shape]) -> int:
    """Return the elements of all tensors of a list."""
    return sum(map(math.prod, shapes))
