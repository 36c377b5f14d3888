"""The data sets of `deeprelax train`: what is read and made of it, and how files that are not right are refused."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import pydoc_data.topics
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deeprelax_cuda.cli import UsageError
from deeprelax_cuda.train import datasets, files, text, whitening
from deeprelax_cuda.train.datasets import DATASETS, cifar10, digits, mnist

IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = datasets.MNIST_FILES


def as_bytes(values: Tensor) -> bytes:
    return values.to(torch.uint8).contiguous().numpy().tobytes()


def idx_of(values: Tensor, type_code: int = 8) -> bytes:
    """The values in an IDX file whose header says that they are of this type."""
    return struct.pack(f">4B{values.dim()}I", 0, 0, type_code, values.dim(), *values.shape) + as_bytes(values)


def digits_like(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of 28x28 with few grey levels and labels of 0 to 9, all of them present."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 28, 1), generator=generator, dtype=torch.uint8).expand(count, 28, 28)
    return images, torch.arange(count) % 10


@pytest.fixture(scope="module")
def whole_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four files of MNIST's sizes, plain."""
    folder = tmp_path_factory.mktemp("mnist")
    for names, count in (((IMAGES, LABELS), 60_000), ((TEST_IMAGES, TEST_LABELS), 10_000)):
        for name, values in zip(names, digits_like(count, seed=count), strict=True):
            (folder / name).write_bytes(idx_of(values))
    return folder


@pytest.fixture
def root(whole_mnist: Path, tmp_path: Path) -> Path:
    """The same files, a link each: a test may take some away and put others there."""
    for path in whole_mnist.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def replace(root: Path, name: str, content: bytes, ending: str = "") -> Path:
    """Put ``content`` in the place of file ``name``, which then has another ``ending``."""
    (root / name).unlink()
    path = root / f"{name}{ending}"
    path.write_bytes(content)
    return path


def refusal(load: Callable[[Path | None], object], root: Path | None) -> str:
    with pytest.raises(UsageError) as raised:
        load(root)
    message = str(raised.value)
    assert message.startswith("--data-root: ")
    assert "\n" not in message
    return message


# Digits.


def test_digits_are_split_by_class_always_the_same_way() -> None:
    pytest.importorskip("sklearn", reason='needs the packages of "deeprelax_cuda[train]"')
    data, again = digits(), digits()
    assert data.train_inputs.shape == (1257, 1, 8, 8)
    assert data.val_inputs.shape == (540, 1, 8, 8)
    assert data.train_inputs.dtype == torch.float32
    assert (data.train_inputs.min(), data.train_inputs.max()) == (0.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(vars(data).values(), vars(again).values(), strict=True) if torch.is_tensor(a))
    assert data.digest == again.digest
    share = data.val_targets.bincount() / (data.val_targets.bincount() + data.train_targets.bincount())
    assert ((share - 540 / 1797).abs() < 0.01).all()


# MNIST: what is read.


@pytest.mark.slow
def test_mnist_is_normalised_and_in_the_order_of_its_files(whole_mnist: Path) -> None:
    data = mnist(whole_mnist)
    for inputs, targets, count in (
        (data.train_inputs, data.train_targets, 60_000),
        (data.val_inputs, data.val_targets, 10_000),
    ):
        images, labels = digits_like(count, seed=count)
        assert inputs.shape == (count, 1, 28, 28)
        assert inputs.dtype == torch.float32
        assert torch.equal(targets, labels)
        torch.testing.assert_close(inputs[:, 0], (images / 255 - 0.1307) / 0.3081)
    assert data.classes == 10
    in_order = b"".join((whole_mnist / name).read_bytes() for name in datasets.MNIST_FILES)
    assert data.digest == hashlib.sha256(in_order).hexdigest()


def test_compressed_files_and_other_places_and_spellings_give_the_same(root: Path) -> None:
    plain = mnist(root)
    replace(root, LABELS, gzip.compress((root / LABELS).read_bytes()), ".gz")
    replace(root, TEST_LABELS, lzma.compress((root / TEST_LABELS).read_bytes()), ".xz")
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    (root / IMAGES).rename(folder / IMAGES)
    (root / TEST_IMAGES).rename(folder / TEST_IMAGES.replace("-idx", ".idx"))
    again = mnist(root)
    assert again.digest == plain.digest
    assert torch.equal(again.train_inputs, plain.train_inputs)
    assert torch.equal(again.val_targets, plain.val_targets)


