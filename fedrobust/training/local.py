"""One client's honest work in a round, and how a model is judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.dropout import _DropoutNd

from fedrobust.data import Dataset
from fedrobust.data.splits import Indices
from fedrobust.errors import InputError
from fedrobust.imports import is_import_path
from fedrobust.seeding import seeded
from fedrobust.training.objectives import Step, parse_objective
from fedrobust.training.task import BATCHES, LAYERS, NOISE, ROOT, Task
from fedrobust.training.vectors import load_vector, manifest, split_vector, to_vector

Poison = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Turns local data (images, labels) into the data that a poisoning client trains on.

Frozen dataclasses with `__call__` make good ones: they can be compared, hashed and pickled.
"""


@dataclass(frozen=True)
class Leash:
    """What keeps a poisoning client near the broadcast model w_0 while it trains; see `Learner.update`.

    Attributes:
        alpha: the weight of the task's objective in the loss, above 0 and at most 1; the rest is the
            weight of |w - w_0|.
        radius: how far w may go from w_0, above 0.
    """

    alpha: float = 1.0
    radius: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise InputError(f"alpha must be above 0 and at most 1, got {self.alpha}")
        if not self.radius > 0:
            raise InputError(f"radius must be above 0, got {self.radius}")


FREE = Leash()
"""No leash: honest training."""


@dataclass(frozen=True, eq=False)
class Shared:
    """What the learners of one process have in common, so that it is built once for all of them.

    Attributes:
        module: the workbench; a learner overwrites its parameters whenever it works, so two
            learners must not work with it at the same time.
        parts: the indices of each client's training examples.
    """

    module: nn.Module
    parts: list[Indices]

    @classmethod
    def of(cls, task: Task, dataset: Dataset) -> Shared:
        """Build the task's model and partition.

        Raises:
            InputError: the task does not fit the dataset.
        """
        return cls(task.build_model(dataset), task.partition(dataset.train_y.cpu().numpy()))


