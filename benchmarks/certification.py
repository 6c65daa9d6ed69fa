"""Certifying by randomised smoothing: copies a second beside the network alone, Cohen's loop and ART.

    python -m benchmarks.certification
    python -m benchmarks.certification --early trained/noisy --sigma 0.5     # how many copies are needed

All on one thread, in turns. The floor is the network alone, at whatever batch turns out best; ours
finds its own by trial. `Cohen's loop` is his CERTIFY, transcribed: batches of 1000, one image at a time.
ART is `PyTorchRandomizedSmoothing.certify` with the batch of its default; it holds all copies of an
image at a time, so it gets fewer of them. Two small images are certified, of MNIST's and of CIFAR-10's
size; the networks' parameters are as drawn, which does not matter to how long they take.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fedrobust_laboratory.central import Trained
from torch import Tensor, nn

from benchmarks.measure import MB, sample
from benchmarks.peers import NEEDS, installed
from fedrobust.data import load
from fedrobust.smoothing import RoundedGaussian, SmoothedClassifier
from fedrobust.training import parse_model

SIGMA, CLASSES, N0, COPIES, COHENS_BATCH, ARTS_BATCH = 0.5, 10, 100, 100_000, 1000, 32
BATCHES = 50, 100, 200, 400, 1000
Certify = Callable[[int], None]
"""Certifies one image from so many noisy copies."""


@dataclass(frozen=True)
class Setting:
    """A network, an image's shape, and how many copies each contestant gets."""

    model: str
    shape: tuple[int, int, int]
    copies: int
    few: int


SETTINGS = (
    Setting("lenet(16)", (1, 28, 28), 100_000, 20_000),
    Setting("lenet(32)", (1, 28, 28), 50_000, 20_000),
    Setting("resnet(20)", (3, 32, 32), 5_000, 2_000),
)
QUICK = (Setting("lenet(4)", (1, 8, 8), 2_000, 1_000),)


def contestants(setting: Setting) -> Mapping[str, Certify]:
    """All of them, the floors first."""
    module = parse_model(setting.model)(setting.shape, CLASSES, 0).eval()
    image = torch.rand(setting.shape, generator=torch.Generator().manual_seed(0))
    found: dict[str, Certify] = {
        **_floors(module, image),
        "ours": _ours(SmoothedClassifier(module, SIGMA, CLASSES), image),
        "ours, rounded noise": _ours(SmoothedClassifier(module, RoundedGaussian(SIGMA), CLASSES), image),
        "ours, bfloat16": _ours(SmoothedClassifier(module, SIGMA, CLASSES, dtype=torch.bfloat16), image),
        "Cohen's loop": _cohens(module, image),
    }
    if installed("adversarial-robustness-toolbox"):
        found["ART"] = _arts(module, image)
    return found


def _floors(module: nn.Module, image: Tensor) -> dict[str, Certify]:
    classifier = SmoothedClassifier(module, SIGMA, CLASSES)

    def alone(size: int) -> Certify:
        images = image.expand(size, *image.shape).contiguous()

        def certify(n: int) -> None:
            for _ in range(0, n, size):
                classifier.labels(images)

        return certify

    return {f"floor, {size} at a time": alone(size) for size in BATCHES}


def _ours(classifier: SmoothedClassifier, image: Tensor) -> Certify:
    classifier.batch_size(image.shape)
    whole = (image * 255).round() / 255

    def certify(n: int) -> None:
        classifier.certify(whole[None], N0, n, seed=0)

    return certify


