"""Noise that is added to images: Gaussian in floating point, or in whole levels of brightness."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import ndtr
from torch import Tensor

from fedrobust.errors import InputError

BLOCK = 50
"""So many noisy copies of an image are drawn at a time, whatever the batch: so the noise is the same."""


class Source(Protocol):
    """Where one image's noisy copies come from, one block after the other."""

    def fill(self, out: Tensor) -> None:
        """Put a block of further copies into (BLOCK, *shape) float32, on the image's device."""
        ...


class Noise(Protocol):
    """A distribution of noise.

    Attributes:
        sigma: its standard deviation, in the images' units.
    """

    @property
    def sigma(self) -> float:
        """See the class."""
        ...

    def source(self, image: Tensor, seed: np.random.SeedSequence) -> Source:
        """Begin to draw copies of an image, (*shape) float32. Raises `InputError` if it does not fit."""
        ...

    def error(self, size: int) -> float:
        """How far so many drawn numbers are from the distribution that is meant, in total variation."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian noise, drawn and added in float32, as everybody does.

    Its numbers, and the sum, are rounded, of which an attacker can make false certificates (Voracek,
    Hein, "Sound Randomized Smoothing in Floating-Point Arithmetic", ICLR 2023, arXiv 2207.07209);
    `RoundedGaussian` is proof against that.

    Attributes:
        sigma: the standard deviation, above 0, in the images' units.
    """

    sigma: float

    def __post_init__(self) -> None:
        _check(self.sigma)

    def source(self, image: Tensor, seed: np.random.SeedSequence) -> Source:
        """See `Noise`."""
        return _Floats(image, self.sigma, generator(seed, image.device))

    def error(self, size: int) -> float:
        """Not known: taken for 0."""
        del size
        return 0.0


@dataclass(frozen=True)
class _Floats:
    image: Tensor
    sigma: float
    generator: torch.Generator

    def fill(self, out: Tensor) -> None:
        out.normal_(generator=self.generator)
        torch.add(self.image, out, alpha=self.sigma, out=out)


@dataclass(frozen=True)
class RoundedGaussian:
    """Gaussian noise rounded to brightness levels, for images that are made of such levels.

    For an image x of whole levels, round(x + e) = x + round(e): what is drawn and added in integers is
    exactly what rounding x + e, with real Gaussian noise e, would give. So the smoothed classifier is
    that of "round, then classify" under real Gaussian noise, whose certificate no rounding spoils: it
    holds for every other image of whole levels within the radius. Voracek, Hein 2023 (arXiv 2207.07209),
    section 4. Drawn by inversion of the distribution function from 64 random bits a number; what double
    precision leaves of that, `error`, is to be taken off the probabilities that are certified.

    Attributes:
        sigma: the standard deviation, above 0, in the images' units.
        levels: so many levels make one unit: 255 for images of 8 bits, scaled to 0 .. 1.
    """

    sigma: float
    levels: int = 255

    def __post_init__(self) -> None:
        _check(self.sigma)
        if self.levels < 1:
            raise InputError(f"levels must be at least 1, got {self.levels}")

    def source(self, image: Tensor, seed: np.random.SeedSequence) -> Source:
        """See `Noise`."""
        whole = (image.double() * self.levels).round()
        off = float((image.double() * self.levels - whole).abs().max())
        if not off < 1e-3:
            raise InputError(
                f"rounded noise needs images of whole levels, multiples of 1/{self.levels}; one is "
                f"{off:.3g} of a level off: round the images first, or use Gaussian noise"
            )
        if float(whole.abs().max()) >= 2**14:
            raise InputError(f"images must be within {2**14} levels of 0; are they scaled to 0 .. 1?")
        return _Levels(whole.short(), self.levels, _inverse(self.sigma * self.levels), seed)

    def error(self, size: int) -> float:
        """See `Noise`: for each number and level a few roundings of float64."""
        return size * len(_inverse(self.sigma * self.levels).thresholds) * 2.0**-50


class _Levels:
    def __init__(
        self, image: Tensor, levels: int, inverse: _Inverse, seed: np.random.SeedSequence
    ) -> None:
        self._image, self._levels, self._inverse = image, levels, inverse
        self._bits = np.random.SFC64(seed)

    def fill(self, out: Tensor) -> None:
        steps = torch.from_numpy(self._inverse(self._bits.random_raw(out.numel())))
        out.copy_(self._image + steps.view(out.shape).to(self._image.device)).div_(self._levels)


@dataclass(frozen=True, eq=False)
class _Inverse:
    """64 random bits -> an integer, distributed as rounded Gaussian noise.

    Attributes:
        lowest: the least of the integers.
        thresholds: uint64, ascending: at or above so many of them is so far above the least.
        first: (65536,) int16, the integer that the first 16 bits begin with.
        split: (65536,) bool, whether the other bits have a say.
    """

    lowest: int
    thresholds: npt.NDArray[np.uint64]
    first: npt.NDArray[np.int16]
    split: npt.NDArray[np.bool_]

    def __call__(self, bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.int16]:
        front = (bits >> np.uint64(48)).astype(np.uint16)
        found = self.first[front]
        open_ = np.flatnonzero(self.split[front])
        found[open_] = self.lowest + np.searchsorted(self.thresholds, bits[open_], side="right")
        return found


@lru_cache(maxsize=8)
def _inverse(spread: float) -> _Inverse:
    reach = int(10 * spread) + 2  # beyond 9.2 standard deviations there is less than one in 2^64
    if reach >= 2**14:
        raise InputError(f"noise of {spread:.0f} levels is too wide to be drawn level by level")
    below = ndtr((np.arange(-reach, reach) + 0.5) / spread)
    # The largest float64 below 1 stands for what rounds up to 1: the last levels, hardly ever drawn.
    scaled = np.minimum(below, np.nextafter(1.0, 0.0)) * 2.0**64
    thresholds = np.maximum.accumulate(scaled.astype(np.uint64))
    fronts = np.arange(65536, dtype=np.uint64) << np.uint64(48)
    begin = np.searchsorted(thresholds, fronts, side="right")
    end = np.searchsorted(thresholds, fronts + np.uint64(2**48 - 1), side="right")
    return _Inverse(-reach, thresholds, (begin - reach).astype(np.int16), begin != end)


def generator(seed: np.random.SeedSequence, device: torch.device) -> torch.Generator:
    """A stream of random numbers on a device.

    A CPU's generator looks at 32 bits of a seed only, so that is all the seeds there are: enough for
    streams, one an image, and too few to begin a stream for every block.
    """
    return torch.Generator(device).manual_seed(int(seed.generate_state(1)[0]))


def _check(sigma: float) -> None:
    if not 0 < sigma < float("inf"):
        raise InputError(f"sigma must be above 0 and finite, got {sigma}")
