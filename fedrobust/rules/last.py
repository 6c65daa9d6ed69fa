"""A lens on the end of the updates, as a rule where the model's last layer is."""

from __future__ import annotations

from dataclasses import dataclass

from fedrobust.gram import Gram
from fedrobust.rules.rule import Lens


@dataclass(frozen=True, repr=False)
class Last(Lens):
    """Lets the rules after it look at the last `count` coordinates of the updates only.

        G <- X_c X_c^T, X_c the last c columns of X

    A backdoor, or relabelled data, often shows most in the layer that gives the answers, which has few
    of the model's coordinates: in the whole update it drowns in the spread of all others.
    `last(650) | dnc` is the spectral signature of the clients' last layers. What is weighed are whole
    updates, and the certificate is on all coordinates: an attacker that keeps to the others is not
    seen, but its reach is told. So this is for detection; `nnm | filter` bounds more.

    Guarantee: that of the rules after it, on the last coordinates alone. Breakdown point: theirs there;
    none on the others. Weighted by shares as they are. Scores: theirs. Deviations: none. Cost: a second
    pass over the last c coordinates. In trees, leaves lie in their order in most updates; a state
    dict's is that in which the model's layers were made.
    Source: Tran, Li, Madry 2018, "Spectral Signatures in Backdoor Attacks" (arXiv 1811.00636), who look
    at one layer's representation; Fung, Yoon, Beschastnikh 2018 (arXiv 1808.04866) look at the last
    layer's updates.

    Attributes:
        count: c, how many coordinates; at least 1.
    """

    name = "last"
    count: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.count >= 1, "say how many coordinates, at least 1, as in last(650)")

    def __call__(self, gram: Gram) -> Gram:
        """The rows by their last coordinates."""
        return gram.last(self.count)
