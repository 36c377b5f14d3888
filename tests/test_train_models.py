"""The networks of `deeprelax train`: they are the published ones, run in every type, and refuse inputs they cannot take."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from deeprelax_cuda.cli import UsageError
from deeprelax_cuda.train.datasets import DATASETS
from deeprelax_cuda.train.models import MODELS

# Tiny batches do not gain by a second thread, and wait for it where cores are shared.
pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32), "text": (64,)}
FITS = [
    ("mlp", "digits"),
    ("mlp", "mnist"),
    ("mnistfc", "mnist"),
    ("mnistfc", "digits"),
    ("lenet", "mnist"),
    ("lenet", "cifar10"),
    ("allcnn", "cifar10"),
    ("allcnn", "mnist"),
    ("lstm", "text"),
]


def build(model: str, data: str, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[model].build(SHAPES[data], classes)


def examples(data: str, count: int, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if data == "text":
        characters = torch.randint(classes, (count, *SHAPES[data]), generator=generator)
        return characters, characters.roll(-1, dims=1)
    return torch.randn(count, *SHAPES[data], generator=generator), torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize(
    ("model", "data", "classes", "count"),
    [
        ("mnistfc", "mnist", 10, 784 * 1024 + 1024 + 2 * 1024 + 1024 * 1024 + 1024 + 2 * 1024 + 1024 * 10 + 10),
        ("lenet", "mnist", 10, 131_220),
        ("allcnn", "cifar10", 10, 1_667_166),
        ("lstm", "text", 103, 103 * 64 + 4 * 128 * (64 + 128 + 2) + 128 * 103 + 103),
    ],
)
def test_the_number_of_parameters_is_the_published_one(model: str, data: str, classes: int, count: int) -> None:
    assert sum(p.numel() for p in build(model, data, classes).parameters()) == count


def test_dropout_is_where_and_as_strong_as_published() -> None:
    def place(model: str, data: str) -> list[str]:
        """The network in short: each layer with weights by its size, each dropout by its probability."""
        layers = []
        for layer in build(model, data).modules():
            if isinstance(layer, nn.Linear):
                layers.append(f"{layer.out_features}")
            elif isinstance(layer, nn.Conv2d):
                layers.append(f"{layer.out_channels} {layer.kernel_size[0]}x{layer.kernel_size[1]} /{layer.stride[0]}")
            elif isinstance(layer, nn.Dropout):
                layers.append(f"dropout {layer.p}")
        return layers

    assert place("mnistfc", "mnist") == ["dropout 0.2", "1024", "dropout 0.2", "1024", "dropout 0.2", "10"]
    convolutions = ["20 5x5 /1", "dropout 0.25", "50 5x5 /1", "dropout 0.25"]
    assert place("lenet", "mnist") == [*convolutions, "500", "dropout 0.25", "10"]
    first = ["dropout 0.2", "96 3x3 /1", "96 3x3 /1", "96 3x3 /2", "dropout 0.5"]
    second = ["192 3x3 /1", "192 3x3 /1", "192 3x3 /2", "dropout 0.5"]
    assert place("allcnn", "cifar10") == [*first, *second, "192 3x3 /1", "192 3x3 /1", "10 1x1 /1"]


def test_all_cnn_averages_over_eight_by_eight() -> None:
    model = build("allcnn", "cifar10")
    sides = {}
    for layer in model:
        layer.register_forward_hook(lambda layer, inputs, _: sides.update({type(layer).__name__: inputs[0].shape[2:]}))
    model(torch.randn(2, 3, 32, 32))
    assert sides["AdaptiveAvgPool2d"] == (8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("model", "data"), FITS)
def test_a_network_trains_in_its_type(model: str, data: str, dtype: torch.dtype) -> None:
    network = build(model, data).to(dtype)
    inputs, targets = examples(data, 4)
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    logits = network(inputs)
    assert logits.shape == (*targets.shape, 10)
    assert logits.dtype == dtype
    cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.dtype == dtype, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any() or name.endswith("bias"), name  # batch norm undoes the bias before it
    network.eval()
    assert torch.equal(network(inputs), network(inputs))


@pytest.mark.parametrize(("model", "data"), FITS)
def test_the_global_generator_gives_the_weights(model: str, data: str) -> None:
    first, again = build(model, data), build(model, data)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    other = MODELS[model].build(SHAPES[data], 10)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_lstm_sees_no_character_of_the_future_and_no_other_window() -> None:
    model = build("lstm", "text").eval()
    characters, _ = examples("text", 2)
    changed = characters.clone()
    changed[0, 30:] = (changed[0, 30:] + 1) % 10
    before, after = model(characters), model(changed)
    torch.testing.assert_close(after[0, :30], before[0, :30])
    torch.testing.assert_close(after[1], before[1])
    assert (after[0, 30:] != before[0, 30:]).any(dim=1).all()
    torch.testing.assert_close(model(characters[1:])[0], before[1])


def test_lstm_learns_a_rule_that_needs_memory() -> None:
    """Each character is the one three before it."""
    model = build("lstm", "text", classes=5)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, lr=MODELS["lstm"].options["lr"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        characters = torch.randint(5, (16, 3), generator=generator).repeat(1, 8)
        loss = cross_entropy(model(characters[:, :-1])[:, 2:].flatten(0, 1), characters[:, 3:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        ("lstm", (1, 28, 28), "lstm takes text, of shape (length,), got inputs of shape (1, 28, 28)"),
        ("mlp", (64,), "mlp takes images, of shape (channels, height, width), got inputs of shape (64,)"),
        ("mnistfc", (64,), "mnistfc takes images, of shape (channels, height, width), got inputs of shape (64,)"),
        ("lenet", (64,), "lenet takes images, of shape (channels, height, width), got inputs of shape (64,)"),
        ("allcnn", (64,), "allcnn takes images, of shape (channels, height, width), got inputs of shape (64,)"),
        ("lenet", (1, 8, 8), "lenet takes images of at least 22 x 22 pixels, got inputs of shape (1, 8, 8)"),
        ("lenet", (1, 28, 21), "lenet takes images of at least 22 x 22 pixels, got inputs of shape (1, 28, 21)"),
        ("allcnn", (1, 8, 8), "allcnn takes images of at least 16 x 16 pixels, got inputs of shape (1, 8, 8)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_the_model_s_name(model: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        MODELS[model].build(shape, 10)
    assert str(raised.value) == f"--model: {message}"


@pytest.mark.parametrize(("model", "side"), [("lenet", 22), ("allcnn", 16)])
def test_the_smallest_image_passes(model: str, side: int) -> None:
    assert MODELS[model].build((2, side, side + 1), 7)(torch.randn(3, 2, side, side + 1)).shape == (3, 7)


def test_every_data_set_s_own_model_takes_it() -> None:
    assert SHAPES.keys() == DATASETS.keys()
    for name, dataset in DATASETS.items():
        MODELS[dataset.model].build(SHAPES[name], 10)
