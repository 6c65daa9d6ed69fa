"""How the model moves by a round's aggregate: stochastic gradient descent, or with adaptive rates.

An optimiser is a few numbers; what it remembers from round to round lies beside the model in one array,
its state. Every coordinate moves by itself, so any range of columns can be stepped alone, and how many
processes share a model changes nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrobust.text import Textual, parse

__all__ = ["CATALOG", "SGD", "Adagrad", "Adam", "Optimiser", "Yogi", "parse_optimiser"]


@dataclass(frozen=True, repr=False)
class Optimiser(Textual, ABC):
    """What takes a model, by the aggregate of its clients' updates, to the next one.

    The aggregate is a step already (updates are the clients' models minus the server's), not a gradient:
    the model moves along it, not against it.
    """

    @property
    @abstractmethod
    def first(self) -> tuple[float, ...]:
        """What each vector of memory is filled with before the first step."""

    @property
    def kept(self) -> int:
        """How many vectors are remembered from round to round, beside the model: 0, 1 or 2."""
        return len(self.first)

    def begin(self, model: Tensor) -> Tensor:
        """(1 + kept, d): a copy of the model, (d,), and below it the memory before the first step."""
        return torch.stack([model, *(torch.full_like(model, value) for value in self.first)])

    @abstractmethod
    def step(self, state: Tensor, aggregate: Tensor) -> None:
        """Move the model and its memory, in place.

        Args:
            state: (1 + kept, d) float32, as `begin` makes it and steps leave it; or columns of it.
            aggregate: (d,) float32, or the same columns of it; it is left as it is, since it may be a
                client's own update.
        """


@dataclass(frozen=True, repr=False)
class SGD(Optimiser):
    """v <- momentum v + aggregate; model <- model + lr v. As it is, FedAvg: the aggregate is added.

    Source: Hsu, Qi, Brown 2019 (arXiv 1909.06335), FedAvgM. Deviation: a learning rate, 1 in the paper;
    it multiplies v, as in Reddi et al. 2021 (arXiv 2003.00295).

    Attributes:
        lr: how much of v is added, above 0.
        momentum: how much of v stays, in [0, 1); 0 keeps no v.
    """

    name = "sgd"

    lr: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.lr > 0, "lr must be above 0")
        self.require(0 <= self.momentum < 1, "momentum must be in [0, 1)")

    @property
    def first(self) -> tuple[float, ...]:
        """Of v, where it is kept."""
        return (0.0,) if self.momentum else ()

    def step(self, state: Tensor, aggregate: Tensor) -> None:
        """Along v, which is the aggregate itself where there is no momentum."""
        model, *memory = state
        for velocity in memory:  # one, or none
            aggregate = velocity.mul_(self.momentum).add_(aggregate)
        model.add_(aggregate, alpha=self.lr)


@dataclass(frozen=True, repr=False)
class Adaptive(Optimiser):
    """model <- model + lr m / (sqrt(v) + tau), v of the squares of aggregates, m of the aggregates.

    Where aggregates have been large, steps are small. Above tau, a coordinate moves by about lr a round
    however long the updates are: lr is in units of the model, not of the aggregate.

    Source: Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan 2021 (arXiv 2003.00295),
    algorithm 2 as published; there is no correction of a bias in it. It asks for a first v of at least
    tau^2, which is tau^2 here, and leaves the first m open, which is 0 here. Deviation: the aggregate is
    that of the run's rule, where the paper has the mean of the updates.

    Attributes:
        lr: above 0.
        tau: the larger, the less steps adapt; at least 1e-18, so that its square is a float32.
    """

    lr: float = 0.01
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.lr > 0, "lr must be above 0")
        self.require(self.tau >= 1e-18, "tau must be at least 1e-18")

    def move(self, model: Tensor, along: Tensor, squares: Tensor) -> None:
        """The step itself, by m and v as they are now."""
        model.addcdiv_(along, squares.sqrt().add_(self.tau), value=self.lr)


@dataclass(frozen=True, repr=False)
class Adagrad(Adaptive):
    """FedAdagrad: v <- v + aggregate^2, and m is the aggregate.

    Source: as `Adaptive`, with beta_1 = 0 as in the paper's experiments, so that no m is kept.
    """

    name = "adagrad"

    @property
    def first(self) -> tuple[float, ...]:
        """Of v."""
        return (self.tau**2,)

    def step(self, state: Tensor, aggregate: Tensor) -> None:
        """Along the aggregate."""
        model, squares = state
        squares.addcmul_(aggregate, aggregate)
        self.move(model, aggregate, squares)


@dataclass(frozen=True, repr=False)
class Moments(Adaptive):
    """Optimisers with m <- beta1 m + (1 - beta1) aggregate.

    Attributes:
        beta1: how much of m stays, in [0, 1).
        beta2: how much of v stays, in [0, 1).
    """

    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.beta1 < 1, "beta1 must be in [0, 1)")
        self.require(0 <= self.beta2 < 1, "beta2 must be in [0, 1)")

    @property
    def first(self) -> tuple[float, ...]:
        """Of m and v."""
        return 0.0, self.tau**2

    def step(self, state: Tensor, aggregate: Tensor) -> None:
        """Along m."""
        model, mean, squares = state
        mean.mul_(self.beta1).add_(aggregate, alpha=1 - self.beta1)
        self.follow(squares, aggregate)
        self.move(model, mean, squares)

    @abstractmethod
    def follow(self, squares: Tensor, aggregate: Tensor) -> None:
        """Bring v, (d,), up to the aggregate, in place."""


@dataclass(frozen=True, repr=False)
class Adam(Moments):
    """FedAdam: v <- beta2 v + (1 - beta2) aggregate^2. Source: as `Adaptive`."""

    name = "adam"

    def follow(self, squares: Tensor, aggregate: Tensor) -> None:
        """A running mean."""
        squares.mul_(self.beta2).addcmul_(aggregate, aggregate, value=1 - self.beta2)
        squares.nan_to_num_(nan=math.inf, posinf=math.inf)  # of an infinite v times a beta2 of 0


@dataclass(frozen=True, repr=False)
class Yogi(Moments):
    """FedYogi: v <- v - (1 - beta2) aggregate^2 sign(v - aggregate^2). Source: as `Adaptive`.

    Where aggregates become small v falls slowly, so steps do not become large all at once.
    """

    name = "yogi"

    def follow(self, squares: Tensor, aggregate: Tensor) -> None:
        """By the new square, whichever is larger."""
        new = aggregate.square()
        squares.addcmul_((squares - new).sign_(), new, value=self.beta2 - 1)
        # A second square beyond float32 makes NaN of an infinite v, and the model would follow. Left
        # infinite as in the other optimisers, the coordinate stays where it is.
        squares.nan_to_num_(nan=math.inf, posinf=math.inf)


CATALOG: dict[str, type[Optimiser]] = {cls.name: cls for cls in (SGD, Adagrad, Adam, Yogi)}


def parse_optimiser(text: str) -> Optimiser:
    """Read `sgd`, `sgd(momentum=0.9)`, `adagrad(0.1)`, `adam(lr=0.01, tau=1e-4)` or `yogi`.

    >>> parse_optimiser("adam(0.1)")
    adam(lr=0.1)

    Raises:
        InputError: the text names no optimiser of the `CATALOG`, or an argument is wrong.
    """
    return parse(text, CATALOG, "optimiser")
