"""The plain mean: what everything else is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from fedrobust.gram import Gram
from fedrobust.rules.rule import Mixed, Weighting, weigh


@dataclass(frozen=True, repr=False)
class Mean(Weighting):
    """sum_i b_i x_i, FedAvg.

    Guarantee: none under attack; the honest mean if nobody attacks. Breakdown point 0: one malicious
    client puts it anywhere. Weighted by shares; eps counts in the certificate and the verdict alone. No
    scores. Deviations: none. Cost: one weighted sum; the certificate beside it adds a Gram pass.
    Source: McMahan, Moore, Ramage, Hampson, Aguera y Arcas 2017, "Communication-Efficient Learning of
    Deep Networks from Decentralized Data" (arXiv 1602.05629).
    """

    name = "mean"

    def __call__(self, gram: Gram) -> Mixed:
        """Weigh the rows by their shares."""
        return weigh(gram.shares)
