"""A comparison: every method at every seed, from the same weights and over the same batches."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deeprelax_cuda.cli import UsageError
from deeprelax_cuda.machine import platform, versions
from deeprelax_cuda.noise import derive_seed
from deeprelax_cuda.train import checkpoint
from deeprelax_cuda.train.data import Batches, Data, batches_per_epoch
from deeprelax_cuda.train.datasets import DATASETS
from deeprelax_cuda.train.generators import Generators, OwnGenerators
from deeprelax_cuda.train.loop import Curve, Replica, Run, part_of, whole_of
from deeprelax_cuda.train.measures import MEASURES, Measure
from deeprelax_cuda.train.methods import METHODS, backend_of, check_replicas, settings_of
from deeprelax_cuda.train.models import MODELS
from deeprelax_cuda.train.progress import Progress, make_progress
from deeprelax_cuda.train.ranks import ALONE, Alone, Broken
from deeprelax_cuda.train.schedules import Schedule
from deeprelax_cuda.train.stopping import Stop, Stopped


@dataclass(frozen=True)
class Settings:
    """What a comparison is made of, and what its bits depend on; numbers and strings, so that it can be saved."""

    data: str
    model: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    eval_every: float
    levels: tuple[float, ...]
    schedule: Schedule
    dtype: str
    device: str
    threads: int
    options: dict[str, dict[str, Any]]
    """The optimizers' options that were given, by the method's name."""

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Settings:
        """Return the settings whose ``asdict`` was saved, by JSON for example, which has no tuples."""
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        values["schedule"] = Schedule(**{**saved["schedule"], "drops": tuple(saved["schedule"]["drops"])})
        return cls(**values)


@dataclass
class Trained:
    """A method's part of a comparison: its optimizer's settings, who computed the steps, and a curve for each seed."""

    settings: dict[str, Any]
    backend: str
    curves: dict[int, Curve]


@dataclass
class Comparison:
    """The settings of a comparison, what it was made with, and what came out of it, by the methods' names."""

    settings: Settings
    data: dict[str, Any]
    """The number of ``train_examples`` and ``val_examples``, and the ``digest`` of the data."""
    versions: dict[str, Any]
    """Those of the process that ended it; "begun_with" has those that it was begun with where they were others."""
    platform: dict[str, Any]
    methods: dict[str, Trained]

    @property
    def measure(self) -> Measure:
        """What its validations measured."""
        return MEASURES[DATASETS[self.settings.data].measure]


def rehearse(settings: Settings, data: Data, ranks: Alone = ALONE) -> Comparison:
    """Return a comparison without curves, after each method has taken a step that is thrown away.

    Wrong options and an absent backend show here, before any work, and the costs of a process's first step stay out of the
    measured seconds.

    Raises:
        UsageError: the network or an optimizer refuses its options, or the backend asked for cannot serve.
    """
    facts = {"digest": data.digest, "train_examples": len(data.train_targets), "val_examples": len(data.val_targets)}
    comparison = Comparison(settings, facts, versions(), platform(), {})

    def built(name: str) -> Run:
        with _refusals_of(name):
            return build(name, settings.seeds[0], settings, data, ranks)

    for name in settings.methods:
        run = ranks.together(partial(built, name))
        with _refusals_of(name), _broken_by(name):
            next(run.steps(Progress(), lambda: None))
        comparison.methods[name] = Trained(settings_of(run.optimizer), backend_of(run.optimizer), {})
    ranks.gather(None)  # so that one that is lost by now is missed before there is a folder
    return comparison


