"""The English text that comes with Python, cut into examples for a model of characters."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from deeprelax_cuda.train.data import Data

#: Characters of an example, and so the number of steps through which a gradient flows.
LENGTH = 64
#: Every tenth topic in the order of names, from the first on, is validated on.
VALIDATION_EVERY = 10


def text(root: Path | None = None) -> Data:
    """Return the topics of Python's own ``help()``, about 460,000 characters, as windows of `LENGTH` characters.

    An input is a window, its target the same window one character on. The vocabulary is all characters that occur, in order of
    code points. The text belongs to the version of Python; the digest says which it was.
    """
    from pydoc_data.topics import topics  # some distributions of Python lack it

    digest = hashlib.sha256("\0".join(f"{name}\0{topics[name]}" for name in sorted(topics)).encode()).hexdigest()
    training, validation = split(topics)
    vocabulary = sorted(set(training + validation))
    train_inputs, train_targets = windows(training, vocabulary)
    val_inputs, val_targets = windows(validation, vocabulary)
    return Data(train_inputs, train_targets, val_inputs, val_targets, classes=len(vocabulary), digest=digest)


def split(topics: Mapping[str, str]) -> tuple[str, str]:
    """Return the training text and the validation text.

    The topics are sections of one manual, and some contain others whole ("compound" has "if", "specialnames" most of the data
    model). Every passage that a validation topic has is therefore left out of the training topics; what is between two blank
    lines is a passage, and the same one whatever its indentation and line breaks.
    """
    names = sorted(topics)
    held_out = names[::VALIDATION_EVERY]
    seen = {_words(passage) for name in held_out for passage in _passages(topics[name])}
    training = (passage for name in names if name not in held_out for passage in _passages(topics[name]))
    validation = (passage for name in held_out for passage in _passages(topics[name]))
    return "\n\n".join(passage for passage in training if _words(passage) not in seen), "\n\n".join(validation)


def windows(characters: str, vocabulary: list[str]) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, int64 of shape (examples, `LENGTH`); the characters that fill no window are left out."""
    number = {character: i for i, character in enumerate(vocabulary)}
    numbers = torch.tensor([number[character] for character in characters])
    used = (len(numbers) - 1) // LENGTH * LENGTH
    return numbers[:used].view(-1, LENGTH), numbers[1 : used + 1].view(-1, LENGTH)


def _passages(topic: str) -> list[str]:
    return [passage for passage in re.split(r"\n\s*\n", topic.strip("\n")) if passage.strip()]


def _words(passage: str) -> str:
    return " ".join(passage.split())
