"""Small comparisons for the tests of `deeprelax train`."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import pytest
import torch

for package in ("sklearn", "tqdm", "matplotlib"):
    pytest.importorskip(package, reason='needs the packages of "deeprelax_cuda[train]"')

from deeprelax_cuda.train import compare, loop  # noqa: E402
from deeprelax_cuda.train.data import Data  # noqa: E402
from deeprelax_cuda.train.schedules import Schedule  # noqa: E402

METHODS = ("sgd", "sgd-ema", "entropy-sgd", "controlled-sgd", "hj", "hj-prox", "heat", "sgld", "elastic-sgd", "parle")
PER_EPOCH = 39  # digits: 1,257 images in full batches of 32
TIMED = ("seconds", "parts")


def settings(**changes: Any) -> compare.Settings:
    """Settings on digits, one seed and two epochs, with changes."""
    values: dict[str, Any] = {
        "data": "digits",
        "model": "mlp",
        "methods": METHODS,
        "seeds": (0,),
        "epochs": 2,
        "batch_size": 32,
        "eval_every": 1.0,
        "levels": (50.0,),
        "schedule": Schedule(),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "options": {},
        **changes,
    }
    values["options"] = {method: dict(values["options"].get(method, {})) for method in values["methods"]}
    for method, own in values["options"].items():
        if method in ("entropy-sgd", "parle"):  # noise, so that its bits are among those that are compared
            own.setdefault("temperature", 1e-8)
        if method in ("elastic-sgd", "parle"):
            own.setdefault("replicas", 2)
    return compare.Settings(**values)


def comparison_of(curves: dict[str, list[loop.Curve]], **changes: Any) -> compare.Comparison:
    """A comparison with these curves, one for each of the seeds 0, 1, ..."""
    seeds = tuple(range(len(next(iter(curves.values())))))
    trained = {name: compare.Trained({}, "nobody", dict(enumerate(of_seeds))) for name, of_seeds in curves.items()}
    made = settings(**{"methods": tuple(curves), "seeds": seeds, "levels": (), **changes})
    return compare.Comparison(made, {"digest": "00", "train_examples": 1257, "val_examples": 540}, {}, {}, trained)


def curve_of(validation: list[float], seconds: list[float] | None = None, each: int = 10) -> loop.Curve:
    """A curve with these values after every ``each`` gradient evaluations, one second apart."""
    evaluations = [each * (i + 1) for i in range(len(validation))]
    seconds = seconds or [float(i + 1) for i in range(len(validation))]
    parts = {"data": 0.1 * seconds[-1], "forward_backward": 0.8 * seconds[-1], "optimizer": 0.1 * seconds[-1]}
    return loop.Curve(evaluations, [1.0] * len(validation), validation, seconds, parts)


def untimed(curve: loop.Curve) -> dict[str, Any]:
    """The fields of a curve that the settings determine."""
    return {name: values for name, values in asdict(curve).items() if name not in TIMED}


def rows_of(text: str) -> dict[str, list[str]]:
    """The rows of a table by their names."""
    return {name: cells for name, *cells in (re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line)}


def state_of(run: loop.Run) -> list[torch.Tensor]:
    """All tensors of a run: parameters, buffers, and the optimizer's state."""
    own = [value for state in run.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    models = [t for replica in run.replicas for t in (*replica.model.parameters(), *replica.model.buffers())]
    return [t.detach().clone() for t in (*models, *own)]


def images(train: int = 96, val: int = 32, size: int = 8, classes: int = 10) -> Data:
    """Random images of ``size`` x ``size`` pixels."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(train + val, 1, size, size, generator=generator)
    targets = torch.randint(classes, (train + val,), generator=generator)
    return Data(inputs[:train], targets[:train], inputs[train:], targets[train:], classes, digest="images")
