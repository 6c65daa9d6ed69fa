"""FLTrust: trust a client as far as its update points the way of the server's own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.rules.rule import Composite, Mixed, Mixing, Rule, Weighting, weigh

_SHORTEST = 1e-12
"""Rows shorter than this beside the root are nothing: to stretch them would stretch rounding errors."""


@dataclass(frozen=True, repr=False)
class FLTrust(Composite):
    """The mean of the rows at the length of the server's row, weighted by how well they agree with it.

        t_i   <- max(0, cos(x_i, root))
        value <- sum_i t_i (||root|| / ||x_i||) x_i / sum_i t_i

    The root is the server's own update, from a small data set of its own: the anchor "root" of
    `aggregate`. Rows and root are measured from the reference. If no client agrees with the root at
    all, the value is the reference: the round is lost, not spoiled.

    Guarantee: the value is never longer than the root and within 90 degrees of it, whatever the clients
    send; so it is as good as the server's data. Breakdown point: none, all clients may be malicious.
    Its certificate is loose, and often empty (infinite): that bound is about the honest clients' mean,
    which the value has no need to be near. Weighted by shares, where the paper has none; eps is not
    used. Scores: 1 - cosine.
    Deviation: rows shorter than 1e-12 of the root, and all rows where the root is zero, count as
    nothing. Cost: n after the Gram.
    Source: Cao, Fang, Liu, Gong 2021, "FLTrust: Byzantine-robust Federated Learning via Trust
    Bootstrapping" (arXiv 2012.13995).
    """

    name = "fltrust"

    @property
    def parts(self) -> tuple[Rule, ...]:
        """Bring the rows to the root's length; weigh them."""
        return RootLength(), RootCosine()

    @property
    def anchors(self) -> tuple[str, ...]:
        """The server's own update."""
        return ("root",)


@dataclass(frozen=True, repr=False)
class RootLength(Mixing):
    """Every row at the length of the root."""

    name = "root_length"

    def __call__(self, gram: Gram) -> Mixed:
        """Stretch or shorten the rows; those of next to no length have no direction and go."""
        lengths = gram.lengths
        root = float(np.sqrt(gram.anchor("root")[1]))
        seen = lengths > _SHORTEST * root
        factors = np.divide(root, lengths, out=np.zeros_like(lengths), where=seen)
        return Mixed(np.diag(factors), gram.shares, gram.eps)


@dataclass(frozen=True, repr=False)
class RootCosine(Weighting):
    """Weights in proportion to the cosine with the root, where that is positive."""

    name = "root_cosine"

    def __call__(self, gram: Gram) -> Mixed:
        """Weigh the rows."""
        toward, norm = gram.anchor("root")
        lengths = gram.lengths * np.sqrt(norm)
        cosines = np.divide(toward, lengths, out=np.zeros_like(toward), where=lengths > 0)
        trust = gram.shares * np.maximum(cosines, 0.0)
        return weigh(trust / (trust.sum() or 1.0), 1 - cosines)
