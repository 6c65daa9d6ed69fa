"""FoolsGold: clients whose updates are too much alike share one voice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.kernels import Matrix, Vector
from fedrobust.rules.rule import Mixed, Weighting, weigh


@dataclass(frozen=True, repr=False)
class FoolsGold(Weighting):
    """Weights that fall with a row's largest cosine similarity to another (against sybils).

        v_i  <- max over j /= i of c_ij, c the cosines
        c_ij <- c_ij min(1, v_i / v_j)                      # pardoning
        a_i  <- 1 - max_j c_ij, over its maximum, kept within [0, 1]
        a_i  <- kappa (log(a_i / (1 - a_i)) + 1/2), kept within [0, 1]

    Per round: the paper compares the clients' updates summed over all rounds, which tells alike honest
    clients from sybils better. The rule keeps nothing; a server that has those sums aggregates them, and
    mixes the round's rows by the weights that this gives.

    Guarantee: none, and breakdown point 0: one attacker who is like nobody has full weight, and one who
    sends what another client sends takes that client's weight away. It takes honest clients to differ
    and sybils to be alike, and lengths do not matter to it; clip first (`clip | foolsgold`). eps is not
    used. Shares multiply the weights (the paper has none). Scores: 1 - a_i before the logit.
    Deviations: no feature importance; a negative cosine counts as 0; a row of zeros is like nobody; a_i
    is kept below 0.99, as the authors' code has it, so that the logit is finite; the weights are
    normalised, so that the value is a mean; where all rows are alike, they are weighted by their shares
    rather than not at all. Cost: n^2 after the Gram.
    Source: Fung, Yoon, Beschastnikh 2018, "Mitigating Sybils in Federated Learning Poisoning" (arXiv
    1808.04866).

    Attributes:
        kappa: confidence, the slope of the logit.
    """

    name = "foolsgold"
    kappa: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.kappa > 0, "kappa must be positive")

    def __call__(self, gram: Gram) -> Mixed:
        """Weigh the rows."""
        similar = gram.cosines
        np.fill_diagonal(similar, 0.0)  # nobody is his own sybil, and to be opposed is no credit
        largest = similar.max(axis=1)
        pardoned = similar * _pardons(largest)
        credit = np.clip(1 - pardoned.max(axis=1), 0.0, 1.0)
        if credit.max() < 1e-6 or gram.n == 1:  # all alike
            return weigh(gram.shares, np.zeros(gram.n))
        credit /= credit.max()
        odds = np.clip(credit, 1e-9, 0.99) / (1 - np.clip(credit, 1e-9, 0.99))
        weights = gram.shares * np.clip(self.kappa * (np.log(odds) + 0.5), 0.0, 1.0)
        return weigh(weights / weights.sum() if weights.sum() > 0 else gram.shares, 1 - credit)


def _pardons(largest: Vector) -> Matrix:
    """(n, n) v_i / v_j where row j has the larger similarity, 1 elsewhere."""
    above = largest[None, :] > largest[:, None]
    return np.divide(largest[:, None], largest[None, :], out=np.ones(above.shape), where=above)
