"""What local and central training minimise.

Noise and perturbations are in pixels, whatever the dataset was normalised by, so that sigma and eps mean
what they mean in papers.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from fedrobust.data import Normalisation
from fedrobust.smoothing.attacks import (
    Adversary,
    LogProbabilities,
    averaged,
    parse_adversary,
    plain,
    smoothed,
)
from fedrobust.text import Textual, parse


@dataclass(frozen=True, eq=False)
class Step:
    """What a step of training has beside its examples.

    Attributes:
        module: is trained; maps normalised images to scores.
        scale: how images are normalised.
        generator: what is random is drawn from it.
        time: how many rounds, or epochs, came before; for warm-up.
    """

    module: nn.Module
    scale: Normalisation
    generator: torch.Generator
    time: int

    @cached_property
    def of_pixels(self) -> nn.Module:
        """The module, for images that are not normalised."""
        return self.scale.of_pixels(self.module)

    def noise(self, x: Tensor, m: int, sigma: float) -> Tensor:
        """(k, m, *shape): for each of k images m samples of Gaussian noise."""
        out = x.new_empty(len(x), m, *x.shape[1:])
        return out.normal_(std=sigma, generator=self.generator)


@dataclass(frozen=True, repr=False)
class Objective(Textual):
    """Maps a batch to the loss that a step descends on."""

    @abstractmethod
    def __call__(self, step: Step, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss.

        Args:
            step: the model, and what else there is.
            x: (k, *shape) float32, normalised images.
            y: (k,) int64, their labels.

        Returns:
            A scalar with a graph to the model's parameters.
        """


@dataclass(frozen=True, repr=False)
class CrossEntropy(Objective):
    """The cross-entropy on the images as they are."""

    name = "cross_entropy"

    def __call__(self, step: Step, x: Tensor, y: Tensor) -> Tensor:
        """See `Objective`."""
        return cross_entropy(step.module(x), y)


@dataclass(frozen=True, repr=False)
class _Noisy(Objective):
    """Trains under Gaussian noise.

    Attributes:
        sigma: the noise's standard deviation, above 0, in pixels.
        m: noisy copies of each image, at least 1.
    """

    sigma: float = 0.25
    m: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.sigma > 0, "sigma must be above 0")
        self.require(self.m >= 1, "m must be at least 1")


@dataclass(frozen=True, repr=False)
class _Attacked(Objective):
    """Trains on what an adversary makes of images.

    Attributes:
        attack: the adversary, as text.
        warmup: over so many rounds, or epochs, eps grows to its value; 0: at once.
    """

    attack: str = "pgd(0.5, steps=4)"
    warmup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.warmup >= 0, "warmup must not be negative")
        _ = self.adversary

    @cached_property
    def adversary(self) -> Adversary:
        """What the text says. Raises `InputError` if that is none."""
        return parse_adversary(self.attack)

    def attacked(self, step: Step, log_probabilities: LogProbabilities, x: Tensor, y: Tensor) -> Tensor:
        """(k, *shape) pixels, attacked in evaluation mode; y as for an `Adversary`.

        In warm-up eps grows in equal steps, as in the code of Salman et al. 2019.
        """
        part = min((step.time + 1) / self.warmup, 1.0) if self.warmup else 1.0
        adversary = self.adversary.within(self.adversary.eps * part)
        training = step.module.training
        step.module.eval()
        found = adversary(log_probabilities, x, y, limits=step.scale.limits)
        step.module.train(training)
        return found


@dataclass(frozen=True, repr=False)
class GaussianAugmentation(_Noisy):
    """The cross-entropy on images with Gaussian noise.

    Cohen, Rosenfeld, Kolter 2019 (arXiv 1902.02918), section 3.3.

    Attributes:
        sigma: the noise's standard deviation, above 0, in pixels.
        m: noisy copies of each image, at least 1.
    """

    name = "gaussian"

    def __call__(self, step: Step, x: Tensor, y: Tensor) -> Tensor:
        """See `Objective`."""
        pixels = step.scale.pixels(x)
        return _loss(_scores(step, pixels, step.noise(pixels, self.m, self.sigma)), y)


@dataclass(frozen=True, repr=False)
class AdversarialTraining(_Attacked):
    """The cross-entropy on the images that an adversary makes, from the model as it is.

    Madry, Makelov, Schmidt, Tsipras, Vladu, ICLR 2018 (arXiv 1706.06083), equation 2.1.

    Attributes:
        attack: the adversary, as text: "pgd(0.5, steps=4)", "pgd(0.1, norm='linf')" or "ddn(0.5)".
        warmup: over so many rounds, or epochs, eps grows to its value; 0: at once.
    """

    name = "adversarial"

    def __call__(self, step: Step, x: Tensor, y: Tensor) -> Tensor:
        """See `Objective`."""
        found = self.attacked(step, plain(step.of_pixels), step.scale.pixels(x), y)
        return cross_entropy(step.of_pixels(found), y)


