"""Label flipping."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedrobust.attacks.attack import Targeted
from fedrobust.attacks.view import View
from fedrobust.errors import InputError


@dataclass(frozen=True)
class FlippedLabels:
    """The poison of an untargeted `LabelFlip`: an example of class c is labelled classes - 1 - c.

    Attributes:
        classes: how many classes there are.
    """

    classes: int

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the images, flip the labels."""
        return x, self.classes - 1 - y


@dataclass(frozen=True)
class Relabelled:
    """The poison of a targeted `LabelFlip`: examples of one class are labelled as another.

    Attributes:
        source: the class whose examples are relabelled.
        target: the label they get.
    """

    source: int
    target: int

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the images, relabel those of the source class."""
        return x, torch.where(y == self.source, self.target, y)


@dataclass(frozen=True, repr=False)
class LabelFlip(Targeted):
    """Train honestly on wrong labels.

    With neither source nor target every example of class c is labelled classes - 1 - c, which costs
    accuracy everywhere. With both, examples of the source class are labelled as the target and all
    others are right: the model is to take one class for another and to be good otherwise.

    Sees: `train`, `classes`.

    Source: Tolpegin, Truex, Gursoy, Liu, "Data Poisoning Attacks Against Federated Learning Systems",
    ESORICS 2020 (arXiv 2007.08432): the targeted form. The untargeted one is that of Allouah et al.
    2023 (arXiv 2302.01772) and of ByzFL.

    Attributes:
        source: a class; given together with the target, or not at all.
        target: another class.
    """

    name = "label_flip"

    source: int | None = None
    target: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        together = (self.source is None) == (self.target is None)
        self.require(together, "give both source and target, or neither")
        distinct = self.source is None or self.source != self.target
        self.require(distinct, "source and target must differ")

    def goal(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The images of the source class, and the target's label.

        Raises:
            InputError: the attack is the untargeted one, whose success is the accuracy that is lost.
        """
        if self.source is None or self.target is None:
            raise InputError(f"{self!r} aims at no class; give source and target")
        return x[y == self.source], torch.full_like(y[y == self.source], self.target)

    def __call__(self, view: View, rng: np.random.Generator) -> Tensor:  # noqa: ARG002
        """Train on wrong labels."""
        if self.source is None or self.target is None:
            return view.train(FlippedLabels(view.classes))
        if not (0 <= self.source < view.classes and 0 <= self.target < view.classes):
            raise InputError(f"{self!r}: the task has the classes 0 .. {view.classes - 1}")
        return view.train(Relabelled(self.source, self.target))
