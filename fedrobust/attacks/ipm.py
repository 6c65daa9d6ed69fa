"""Inner-product manipulation, with a given scale or the worst one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedrobust.attacks.attack import Attack
from fedrobust.attacks.rehearsal import Rehearsal, best_scale, stepped_scale
from fedrobust.attacks.view import View


@dataclass(frozen=True, repr=False)
class IPM(Attack):
    """Turn the aggregate against the descent direction: every row is -scale * mean(honest).

    With a fraction eps of malicious clients the plain mean becomes (1 - eps - eps * scale) times
    the honest mean: reversed when scale > (1 - eps) / eps. The default, 5, is the least integer that
    reverses it at eps = 0.2, and so the least conspicuous; at eps = 0.1 the mean keeps 0.4 of its
    length. A scale such as 0.5 reverses no mean, but lies close enough to the honest updates to be
    picked by rules that choose among them.

    Sees: `honest`.

    Source: Xie, Koyejo, Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product
    Manipulation", UAI 2019 (arXiv 1903.03936).

    Attributes:
        scale: the paper's epsilon, above 0.
    """

    name = "ipm"

    scale: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.scale > 0, "scale must be above 0")

    def __call__(self, view: View, rng: np.random.Generator) -> Tensor:  # noqa: ARG002
        """Send the negated, scaled mean of the honest updates."""
        return (-self.scale * view.honest.mean(dim=0)).repeat(view.malicious, 1)


@dataclass(frozen=True, repr=False)
class OptimalIPM(Attack):
    """`IPM` with the scale that moves this rule, in this round, furthest from the honest mean.

        argmax_s |aggregate(honest, -s mean(honest), ..) - mean(honest)|,    s in 0.01 .. 100

    Sees: `honest`, `rule`, `eps`.

    Source: Xie, Koyejo, Gupta (arXiv 1903.03936), with the line search of Shejwalkar, Houmansadr, NDSS
    2021 and of ByzFL's `Optimal_InnerProductManipulation`. Deviation: a grid that is zoomed in on, for
    the error jumps where a rule starts to notice. `step` has ByzFL's own search, which mostly stops at
    the first scale that harms at all: `optimal_ipm(20, step=10)`.

    Attributes:
        budget: how many scales are tried, at least 6.
        step: the first step of ByzFL's search, which begins at 0; 0 searches the grid.
    """

    name = "optimal_ipm"

    budget: int = 40
    step: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.budget >= 6, "budget must be at least 6")
        self.require(self.step >= 0, "step must not be negative; 0 searches a grid")

    def __call__(self, view: View, rng: np.random.Generator) -> Tensor:  # noqa: ARG002
        """Try scales on the rule, send the worst."""
        stage = Rehearsal.of(view)

        def error(scale: float) -> float:
            return stage.error(-scale * stage.mean)

        if self.step:
            scale = stepped_scale(error, self.step, self.budget)
        else:
            scale = best_scale(error, 0.01, 100.0, self.budget)
        return stage.rows(-scale * stage.mean)