class Learner:
    """One client's honest training: its examples and, with momentum, its last update.

    Attributes:
        task: what is trained.
        module: the workbench, with whatever parameters the last work left in it.
        x: images, the local ones among them.
        y: their labels.
        mine: (examples,) int64, which of them are local.
        objective: what its steps descend on.
        examples: how many those are.
    """

    def __init__(
        self,
        task: Task,
        dataset: Dataset,
        client: int,
        poison: Poison | None = None,
        *,
        shared: Shared | None = None,
    ) -> None:
        """Take the client's part of the data.

        Args:
            task: what is trained.
            dataset: all the data. Alone, a learner keeps its own part of it only; learners that share
                something share the whole as well, and copy nothing.
            client: which client this is, 0 .. task.clients - 1.
            poison: applied once, here, to the local images and labels.
            shared: built by `Shared.of(task, dataset)`; worth giving to many learners.

        Raises:
            InputError: there is no such client, or the poison leaves no example.
        """
        alone, shared = shared is None, shared or Shared.of(task, dataset)
        if not 0 <= client < len(shared.parts):
            raise InputError(f"there is no client {client}; the task has 0 .. {task.clients - 1}")
        self.x, self.y = dataset.train_x, dataset.train_y
        self.objective, self._scale = parse_objective(task.objective), dataset.normalisation
        self.mine = torch.from_numpy(shared.parts[client])
        if poison or alone:
            x, y = self.x[self.mine], self.y[self.mine]
            if poison:  # worked out on the processor: the same wherever the clients train
                x, y = (part.to(self.x.device) for part in poison(x.cpu(), y.cpu()))
            self.x, self.y = x, y
            self.mine = torch.arange(len(self.x))
        if not (len(self.mine) and len(self.x) == len(self.y)):
            raise InputError(
                f"the poison left client {client} with {len(self.x)} images and {len(self.y)} "
                "labels; they must be as many, and at least one"
            )
        self.task = task
        self._client = client
        self.module = shared.module
        self._sent: Tensor | None = None
        self.examples = len(self.mine)

    def to(self, device: torch.device) -> Learner:
        """The same learner, which keeps its examples and trains on a device from now on."""
        self.x, self.y, self.module = self.x.to(device), self.y.to(device), self.module.to(device)
        return self

    def update(
        self,
        round: int,  # noqa: A002 (the field's word for it)
        model: Tensor,
        leash: Leash = FREE,
        *,
        module: nn.Module | None = None,
    ) -> Tensor:
        """Train from the broadcast model and return what this client honestly sends.

        With w_0 the broadcast model, `steps` times: w_{k+1} = w_k - lr * gradient of the task's
        objective on a batch, plus decay w_k, plus proximal (w_k - w_0) (FedProx: Li, Sahu, Zaheer,
        Sanjabi, Talwalkar, Smith 2020, arXiv 1812.06127, equation 2). Batches walk through the examples
        in random order, shuffled anew when all have been seen. That order, and what objectives and
        layers such as dropout draw, depends on (task.seed, client, round) alone, so the result is the
        same wherever and whenever a processor works it out; a GPU draws and rounds otherwise. The update
        is delta = w_K - w_0.

        With momentum m the client sends u_t = m * u_{t-1} + (1 - m) * delta_t instead, and
        u_1 = delta_1: call once per round, in order. Source: Karimireddy, He, Jaggi, "Learning from
        History for Byzantine Robust Optimization", ICML 2021, worker momentum. Deviations: there
        delta is one stochastic gradient, here it may be several steps; a client that sits out a
        round keeps its old u.

        A client on a leash does not train honestly: it descends on

            alpha objective + (1 - alpha) |w - w_0|

        and after each step w is projected onto the ball |w - w_0| <= radius.

        Args:
            round: the number of the round, from 1.
            model: (d,) float32, the broadcast parameters; left as it is.
            leash: none for honest training.
            module: a copy of the learner's own to work with, so that several can work at a time.

        Returns:
            (d,) float32, on the device of `model`, whichever the learner works on: that of its images.

        Raises:
            InputError: the vector's length is not the model's.
        """
        module = module or self.module
        start = model.to(self.x.device)
        load_vector(module, start)
        module.train()
        parameters = list(module.parameters())
        origins = split_vector(start, manifest(module)).values()
        generator = torch.Generator(start.device).manual_seed(self._seed(NOISE, round))
        step = Step(module, self._scale, generator, round - 1)
        with self._draws(round):
            for rows in self.batches(round).to(start.device):
                loss = leash.alpha * self.objective(step, self.x[rows], self.y[rows])
                if leash.alpha < 1:  # its gradient at w = w_0 is 0, by torch's choice among subgradients
                    # In the vector's order, whatever the memory's: convolutions have channels last.
                    moved = torch.cat([parameter.reshape(-1) for parameter in parameters]) - start
                    loss = loss + (1 - leash.alpha) * torch.linalg.vector_norm(moved)
                gradients = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    for parameter, gradient, origin in zip(parameters, gradients, origins, strict=True):
                        pull(self.task, parameter, origin)
                        parameter.sub_(gradient, alpha=self.task.lr)
                if leash.radius < math.inf:
                    _project(module, start, leash.radius)
        return self.with_momentum(to_vector(module).sub_(start).to(model.device))

    def _draws(self, round: int) -> AbstractContextManager[None]:  # noqa: A002
        """What a module may draw from torch's global generator; our own models draw nothing."""
        parts = self.module.modules()
        if is_import_path(self.task.model) or any(isinstance(part, _DropoutNd) for part in parts):
            return seeded(self._seed(LAYERS, round), self.x.device)
        return nullcontext()

    def _seed(self, stream: int, round: int) -> int:  # noqa: A002
        """Of what this client draws from one of the task's streams in a round."""
        key = self.task.entropy(stream, self._client, round)
        return int(key.generate_state(1, np.uint64)[0])

    def batches(self, round: int) -> Tensor:  # noqa: A002
        """(steps, size) int64: which of the images each of a round's steps is on."""
        steps, batch = self.task.steps, self.task.batch
        if batch == 0 or batch >= self.examples:
            return self.mine.expand(steps, -1)
        generator = torch.Generator().manual_seed(self._seed(BATCHES, round))
        passes = -(-steps * batch // self.examples)
        order = [torch.randperm(self.examples, generator=generator) for _ in range(passes)]
        return self.mine.index_select(0, torch.cat(order)[: steps * batch]).view(steps, batch)

    def with_momentum(self, delta: Tensor) -> Tensor:
        """What is sent after this round's training, (d,), in the place of how far that got."""
        if self.task.momentum == 0:
            return delta
        if self._sent is None:
            self._sent = delta.clone()
        else:
            self._sent.copy_(delta.lerp_(self._sent, self.task.momentum))
        return delta


def own_learner(task: Task, dataset: Dataset, client: int) -> Learner:
    """One client's honest training on data that it alone has: all of it, whatever the task's split.

    Args:
        task: what is trained; its dataset is not looked at.
        dataset: the client's own, with images of the same shape and as many classes.
        client: which client this is, 0 .. task.clients - 1; what it draws depends on it.

    Raises:
        InputError: there is no such client, or the task does not fit the dataset.
    """
    everything = np.arange(len(dataset.train_y))
    shared = Shared(task.build_model(dataset), [everything] * task.clients)
    return Learner(task, dataset, client, shared=shared)


def root_learner(task: Task, dataset: Dataset, examples: int) -> Learner:
    """The server's own training, whose update is the row "root" of rules that look at one.

    It trains as one more client would, on examples drawn from all the clients' (Cao, Fang, Liu, Gong
    2021, arXiv 2012.13995, section 7.1); without momentum, so that its update depends on the round and
    the model alone.

    Args:
        task: what is trained.
        dataset: all the data.
        examples: how many of them the server has.

    Raises:
        InputError: there are not so many, or the task does not fit the dataset.
    """
    total = len(dataset.train_y)
    if not 1 <= examples <= total:
        raise InputError(f"root must be 1 .. {total}, the number of training examples, got {examples}")
    drawn = np.random.default_rng(task.entropy(ROOT)).choice(total, examples, replace=False)
    nothing = np.empty(0, dtype=np.int64)
    shared = Shared(task.build_model(dataset), [*[nothing] * task.clients, np.sort(drawn)])
    return Learner(replace(task, momentum=0.0), dataset, task.clients, shared=shared)


def _project(module: nn.Module, model: Tensor, radius: float) -> None:
    """Pull a module's parameters back into the ball around the model."""
    delta = to_vector(module).sub_(model)
    length = float(torch.linalg.vector_norm(delta))
    if length > radius:
        load_vector(module, model + (radius / length) * delta)


def pull(task: Task, parameter: Tensor, origin: Tensor) -> None:
    """What a local step does beside following the gradient, in place: to zero, and to the origin."""
    if task.decay or task.proximal:
        parameter.mul_(1 - task.lr * (task.decay + task.proximal))
    if task.proximal:
        parameter.add_(origin, alpha=task.lr * task.proximal)


@dataclass(frozen=True)
class Evaluation:
    """How good a model is.

    Attributes:
        accuracy: the fraction of examples classified correctly, 0 .. 1.
        loss: the mean cross-entropy, in nats.
    """

    accuracy: float
    loss: float


def evaluate(module: nn.Module, x: Tensor, y: Tensor, batch: int = 256) -> Evaluation:
    """Judge a model, in evaluation mode, `batch` examples at a time.

    Args:
        module: maps images to logits; its mode is restored.
        x: (n, channels, height, width) float32.
        y: (n,) int64.
        batch: bounds the memory needed, not the result. On a CPU 128 to 256 images are fastest: 1024
            leave its cache, and cnn(16) and resnet(20) take half as long again.

    Raises:
        InputError: there are no examples, not one label per image, or labels that the model has no
            logit for.
    """
    if not 0 < len(x) == len(y):
        raise InputError(
            f"cannot evaluate on {len(x)} images and {len(y)} labels; "
            "they must be as many, and at least one"
        )
    correct, loss = 0, 0.0
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(x), batch):
                images, labels = x[start : start + batch], y[start : start + batch]
                logits = module(images)
                _check_labels(labels, logits.shape[1])
                correct += int((logits.argmax(dim=1) == labels).sum())
                loss += float(cross_entropy(logits, labels, reduction="sum"))
    finally:
        module.train(training)
    return Evaluation(accuracy=correct / len(x), loss=loss / len(x))


def _check_labels(labels: Tensor, classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"the label {low if low < 0 else high} is none of the model's, which are 0 .. {classes - 1}"
        )
