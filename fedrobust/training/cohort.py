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
from fedrobust.training.local import FREE, Learner, Leash, descend
from fedrobust.training.models import is_plain
from fedrobust.training.objectives import CrossEntropy
from fedrobust.training.vectors import manifest, split_vector

T = TypeVar("T")
_ELEMENTS = 1 << 20
"""So many numbers a thread works on at a time: they fit its cache, whatever the number of clients."""


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
        round: the number of the round.
        model: (d,) float32, the broadcast parameters; left as it is.
        leash: as for `Learner.update`.
        out: (k, d) float32, contiguous, is filled and returned; None makes a new one.

    Returns:
        (k, d) float32, a row a learner.

    Raises:
        InputError: the vector's length is not the model's.
    """
    module, threads = learners[0].module, torch.get_num_threads()
    split_vector(model, manifest(module))  # tells whether the length is right
    rows = model.new_empty(len(learners), len(model)) if out is None else out
    layers = _layers(module)
    if leash == FREE and _is_dense(layers) and learners[0].objective == CrossEntropy():
        each = len(model) + _largest_batch(learners) * learners[0].x[0].numel()
        count = max(1, min(_ELEMENTS // each, -(-len(learners) // threads)))
        parts = [slice(i, i + count) for i in range(0, len(learners), count)]

        def together(part: slice) -> None:
            _train(learners[part], layers, round, model, rows[part])

        _spread([together] * min(threads, len(parts)), parts)
        return rows

    def alone(bench: nn.Module, place: int) -> None:
        rows[place] = learners[place].update(round, model, leash, module=bench)

    # Others' layers may keep a state, which copies would not share.
    copies = min(threads, len(learners)) - 1 if is_plain(module) else 0
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
    layers: Sequence[nn.Module],
    round: int,  # noqa: A002
    model: Tensor,
    rows: Tensor,
) -> None:
    """Put into (k, d) rows what these learners of a dense network send."""
    rows.copy_(model)
    shapes = [p.shape for layer in layers for p in layer.parameters()]
    sizes = [shape.numel() for shape in shapes]
    stacked = [p.view(-1, *s) for p, s in zip(rows.split_with_sizes(sizes, dim=1), shapes, strict=True)]
    origins = [p.view(s) for p, s in zip(model.split_with_sizes(sizes), shapes, strict=True)]
    for images, labels, shares in _batches(learners, round):
        gradients = _gradients(layers, stacked, images.flatten(2), labels, shares)
        for parameter, gradient, origin in zip(stacked, gradients, origins, strict=True):
            descend(learners[0].task, parameter, gradient, origin)
    rows.sub_(model)
    for learner, row in zip(learners, rows, strict=True):
        learner.with_momentum(row)


def _batches(
    learners: Sequence[Learner],
    round: int,  # noqa: A002
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each step's images, labels and examples' shares in the loss; all in the same memory.

    Short batches are filled up with examples that have no share.
    """
    x, y, size = learners[0].x, learners[0].y, _largest_batch(learners)
    images = x.new_empty(len(learners), size, *x.shape[1:])
    labels = y.new_empty(len(learners), size)
    shares = x.new_zeros(len(learners), size)
    plans = list[Tensor]()
    for learner, share in zip(learners, shares, strict=True):
        plan = learner.batches(round)
        share[: plan.shape[1]] = 1 / plan.shape[1]
        plans.append(torch.cat([plan, plan[:, :1].expand(-1, size - plan.shape[1])], dim=1))
    groups = [list(group) for _, group in groupby(range(len(learners)), lambda i: id(learners[i].x))]
    for rows in torch.stack(plans, dim=1):
        for group in groups:  # whose images are in the same tensor
            own, span = learners[group[0]], slice(group[0], group[-1] + 1)
            torch.index_select(own.x, 0, rows[span].flatten(), out=images[span].flatten(0, 1))
            torch.index_select(own.y, 0, rows[span].flatten(), out=labels[span].flatten())
        yield images, labels, shares


def _gradients(
    layers: Sequence[nn.Module],
    stacked: Sequence[Tensor],
    x: Tensor,
    labels: Tensor,
    shares: Tensor,
) -> list[Tensor]:
    """Of each learner's cross-entropy, by each of its parameters.

    Written out, since going through autograd and `vmap` takes half as long again (measured with small
    networks, where it matters).

    Args:
        layers: a dense network's.
        stacked: (k, *shape) each, the learners' parameters, layer by layer.
        x: (k, n, pixels) float32.
        labels: (k, n) int64.
        shares: (k, n) float32, the examples' weights in the loss.

    Returns:
        (k, *shape) float32 each, as the parameters are.
    """
    left, inputs = iter(stacked), list[Tensor]()
    owned = [[next(left) for _ in layer.parameters()] for layer in layers]
    for layer, own in zip(layers, owned, strict=True):
        inputs.append(x)
        if type(layer) is nn.ReLU:
            x = x.relu()
        elif own:
            weight, *bias = own
            x = torch.baddbmm(bias[0].unsqueeze(1), x, weight.mT) if bias else x @ weight.mT
    slope = x.softmax(dim=2)
    slope.scatter_add_(2, labels.unsqueeze(2), slope.new_tensor(-1.0).expand(*labels.shape, 1))
    slope.mul_(shares.unsqueeze(2))
    found: list[Tensor] = []  # from the last to the first
    for layer, own, x in zip(reversed(layers), reversed(owned), reversed(inputs), strict=True):
        if type(layer) is nn.ReLU:
            slope = slope * (x > 0)
        elif own:
            weight, *bias = own
            found += [slope.sum(dim=1) for _ in bias] + [slope.mT @ x]
            if len(found) < len(stacked):
                slope = slope @ weight
    return found[::-1]
