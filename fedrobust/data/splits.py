"""How the examples of a dataset are spread over the clients of a federation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedrobust.errors import InputError
from fedrobust.text import Textual, parse

Labels = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, repr=False)
class Split(Textual, ABC):
    """A way to give every example to exactly one client, and every client at least one."""

    def __call__(self, labels: Labels, clients: int, rng: np.random.Generator) -> list[Indices]:
        """Split the examples 0 .. n - 1 over the clients.

        Args:
            labels: (n,), the class of each example.
            clients: how many clients there are, at least 1 and at most n.
            rng: where the randomness comes from.

        Returns:
            One array per client: the sorted indices of its examples. They are disjoint, cover all
            examples, and none is empty.

        Raises:
            InputError: there are no clients, or more clients than examples.
        """
        if not 1 <= clients <= len(labels):
            raise InputError(
                f"cannot split {len(labels)} examples over {clients} clients; "
                f"use 1 to {len(labels)} clients"
            )
        return [np.sort(part) for part in self.assign(np.asarray(labels), clients, rng)]

    @abstractmethod
    def assign(self, labels: Labels, clients: int, rng: np.random.Generator) -> list[Indices]:
        """As `__call__`, with arguments known to be good and parts in any order."""


@dataclass(frozen=True, repr=False)
class IID(Split):
    """Every client gets a random sample of all examples; sizes differ by at most one."""

    name = "iid"

    def assign(self, labels: Labels, clients: int, rng: np.random.Generator) -> list[Indices]:
        """Deal a shuffled deck."""
        return np.array_split(rng.permutation(len(labels)), clients)


@dataclass(frozen=True, repr=False)
class Dirichlet(Split):
    """Each class is shared by the clients in proportions drawn from Dirichlet(alpha, ..., alpha).

    The smaller `alpha`, the more one-sided the clients: at 0.1 most hold one or two classes, at 100
    all hold nearly the same mixture. Sizes vary as well. A client that would be left without an
    example is given one of the client that has most at that moment, so that any `alpha` works
    without redrawing.

    Source: Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML
    2019, section 4. It is what most authors use for the non-identical data of Hsu, Qi, Brown,
    "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
    2019, who draw a mixture of classes per client instead, for clients of equal size.

    Attributes:
        alpha: the concentration, above 0 and at most 1e6.
    """

    name = "dirichlet"

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.alpha <= 1e6, "alpha must be above 0 and at most 1e6")

    def assign(self, labels: Labels, clients: int, rng: np.random.Generator) -> list[Indices]:
        """Cut each shuffled class at the drawn proportions."""
        shares: list[list[Indices]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            proportions = rng.dirichlet(np.full(clients, self.alpha))
            cuts = (np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
            for share, piece in zip(shares, np.split(members, cuts), strict=True):
                share.append(piece)
        parts = [np.concatenate(share) for share in shares]
        _fill_empty(parts)
        return parts


@dataclass(frozen=True, repr=False)
class Similarity(Split):
    """A part of every client's examples is drawn from all of them, the others are its own classes'.

    The part `gamma` of all examples is dealt as by `iid`; what is left is sorted by label and cut into
    one equal stretch a client. So 1 is iid, and at 0 a client holds one class or two.

    Source: Karimireddy et al. 2020, "SCAFFOLD" (arXiv 1910.06378), section 7, where it is "s% similar";
    the "gamma similarity" of Allouah et al. 2023 (arXiv 2302.01772).

    Attributes:
        gamma: in [0, 1].
    """

    name = "similarity"

    gamma: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.gamma <= 1, "gamma must be in [0, 1]")

    def assign(self, labels: Labels, clients: int, rng: np.random.Generator) -> list[Indices]:
        """Deal some, sort the others; who gets which stretch is drawn."""
        deck = rng.permutation(len(labels))
        dealt, own = np.split(deck, [round(self.gamma * len(deck))])
        stretches = np.array_split(own[np.argsort(labels[own], kind="stable")], clients)
        # Unequal hands go to unequal stretches the other way round, so that sizes differ by one at most.
        hands = sorted(np.array_split(dealt, clients), key=len)
        stretches.sort(key=len, reverse=True)
        owners = rng.permutation(clients)
        parts = [np.concatenate(pair) for pair in zip(hands, stretches, strict=True)]
        return [parts[owner] for owner in owners]


@dataclass(frozen=True, repr=False)
class Shards(Split):
    """Sorted by label and cut into equal shards, of which every client draws some.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
    Data" (arXiv 1602.05629), section 3, with two shards a client: most clients hold two classes.

    Attributes:
        each: how many shards a client draws, at least 1; fewer where there are too few examples.
    """

    name = "shards"

    each: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.each >= 1, "each must be at least 1")

    def assign(self, labels: Labels, clients: int, rng: np.random.Generator) -> list[Indices]:
        """Deal the shards."""
        each = min(self.each, len(labels) // clients)
        deck = rng.permutation(len(labels))
        cut = np.array_split(deck[np.argsort(labels[deck], kind="stable")], clients * each)
        drawn = rng.permutation(len(cut)).reshape(clients, each)
        return [np.concatenate([cut[shard] for shard in hand]) for hand in drawn]


@dataclass(frozen=True, repr=False)
class Quantity(Split):
    """Clients of the same mixture and of sizes drawn from Dirichlet(alpha, ..., alpha).

    Source: Li, Diao, Chen, He 2022, "Federated Learning on Non-IID Data Silos: An Experimental Study"
    (arXiv 2102.02079), "quantity skew". A client that would be left without an example is given one
    of the largest.

    Attributes:
        alpha: the concentration, above 0 and at most 1e6: at 0.5 a few clients hold most examples.
    """

    name = "quantity"

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.alpha <= 1e6, "alpha must be above 0 and at most 1e6")

    def assign(self, labels: Labels, clients: int, rng: np.random.Generator) -> list[Indices]:
        """Cut a shuffled deck at the drawn proportions."""
        proportions = rng.dirichlet(np.full(clients, self.alpha))
        cuts = (np.cumsum(proportions)[:-1] * len(labels)).astype(np.int64)
        parts = np.split(rng.permutation(len(labels)), cuts)
        _fill_empty(parts)
        return parts


@dataclass(frozen=True, repr=False)
class Rare(Split):
    """The examples of one class belong to the last few clients alone; all others are dealt evenly.

    Where robust rules fail: the holders are honest, and differ from all others as malicious ones would.
    A holder that would be left without an example is given one of another holder's.

    Attributes:
        holders: how many clients hold the class, at least 1.
        label: the class.
    """

    name = "rare"

    holders: int = 2
    label: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.holders >= 1, "holders must be at least 1")
        self.require(self.label >= 0, "label must be at least 0")

    def assign(self, labels: Labels, clients: int, rng: np.random.Generator) -> list[Indices]:
        """Deal the class to the last ones, and all others to everybody."""
        self.require(self.holders <= clients, f"there are {clients} clients and {self.holders} holders")
        deck = rng.permutation(len(labels))
        rare = labels[deck] == self.label
        self.require(
            bool(rare.any()), f"no example has the label {self.label}; choose one that some have"
        )
        first, common = clients - self.holders, int(np.count_nonzero(~rare))
        self.require(
            common >= first,
            f"{first} clients are to hold other labels than {self.label} alone, and {common} examples "
            "have one; take fewer clients, or more holders",
        )
        parts = np.array_split(deck[~rare], clients)
        held = np.array_split(deck[rare], self.holders)
        parts[first:] = [np.concatenate(both) for both in zip(parts[first:], held, strict=True)]
        _fill_empty(parts)  # of holders: all others have something, and none of them more than one
        return parts


def _fill_empty(parts: list[Indices]) -> None:
    sizes = np.array([len(part) for part in parts])
    for poor in np.flatnonzero(sizes == 0):
        rich = int(np.argmax(sizes))
        parts[poor], parts[rich] = parts[rich][-1:], parts[rich][:-1]
        sizes[poor], sizes[rich] = 1, sizes[rich] - 1


CATALOG: dict[str, type[Split]] = {
    "iid": IID,
    "dirichlet": Dirichlet,
    "similarity": Similarity,
    "shards": Shards,
    "quantity": Quantity,
    "rare": Rare,
}


def parse_split(text: str) -> Split:
    """Read `iid`, `dirichlet(0.1)`, `similarity(0.5)`, `shards(2)`, `quantity(0.5)` or `rare(2)`.

    >>> parse_split("dirichlet(alpha=0.1)")
    dirichlet(alpha=0.1)

    Raises:
        InputError: the text names no split of the `CATALOG`, or an argument is wrong.
    """
    return parse(text, CATALOG, "split")
