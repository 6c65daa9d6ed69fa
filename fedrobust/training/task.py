"""What a federation trains: the one description that server and clients share."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import numpy as np
from torch import nn

from fedrobust.data import Dataset, datasets, parse_split
from fedrobust.data.splits import Indices, Labels
from fedrobust.errors import InputError
from fedrobust.imports import is_import_path
from fedrobust.text import Textual, choose
from fedrobust.training.models import parse_model
from fedrobust.training.objectives import parse_objective

# Independent random streams of one seed, told apart by the first word of the spawn key; LAYERS is what a
# module draws while it trains, as dropout does, NOISE what an objective draws, ROOT which examples are
# the server's own, SERVER what its rule and schedule draw.
PARTITION, BATCHES, LAYERS, NOISE, ROOT, SERVER = 0, 1, 4, 5, 6, 7


def client_name(index: int) -> str:
    """What the index-th client of a task is called; up to 9999 names sort as the indices do."""
    return f"client-{index:04d}"


@dataclass(frozen=True, repr=False)
class Task(Textual):
    """What is trained, on what, by how many, and how each client trains.

    Attributes:
        dataset: a name that `fedrobust data` lists, or an import path "package.module:attribute".
        split: how the examples are spread over the clients, as text.
        model: what is trained, as text, or an import path "package.module:attribute".
        clients: how many clients share the data, at least 1.
        seed: of the split, the initial model and the batches; 0 .. 2**32 - 1.
        steps: local SGD steps per round, at least 1; 1 makes an update one gradient step.
        batch: examples per step; 0 means all that the client has.
        lr: the local learning rate, above 0.
        momentum: how much of the last update goes into the next one, in [0, 1).
        proximal: FedProx's mu, at least 0: how strongly steps are pulled back to the round's model.
        decay: weight decay lambda, at least 0: how strongly steps pull the parameters to zero.
        objective: what local steps descend on, as text: "cross_entropy", "gaussian(0.5)",
            "adversarial", "trades", "smoothadv(0.5, m=2)" or "consistency(0.5)".
        outsiders: the first so many clients hold a random sample each of all examples, while the others
            divide all examples among themselves, as in published experiments whose malicious clients
            take no data away; 0 .. clients - 1.
    """

    name = "task"

    dataset: str = "digits"
    split: str = "iid"
    model: str = "mlp"
    clients: int = 10
    seed: int = 0
    steps: int = 5
    batch: int = 32
    lr: float = 0.1
    momentum: float = 0.0
    proximal: float = 0.0
    decay: float = 0.0
    objective: str = "cross_entropy"
    outsiders: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        datasets.check_name(self.dataset)
        parse_split(self.split)
        parse_model(self.model)
        parse_objective(self.objective)
        self.require(self.clients >= 1, "clients must be at least 1")
        self.require(0 <= self.seed < 2**32, "seed must be in 0 .. 2**32 - 1")
        self.require(self.steps >= 1, "steps must be at least 1")
        self.require(self.batch >= 0, "batch must be at least 1, or 0 for all local examples")
        self.require(self.lr > 0, "lr must be above 0")
        self.require(0 <= self.momentum < 1, "momentum must be in [0, 1)")
        self.require(self.proximal >= 0, "proximal must not be negative")
        self.require(self.decay >= 0, "decay must not be negative")
        self.require(0 <= self.outsiders < self.clients, f"outsiders must be in 0 .. {self.clients - 1}")

    def to_json(self) -> str:
        """A JSON object of all fields, that `from_json` reads back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, *, imports: bool = False) -> Task:
        """Read a JSON object; fields that it leaves out have their defaults. Imports nothing.

        Args:
            text: of anybody's, such as a server at the other end of a connection.
            imports: whether a model or dataset may be an import path, whose code runs once it is built
                or loaded.

        Raises:
            InputError: the text is no JSON object, has an unknown key, a value is wrong, or is an import
                path that may not be.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the task is not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise InputError(f"the task must be a JSON object, got {type(fields).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            choose(key, known, "task field")
        task = cls(**fields)
        if not imports and (paths := [p for p in (task.model, task.dataset) if is_import_path(p)]):
            raise InputError(
                f"the task names {paths[0]!r}, whose code would be imported and run here; allow that "
                "(--allow-imports) only where you trust whoever runs the server"
            )
        return task

    def partition(self, labels: Labels) -> list[Indices]:
        """The indices of each client's examples: the same on every machine.

        Args:
            labels: (n,) int64, the classes of the training examples.

        Raises:
            InputError: there are more clients than examples.
        """
        rng = np.random.default_rng(self.entropy(PARTITION))
        parts = parse_split(self.split)(labels, self.clients - self.outsiders, rng)
        size = len(labels) // self.clients
        self.require(size > 0, f"{len(labels)} examples are too few for {self.clients} clients")
        samples = [rng.choice(len(labels), size, replace=False) for _ in range(self.outsiders)]
        return [*map(np.sort, samples), *parts]

    def build_model(self, dataset: Dataset) -> nn.Module:
        """The model that the federation starts from: the same on every machine; on the dataset's device.

        Raises:
            InputError: the images are too small for the model, or what its path names is no model.
        """
        module = parse_model(self.model)(dataset.shape, dataset.classes, self.seed)
        return module.to(dataset.train_x.device)

    def draws(self, number: int) -> int:
        """The seed of what the server draws in a round, which clients that know the task know, too."""
        return int(self.entropy(SERVER, number).generate_state(1, np.uint64)[0])

    def entropy(self, *key: int) -> np.random.SeedSequence:
        """The seed of one of this task's random streams; different keys, independent streams."""
        return np.random.SeedSequence(self.seed, spawn_key=key)
