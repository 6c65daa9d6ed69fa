"""Randomised smoothing: what a network says of an image under noise, and within what radius."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedrobust.errors import InputError
from fedrobust.kernels import workers
from fedrobust.smoothing import bounds
from fedrobust.smoothing.attacks import Adversary, smoothed
from fedrobust.smoothing.counting import Counter, fastest_batch
from fedrobust.smoothing.noise import BLOCK, Gaussian, Noise, generator

ABSTAIN = -1
"""In the place of a class."""
Labels = npt.NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Certified:
    """What is certain of each of n images.

    Attributes:
        label: (n,) int64, the smoothed classifier's answer, or `ABSTAIN`, -1.
        radius: (n,) float64, l2, in the images' units: closer to the image than this the answer is the
            same; 0 where it abstains.
        samples: (n,) int64, how many noisy copies that took.
    """

    label: Labels
    radius: npt.NDArray[np.float64]
    samples: Labels


class SmoothedClassifier:
    """The classifier g(x) = the class that f most often gives to x + N(0, sigma^2 I).

    Cohen, Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019
    (arXiv 1902.02918). Whatever f is, g does not change its answer within a radius that can be computed.

    The noise of an image depends on the seed, the image's number and the kind of device alone, so that
    answers are the same however images are batched or spread over processes (up to a device's own
    rounding in f, which may depend on the batch). All answers are about independent noise: with a fixed
    seed one gets the same answer again, and whoever knows the seed before choosing the image could fit
    it to the noise.

    Attributes:
        noise: what is added to images.
        classes: how many there are.
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: float | Noise,
        classes: int,
        *,
        dtype: torch.dtype | None = None,
        batch: int | None = None,
    ) -> None:
        """Smooth a copy of a model, in evaluation mode: what is trained later does not change it.

        Args:
            model: f, maps images (n, *shape) to scores (n, classes); on any device.
            sigma: the standard deviation of Gaussian noise, in the images' units; or another noise, such
                as `RoundedGaussian(sigma)`.
            classes: how many there are.
            dtype: the model is converted to it, as to bfloat16, which is faster. The converted network
                is the one that is certified: keep predicting with this one.
            batch: noisy copies in one pass, rounded up to a multiple of 50; None finds out what is
                fastest.

        Raises:
            InputError: sigma is not above 0, there are fewer than 2 classes, or batch is below 1.
        """
        if classes < 2:
            raise InputError(f"classes must be at least 2, got {classes}")
        if batch is not None and batch < 1:
            raise InputError(f"batch must be at least 1, got {batch}")
        self.noise: Noise = (
            Gaussian(float(sigma)) if isinstance(sigma, int | float | np.floating) else sigma
        )
        self.classes = classes
        self._model = copy.deepcopy(model).eval().requires_grad_(requires_grad=False).to(dtype=dtype)
        self._dtype = dtype
        self._batch = None if batch is None else -(-batch // BLOCK) * BLOCK
        self._device = next(iter(self._model.parameters()), torch.empty(0)).device

    def predict(
        self,
        x: Tensor,
        n: int = 1000,
        alpha: float = 0.001,
        *,
        seed: int | None = None,
        ids: Sequence[int] | None = None,
    ) -> Labels:
        """The class of each image; wrong about g with probability alpha at most, for each image.

        PREDICT of Cohen et al. 2019, section 3.2.1. How far the n copies may be from the noise that is
        meant, n times `Noise.error` in total variation, is taken off alpha.

        Args:
            x: (k, *shape) float32.
            n: noisy copies of each image.
            alpha: how often an answer may be another than g's, in (0, 1).
            seed: of the noise, 0 or above; None draws one.
            ids: the images' numbers, so that each has noise of its own; None: 0 .. k - 1.

        Returns:
            (k,) int64, -1 where no class is clearly ahead.

        Raises:
            InputError: an argument is out of its range, so many copies leave nothing of alpha, or the
                model does not fit the images.
        """
        _check(alpha, n=n)
        error = self.noise.error(x.shape[1:].numel())
        level = alpha - n * error
        if level <= 0:
            raise InputError(
                f"each noisy copy may be drawn wrongly with probability {error:.1e}, so that n = {n} of "
                f"them leave nothing of alpha = {alpha}: take less than {math.ceil(alpha / error)}"
            )

        def answer(counter: Counter) -> Labels:
            counts = counter.more(n)
            order = counts.argsort(axis=1, kind="stable")[:, ::-1]
            first, second = np.take_along_axis(counts, order[:, :2], axis=1).T
            return np.where(bounds.undecided(first, second, level), ABSTAIN, order[:, 0])

        return np.concatenate(self._spread(x, seed, ids, answer))

    def certify(
        self,
        x: Tensor,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        *,
        seed: int | None = None,
        ids: Sequence[int] | None = None,
    ) -> Certified:
        """The class of each image, and a radius in which g gives the same.

        CERTIFY of Cohen et al. 2019, section 3.2.2: n0 copies choose a class, n others bound how likely
        it is. An answer is wrong with probability alpha at most, for each image.

        Args:
            x: (k, *shape) float32.
            n0: noisy copies of each image that choose its class.
            n: noisy copies that bound the class's probability.
            alpha: how often a certificate may be wrong, in (0, 1).
            seed: of the noise, 0 or above; None draws one.
            ids: the images' numbers, so that each has noise of its own; None: 0 .. k - 1.

        Raises:
            InputError: as `predict`.
        """
        _check(alpha, n0=n0, n=n)

        error = self.noise.error(x.shape[1:].numel())

        def answer(counter: Counter) -> Certified:
            chosen = counter.chosen(n0)
            p = bounds.lower_bound(_of(counter.more(n), chosen), n, alpha) - error
            label = np.where(p < 0.5, ABSTAIN, chosen)
            return Certified(label, bounds.radius(p, self.noise.sigma), np.full(counter.size, n0 + n))

        return _joined(self._spread(x, seed, ids, answer))

    def certify_at(
        self,
        x: Tensor,
        radius: float,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        *,
        seed: int | None = None,
        ids: Sequence[int] | None = None,
    ) -> Certified:
        """Whether g keeps its answer within one radius, with as few noisy copies as that takes.

        Copies are drawn until the evidence that the class is likely enough for this radius, or that it
        is not, reaches 1 / alpha (`bounds.evidence_above`), n at most. Although one looks again and
        again, a certificate is wrong with probability alpha at most, for each image, as `certify`'s: the
        evidence is a supermartingale if the class is not that likely, and Ville's inequality bounds
        how often one ever gets so far.

        Args:
            x: (k, *shape) float32.
            radius: that is asked for, at least 0.
            n0: noisy copies of each image that choose its class.
            n: noisy copies at most after that.
            alpha: how often a certificate may be wrong, in (0, 1).
            seed: of the noise, 0 or above; None draws one.
            ids: the images' numbers, so that each has noise of its own; None: 0 .. k - 1.

        Returns:
            With the radius that was asked for, or label -1 and radius 0 where it cannot be certified.

        Raises:
            InputError: as `predict`.
        """
        _check(alpha, n0=n0, n=n)
        if not 0 <= radius < np.inf:
            raise InputError(f"radius must be at least 0 and finite, got {radius}")
        p = bounds.needed(radius, self.noise.sigma) + self.noise.error(x.shape[1:].numel())
        enough = -np.log(alpha)

        def answer(counter: Counter) -> Certified:
            chosen = counter.chosen(n0)
            hits, drawn = np.zeros((2, counter.size), np.int64)
            certain = np.zeros(counter.size, bool)
            left = np.arange(counter.size if p < 1 else 0)
            for before, now in itertools.pairwise(_looks(n)):
                if not len(left):
                    break
                hits[left] += _of(counter.more(now - before, left), chosen[left])
                drawn[left] = now
                certain[left] = bounds.evidence_above(hits[left], now, p) >= enough
                refuted = bounds.evidence_below(hits[left], now, p) >= enough
                left = left[~(certain[left] | refuted)]
            label = np.where(certain, chosen, ABSTAIN)
            return Certified(label, np.where(certain, float(radius), 0.0), n0 + drawn)

        return _joined(self._spread(x, seed, ids, answer))

    def attacked(
        self,
        x: Tensor,
        y: Tensor,
        adversary: Adversary,
        m: int = 16,
        *,
        naive: bool = False,
        limits: tuple[float, float] | None = None,
        seed: int | None = None,
        ids: Sequence[int] | None = None,
    ) -> Tensor:
        """Images near the given ones that g is to get wrong, to be tried with `predict`.

        How many of them it still gets right is what it seems to withstand: an upper bound on what it
        does withstand, as certificates are a lower one.

        Args:
            x: (k, *shape) float32.
            y: (k,) int64, their labels.
            adversary: `PGD` or `DDN`.
            m: samples of noise for each image, the same in all of the adversary's steps.
            naive: attack the model under noise instead, see `smoothed`.
            limits: of pixels.
            seed: of the noise, 0 or above; None draws one.
            ids: the images' numbers, so that each has noise of its own; None: 0 .. k - 1.

        Returns:
            (k, *shape) float32, on the model's device.

        Raises:
            InputError: as `predict`.
        """
        _check(0.5, m=m)
        x, seeds = self._examined(x, seed, ids)
        found = torch.empty_like(x)
        for i, image in enumerate(x):
            noise = image.new_empty(1, m, *image.shape).normal_(
                std=self.noise.sigma, generator=generator(seeds[i], x.device)
            )
            averaged = smoothed(self._scores, noise, naive=naive)
            found[i] = adversary(averaged, image[None], y[i : i + 1].to(x.device), limits=limits)[0]
        return found

    def batch_size(self, shape: Sequence[int]) -> int:
        """How many noisy copies of such images go through the model at once; found by trial, once."""
        if self._batch is None:
            image = torch.zeros(*shape, device=self._device)
            # On a thread of those that will do the work: on a CPU a batch is one thread's.
            trial = workers(torch.get_num_threads()).submit(fastest_batch, self.labels, image)
            self._batch = trial.result()
        return self._batch

    @torch.inference_mode()
    def labels(self, images: Tensor) -> Tensor:
        """(n,) int64: the class that the model itself, f, gives to each of (n, *shape) images.

        Raises:
            InputError: it gives something else than (n, classes) scores.
        """
        scores = self._scores(images)
        if scores.shape != (len(images), self.classes):
            raise InputError(
                f"the model maps {len(images)} images to {tuple(scores.shape)}, expected scores "
                f"({len(images)}, {self.classes})"
            )
        found: Tensor = scores.argmax(dim=1)
        return found

    def _scores(self, images: Tensor) -> Tensor:
        scores: Tensor = self._model(images if self._dtype is None else images.to(self._dtype))
        return scores

    def _spread(
        self,
        x: Tensor,
        seed: int | None,
        ids: Sequence[int] | None,
        answer: Callable[[Counter], T],
    ) -> list[T]:
        """Answers for parts of the images; on a CPU as many parts as torch has threads, each on one."""
        x, seeds = self._examined(x, seed, ids)
        count = min(torch.get_num_threads(), len(x)) if self._device.type == "cpu" else 1
        edges = [len(x) * i // max(count, 1) for i in range(max(count, 1) + 1)]
        parts = [slice(*edge) for edge in itertools.pairwise(edges)]
        batch = self.batch_size(x.shape[1:])

        def work(part: slice) -> T:
            counter = Counter(self.labels, self.classes, self.noise, x[part], seeds[part], batch)
            return answer(counter)

        if len(parts) == 1:
            return [work(parts[0])]
        return list(workers(torch.get_num_threads()).map(work, parts))

    def _examined(
        self, x: Tensor, seed: int | None, ids: Sequence[int] | None
    ) -> tuple[Tensor, list[np.random.SeedSequence]]:
        """Images where the model is, and a seed for each. Raises as `predict`."""
        if x.ndim < 2 or not x.is_floating_point():
            raise InputError(
                f"images must be floating point, (k, *shape), got {x.dtype} {tuple(x.shape)}; a single "
                "one goes in as image[None]"
            )
        if not bool(x.isfinite().all()):
            raise InputError("images must be finite; at least one value is not")
        numbers = range(len(x)) if ids is None else ids
        if len(numbers) != len(x) or min(numbers, default=0) < 0:
            raise InputError(f"ids must be numbers from 0, one for each of {len(x)} images")
        if seed is not None and seed < 0:
            raise InputError(f"seed must be at least 0, got {seed}")
        x = x.detach().to(self._device, torch.float32)
        entropy = np.random.SeedSequence(seed).entropy  # None: from the system
        return x, [np.random.SeedSequence(entropy, spawn_key=(int(number),)) for number in numbers]


def _of(counts: npt.NDArray[np.int64], chosen: Labels) -> Labels:
    """(k,) int64: of (k, classes) counts that of each image's class."""
    found: Labels = np.take_along_axis(counts, chosen[:, None], axis=1)[:, 0]
    return found


def _looks(n: int) -> Iterator[int]:
    """0, then after how many copies the evidence is looked at: every fifth more, and at last n."""
    at = 0
    while at < n:
        yield at
        at = max(at + BLOCK, int(1.2 * at) // BLOCK * BLOCK)
    yield n


def _joined(parts: Sequence[Certified]) -> Certified:
    return Certified(
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.radius for part in parts]),
        np.concatenate([part.samples for part in parts]),
    )


def _check(alpha: float, **counts: int) -> None:
    if not 0 < alpha < 1:
        raise InputError(f"alpha must be in (0, 1), got {alpha}")
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} must be at least 1, got {count}")
