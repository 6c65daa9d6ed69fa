"""Many clients' work in a round, done together where that pays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fedrobust.training.local import FREE, Learner, Leash, descend
from fedrobust.training.vectors import load_vector

_DENSE = (nn.Sequential, nn.Flatten, nn.Linear, nn.ReLU)
"""Models of just these are trained together: convolutions gain nothing from it on a CPU (measured)."""
_ELEMENTS = 1 << 23
"""So many numbers are worked on at a time, which bounds the memory whatever the number of clients."""


def updates(
    learners: Sequence[Learner],
    round: int,  # noqa: A002 (the field's word for it)
    model: Tensor,
    leash: Leash = FREE,
) -> Tensor:
    """What each learner's `update` gives, to the rounding of float32: one batched pass for all of them.

    Learners of dense networks without a leash take each step at the same time, as one product of stacked
    matrices a layer. All others work one after the other.

    Args:
        learners: of the same task, which share a module (`Shared.of`).
        round: the number of the round.
        model: (d,) float32, the broadcast parameters; left as it is.
        leash: as for `Learner.update`.

    Returns:
        (k, d) float32, a row a learner.

    Raises:
        InputError: the vector's length is not the model's.
    """
    dense = all(type(part) in _DENSE for part in learners[0].module.modules())
    if leash != FREE or not dense:
        return torch.stack([learner.update(round, model, leash) for learner in learners])
    largest = max(learner.examples for learner in learners)
    most = min(learners[0].task.batch or largest, largest)
    each = 4 * len(model) + most * learners[0].x[0].numel()
    count = max(1, _ELEMENTS // each)
    deltas = [
        delta
        for first in range(0, len(learners), count)
        for delta in _trained(learners[first : first + count], round, model, most)
    ]
    return torch.stack(
        [learner.with_momentum(delta) for learner, delta in zip(learners, deltas, strict=True)]
    )


def _trained(learners: Sequence[Learner], round: int, model: Tensor, most: int) -> Tensor:  # noqa: A002
    """(k, d): how far each learner gets from the model."""
    task, module = learners[0].task, learners[0].module
    load_vector(module, model)
    module.train()
    origin = {name: parameter.detach() for name, parameter in module.named_parameters()}
    stacked = {name: p.expand(len(learners), *p.shape).clone() for name, p in origin.items()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor, share: Tensor) -> Tensor:
        return share @ cross_entropy(functional_call(module, parameters, (x,)), y, reduction="none")

    step = vmap(grad(loss))
    plans = [learner.batches(round) for learner in learners]
    for rows in zip(*plans, strict=True):
        gradients = step(stacked, *_batch(learners, rows, most))
        for name, parameter in stacked.items():
            descend(task, parameter, gradients[name], origin[name])
    moved = [(stacked[name] - start).flatten(1) for name, start in origin.items()]
    return torch.cat(moved, dim=1)


def _batch(
    learners: Sequence[Learner], rows: Sequence[slice | Tensor], most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One step's images, labels and each example's share of the loss, short batches filled up."""
    x, y = learners[0].x, learners[0].y
    images = x.new_zeros(len(learners), most, *x.shape[1:])
    labels = y.new_zeros(len(learners), most)
    shares = x.new_zeros(len(learners), most)
    for i, (learner, chosen) in enumerate(zip(learners, rows, strict=True)):
        if isinstance(chosen, slice):
            size = learner.examples
            images[i, :size], labels[i, :size] = learner.x, learner.y
        else:
            size = len(chosen)
            torch.index_select(learner.x, 0, chosen, out=images[i, :size])
            torch.index_select(learner.y, 0, chosen, out=labels[i, :size])
        shares[i, :size] = 1 / size
    return images, labels, shares
