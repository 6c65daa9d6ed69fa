"""SEVER over clients: train, leave out whose updates stand out, train on with the others.

Pure: what is decided here the coordinator does as if an operator had decided it, so the ledger tells
why, and `fedrobust ledger release` takes it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.kernels import Vector
from fedrobust.rules import EntropyFilter
from fedrobust.text import Textual, choose, parse
from fedrobust_server.quarantine import Ban, Override

NONE = "none"
"""The default schedule: nobody is left out by it."""


@dataclass(frozen=True, repr=False)
class Sever(Textual):
    """After every so many rounds, the clients whose updates stand out most are left out for good.

    Near an optimum the honest updates cancel out, so malicious ones can hold the model elsewhere only by
    a common direction of their own, in which they stand out. The learner of SEVER is the federation
    itself, by whatever rule (with `mean` it is SEVER as published, `filter` guards the rounds in
    between); clients take the place of examples, and their updates that of gradients. Training goes on
    from the model that is there: in the paper it begins anew, which costs rounds and, for a convex loss,
    leads to the same model.

    Source: Diakonikolas, Kamath, Kane, Li, Steinhardt, Stewart 2019 (arXiv 1803.02815), algorithm 1, and
    its filters as in `fedrobust.statistics.sever`.

    Attributes:
        every: rounds of training before each look.
        times: how many looks.
        eps: the share of the clients that may be malicious; None is the run's.
        removal: "quantile", the share eps / 2 of those left that stands out most; or "random", each with
            a chance like its squared score.
        scores: what stands out: "spectral", in the one direction in which updates spread most; "que", in
            all large directions together (Dong, Hopkins, Li 2019, arXiv 1906.11366), against attackers
            that do not all pull one way.
    """

    name = "sever"

    every: int = 10
    times: int = 3
    eps: float | None = None
    removal: str = "quantile"
    scores: str = "spectral"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.every >= 1, "every must be at least 1 round")
        self.require(self.times >= 1, "times must be at least 1")
        self.require(self.eps is None or 0 <= self.eps < 0.5, "eps must be in [0, 0.5)")
        choose(self.removal, ("quantile", "random"), "removal")
        choose(self.scores, SCORES, "scores")

    def looks(self, number: int) -> bool:
        """Whether clients are looked at after this round."""
        return number % self.every == 0 and number // self.every <= self.times

    def score(self, gram: Gram) -> Vector:
        """(n,) how far out each client's update is, not negative."""
        return SCORES[self.scores](gram)

    def decide(self, number: int, scores: Mapping[str, float], eps: float, seed: int) -> list[Override]:
        """Whom to leave out from now on.

        Args:
            number: of the round that is over.
            scores: of the clients that took part, by `score`.
            eps: the run's.
            seed: of random removal.
        """
        from fedrobust.statistics.severing import REMOVALS  # noqa: PLC0415 (takes a second)

        names = sorted(scores)
        values = np.array([scores[name] for name in names])
        remove = REMOVALS[self.removal]
        eps = eps if self.eps is None else self.eps
        left = remove(values, np.ones(len(names)), eps, np.random.default_rng(seed))
        out = [i for i in np.argsort(-values, kind="stable").tolist() if not left[i]]
        return [
            Override(
                names[i],
                Ban(),
                f"look {number // self.every} of {self.times}, after round {number}: {self.scores} "
                f"score {values[i]:.3g}, number {place} of {len(names)}; their median is "
                f"{np.median(values):.3g}",
                self.name,
            )
            for place, i in enumerate(out, start=1)
        ]


def parse_schedule(text: str) -> Sever | None:
    """Read `none` or `sever(every=20, times=2)`.

    Raises:
        InputError: the text is no schedule, or an argument is wrong.
    """
    return None if text == NONE else parse(text, {Sever.name: Sever}, "schedule")


def spectral(gram: Gram) -> Vector:
    """|<v, x_i - mean>|, v the direction in which the updates spread most."""
    along: Vector = np.abs(gram.leading(gram.shares)[1][:, 0])
    return along


def quantum_entropy(gram: Gram) -> Vector:
    """Roots of (x_i - mean)^T U (x_i - mean), U = exp(4 Sigma / ||Sigma||) over its top eigenvalue."""
    variances, projections = gram.spectrum(gram.shares)
    squares = projections**2
    rest = np.maximum(gram.centred_norms(gram.shares) - squares.sum(axis=1), 0.0)
    return np.asarray(np.sqrt(EntropyFilter().measure(squares, variances, rest)))


SCORES: dict[str, Callable[[Gram], Vector]] = {"spectral": spectral, "que": quantum_entropy}
"""(n,) scores of updates that all have a share, by name."""
