"""Counts which classes a model gives to noisy copies of images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedrobust.smoothing.noise import BLOCK, Noise, Source

Counts = npt.NDArray[np.int64]
Labels = npt.NDArray[np.int64]
Classify = Callable[[Tensor], Tensor]
"""(n, *shape) float32 images -> (n,) int64 classes."""
_CHOICE, _ESTIMATE = 0, 1  # streams of noise: what bounds a class's probability did not choose the class
_BATCHES = 16
"""After so many of them classes are counted: that takes a twentieth of the time of a small one."""
_LARGEST = 8192
"""No batch is larger than this; we know of no device on which one would be faster."""
_TRIAL = 0.03
"""Seconds that a size is tried for at least, each time: shorter ones are a matter of luck."""


class Counter:
    """Some images, and the noise that is still to come for each.

    Attributes:
        size: how many images there are.
    """

    def __init__(
        self,
        classify: Classify,
        classes: int,
        noise: Noise,
        images: Tensor,
        seeds: Sequence[np.random.SeedSequence],
        batch: int,
    ) -> None:
        """Prepare memory for a batch, and nothing else.

        Args:
            classify: the model.
            classes: how many it tells apart.
            noise: what is added.
            images: (k, *shape) float32, on the model's device.
            seeds: one an image.
            batch: copies in one pass, a multiple of `BLOCK`.
        """
        self.size = len(images)
        self._classify, self._classes = classify, classes
        self._sources = [
            [
                noise.source(image, _child(seed, stream))
                for image, seed in zip(images, seeds, strict=True)
            ]
            for stream in (_CHOICE, _ESTIMATE)
        ]
        self._buffer = images.new_empty(batch // BLOCK, BLOCK, *images.shape[1:])

    def chosen(self, n0: int) -> Labels:
        """(k,) int64: the class that is most frequent among n0 copies of each image."""
        chosen: Labels = self._count(self._sources[_CHOICE], n0).argmax(axis=1)
        return chosen

    def more(self, n: int, which: npt.NDArray[np.int64] | None = None) -> Counts:
        """(k, classes) int64: of n further copies of each image, how many are given each class.

        Args:
            n: so many.
            which: (k,) the images; None takes all.
        """
        sources = self._sources[_ESTIMATE]
        return self._count(sources if which is None else [sources[i] for i in which], n)

    @torch.inference_mode()
    def _count(self, sources: Sequence[Source], n: int) -> Counts:
        device, batch = self._buffer.device, len(self._buffer)
        counts = torch.zeros(len(sources) * self._classes, dtype=torch.int64, device=device)
        plan = _blocks(len(sources), n)
        while group := list(islice(plan, _BATCHES * batch)):
            parts = [group[start : start + batch] for start in range(0, len(group), batch)]
            found = torch.cat([self._labels(sources, part) for part in parts])
            rows, sizes = torch.tensor(group, device=device).T
            found = found.view(len(group), BLOCK) + self._classes * rows[:, None]
            asked = torch.arange(BLOCK, device=device) < sizes[:, None]
            counts += torch.bincount(found[asked], minlength=len(counts))
        return counts.view(-1, self._classes).cpu().numpy()

    def _labels(self, sources: Sequence[Source], part: Sequence[tuple[int, int]]) -> Tensor:
        """(BLOCK * blocks,) int64: the classes of the next block of copies of each of those images."""
        copies = self._buffer[: len(part)]
        for (row, _), block in zip(part, copies, strict=True):
            sources[row].fill(block)
        return self._classify(copies.flatten(0, 1))


def _blocks(images: int, n: int) -> Iterator[tuple[int, int]]:
    """(image, how many of the block's copies count), the blocks of an image in a row."""
    for row in range(images):
        for start in range(0, n, BLOCK):
            yield row, min(BLOCK, n - start)


def _child(seed: np.random.SeedSequence, stream: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, stream))


def fastest_batch(classify: Classify, image: Tensor) -> int:
    """How many copies of an image go through a model at the highest rate, a multiple of `BLOCK`.

    Found by trial: on a CPU a batch that leaves its cache is slower by half or more, on a GPU a small
    one leaves it idle. What else the machine is doing is not to decide: sizes that come into question
    are tried in turns, each for as long, the best try of each counts, and on a CPU the time that this
    thread has had of it.
    """
    rates: dict[int, float] = {}
    size = best = BLOCK
    while size <= min(_LARGEST, 4 * best):
        try:
            rates[size] = max(_rate(classify, image, size) for _ in range(2))
        except torch.OutOfMemoryError:
            if not rates:
                raise
            break
        best = max(rates, key=rates.__getitem__)
        if rates[size] < 0.7 * rates[best]:
            break
        size *= 2
    tries = [[_rate(classify, image, size, _TRIAL) for size in rates] for _ in range(3)]
    found = dict(zip(rates, map(max, *tries), strict=True))
    enough = max(found.values()) / 1.03  # of two that are as fast, the one that takes less memory
    return min(size for size, rate in found.items() if rate >= enough)


@torch.inference_mode()
def _rate(classify: Classify, image: Tensor, size: int, seconds: float = 0.0) -> float:
    """Copies a second in batches of a size: one batch, or as many as take so long."""
    images = image.expand(size, *image.shape).contiguous()
    clock = time.thread_time if image.device.type == "cpu" else time.perf_counter
    began, copies, spent = clock(), 0, 0.0
    while not copies or spent < seconds:
        classify(images)[0].item()  # waits for the device
        copies, spent = copies + size, clock() - began
    return copies / max(spent, 1e-9)
