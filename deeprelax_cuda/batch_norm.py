"""Batch norm for an evaluation at other weights than those of the training steps: at the answer of a relaxation method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from deeprelax_cuda.steps import compute_type


@contextmanager
def recalibrate_batch_norm(
    model: nn.Module, loader: Iterable[Any], *, device: torch.device | str | None = None
) -> Iterator[None]:
    """Within the ``with`` block the batch norm layers of ``model`` have the running statistics of its present weights.

    While a relaxation method trains, running statistics are those of the live weights y. For an evaluation at the anchor x they
    are computed anew, by a pass over ``loader`` without dropout. For each channel c over its B batches, with the mean and the
    unbiased variance of what reaches the layer in batch b::

        running_mean[c] = 1/B * sum of mean[b, c];   running_var[c] = 1/B * sum of var[b, c]

    Afterwards, also after an exception, the buffers of training have their bits back, in place. The pass takes no gradients and
    leaves torch's generators and those of a ``DataLoader`` where they were, so that training goes on as if there had been no
    evaluation::

        optimizer.eval()
        with dr.recalibrate_batch_norm(model, train_loader):
            model.eval()
            evaluate(model)
        model.train()
        optimizer.train()

    A layer that is in eval mode while ``model`` is in training mode has statistics that are frozen: they are part of what is
    trained, and stay. If ``model`` as a whole is in eval mode no layer looks frozen, and all are computed anew: with frozen
    layers call ``model.eval()`` within the block, as above. Layers without running statistics, and layers that the pass does
    not reach, stay as they are. A layer that is called several times a batch counts each call.

    Args:
        model: in any mode; its modes are the same in the block as before it. It may be compiled, in the whole or in parts: the
            pass runs eagerly. The pass goes through the module inside a `DistributedDataParallel`, on this rank alone.
        loader: yields inputs, or tuples or lists of which the inputs are the first item, in batches of more than one value a
            channel. A model without batch norm takes nothing from it. Data sets that draw from other generators (Python's,
            NumPy's) and persistent workers, which have their own state, go on from where the pass left them: where those are
            part of training, give a loader of its own.
        device: where to move the inputs; None: they are where the model needs them.

    Raises:
        ValueError: an empty loader, or a batch of one value a channel. The buffers of training are intact then.

    Source: evaluation at x in arXiv 1611.01838 and arXiv 1704.04932; the mean in place of a moving average is that of
    `torch.optim.swa_utils.update_bn`.
    """
    network = _unwrapped(model)
    layers = [layer for layer in network.modules() if _has_statistics(layer) and (layer.training or not network.training)]
    kept = [(layer, {name: t.detach().clone() for name, t in layer.named_buffers(recurse=False)}) for layer in layers]
    try:
        if layers:
            _compute_statistics(network, layers, loader, device)
        yield
    finally:
        with torch.no_grad():
            for layer, buffers in kept:
                for name, value in buffers.items():
                    layer.get_buffer(name).copy_(value)


class _MeanStatistics:
    """A forward hook of a batch norm layer: the mean over its calls of the statistics that each leaves in the layer's buffers.

    The mean is of the compute type: one that ran in bfloat16 buffers was off by 38 % of a variance after 468 batches.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        self.buffers = [layer.get_buffer("running_mean"), layer.get_buffer("running_var")]
        self.means = [buffer.to(compute_type(buffer.dtype), copy=True) for buffer in self.buffers]
        self.calls = 0

    def __call__(self, *_: object) -> None:
        self.calls += 1
        for mean, buffer in zip(self.means, self.buffers, strict=True):
            if self.calls == 1:
                mean.copy_(buffer)
            else:
                mean.lerp_(buffer.to(mean.dtype), 1.0 / self.calls)


@torch.no_grad()
def _compute_statistics(
    network: nn.Module, layers: Sequence[_BatchNorm], loader: Iterable[Any], device: torch.device | str | None
) -> None:
    """Put the mean statistics over ``loader`` into the buffers of the layers that it reaches; change nothing else."""
    statistics = [_MeanStatistics(layer) for layer in layers]
    batches = 0
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would pass by the hooks of today
        stack.enter_context(_generators_kept(network, loader))
        stack.enter_context(_each_call_tells(network, dict(zip(layers, statistics, strict=True))))
        for batch in loader:
            inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
            network(inputs if device is None else inputs.to(device))
            batches += 1
    if batches == 0:
        raise ValueError("loader: expected at least one batch, got none")
    for found in statistics:
        for mean, buffer in zip(found.means, found.buffers, strict=True):
            buffer.copy_(mean)


@contextmanager
def _each_call_tells(network: nn.Module, hooks: Mapping[_BatchNorm, _MeanStatistics]) -> Iterator[None]:
    """Put ``network`` in eval mode but for its layers with hooks, whose buffers hold the statistics of the last call alone."""
    modes = [(module, module.training) for module in network.modules()]  # not eval(), which a module may have made its own
    momenta = [(layer, layer.momentum) for layer in hooks]
    handles = []
    try:
        for module, _ in modes:
            module.training = module in hooks
        for layer, hook in hooks.items():
            layer.momentum = 1.0  # the weight of the new statistics
            for buffer in hook.buffers:
                buffer.zero_()  # a weight of 0 would not remove an infinity
            handles.append(layer.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, training in modes:
            module.training = training


@contextmanager
def _generators_kept(network: nn.Module, loader: Iterable[Any]) -> Iterator[None]:
    """Put back the generators that a pass may draw from: those of the devices, and those that shuffle ``loader``.

    A `DataLoader` draws a seed for its workers even if it has none and does not shuffle.
    """
    devices = {t.device for t in chain(network.parameters(), network.buffers())}
    generators = [torch.default_generator]
    generators += [torch.cuda.default_generators[device.index] for device in devices if device.type == "cuda"]
    samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
    own = [getattr(owner, "generator", None) for owner in (loader, *samplers)]
    generators += [generator for generator in own if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _has_statistics(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside wrappers that compile it, or that would exchange buffers between ranks before a pass."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model