def _cohens(module: nn.Module, image: Tensor) -> Certify:
    def count(n: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        counts = np.zeros(CLASSES, np.int64)
        with torch.no_grad():
            for start in range(0, n, COHENS_BATCH):
                batch = image.repeat((min(COHENS_BATCH, n - start), 1, 1, 1))
                found = module(batch + torch.randn_like(batch) * SIGMA).argmax(1)
                for label in found.numpy():
                    counts[label] += 1
        return counts

    def certify(n: int) -> None:
        count(N0)
        count(n)

    return certify


def _arts(module: nn.Module, image: Tensor) -> Certify:
    from art.estimators.certification.randomized_smoothing import (  # noqa: PLC0415
        PyTorchRandomizedSmoothing,
    )

    logging.getLogger("art").setLevel(logging.ERROR)
    classifier = PyTorchRandomizedSmoothing(
        model=module,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(image.shape),
        nb_classes=CLASSES,
        sample_size=N0,
        scale=SIGMA,
        alpha=0.001,
        device_type="cpu",
    )

    def certify(n: int) -> None:
        classifier.certify(image[None].numpy(), n=n, batch_size=ARTS_BATCH)

    return certify


def compare(setting: Setting, repetitions: int) -> None:
    """Print a table of a setting."""
    runs = contestants(setting)
    copies = {name: setting.few if name == "ART" else setting.copies for name in runs}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, float] = {}
    for certify in runs.values():
        certify(N0)
    for _ in range(repetitions):
        for name, certify in runs.items():
            cost = sample(lambda name=name, certify=certify: certify(copies[name]))
            rates[name].append(copies[name] / cost.cpu)
            peaks[name] = max(peaks.get(name, 0.0), cost.peak)
    middle = {name: statistics.median(found) for name, found in rates.items()}
    floor = max(rate for name, rate in middle.items() if name.startswith("floor"))
    print(f"\n{setting.model}, images of {' x '.join(map(str, setting.shape))}\n")
    print("| | copies/s | spread | of the floor | ours over it | peak, MB | copies |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, rate in middle.items():
        spread = (max(rates[name]) - min(rates[name])) / rate
        print(
            f"| {name} | {rate:,.0f} | {100 * spread:.0f} % | {rate / floor:.2f} "
            f"| {middle['ours'] / rate:.2f} | {peaks[name] / MB:.0f} | {copies[name]:,} |"
        )


def early(folder: Path, sigma: float, every: int, data_dir: Path | None) -> None:
    """Print how many copies certifying one radius takes, beside the same number for every image.

    Args:
        folder: of a run or of a training, whose model is asked.
        sigma: of the noise.
        every: only each so-manieth test image.
        data_dir: where datasets are.
    """
    trained = Trained.find(folder)
    dataset = load(trained.source.dataset, data_dir)
    module = trained.module(dataset)
    classifier = SmoothedClassifier(
        dataset.normalisation.of_pixels(module), sigma, dataset.classes, dtype=torch.bfloat16
    )
    x, y = dataset.normalisation.pixels(dataset.test_x[::every]), dataset.test_y[::every].numpy()
    fixed = N0 + COPIES
    print("| radius | certified accuracy, % | mean copies | median | 95 % below | fewer than all |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for radius in sigma * np.array([0.0, 0.5, 1.0, 2.0, 3.0]):
        found = classifier.certify_at(x, float(radius), N0, COPIES, seed=0)
        mean, median = found.samples.mean(), np.median(found.samples)
        print(
            f"| {radius:g} | {100 * (found.label == y).mean():.1f} | {mean:,.0f} | {median:,.0f} "
            f"| {np.quantile(found.samples, 0.95):,.0f} | {fixed / mean:.1f} x |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each setting."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.certification", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny network, once")
    parser.add_argument("--only", default="", metavar="MODEL", help="networks whose name begins so")
    parser.add_argument("--repetitions", type=int, default=5, help="of each [5]")
    parser.add_argument("--early", type=Path, metavar="FOLDER", help="count the copies for this model")
    parser.add_argument("--sigma", type=float, default=SIGMA, help=f"of --early [{SIGMA}]")
    parser.add_argument("--every", type=int, default=20, help="test image, for --early [20]")
    parser.add_argument("--data-dir", type=Path, help="where datasets are [$FEDROBUST_DATA]")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.early:
        early(options.early, options.sigma, options.every, options.data_dir)
        return
    if not installed("adversarial-robustness-toolbox"):
        print(f"ART is left out: {NEEDS}")
    for setting in QUICK if options.quick else SETTINGS:
        if not setting.model.startswith(options.only):
            continue
        compare(setting, 1 if options.quick else options.repetitions)


if __name__ == "__main__":
    main()
