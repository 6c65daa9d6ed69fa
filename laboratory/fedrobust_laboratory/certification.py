"""Certifies a trained model, or attacks it, image by image on Ray, into a log that can be gone on."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from fedrobust_server import lifeline
from fedrobust_server.config import read_config
from fedrobust_server.launch import start_ray
from ray.util import ActorPool
from torch import Tensor, nn

from fedrobust import InputError
from fedrobust.data import Dataset, load
from fedrobust.devices import accelerator
from fedrobust.smoothing import (
    Entry,
    Log,
    RoundedGaussian,
    SmoothedClassifier,
    parse_adversary,
    read_log,
)
from fedrobust.smoothing.logs import begun
from fedrobust.text import Textual, choose, parse
from fedrobust.training import load_vector, to_vector
from fedrobust_laboratory.central import Trained, claim, fingerprint

_COPIES = 20_000
"""So many noisy copies make a piece of work that is worth sending to another process."""


@dataclass(frozen=True, repr=False)
class Plan(Textual):
    """What is asked about every image.

    Attributes:
        sigma: the noise's standard deviation, above 0, in pixels.
        n0: noisy copies that choose the class of an image.
        n: noisy copies that bound the class's probability; with an attack, that predict.
        alpha: how often an answer may be wrong, in (0, 1).
        every: only each so-manieth test image, at least 1.
        radius: certify this radius only, with as few copies as that takes; -1: the largest one.
        noise: "gaussian", or "rounded" to whole levels of 8 bits, which floating-point rounding cannot
            be used against.
        precision: "float32", or "bfloat16": then that network is the one that is certified.
        attack: in the place of certifying, attack as this says, "pgd(0.5, steps=20)" or "ddn(0.5)", and
            predict; all entries have its eps for a radius.
        m: samples of noise that the attack looks at.
        naive: whether the attack is on the model under noise, rather than on the smoothed classifier.
        seed: of the noise, 0 or above.
        batch: noisy copies in one pass, rounded up to a multiple of 50; 0: as many as are fastest, which
            each process finds by trial. Where a kernel's rounding depends on it, so may answers.
    """

    name = "plan"

    sigma: float = 0.25
    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    every: int = 1
    radius: float = -1.0
    noise: str = "gaussian"
    precision: str = "float32"
    attack: str = ""
    m: int = 16
    naive: bool = False
    seed: int = 0
    batch: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.sigma > 0, f"sigma must be above 0, got {self.sigma}")
        for name in ("n0", "n", "every", "m"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1")
        self.require(0 < self.alpha < 1, f"alpha must be in (0, 1), got {self.alpha}")
        asked = self.radius >= 0 and float(f"{self.radius:.3g}") == self.radius
        said = f"radius must be at least 0, of 3 digits as in a log, or -1, got {self.radius}"
        self.require(asked or self.radius == -1, said)
        for name in ("seed", "batch"):
            self.require(getattr(self, name) >= 0, f"{name} must be at least 0")
        choose(self.noise, ("gaussian", "rounded"), "noise")
        choose(self.precision, ("float32", "bfloat16"), "precision")
        if self.attack:
            parse_adversary(self.attack)
        self.require(
            not self.attack or self.radius == -1,
            "an attack's radius is its eps: leave out radius, or the attack",
        )
        self.require(
            bool(self.attack) or (not self.naive and self.m == type(self).m),
            "naive and m are of an attack: give one, or leave them out",
        )

    def classifier(self, model: nn.Module, classes: int) -> SmoothedClassifier:
        """The smoothed classifier that is asked."""
        noise = RoundedGaussian(self.sigma) if self.noise == "rounded" else self.sigma
        dtype = torch.bfloat16 if self.precision == "bfloat16" else None
        return SmoothedClassifier(model, noise, classes, dtype=dtype, batch=self.batch or None)

    def ask(
        self, classifier: SmoothedClassifier, dataset: Dataset, numbers: Sequence[int]
    ) -> list[Entry]:
        """What is found about some of the test images.

        Args:
            classifier: of pixels.
            dataset: whose test images they are.
            numbers: of them.
        """
        began, which = time.perf_counter(), list(numbers)
        x, y = dataset.normalisation.pixels(dataset.test_x[which]), dataset.test_y[which]
        if self.noise == "rounded":
            x = (x * 255).round() / 255
        if self.attack:
            label, radius = self._attacked(classifier, dataset, x, y, which)
        elif self.radius >= 0:
            found = classifier.certify_at(
                x, self.radius, self.n0, self.n, self.alpha, seed=self.seed, ids=which
            )
            label, radius = found.label, found.radius
        else:
            found = classifier.certify(x, self.n0, self.n, self.alpha, seed=self.seed, ids=which)
            label, radius = found.label, found.radius
        each = (time.perf_counter() - began) / len(which)
        rows = zip(which, y.tolist(), label.tolist(), radius.tolist(), strict=True)
        return [Entry(*row, each) for row in rows]

    def _attacked(
        self, classifier: SmoothedClassifier, dataset: Dataset, x: Tensor, y: Tensor, which: list[int]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        adversary, limits = parse_adversary(self.attack), dataset.normalisation.limits
        found = classifier.attacked(
            x, y, adversary, self.m, naive=self.naive, limits=limits, seed=self.seed, ids=which
        )
        if self.noise == "rounded":  # towards the image, so that none goes further than eps
            x = x.to(found.device)
            found = x + ((found - x) * 255).trunc() / 255
        label = classifier.predict(found, self.n, self.alpha, seed=self.seed, ids=which)
        return label, np.full(len(label), adversary.eps)


def parse_plan(text: str) -> Plan:
    """Read `plan(sigma=0.5, n=10000, every=20)`.

    Raises:
        InputError: the text is no plan, or an argument is wrong.
    """
    return parse(text, {"plan": Plan}, "plan")


@dataclass(frozen=True)
class Asked:
    """A model and a plan; every process finds the rest by itself.

    Attributes:
        trained: the model.
        plan: what is asked of it.
        data_dir: where datasets are; None reads FEDROBUST_DATA.
    """

    trained: Trained
    plan: Plan
    data_dir: Path | None

    @cached_property
    def dataset(self) -> Dataset:
        """That the model was trained on."""
        return load(self.trained.source.dataset, self.data_dir)

    @property
    def numbers(self) -> range:
        """Of the test images that are asked about."""
        return range(0, len(self.dataset.test_y), self.plan.every)

    @cached_property
    def vector(self) -> Tensor:
        """(d,) the model's parameters."""
        return to_vector(self.trained.module(self.dataset))

    @cached_property
    def classifier(self) -> SmoothedClassifier:
        """The smoothed classifier, of pixels."""
        module = self.trained.source.build_model(self.dataset)
        load_vector(module, self.vector)
        module = self.dataset.normalisation.of_pixels(module)
        module.to(accelerator())
        return self.plan.classifier(module, self.dataset.classes)


