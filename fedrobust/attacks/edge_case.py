"""Edge cases: a backdoor without a trigger, in inputs that hardly ever occur."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedrobust.attacks.attack import Targeted, replacement, typical_length
from fedrobust.attacks.view import View
from fedrobust.errors import InputError
from fedrobust.training import Leash


@dataclass(frozen=True)
class RareAsTarget:
    """The poison of `EdgeCase`: the least typical images of one class, labelled as another.

    Attributes:
        source: the class.
        target: the label that its edge cases get.
        tail: the fraction of the source's images that are edge cases, above 0 and at most 1; at least
            one image is, where the class has any.
        fraction: of the data that are edge cases in the end, below 1; they are repeated to that end.
    """

    source: int
    target: int
    tail: float
    fraction: float

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Relabel and repeat the edge cases; data without the source class stay as they are."""
        edge = self.edge(x, y)
        if len(edge) == 0:
            return x, y
        rest = torch.ones(len(x), dtype=torch.bool, device=x.device)
        rest[edge] = False
        wanted = math.floor(self.fraction / (1 - self.fraction) * int(rest.sum()))
        copies = edge[torch.arange(max(wanted, len(edge)), device=x.device) % len(edge)]
        labels = torch.full_like(y[copies], self.target)
        return torch.cat([x[rest], x[copies]]), torch.cat([y[rest], labels])

    def edge(self, x: Tensor, y: Tensor) -> Tensor:
        """Indices of the source's images that are furthest from their mean, furthest first.

        That is where a Gaussian of the same variance in all directions, fitted to the class, has its
        least density.
        """
        members = (y == self.source).nonzero().flatten()
        images = x[members].flatten(1)
        distances = torch.linalg.vector_norm(images - images.mean(dim=0), dim=1)
        order = distances.argsort(descending=True, stable=True)
        return members[order[: math.ceil(self.tail * len(members))]]


@dataclass(frozen=True, repr=False)
class EdgeCase(Targeted):
    """Have the least typical examples of one class taken for another, and all others right.

        row i = gamma u_i,    |u_i| <= reach * r / gamma

    u_i is the update of training on the member's data with its edge cases relabelled, and gamma = n / f
    unless a scale is given, so that the members' model replaces the others'. With reach, training is
    projected gradient descent (PGD): after each step the member's model is projected onto a ball about
    the broadcast one, such that the row is no longer than reach typical honest updates, r being the root
    mean square length of the own ones. The paper's attacks are scale=1 (black-box), scale=1 with reach
    (PGD without replacement), and reach alone (PGD with replacement).

    Where few honest clients hold such examples, little is learnt against the lesson, and the test
    accuracy hardly shows it.

    Sees: `train`, `classes`; `own` too if reach is given.

    Source: Wang, Sreenivasan, Rajput, Vishwakarma, Agarwal, Sohn, Lee, Papailiopoulos, "Attack of the
    Tails: Yes, You Really Can Backdoor Federated Learning", NeurIPS 2020 (arXiv 2007.05084).
    Deviations: the paper brings edge cases from elsewhere (aeroplanes of one airline, digits of another
    country), which hardly any other client has. Here they are the tail of the data at hand, so that
    honest clients teach the right label on theirs, and a held-out tail is less uniform than one airline:
    expect lower success, and that it fades within rounds. What is rare is told by the pixels' distance
    from the class mean. There the radius of the ball is a number, and the scaling is not taken into
    account.

    Attributes:
        source: the class whose edge cases are relabelled.
        target: the label that they get.
        tail: the fraction of the source's examples that are edge cases, above 0 and at most 1.
        fraction: of the training data that edge cases make up, above 0 and below 1.
        scale: above 0; None means n / f.
        reach: the length of a row in units of an honest one, above 0; None sets no bound.
        alpha: the weight of the lesson in the loss, above 0, as in `Backdoor`.
    """

    name = "edge_case"

    source: int = 7
    target: int = 1
    tail: float = 0.25
    fraction: float = 0.3
    scale: float | None = None
    reach: float | None = None
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.source != self.target, "source and target must differ")
        self.require(0 < self.tail <= 1, "tail must be above 0 and at most 1")
        self.require(0 < self.fraction < 1, "fraction must be above 0 and below 1")
        self.require(self.scale is None or self.scale > 0, "scale must be above 0")
        self.require(self.reach is None or self.reach > 0, "reach must be above 0")
        self.require(0 < self.alpha <= 1, "alpha must be above 0 and at most 1")

    @property
    def poison(self) -> RareAsTarget:
        """What the members train on."""
        return RareAsTarget(self.source, self.target, self.tail, self.fraction)

    def goal(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The edge cases among these images, and the target's label."""
        edge = self.poison.edge(x, y)
        return x[edge], torch.full_like(y[edge], self.target)

    def __call__(self, view: View, rng: np.random.Generator) -> Tensor:  # noqa: ARG002
        """Train on relabelled edge cases, in a ball if one is given, scale what comes out."""
        if not (0 <= self.source < view.classes and 0 <= self.target < view.classes):
            raise InputError(f"{self!r}: the task has the classes 0 .. {view.classes - 1}")
        scale, radius = replacement(view, self.scale), math.inf
        if self.reach is not None:
            # Above 0, as a ball must be, where the honest updates are all 0.
            radius = max(self.reach * typical_length(view.own) / scale, 1e-30)
        return scale * view.train(self.poison, Leash(self.alpha, radius))