def test_a_plain_file_goes_before_a_compressed_one(root: Path) -> None:
    (root / f"{LABELS}.gz").write_bytes(b"not gzip")
    mnist(root)


def test_content_that_is_not_the_published_one_is_said_in_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mnist(root)
    said = capsys.readouterr().err
    assert said == f"deeprelax train: {root}: files and shapes are MNIST's, the content is not the published one\n"

    parts = [digits_like(count, seed=count)[::-1] for count in (60_000, 10_000)]
    monkeypatch.setattr(datasets, "MNIST_CONTENT", files.content_of(*((y.to(torch.uint8), x) for y, x in parts)))
    mnist(root)
    assert capsys.readouterr().err == ""


def test_the_content_of_examples_does_not_depend_on_their_order() -> None:
    images, labels = torch.arange(24, dtype=torch.uint8).view(6, 2, 2), torch.tensor([3, 1, 4, 1, 5, 9], dtype=torch.uint8)
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    content = files.content_of((labels, images))
    assert files.content_of((labels[order], images[order])) == content
    assert files.content_of((labels[order], images)) != content
    assert files.content_of((labels[:3], images[:3]), (labels[3:], images[3:])) != files.content_of(
        (labels[3:], images[3:]), (labels[:3], images[:3])
    )


# MNIST: what is refused.


def test_no_folder_and_no_files_name_all_that_is_expected(tmp_path: Path) -> None:
    everything = f"{IMAGES}, {LABELS}, {TEST_IMAGES}, {TEST_LABELS}, each plain, .gz or .xz"
    assert refusal(mnist, None) == f"--data-root: --data mnist needs the folder with {everything}"
    absent = tmp_path / "absent"
    assert refusal(mnist, absent) == f"--data-root: {absent} is not a folder; expected the one with {everything}"
    (tmp_path / LABELS).touch()
    missing = f"{IMAGES}, {TEST_IMAGES}, {TEST_LABELS}"
    assert refusal(mnist, tmp_path) == f"--data-root: no {missing} in {tmp_path} or its MNIST/raw; expected {everything}"


@pytest.mark.parametrize("name", [LABELS, TEST_LABELS])
@pytest.mark.parametrize(
    ("ending", "change", "message"),
    [
        (".gz", lambda packed: packed[:-40], "is cut off"),
        (".gz", lambda packed: packed[:-3], "is cut off"),
        (".gz", lambda packed: b"\x1f\x8c" + packed[2:], "is damaged: Not a gzipped file"),
        (".gz", lambda packed: packed[:-8] + bytes(4) + packed[-4:], "is damaged: CRC check failed"),
        (".gz", lambda packed: packed[:10] + b"\xff" * 20 + packed[30:], "is damaged: Error -3"),
        (".xz", lambda packed: packed[:-40], "is damaged: Compressed data ended"),
        (".xz", lambda packed: b"xz" + packed[2:], "is damaged: Input format not supported"),
        (".xz", lambda packed: packed[:60] + bytes(20) + packed[80:], "is damaged: Corrupt input data"),
    ],
)
def test_compressed_files_that_are_cut_off_or_damaged_are_refused(
    name: str, ending: str, change: Callable[[bytes], bytes], message: str, root: Path
) -> None:
    compress = {".gz": gzip.compress, ".xz": lzma.compress}[ending]
    path = replace(root, name, change(compress((root / name).read_bytes())), ending)
    assert refusal(mnist, root).startswith(f"--data-root: {path} {message}")


def test_a_file_that_cannot_be_read_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(files.READERS, "", refuse)
    assert refusal(mnist, root) == f"--data-root: {root / IMAGES} cannot be read: Permission denied"


