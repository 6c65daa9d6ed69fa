"""Centred clipping: steps toward the rows, none of them longer than a radius."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedrobust.gram import Gram
from fedrobust.kernels import Vector
from fedrobust.rules.mean import Mean
from fedrobust.rules.mixings import length_of
from fedrobust.rules.rule import Composite, Mixed, Mixing, Rule


@dataclass(frozen=True, repr=False)
class CenteredClipping(Composite):
    """The mean of the rows after clipping their distance from a centre; the result is the next centre.

        v <- v + sum_i b_i (x_i - v) min(1, radius / ||x_i - v||)

    The first centre is the reference: the broadcast model or, as the paper has it, the previous
    aggregate given as `reference`. The rule keeps nothing from round to round. All steps take place
    in client space, so many cost no more than few.

    Guarantee: with a radius of order sigma sqrt(n / f), the error is O(sigma sqrt eps) about honest
    rows within sigma of their mean and a centre that is near; one step moves by at most the radius.
    Breakdown point 1/2 with the default radius. Weighted by shares: the default radius is by mass.
    Moving every row moves the value only if the reference moves along.
    Scores: distances from the last centre, over the radius. Deviation: the default radius. Cost: n^2 a
    step after the Gram.
    Source: Karimireddy, He, Jaggi 2021, "Learning from History for Byzantine Robust Optimization"
    (arXiv 2012.10333).

    Attributes:
        radius: in the updates' units; None takes, in each step, the largest distance that malicious rows
            cannot have raised: the smallest that rows of 1 - eps of the mass do not exceed, with equal
            shares the (n - f)-th smallest.
        steps: L, how often the centre moves.
    """

    name = "centered_clipping"
    radius: float | None = None
    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.radius is None or self.radius > 0, "radius must be positive")
        self.require(self.steps >= 1, "steps must be at least 1")

    @property
    def parts(self) -> tuple[Rule, ...]:
        """Clip the rows about the last centre; average them."""
        return ClippedAbout(self.radius, self.steps), Mean()


@dataclass(frozen=True, repr=False)
class ClippedAbout(Mixing):
    """The rows as centred clipping's last step sees them. Attributes as there."""

    name = "clipped_about"
    radius: float | None = None
    steps: int = 1

    def __call__(self, gram: Gram) -> Mixed:
        """Move each row toward the centre until it is within the radius."""
        product, norms = gram.product(self.steps - 1), gram.squared_norms
        centre, toward = np.zeros(gram.n), np.zeros(gram.n)  # the reference: no weight on any row
        for step in range(self.steps):
            toward = product(centre) if step else toward
            distances = np.sqrt(np.maximum(norms - 2 * toward + centre @ toward, 0.0))
            radius = self._radius(gram, distances)
            factors = np.divide(radius, distances, out=np.ones_like(distances), where=distances > radius)
            before = centre
            centre = gram.shares * factors + (gram.shares @ (1 - factors)) * centre
        matrix = (1 - factors)[:, None] * before
        matrix[np.diag_indices(gram.n)] += factors
        return Mixed(matrix, gram.shares, gram.eps, scores=distances / (radius or 1.0))

    def _radius(self, gram: Gram, distances: Vector) -> float:
        if self.radius is not None:
            return self.radius
        return length_of(gram, distances, 1 - gram.eps)
