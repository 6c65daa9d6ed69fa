"""Attacks on a classifier, and on a smoothed one: images nearby that it gets wrong.

An attack climbs the loss of a function that maps images to logarithms of probabilities: a model's own
(`plain`), or those that a model gives on the average under noise (`smoothed`). All are float32, whatever
a model computes in.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, nll_loss

from fedrobust.text import Textual, choose, parse

LogProbabilities = Callable[[Tensor], Tensor]
"""(k, *shape) images -> (k, classes)."""
Scores = Callable[[Tensor], Tensor]
"""Likewise, of a model: before they are made probabilities."""
_LEAST = torch.finfo(torch.float32).tiny
"""Above 0, and below any length that is not; a processor may take less for 0."""


def plain(model: Scores) -> LogProbabilities:
    """What the model itself says."""
    return lambda x: log_softmax(model(x).float(), dim=1)


def smoothed(
    model: Callable[[Tensor], Tensor], noise: Tensor, *, naive: bool = False
) -> LogProbabilities:
    """What the model says on the average over m samples of noise, the same ones at every call.

    log (1/m sum_j softmax f(x + noise_j)): the loss of the smoothed classifier, as it is attacked by
    Salman, Yang, Li, Zhang, Zhang, Razenshteyn, Bubeck, "Provably Robust Deep Learning via Adversarially
    Trained Smoothed Classifiers", NeurIPS 2019 (arXiv 1906.04584), equation 5, estimated as in section
    2.2.

    Args:
        model: maps images to scores.
        noise: (k, m, *shape), for each image m samples.
        naive: the mean of the logarithms instead, the loss of the model under noise: a weaker attack on
            the smoothed classifier, to be compared with.
    """

    def log_probabilities(x: Tensor) -> Tensor:
        scores = model((x.unsqueeze(1) + noise).flatten(0, 1)).float().view(len(x), noise.shape[1], -1)
        return log_softmax(scores, dim=2).mean(dim=1) if naive else averaged(scores)

    return log_probabilities


def averaged(scores: Tensor) -> Tensor:
    """(k, classes) logarithms of the mean of the m probabilities that (k, m, classes) scores give."""
    return torch.logsumexp(log_softmax(scores, dim=2), dim=1) - math.log(scores.shape[1])


@dataclass(frozen=True, repr=False)
class Adversary(Textual):
    """Finds images near given ones that are classified wrongly.

    Attributes:
        eps: how far an image may go, above 0, in its own units.
        steps: how often it is moved, at least 1.
    """

    eps: float = 1.0
    steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.eps > 0, "eps must be above 0")
        self.require(self.steps >= 1, "steps must be at least 1")

    @abstractmethod
    def __call__(
        self, log_probabilities: LogProbabilities, x: Tensor, y: Tensor, *, limits: Limits | None = None
    ) -> Tensor:
        """Move images.

        Args:
            log_probabilities: of what is attacked.
            x: (k, *shape) float32.
            y: (k,) int64, their labels, or (k, classes) float32, probabilities to lead away from.
            limits: pixels stay within them.

        Returns:
            (k, *shape), each within eps of its image.
        """

    def within(self, eps: float) -> Self:
        """The same attack with another eps."""
        return replace(self, eps=eps)


Limits = tuple[float, float]
"""The least and the largest value of a pixel."""


@dataclass(frozen=True, repr=False)
class PGD(Adversary):
    """Projected gradient ascent on the loss, from the image itself.

    Madry, Makelov, Schmidt, Tsipras, Vladu, ICLR 2018 (arXiv 1706.06083); in l2 with steps of length
    2 eps / steps along the normalised gradient, each clipped to the limits and then shortened to eps, as
    the code of Salman et al. 2019 has it; in linf with steps along its signs.

    Attributes:
        norm: "l2" or "linf", in which eps is measured.
    """

    name = "pgd"

    norm: str = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(self.norm, ("l2", "linf"), "norm")

    def __call__(
        self, log_probabilities: LogProbabilities, x: Tensor, y: Tensor, *, limits: Limits | None = None
    ) -> Tensor:
        """See `Adversary`."""
        delta = torch.zeros_like(x)
        for _ in range(self.steps):
            gradient, _ = _ascent(log_probabilities, x + delta, y)
            step = 2 * self.eps / self.steps
            if self.norm == "l2":  # shortened last, so that it reaches eps beside what is clipped
                delta = _clipped(x + delta + step * _unit(gradient), limits) - x
                delta = _shortened(delta, self.eps)
            else:
                delta = (delta + step * gradient.sign()).clamp(-self.eps, self.eps)
                delta = _clipped(x + delta, limits) - x
        return _clipped(x + delta, limits)


@dataclass(frozen=True, repr=False)
class DDN(Adversary):
    """Decoupled direction and norm, in l2: looks for the smallest change that succeeds.

    Rony, Hafemann, Oliveira, Ben Ayed, Sabourin, Granger, CVPR 2019 (arXiv 1811.09600), algorithm 1, as
    Salman et al. 2019 train with it (section 2.3 and their code): the length begins at eps, shrinks
    where an image is classified wrongly and grows where not; the smallest change that made it wrong is
    kept, and at last shortened to eps if it is longer. So an image that is wrong as it is, or that no
    change made wrong, stays as it is. Steps along the normalised gradient shrink by a cosine from 1 to
    0.01.

    Deviations: no quantisation; no random step where there is no gradient, and no bound on the norm but
    the limits; under noise an image is wrong where the mean of the probabilities is, not where most of
    the noisy copies are.

    Attributes:
        steps: how often the image is looked at, at first as it is; at least 2.
        gamma: how fast the norm adapts, in (0, 1).
    """

    name = "ddn"

    gamma: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.steps >= 2, "steps must be at least 2: the first looks at the image as it is")
        self.require(0 < self.gamma < 1, "gamma must be in (0, 1)")

    def __call__(
        self, log_probabilities: LogProbabilities, x: Tensor, y: Tensor, *, limits: Limits | None = None
    ) -> Tensor:
        """See `Adversary`."""
        delta = best = torch.zeros_like(x)
        norm = torch.full_like(_lengths(x), self.eps)
        least = torch.full_like(norm, math.inf)
        for number in range(self.steps):
            gradient, wrong = _ascent(log_probabilities, x + delta, y)
            wrong, length = wrong.view(norm.shape), _lengths(delta)
            better = wrong & (length < least)
            best, least = torch.where(better, delta, best), torch.where(better, length, least)
            cosine = torch.cos(torch.tensor(torch.pi * number / self.steps))
            delta = delta + float(0.01 + 0.99 * (1 + cosine) / 2) * _unit(gradient)
            norm = norm * torch.where(wrong, 1 - self.gamma, 1 + self.gamma)
            delta = _clipped(x + norm * _unit(delta), limits) - x
        return _clipped(x + _shortened(best, self.eps), limits)


CATALOG: dict[str, type[Adversary]] = {"pgd": PGD, "ddn": DDN}


def parse_adversary(text: str) -> Adversary:
    """Read `pgd(0.5, steps=4)`, `pgd(0.03, norm='linf')` or `ddn(0.5)`.

    Raises:
        InputError: the text names no attack of the `CATALOG`, or an argument is wrong.
    """
    return parse(text, CATALOG, "attack on images")


def _ascent(log_probabilities: LogProbabilities, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of each image's loss, and whether it is classified wrongly."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        found = log_probabilities(x)
        loss = nll_loss(found, y, reduction="sum") if y.ndim == 1 else -(y * found).sum()
        (gradient,) = torch.autograd.grad(loss, x)
    return gradient, found.detach().argmax(dim=1) != (y if y.ndim == 1 else y.argmax(dim=1))


def _lengths(x: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return lengths.view(-1, *[1] * (x.ndim - 1))


def _unit(x: Tensor) -> Tensor:
    """Of length 1, however short, as a very sure model's gradient is; what is 0 stays 0."""
    # By the largest entry first: the squares of those below 1e-23 are 0 in float32.
    x = x / x.abs().amax(dim=tuple(range(1, x.ndim)), keepdim=True).clamp_min(_LEAST)
    return x / _lengths(x).clamp_min(_LEAST)


def _shortened(x: Tensor, length: float) -> Tensor:
    return x * (length / _lengths(x).clamp_min(length))


def _clipped(x: Tensor, limits: Limits | None) -> Tensor:
    return x if limits is None else x.clamp(*limits)
