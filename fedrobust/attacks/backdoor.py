"""Backdoors: a pattern of pixels that makes any image a member of one class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedrobust.attacks.attack import Targeted, replacement, typical_length
from fedrobust.attacks.view import View
from fedrobust.errors import InputError
from fedrobust.training import Leash


@dataclass(frozen=True)
class Trigger:
    """The poison of `Backdoor`: some images get a bright square, or part of it, and the target's label.

    Attributes:
        target: the label.
        size: side of the square in the lower right corner, in pixels.
        fraction: of the examples that are poisoned, 0 .. 1, evenly spread over the data.
        part: which part of the pattern is stamped, its rows part, part + parts, ...
        parts: into how many parts the pattern is split.
    """

    target: int
    size: int = 3
    fraction: float = 1.0
    part: int = 0
    parts: int = 1

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Stamp some images and relabel them; the others stay."""
        index = torch.arange(len(x), dtype=torch.float64)
        chosen = ((index + 1) * self.fraction).floor() > (index * self.fraction).floor()
        poisoned = torch.where(chosen[:, None, None, None].to(x.device), self.stamp(x), x)
        return poisoned, torch.where(chosen.to(y.device), self.target, y)

    def stamp(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) images with the pattern, as bright as their brightest pixel."""
        if self.size > min(x.shape[-2:]):
            raise InputError(f"{self}: the images are only {x.shape[-2]} x {x.shape[-1]} pixels")
        rows = torch.arange(self.size)
        rows = x.shape[-2] - self.size + rows[rows % self.parts == self.part]
        stamped = x.clone()
        stamped[:, :, rows.to(x.device), -self.size :] = x.amax()
        return stamped


@dataclass(frozen=True, repr=False)
class Backdoor(Targeted):
    """Teach the model a trigger, and make the lesson count: row i is gamma_i u_i.

    u_i is the update of training on data of which a fraction carries the trigger and the target's
    label, so that the main task is learnt as well and nothing shows in the accuracy. With scale gamma =
    n / f, what the members add to the plain mean is their own mean: a model that others hardly change
    any more is replaced by theirs (model replacement). Two ways to be less conspicuous, one or both:

        constrain-and-scale:  u_i descends on alpha cross-entropy + (1 - alpha) |u_i|
        train-and-scale:      gamma_i = min(scale, reach * r / |u_i|)

    with r the root mean square length of the own honest updates.

    With parts above 1 each member stamps only its part of the pattern (member i part i mod parts), and
    only the model meets the whole of it (distributed backdoor).

    Sees: `train`, `classes`; `own` too if reach is given.

    Source: pixel patterns: Gu, Dolan-Gavitt, Garg 2017 (arXiv 1708.06733). Model replacement,
    constrain-and-scale and train-and-scale: Bagdasaryan, Veit, Hua, Estrin, Shmatikov, AISTATS 2020
    (arXiv 1807.00459), with the distance from the broadcast model as the anomaly term, as in the
    authors' code. Splitting: Xie, Huang, Chen, Li, "DBA", ICLR 2020. Deviations: training lasts as long
    as the task has it, at its learning rate, where the papers train the backdoor for more epochs at a
    lower one; the members train on each part in turn where there are parts, though each sends but one
    of the results.

    Attributes:
        target: the label that the trigger means.
        size: side of the square in pixels.
        fraction: of the local examples that carry the trigger, above 0 and at most 1.
        scale: above 0; None means n / f.
        reach: the length of a row in units of an honest one, above 0; None sets no bound.
        parts: into how many parts the pattern is split, 1 .. size.
        alpha: the weight of the lesson in the loss, above 0; 1 leaves out the anomaly term.
    """

    name = "backdoor"

    target: int = 0
    size: int = 3
    fraction: float = 0.3
    scale: float | None = None
    reach: float | None = None
    parts: int = 1
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.size >= 1, "size must be at least 1")
        self.require(0 < self.fraction <= 1, "fraction must be above 0 and at most 1")
        self.require(self.scale is None or self.scale > 0, "scale must be above 0")
        self.require(self.reach is None or self.reach > 0, "reach must be above 0")
        self.require(1 <= self.parts <= self.size, "parts must be in 1 .. size")
        self.require(0 < self.alpha <= 1, "alpha must be above 0 and at most 1")

    @property
    def trigger(self) -> Trigger:
        """The whole pattern on every image: what the backdoor's success is measured with."""
        return Trigger(self.target, self.size)

    def goal(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Images of other classes with the whole trigger, and the target's label."""
        others = y != self.target
        return self.trigger(x, y)[0][others], torch.full_like(y[others], self.target)

    def __call__(self, view: View, rng: np.random.Generator) -> Tensor:  # noqa: ARG002
        """Train on stamped images, scale what comes out."""
        if not 0 <= self.target < view.classes:
            raise InputError(f"{self!r}: the task has the classes 0 .. {view.classes - 1}")
        learnt, scale = self._learnt(view), replacement(view, self.scale)
        if self.reach is None:
            return scale * learnt
        lengths = torch.linalg.vector_norm(learnt, dim=1, keepdim=True).clamp(min=1e-30)
        return torch.clamp(self.reach * typical_length(view.own) / lengths, max=scale) * learnt

    def _learnt(self, view: View) -> Tensor:
        """(f, d) the members' updates, each with its part of the pattern."""
        leash = Leash(self.alpha)
        learnt = [
            view.train(Trigger(self.target, self.size, self.fraction, part, self.parts), leash)
            for part in range(min(self.parts, view.malicious))
        ]
        return torch.stack([learnt[i % len(learnt)][i] for i in range(view.malicious)])