LABEL_VALUES = torch.arange(10_000) % 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_of(LABEL_VALUES, type_code=13), "expected IDX magic 00000801, got 00000d01"),
        (idx_of(LABEL_VALUES.view(100, 100)), "expected IDX magic 00000801, got 00000802"),
        (b"", "expected IDX magic 00000801, got nothing"),
        (b"\0\0\x08\x01\0\0", "expected dimensions 10000, got none"),
        (idx_of(LABEL_VALUES[1:]), "expected dimensions 10000, got 9999"),
        (idx_of(LABEL_VALUES)[:-1], "expected 10008 bytes, got 10007"),
        (idx_of(LABEL_VALUES) + b"\0", "expected 10008 bytes, got 10009"),
        (idx_of(LABEL_VALUES.clamp(max=8) + (LABEL_VALUES == 7) * 3), "expected labels from 0 to 9, got 10 at example 7"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_labels_that_are_not_the_test_images_are_refused(content: bytes, message: str, root: Path) -> None:
    path = replace(root, TEST_LABELS, content)
    assert refusal(mnist, root) == f"--data-root: {path}: {message}"


def test_images_of_another_size_are_refused(root: Path) -> None:
    path = replace(root, TEST_IMAGES, idx_of(torch.zeros(10_000, 20, 20)))
    assert refusal(mnist, root) == f"--data-root: {path}: expected dimensions 10000 x 28 x 28, got 10000 x 20 x 20"


# CIFAR-10, with fewer records a file.

RECORDS = 4


@pytest.fixture
def cifar_records(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The records of the six files, of shape (6, RECORDS, 3073); the data set is told that files are this short."""
    monkeypatch.setattr(datasets, "CIFAR10_RECORDS", RECORDS)
    generator = torch.Generator().manual_seed(0)
    records = torch.randint(256, (6, RECORDS, 3073), generator=generator, dtype=torch.uint8)
    records[:, :, 0] %= 10
    return records


def write_cifar(folder: Path, records: Tensor) -> None:
    for name, part in zip(datasets.CIFAR10_FILES, records, strict=True):
        (folder / name).write_bytes(as_bytes(part))


def planes(records: Tensor) -> Tensor:
    """The pixels of records, of shape (images, 3, 32, 32): a plane of each colour, row by row."""
    return records.reshape(-1, 3073)[:, 1:].reshape(-1, 3, 32, 32)


class Nothing:
    """In the place of whitening: remembers what it was to be made of, and changes nothing."""

    def __init__(self, images: Tensor) -> None:
        Nothing.images = images.clone()

    def whiten_(self, images: Tensor) -> Tensor:
        return images


def test_cifar10_is_read_with_statistics_of_the_training_images(
    cifar_records: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(whitening, "Zca", Nothing)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    write_cifar(folder, cifar_records)
    last = folder / "data_batch_5.bin"
    last.with_name("data_batch_5.bin.xz").write_bytes(lzma.compress(last.read_bytes()))
    last.unlink()
    data = cifar10(tmp_path)

    expected = planes(cifar_records).double()
    expected = expected - expected.mean(dim=(1, 2, 3), keepdim=True)
    expected = (expected / expected.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()).float()
    torch.testing.assert_close(torch.cat([data.train_inputs, data.val_inputs]), expected)
    assert torch.equal(Nothing.images, data.train_inputs.flatten(1))
    assert data.train_inputs.shape == (5 * RECORDS, 3, 32, 32)
    assert torch.equal(data.train_targets, cifar_records[:5, :, 0].flatten().long())
    assert torch.equal(data.val_targets, cifar_records[5, :, 0].long())
    assert data.digest == hashlib.sha256(as_bytes(cifar_records)).hexdigest()
    assert capsys.readouterr().err.count("CIFAR-10's, the content is not the published one\n") == 1


@pytest.mark.slow
def test_cifar10_is_whitened(cifar_records: Tensor, tmp_path: Path) -> None:
    write_cifar(tmp_path, cifar_records)
    data = cifar10(tmp_path)
    train, val = (whitening.contrast_normalized(planes(part)) for part in (cifar_records[:5], cifar_records[5]))
    zca = whitening.Zca(train)
    assert torch.equal(data.train_inputs.flatten(1), zca.whiten_(train))
    assert torch.equal(data.val_inputs.flatten(1), zca.whiten_(val))


def test_cifar10_files_of_another_length_or_with_wrong_labels_are_refused(cifar_records: Tensor, tmp_path: Path) -> None:
    names = "data_batch_1.bin, data_batch_2.bin, data_batch_3.bin, data_batch_4.bin, data_batch_5.bin, test_batch.bin"
    assert f"cifar10 needs the folder with {names}, each plain, .gz or .xz" in refusal(cifar10, None)
    assert f"no {names} in {tmp_path} or its cifar-10-batches-bin; expected {names}" in refusal(cifar10, tmp_path)

    cifar_records[2, 3, 0] = 10
    write_cifar(tmp_path, cifar_records)
    path = tmp_path / "data_batch_3.bin"
    assert refusal(cifar10, tmp_path) == f"--data-root: {path}: expected labels from 0 to 9, got 10 at example 3"

    path.write_bytes(path.read_bytes()[:-1])
    length = RECORDS * 3073
    expected = f"--data-root: {path}: expected {length} bytes ({RECORDS} records of 3073), got {length - 1}"
    assert refusal(cifar10, tmp_path) == expected


# Whitening.


def test_contrast_is_one_for_all_images_but_flat_ones() -> None:
    grey = torch.full((2, 2, 8), 100, dtype=torch.uint8)
    grey[1, 0, 0] += 1  # far less than a grey level of contrast
    noise = torch.randint(256, (5, 2, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = whitening.contrast_normalized(torch.cat([grey, noise]))
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.mean(dim=1), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(images[2:].std(dim=1, correction=0), torch.ones(5))
    assert torch.equal(images[0], torch.zeros(16))
    assert images[1].abs().max() < 1.0


def test_whitening_is_zca_with_its_statistics_of_the_images_given(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([10.0, 1.0, 0.1, 0.0])
    mixed, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    train, other = ((torch.randn(n, 4, generator=generator) * scales) @ mixed + 5 for n in (5000, 70))

    exact = train.double()
    centre = exact.mean(dim=0)
    covariance = (exact - centre).T @ (exact - centre) / 5000
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    matrix = eigenvectors @ ((eigenvalues + 0.1) ** -0.5).diag() @ eigenvectors.T
    for chunk in (10_000, 33):
        monkeypatch.setattr(whitening, "CHUNK", chunk)
        zca = whitening.Zca(train)
        for images in (train, other):
            expected = ((images.double() - centre) @ matrix).float()
            torch.testing.assert_close(zca.whiten_(images.clone()), expected, atol=2e-4, rtol=2e-4)


# Text.


def test_text_is_windows_whose_targets_are_the_next_characters() -> None:
    data, again = text.text(), text.text()
    assert data.digest == again.digest
    assert re.fullmatch("[0-9a-f]{64}", data.digest)
    for inputs, targets, others in (
        (data.train_inputs, data.train_targets, again.train_inputs),
        (data.val_inputs, data.val_targets, again.val_inputs),
    ):
        assert inputs.shape == targets.shape == (len(inputs), 64)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs, others)
        assert torch.equal(inputs.flatten()[1:], targets.flatten()[:-1])
        assert int(inputs.min()) >= 0
        assert int(targets.max()) < data.classes
    assert len(data.val_inputs) > 200
    assert len(data.train_inputs) > 10 * len(data.val_inputs)


def test_no_passage_of_python_s_topics_is_on_both_sides() -> None:
    training, validation = text.split(pydoc_data.topics.topics)
    sides = [{" ".join(p.split()) for p in re.split(r"\n\s*\n", side)} for side in (training, validation)]
    assert len(sides[0]) > 1000
    assert not sides[0] & sides[1]


def topics(**more: str) -> dict[str, str]:
    """Eleven topics of which "a" and "k" are validated on."""
    own = {name: f"Topic {name}\n\n   said of {name} alone\n   in two lines\n" for name in "abcdefghijk"}
    return {**own, **more}


def test_every_tenth_topic_is_validated_on_whatever_the_order() -> None:
    training, validation = text.split(dict(reversed(topics().items())))
    assert validation == "Topic a\n\n   said of a alone\n   in two lines\n\nTopic k\n\n   said of k alone\n   in two lines"
    assert [name for name in "abcdefghijk" if f"Topic {name}" in training] == list("bcdefghij")


def test_what_validation_has_is_left_out_of_training_in_any_layout() -> None:
    contains = "Before\n\n      said of a\n      alone in two lines\n\nAfter\n"
    training, validation = text.split(topics(c=topics()["k"], d=contains))
    assert "said of a alone" in validation
    assert "said of k alone" in validation
    assert "said of a" not in training
    assert "said of k" not in training
    assert "Before\n\nAfter" in training


def test_a_character_that_only_validation_has_is_in_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pydoc_data.topics, "topics", topics(a="\u00e9" * 200, b="b" * 200))
    data = text.text()
    assert not (data.train_inputs == data.classes - 1).any()
    assert (data.val_inputs[0] == data.classes - 1).all()

    before = data.digest
    monkeypatch.setattr(pydoc_data.topics, "topics", topics(a="\u00e9" * 200, b="b" * 201))
    assert text.text().digest != before


# The table.


def test_the_levels_of_a_data_set_fall() -> None:
    for dataset in DATASETS.values():
        assert list(dataset.levels) == sorted(dataset.levels, reverse=True)
    assert {name for name, dataset in DATASETS.items() if dataset.measure == "perplexity"} == {"text"}