def certify(
    asked: Asked,
    log: Path,
    ray_address: str | None = None,
    watch: Callable[[int], None] = lambda _number: None,
) -> None:
    """Ask about the test images, as many at a time as Ray has processors, and write down every answer.

    The answers are the same whatever the number of processes; a log that was cut short is gone on with.

    Args:
        asked: what is asked of which model.
        log: the file, in the columns of Cohen et al. 2019; beside it, under its name and `.toml`, is
            written what it is a log of.
        ray_address: a Ray cluster to join; None starts one on this machine.
        watch: is told the number of every image in the log, those of an earlier time first.

    Raises:
        InputError: the data or the model is not there, or the log is of something else.
        ConnectionError: Ray does not start, or a process of it is lost.
    """
    dataset, which = asked.dataset, list(asked.numbers)
    about = {
        **dataclasses.asdict(asked.plan),
        "model": fingerprint(asked.vector),
        "network": asked.trained.source.model,
        "dataset": asked.trained.source.dataset,
        "images": fingerprint(dataset.test_x[which], dataset.test_y[which]),
    }
    beside = _beside(log)
    if log.exists() and not beside.exists():
        raise InputError(f"{log} is no log of ours to go on with; choose another file with --to")
    claim(beside, about, f"{log} is a log of another model or plan, or of other images", "both")
    known = begun(log)
    for number in asked.numbers:
        if number in known:
            watch(number)
    left = [number for number in asked.numbers if number not in known]
    if not left:
        return
    with log.open("a", encoding="utf-8") as file, start_ray(ray_address):
        for entries in _answers(asked, left):
            file.writelines(f"{entry.line()}\n" for entry in entries)
            file.flush()
            for entry in entries:
                watch(entry.idx)