@contextmanager
def _broken_by(name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith("replicas: "):
            raise Broken(f"{name}: {error}") from error
        raise


@contextmanager
def _refusals_of(method: str) -> Iterator[None]:
    try:
        yield
    except Broken:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{method}: {' '.join(str(error).split())}") from error  # those of CUDA have several lines


def compare(
    comparison: Comparison,
    data: Data,
    *,
    quiet: bool,
    saver: Saver | None = None,
    stop: Stop | None = None,
    ranks: Alone = ALONE,
) -> None:
    """Add the curve of every method at every seed that has none yet, showing progress on standard error unless ``quiet``.

    Raises:
        Stopped: ``stop``, which is asked after every step and between the batches of an evaluation, has been told to; the
            comparison is saved, and ``where`` says how far it got.
        Broken: replicas cannot go on together.
    """
    settings, stop = comparison.settings, stop or Stop()
    run_steps = settings.epochs * batches_per_epoch(data, settings.batch_size)
    runs = [(name, seed) for seed in settings.seeds for name in settings.methods]
    left = [(name, seed) for name, seed in runs if seed not in comparison.methods[name].curves]
    begun = saver.begun if saver else None
    done = (len(runs) - len(left)) * run_steps + (begun["step"] if begun else 0)
    progress = make_progress(steps=len(runs) * run_steps, done=done, epochs=settings.epochs, quiet=quiet or ranks.rank > 0)
    in_its_middle = ranks.from_first(lambda: begun is not None)
    try:
        for name, seed in left:
            progress.run(f"{name}, seed {seed}")
            run = build(name, seed, settings, data, ranks)
            if saver and in_its_middle:
                saver.go_on(run)
                in_its_middle = False
            try:
                with _broken_by(f"{name}, seed {seed}"):
                    for _ in run.steps(progress, stop.check):
                        signum, due = ranks.agree(run.optimizer, stop.signum, saver.is_due() if saver else False)
                        if saver and due:
                            try:
                                saver.save(comparison, run)
                            except OSError as error:  # the disk may have room again, or training end without it
                                progress.warn(f"deeprelax train: checkpoint not written: {error}")
                        if signum is not None:
                            raise Stopped(signum)
            except Stopped as stopped:
                stopped.where = f"{name}, seed {seed}, after {run.step} of {run_steps} gradient evaluations"
                if saver:
                    saver.save(comparison, run)
                raise
            comparison.methods[name].curves[seed] = run.curve
    finally:
        progress.close()


def build(method: str, seed: int, settings: Settings, data: Data, ranks: Alone = ALONE) -> Run:
    """Return a run at its start: the replicas with the weights that belong to ``seed``, and the method's optimizer of them.

    Replica r of several has the seed ``derive_seed(seed, r)`` for its data and for torch's generators, as in the optimizer.
    """
    device, dtype = ranks.device(settings.device), getattr(torch, settings.dtype)
    torch.manual_seed(seed)
    model = MODELS[settings.model].build(data.train_inputs.shape[1:], data.classes).to(device, dtype)
    steps = settings.epochs * batches_per_epoch(data, settings.batch_size)
    made, options = METHODS[method], dict(settings.options[method])
    count = check_replicas(options.pop("replicas")) if made.has_replicas else 1
    here = ranks.homes(count)[ranks.rank]
    models = [model, *(copy.deepcopy(model) for _ in here[1:])]
    seeds = [derive_seed(seed, number) if count > 1 else seed for number in here]
    if count > len(here) == 1:
        torch.manual_seed(seeds[0])
    generators = [OwnGenerators(device, own) if len(here) > 1 else Generators(device) for own in seeds]
    if ranks.group:
        optimizer = made.make(model.parameters(), seed, steps, group=ranks.group, **options)
    elif made.has_replicas:
        optimizer = made.make(None, seed, steps, replicas=[model.parameters() for model in models], **options)
    else:
        optimizer = made.make(model.parameters(), seed, steps, **options)
    return Run(
        [
            Replica(model, Batches(data, settings.batch_size, own), drawn)
            for model, own, drawn in zip(models, seeds, generators, strict=True)
        ],
        optimizer,
        settings.schedule.make(optimizer, settings.epochs),
        data,
        MEASURES[DATASETS[settings.data].measure],
        ranks,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        eval_every=settings.eval_every,
    )


class Saver:
    """Saves a comparison in progress now and then, and is where a new process finds it."""

    def __init__(
        self,
        path: Path,
        *,
        interval: float,
        data_root: Path | None,
        begun: dict[str, Any] | None = None,
        ranks: Alone = ALONE,
    ) -> None:
        """``interval`` in seconds; ``begun`` is the state of the run in whose middle an earlier process was left."""
        self.path = path
        self.begun = begun
        self._interval = interval
        self._data_root = data_root
        self._ranks = ranks
        self._next = time.monotonic() + interval

    def is_due(self) -> bool:
        """Whether the interval is over."""
        return time.monotonic() >= self._next

    def save(self, comparison: Comparison, run: Run | None) -> None:
        """Write the comparison with the ``run`` that is in progress, which all ranks give their parts of."""
        parts = self._ranks.collect(run.state_dict()) if run else []
        self._next = time.monotonic() + self._interval
        if self._ranks.rank:
            return
        content = {
            "settings": asdict(comparison.settings),
            "data": comparison.data,
            "data_root": str(self._data_root.resolve()) if self._data_root else None,
            "versions": comparison.versions,
            "curves": {
                name: {seed: asdict(curve) for seed, curve in trained.curves.items()}
                for name, trained in comparison.methods.items()
            },
            "run": whole_of(parts) if run else None,
        }
        checkpoint.write(self.path, content)

    def go_on(self, run: Run) -> None:
        """Bring ``run`` to where the one that has begun was left."""

        def parts() -> list[dict[str, Any]]:
            whole, self.begun = self.begun or {}, None
            with checkpoint.fitting(self.path):
                return [part_of(whole, here) for here in self._ranks.homes(len(whole["replicas"]))]

        state = self._ranks.scatter(parts)

        def load() -> None:
            with checkpoint.fitting(self.path):
                run.load_state_dict(state)

        self._ranks.together(load)
