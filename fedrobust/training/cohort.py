"""Many clients' work in a round, done together where that pays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor, nn

from fedrobust.kernels import workers
from fedrobust.training.local import FREE, Learner, Leash, pull
from fedrobust.training.models import is_plain
from fedrobust.training.objectives import CrossEntropy
from fedrobust.training.task import Task
from fedrobust.training.vectors import manifest, split_vector

T = TypeVar("T")
_ELEMENTS = 1 << 20
"""So many numbers a thread works on at a time: they fit its cache, whatever the number of clients."""
_ELEMENTS_OF_GPU = 1 << 26
"""The same where they are on a GPU, which wants much to do at a time."""


def updates(
    learners: Sequence[Learner],
    round: int,  # noqa: A002 (the field's word for it)
    model: Tensor,
    leash: Leash = FREE,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """What each learner's `update` gives, to the rounding of float32.

    It is worked out on `torch.get_num_threads()` threads of one learner or more: several threads at one
    convolution are no faster, and stand in each other's way on a busy machine.

    Learners of dense networks, by cross-entropy and without a leash, take each step at the same time,
    as one product of stacked matrices a layer. All others work one after the other: on a CPU
    convolutions of batches of 32 are within a tenth as fast as those of any larger batch, which bounds
    what sharing them could save.

    Args:
        learners: of the same task, which share a module (`Shared.of`).
        round: the number of the round, from 1.
        model: (d,) float32, the broadcast parameters; left as it is. On any device.
        leash: as for `Learner.update`.
        out: (k, d) float32, contiguous, is filled and returned; None makes a new one.

    Returns:
        (k, d) float32, a row a learner, on the model's device.

    Raises:
        InputError: the vector's length is not the model's.
    """
    module, device = learners[0].module, learners[0].x.device
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    split_vector(model, manifest(module))  # tells whether the length is right
    rows = model.new_empty(len(learners), len(model)) if out is None else out
    layers = _layers(module)
    plain = is_plain(module)
    if leash == FREE and plain and _is_dense(layers) and learners[0].objective == CrossEntropy():
        start = model.to(device)
        each = len(model) + _largest_batch(learners) * learners[0].x[0].numel()
        memory = _ELEMENTS if device.type == "cpu" else _ELEMENTS_OF_GPU
        count = max(1, min(memory // each, -(-len(learners) // threads)))
        parts = [slice(i, i + count) for i in range(0, len(learners), count)]
        # Drawn before threads start, which would wait for each other's interpreter.
        plans = [learner.batches(round) for learner in learners]

        def together(part: slice) -> None:
            sent = rows[part]
            there = sent if sent.device == device else start.new_empty(sent.shape)
            _train(learners[part], plans[part], layers, start, there)
            if there is not sent:
                sent.copy_(there)
            for learner, row in zip(learners[part], sent, strict=True):
                learner.with_momentum(row)

        _spread([together] * min(threads, len(parts)), parts)
        return rows

    def alone(bench: nn.Module, place: int) -> None:
        rows[place] = learners[place].update(round, model, leash, module=bench)

    # Others' layers may keep a state, which copies would not share.
    copies = min(threads, len(learners)) - 1 if plain else 0
    benches = [module, *(copy.deepcopy(module) for _ in range(copies))]
    _spread([partial(alone, bench) for bench in benches], range(len(learners)))
    return rows


def _spread(benches: Sequence[Callable[[T], None]], parts: Sequence[T]) -> None:
    """Have each part worked on at a bench, each bench on a thread: who is free takes the next part."""
    left = iter(parts)

    def work(bench: Callable[[T], None]) -> None:
        for part in left:
            bench(part)

    if len(benches) == 1:
        work(benches[0])
    else:
        list(workers(torch.get_num_threads()).map(work, benches))


def _layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a sequence, also of one that is made of sequences; else the module itself."""
    if type(module) is not nn.Sequential:
        return [module]
    return [layer for part in module for layer in _layers(part)]


def _is_dense(layers: Sequence[nn.Module]) -> bool:
    """Whether images become rows first, and all that follows is products and rectified units."""
    first, *others = layers
    parameters = [id(p) for layer in others for p in layer.parameters()]
    return (
        type(first) is nn.Flatten
        and (first.start_dim, first.end_dim) == (1, -1)
        and all(type(layer) in (nn.Linear, nn.ReLU) for layer in others)
        and len(parameters) == len(set(parameters))  # no parameter is used twice
    )


def _largest_batch(learners: Sequence[Learner]) -> int:
    largest = max(learner.examples for learner in learners)
    return min(learners[0].task.batch or largest, largest)


