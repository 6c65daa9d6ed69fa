"""Training on all the data in one place: what a federation is compared with, or starts from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from fedrobust.data import Dataset, datasets
from fedrobust.seeding import seeded
from fedrobust.text import Textual, choose
from fedrobust.training.models import parse_model
from fedrobust.training.objectives import Step, parse_objective
from fedrobust.training.vectors import load_vector, to_vector

_ORDER, _NOISE, _LAYERS, _LABELS = 0, 1, 2, 3  # independent random streams of an epoch


@dataclass(frozen=True, repr=False)
class Course(Textual):
    """Central training, by SGD with Nesterov's momentum at a rate that falls along half a cosine to 0.

    Attributes:
        dataset: a name that `fedrobust data` lists, or an import path "package.module:attribute".
        model: what is trained, as text, or an import path "package.module:attribute".
        objective: what is minimised, as text: "cross_entropy", "gaussian(0.5)", "adversarial",
            "trades", "smoothadv(0.5, m=2)" or "consistency(0.5)".
        labelled: the part of the training images whose labels are used, in (0, 1].
        epochs: how often every example is seen, at least 1.
        batch: examples per step, at least 1.
        lr: the rate of the first step, above 0.
        momentum: in [0, 1).
        decay: weight decay, at least 0.
        precision: "float32", or "bfloat16": layers compute in it, parameters stay float32; twice as fast
            where a processor has instructions for it.
        seed: of the initial model, the batches, the noise, and which labels are used; 0 .. 2**32 - 1.
    """

    name = "course"

    dataset: str = "digits"
    model: str = "mlp"
    objective: str = "cross_entropy"
    labelled: float = 1.0
    epochs: int = 10
    batch: int = 128
    lr: float = 0.05
    momentum: float = 0.9
    decay: float = 1e-4
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        datasets.check_name(self.dataset)
        parse_model(self.model)
        parse_objective(self.objective)
        self.require(0 < self.labelled <= 1, "labelled must be in (0, 1]")
        self.require(self.epochs >= 1, "epochs must be at least 1")
        self.require(self.batch >= 1, "batch must be at least 1")
        self.require(self.lr > 0, "lr must be above 0")
        self.require(0 <= self.momentum < 1, "momentum must be in [0, 1)")
        self.require(self.decay >= 0, "decay must not be negative")
        choose(self.precision, ("float32", "bfloat16"), "precision")
        self.require(0 <= self.seed < 2**32, "seed must be in 0 .. 2**32 - 1")

    def build_model(self, dataset: Dataset) -> nn.Module:
        """The model that training starts from.

        Raises:
            InputError: the images are too small for the model, or what its path names is no model.
        """
        return parse_model(self.model)(dataset.shape, dataset.classes, self.seed)


@dataclass(frozen=True, eq=False)
class Progress:
    """How far training has come: all that going on needs.

    Attributes:
        epochs: that are done.
        model: (d,) float32, the parameters.
        velocity: (d,) float32, the optimiser's momentum.
        loss: the mean of the objective over the last epoch; NaN before the first.
    """

    epochs: int
    model: Tensor
    velocity: Tensor
    loss: float = math.nan

    @classmethod
    def from_model(cls, module: nn.Module) -> Progress:
        """The beginning."""
        model = to_vector(module)
        return cls(0, model, torch.zeros_like(model))


def labelled(course: Course, dataset: Dataset, teacher: nn.Module | None = None) -> Dataset:
    """The training images whose labels a course uses, and the others with a teacher's labels.

    Self-training, as in Carmon, Raghunathan, Schmidt, Liang, Duchi, "Unlabeled Data Improves Adversarial
    Robustness", NeurIPS 2019 (arXiv 1905.13736), algorithm 1, and Salman et al. 2019 (arXiv 1906.04584).
    Courses with the same seed and part use the same labels.

    Args:
        course: says which part that is, at least one image.
        dataset: that it names.
        teacher: maps normalised images to scores; its first answer is the label. None leaves images
            without a label out.
    """
    count = len(dataset.train_y)
    known = max(1, round(course.labelled * count))
    if known == count:
        return dataset
    order = torch.randperm(count, generator=_generator(course, 0, _LABELS))
    if teacher is None:
        rows = order[:known].sort().values
        return replace(dataset, train_x=dataset.train_x[rows], train_y=dataset.train_y[rows])
    y = dataset.train_y.clone()
    teacher.eval()
    with torch.no_grad():
        for rows in torch.split(order[known:], 256):
            y[rows] = teacher(dataset.train_x[rows]).argmax(dim=1)
    return replace(dataset, train_y=y)


def train(course: Course, dataset: Dataset, module: nn.Module, begun: Progress) -> Iterator[Progress]:
    """Train, epoch by epoch; gone on with after any of them, the result is the same.

    Args:
        course: how.
        dataset: that it names.
        module: the workbench, on the device to train on; what is yielded last, it holds.
        begun: where to go on.

    Yields:
        What every epoch leads to.

    Raises:
        InputError: the parameters are not this module's.
    """
    device = next(module.parameters()).device
    load_vector(module, begun.model)
    parameters, velocity = list(module.parameters()), begun.velocity.to(device).clone()
    objective = parse_objective(course.objective)
    per_epoch = -(-len(dataset.train_y) // course.batch)
    module.train()
    for epoch in range(begun.epochs, course.epochs):
        order = torch.randperm(len(dataset.train_y), generator=_generator(course, epoch, _ORDER))
        step = Step(module, dataset.normalisation, _generator(course, epoch, _NOISE, device), epoch)
        total = torch.zeros((), device=device)
        with seeded(_seed(course, epoch, _LAYERS), device):
            for number, rows in enumerate(torch.split(order, course.batch)):
                x, y = dataset.train_x[rows].to(device), dataset.train_y[rows].to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=course.precision == "bfloat16"):
                    loss = objective(step, x, y)
                gradients = torch.autograd.grad(loss, parameters)
                done = (epoch * per_epoch + number) / (course.epochs * per_epoch)
                _descend(course, done, parameters, gradients, velocity)
                total += loss.detach() * len(rows)
        yield Progress(epoch + 1, to_vector(module), velocity.clone(), float(total) / len(order))


@torch.no_grad()
def _descend(
    course: Course,
    done: float,
    parameters: list[nn.Parameter],
    gradients: tuple[Tensor, ...],
    velocity: Tensor,
) -> None:
    """One step, when such a part of the course is done; `velocity` (d,) is kept up to date."""
    rate, at = course.lr * (1 + math.cos(math.pi * done)) / 2, 0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        slope = gradient.add(parameter, alpha=course.decay)
        memory = velocity[at : at + parameter.numel()].view(parameter.shape)
        memory.mul_(course.momentum).add_(slope)
        parameter.sub_(slope.add_(memory, alpha=course.momentum), alpha=rate)
        at += parameter.numel()


def _generator(
    course: Course, epoch: int, stream: int, device: torch.device | None = None
) -> torch.Generator:
    return torch.Generator(device or "cpu").manual_seed(_seed(course, epoch, stream))


def _seed(course: Course, epoch: int, stream: int) -> int:
    key = np.random.SeedSequence(course.seed, spawn_key=(epoch, stream))
    return int(key.generate_state(1, np.uint64)[0])