@dataclass(frozen=True, repr=False)
class Trades(_Attacked):
    """The cross-entropy on the images, and that an adversary's images are answered alike.

    CE(f(x), y) + beta KL(F(x) || F(x')), where x' is what an adversary finds that climbs the divergence:
    it needs no label. Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, "Theoretically Principled Trade-off
    between Robustness and Accuracy", ICML 2019 (arXiv 1901.08573), equation 5 and algorithm 1, where
    beta is 1 / lambda. With sigma above 0 F is the smoothed classifier, the mean under m samples of
    noise that x and x' share, and the cross-entropy is under that noise. Where a teacher has labelled
    images, this is the robust self-training of Carmon, Raghunathan, Schmidt, Liang, Duchi, NeurIPS 2019
    (arXiv 1905.13736), section 3.

    Attributes:
        attack: the adversary, as text: "pgd(0.5, steps=4)" or "ddn(0.5, steps=4)".
        warmup: over so many rounds, or epochs, eps grows to its value; 0: at once.
        beta: weight of the divergence, at least 0.
        sigma: the noise's standard deviation, at least 0, in pixels.
        m: noisy copies of each image, at least 1; without noise, 1.
    """

    name = "trades"

    beta: float = 6.0
    sigma: float = 0.0
    m: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.beta >= 0, "beta must not be negative")
        self.require(self.sigma >= 0, "sigma must not be negative")
        self.require(self.m >= 1, "m must be at least 1")
        self.require(self.sigma > 0 or self.m == 1, "without noise, sigma 0, m must be 1")

    def __call__(self, step: Step, x: Tensor, y: Tensor) -> Tensor:
        """See `Objective`."""
        pixels = step.scale.pixels(x)
        noise = step.noise(pixels, self.m, self.sigma)
        scores = _scores(step, pixels, noise)
        answer, others = averaged(scores), smoothed(step.of_pixels, noise)
        # At the image itself the divergence is 0, and so is its gradient: the adversary looks at it from
        # beside, as in the authors' code.
        beside = step.noise(pixels, 1, 1e-3).squeeze(1)
        found = self.attacked(step, lambda z: others(z + beside), pixels, answer.detach().exp())
        divergence = kl_div(others(found), answer, reduction="batchmean", log_target=True)
        return _loss(scores, y) + self.beta * divergence


@dataclass(frozen=True, repr=False)
class SmoothAdv(_Attacked, _Noisy):
    """Adversarial training of the smoothed classifier.

    The adversary climbs the loss of the average under noise, log 1/m sum_j f(x' + noise_j); then the
    model descends on the cross-entropy at x' + noise_j, the same noise. Salman, Yang, Li, Zhang, Zhang,
    Razenshteyn, Bubeck, NeurIPS 2019 (arXiv 1906.04584), section 2.2 and their code with
    `--train-multi-noise`.

    Attributes:
        sigma: the noise's standard deviation, above 0, in pixels.
        m: noisy copies of each image, at least 1.
        attack: the adversary, as text: "pgd(1.0, steps=4)" or "ddn(1.0, steps=4)".
        warmup: over so many rounds, or epochs, eps grows to its value; 0: at once.
    """

    name = "smoothadv"

    m: int = 2
    attack: str = "pgd(1.0, steps=4)"

    def __call__(self, step: Step, x: Tensor, y: Tensor) -> Tensor:
        """See `Objective`."""
        pixels = step.scale.pixels(x)
        noise = step.noise(pixels, self.m, self.sigma)
        found = self.attacked(step, smoothed(step.of_pixels, noise), pixels, y)
        return _loss(_scores(step, found, noise), y)


@dataclass(frozen=True, repr=False)
class Consistency(_Noisy):
    """Gaussian augmentation, and that predictions under noise agree and are sure.

    1/m sum_j [CE(f_j, y) + lbd KL(f_avg || f_j)] + eta H(f_avg), where f_j are the class probabilities
    of x + noise_j and f_avg is their mean. Jeong, Shin, "Consistency Regularization for Certified
    Robustness of Smoothed Classifiers", NeurIPS 2020 (arXiv 2006.04062), equations 7 and 8 with lambda
    over all m samples, as their code has it.

    Attributes:
        sigma: the noise's standard deviation, above 0, in pixels.
        m: noisy copies of each image, at least 2.
        lbd: weight of the divergence, at least 0.
        eta: weight of the entropy, at least 0.
    """

    name = "consistency"

    m: int = 2
    lbd: float = 10.0
    eta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.m >= 2, "m must be at least 2: predictions are compared")
        self.require(self.lbd >= 0 and self.eta >= 0, "lbd and eta must not be negative")

    def __call__(self, step: Step, x: Tensor, y: Tensor) -> Tensor:
        """See `Objective`."""
        pixels = step.scale.pixels(x)
        scores = _scores(step, pixels, step.noise(pixels, self.m, self.sigma))
        each = log_softmax(scores, dim=2)
        mean = each.exp().mean(dim=1).clamp_min(1e-20)  # at 0 no gradient is finite
        entropy = -(mean * mean.log()).sum(dim=1).mean()
        divergence = (
            kl_div(each, mean.unsqueeze(1).expand_as(each), reduction="sum") / scores[..., 0].numel()
        )
        return _loss(scores, y) + self.lbd * divergence + self.eta * entropy


CATALOG: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
    "gaussian": GaussianAugmentation,
    "adversarial": AdversarialTraining,
    "trades": Trades,
    "smoothadv": SmoothAdv,
    "consistency": Consistency,
}


def parse_objective(text: str) -> Objective:
    """Read `gaussian(0.5)` or `smoothadv(0.5, attack="ddn(1.0, steps=4)")`.

    >>> parse_objective("gaussian(0.5)")
    gaussian(sigma=0.5)

    Raises:
        InputError: the text names no objective of the `CATALOG`, or an argument is wrong.
    """
    return parse(text, CATALOG, "objective")


def _scores(step: Step, pixels: Tensor, noise: Tensor) -> Tensor:
    """(k, m, classes) float32: of (k, *shape) pixels under each of (k, m, *shape) samples of noise."""
    found: Tensor = step.of_pixels((pixels.unsqueeze(1) + noise).flatten(0, 1))
    # Autocast on a CPU would leave logarithms and exponentials of them in bfloat16.
    return found.float().view(len(pixels), noise.shape[1], -1)


def _loss(scores: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of (k, m, classes) scores."""
    return cross_entropy(scores.flatten(0, 1), y.repeat_interleave(scores.shape[1]))