def _train(
    learners: Sequence[Learner],
    plans: Sequence[Tensor],
    layers: Sequence[nn.Module],
    model: Tensor,
    rows: Tensor,
) -> None:
    """Put into (k, d) rows how far these learners of a dense network get."""
    shapes = [p.shape for layer in layers for p in layer.parameters()]
    sizes = [shape.numel() for shape in shapes]
    origins = [p.view(shape) for p, shape in zip(model.split_with_sizes(sizes), shapes, strict=True)]
    # Each parameter's values side by side, as the library's batched products want them.
    stacked = [origin.repeat(len(rows), *[1] * origin.ndim) for origin in origins]
    left = iter(zip(stacked, origins, strict=True))
    owned = [[next(left) for _ in layer.parameters()] for layer in layers]
    for images, labels, shares in _batches(learners, plans):
        _descend(learners[0].task, layers, owned, images.flatten(2).mT, labels, shares)
    columns = rows.split_with_sizes(sizes, dim=1)
    for part, parameter, origin in zip(columns, stacked, origins, strict=True):
        torch.sub(parameter.flatten(1), origin.flatten(), out=part)


def _batches(
    learners: Sequence[Learner], plans: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each step's images, labels and examples' shares in the loss; all in the same memory.

    Short batches are filled up with examples that have no share.
    """
    x, y, size = learners[0].x, learners[0].y, _largest_batch(learners)
    images = x.new_empty(len(learners), size, *x.shape[1:])
    labels = y.new_empty(len(learners), size)
    own_sizes = torch.tensor([plan.shape[1] for plan in plans]).unsqueeze(1)
    shares = ((torch.arange(size) < own_sizes) / own_sizes).to(x.device)
    full = [torch.cat([plan, plan[:, :1].expand(-1, size - plan.shape[1])], dim=1) for plan in plans]
    groups = [list(g) for _, g in groupby(range(len(learners)), lambda i: _tensors(learners[i]))]
    for rows in torch.stack(full, dim=1).to(x.device):
        for group in groups:
            own, span = learners[group[0]], slice(group[0], group[-1] + 1)
            torch.index_select(own.x, 0, rows[span].flatten(), out=images[span].flatten(0, 1))
            torch.index_select(own.y, 0, rows[span].flatten(), out=labels[span].flatten())
        yield images, labels, shares


def _tensors(learner: Learner) -> tuple[int, int]:
    """Which its images and labels are in; many learners have theirs in the same."""
    return id(learner.x), id(learner.y)


def _descend(
    task: Task,
    layers: Sequence[nn.Module],
    owned: Sequence[Sequence[tuple[Tensor, Tensor]]],
    x: Tensor,
    labels: Tensor,
    shares: Tensor,
) -> None:
    """One local step of each learner, in place, on its cross-entropy.

    Written out, since going through autograd and `vmap` takes half as long again (measured with small
    networks, where it matters). Examples are columns, as softmax over a last dimension of ten is ten
    times as slow; a gradient of weights is never stored, but subtracted as it is multiplied out.

    Args:
        task: what is trained.
        layers: a dense network's.
        owned: by layer, its parameters: (k, *shape) the learners', and (*shape) the broadcast ones.
        x: (k, pixels, n) float32.
        labels: (k, n) int64.
        shares: (k, n) float32, the examples' weights in the loss.
    """
    inputs = list[Tensor]()
    for layer, own in zip(layers, owned, strict=True):
        inputs.append(x)
        if type(layer) is nn.ReLU:
            x = x.relu()
        elif own:
            (weight, _), *bias = own
            x = torch.baddbmm(bias[0][0].unsqueeze(2), weight, x) if bias else weight @ x
    slope, place = x.softmax(dim=1), labels.unsqueeze(1)
    slope.scatter_add_(1, place, slope.new_tensor(-1.0).expand(place.shape))
    slope.mul_(shares.unsqueeze(1))
    lowest = next(i for i, own in enumerate(owned) if own)
    for i in range(len(layers) - 1, lowest - 1, -1):
        x = inputs[i]
        if type(layers[i]) is nn.ReLU:
            slope = slope * x.relu().sign()  # a comparison takes ten times as long
        elif owned[i]:
            (weight, origin), *bias = owned[i]
            below = weight.mT @ slope if i > lowest else slope
            pull(task, weight, origin)
            weight.baddbmm_(slope, x.mT, alpha=-task.lr)
            for parameter, origin in bias:
                pull(task, parameter, origin)
                parameter.sub_(slope.sum(dim=2), alpha=task.lr)
            slope = below