def read_certified(log: Path) -> Log:
    """Read a log of certificates, of ours or of others.

    Raises:
        InputError: it is of an attack, or as `read_log`.
    """
    if attack := _attack(log):
        raise InputError(
            f"{log} is a log of the attack {attack}, which certifies nothing: give it to --attacked"
        )
    return read_log(log)


def read_attacked(log: Path) -> Log:
    """Read a log of an attack in l2, the norm of radii.

    Raises:
        InputError: it is of certificates, or of an attack in another norm, or as `read_log`.
    """
    attack = _attack(log)
    if attack == "":
        raise InputError(f"{log} is a log of certificates: give it to --plot, and here one of an attack")
    if attack is not None and getattr(parse_adversary(attack), "norm", "l2") != "l2":
        raise InputError(f"{log} is a log of {attack}, whose eps is no l2 radius: leave it out")
    return read_log(log)


def require_alike(certified: Path, attacked: Path) -> None:
    """Make sure that two logs are of the same smoothed classifier, where both say what they are of.

    Raises:
        InputError: they are not.
    """
    ours, theirs = _about(certified), _about(attacked)
    if ours is None or theirs is None:
        return
    for key in ("model", "dataset", "sigma", "precision"):
        one, other = ours.get(key), theirs.get(key)
        if one != other:
            raise InputError(
                f"{attacked} is no log of an attack on what {certified} certifies: its {key} is "
                f"{other}, not {one}; leave it out, or give --plot the log of the same model"
            )


def _attack(log: Path) -> str | None:
    """That a log is of: empty for certificates, None where nothing beside it says, as with others'."""
    about = _about(log)
    return None if about is None else str(about.get("attack", ""))


def _about(log: Path) -> dict[str, Any] | None:
    """What is written beside a log; None where nothing is."""
    beside = _beside(log)
    return read_config(beside) if beside.exists() else None


def _beside(log: Path) -> Path:
    """Where it is written what a log is of."""
    return log.with_name(f"{log.name}.toml")


class _Asker:
    """A process that answers."""

    def __init__(self, asked: Asked) -> None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        self._asked = asked

    def ask(self, numbers: Sequence[int]) -> list[Entry]:
        return self._asked.plan.ask(self._asked.classifier, self._asked.dataset, numbers)


def _answers(asked: Asked, numbers: Sequence[int]) -> Iterator[list[Entry]]:
    """In the numbers' order."""
    data_dir = None if asked.data_dir is None else asked.data_dir.resolve()
    sent = dataclasses.replace(asked, data_dir=data_dir)
    sent.__dict__["vector"] = asked.vector  # read once, here: other machines may not have the file
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(resources.get("GPU", 0))
    remote: Any = ray.remote(num_cpus=0 if gpus else 1, num_gpus=1 if gpus else 0)
    asker = remote(_Asker)
    size = max(1, _COPIES // (asked.plan.n0 + asked.plan.n))
    parts = [list(part) for part in _batched(numbers, size)]
    count = min(gpus or int(resources.get("CPU", 1)), len(parts))
    pool = ActorPool([asker.remote(sent) for _ in range(count)])
    for part in parts:
        pool.submit(lambda actor, part: actor.ask.remote(part), part)
    left = len(parts)
    while left:
        try:
            with lifeline.told("a piece of work"):
                entries = pool.get_next(timeout=lifeline.PAUSE)
        except TimeoutError:
            lifeline.check()
        else:
            left -= 1
            yield entries


def _batched(numbers: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    left = iter(numbers)
    while part := tuple(itertools.islice(left, size)):
        yield part
