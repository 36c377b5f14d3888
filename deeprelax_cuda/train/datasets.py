"""The data sets that `deeprelax train` knows, and the settings that suit each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from deeprelax_cuda.train import files, whitening
from deeprelax_cuda.train.data import Data
from deeprelax_cuda.train.text import text


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
    """CPU threads, None for torch's own number. Tiny batches gain little by a second, and suffer where cores are shared."""


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


MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MNIST_TRAIN, MNIST_TEST = 60_000, 10_000
#: `files.content_of` the published training and test examples.
MNIST_CONTENT = "6019fe9bf4c2c256d446828213e33f053c0e4bb68978d9cf2b5efa0cc8dc5753"


def mnist(root: Path | None = None) -> Data:
    """Return MNIST, or what was made to take its place: 60,000 images of 28x28 to train, the 10,000 test images to validate.

    Pixels p of 0 to 255 become (p / 255 - 0.1307) / 0.3081, mean 0 and standard deviation 1 over MNIST's training images.

    Args:
        root: the folder with the four IDX files of `MNIST_FILES`, or of which ``MNIST/raw``, torchvision's place, has them.

    Raises:
        UsageError: a file is missing, damaged, or of another shape.
    """
    paths = files.find(root, "mnist", MNIST_FILES, "MNIST/raw")
    contents = files.read(paths)
    parts = []
    for i, count in ((0, MNIST_TRAIN), (2, MNIST_TEST)):
        images = files.idx(paths[i], contents[i], (count, 28, 28))
        labels = files.idx(paths[i + 1], contents[i + 1], (count,))
        files.check_labels(paths[i + 1], labels, 10)
        parts.append((labels, images))
    files.say_if_other(paths[0].parent, "MNIST", files.content_of(*parts), MNIST_CONTENT)
    train_inputs, val_inputs = (images[:, None].float().div_(255).sub_(0.1307).div_(0.3081) for _, images in parts)
    train_targets, val_targets = (labels.long() for labels, _ in parts)
    return Data(train_inputs, train_targets, val_inputs, val_targets, classes=10, digest=files.digest(contents))


CIFAR10_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CIFAR10_RECORDS = 10_000  # in each file: a label byte, then 32x32 pixels of red, of green, of blue
#: `files.content_of` the published training and test examples, in whatever order.
CIFAR10_CONTENT = "abf4b167a135b062ef28f7f742091acaf0d93435cacacaa70137c477b4a499cb"


def cifar10(root: Path | None = None) -> Data:
    """Return CIFAR-10, contrast normalised and whitened: 50,000 images of 3x32x32 to train, the 10,000 test images to validate.

    See `whitening`; its statistics are those of the training images. On two cores it takes about 20 seconds, 6 of them for xz.

    Args:
        root: the folder with the six files of the binary version, or of which ``cifar-10-batches-bin`` has them.

    Raises:
        UsageError: a file is missing, damaged, or of another length.
    """
    paths = files.find(root, "cifar10", CIFAR10_FILES, "cifar-10-batches-bin")
    contents = files.read(paths)
    batches = [files.records(*file, CIFAR10_RECORDS, 3073) for file in zip(paths, contents, strict=True)]
    for path, batch in zip(paths, batches, strict=True):
        files.check_labels(path, batch[:, 0], 10)
    parts = [(part[:, 0], part[:, 1:]) for part in (torch.cat(batches[:-1]), batches[-1])]
    files.say_if_other(paths[0].parent, "CIFAR-10", files.content_of(*parts), CIFAR10_CONTENT)

    train, val = (whitening.contrast_normalized(pixels) for _, pixels in parts)
    zca = whitening.Zca(train)
    train_inputs, val_inputs = (zca.whiten_(images).view(-1, 3, 32, 32) for images in (train, val))
    train_targets, val_targets = (labels.long() for labels, _ in parts)
    return Data(train_inputs, train_targets, val_inputs, val_targets, classes=10, digest=files.digest(contents))


DATASETS = {
    "digits": Dataset(digits, model="mlp", epochs=30, batch_size=32, levels=(5.0, 3.0), threads=1),
    "mnist": Dataset(mnist, model="lenet", epochs=5, batch_size=128, levels=(2.0, 1.0)),
    "cifar10": Dataset(cifar10, model="allcnn", epochs=20, batch_size=128, levels=(30.0, 20.0)),
    "text": Dataset(text, model="lstm", epochs=10, batch_size=32, levels=(6.0, 5.0), measure="perplexity", threads=1),
}
