"""Directed deviation: just beyond the honest extremes, or as far as Krum still chooses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedrobust import kernels
from fedrobust.attacks.attack import Attack
from fedrobust.attacks.view import View
from fedrobust.kernels import Block, Matrix, Vector


@dataclass(frozen=True, repr=False)
class Fang(Attack):
    """Beyond the honest extreme in each coordinate, on the side that the honest mean moves away from.

    With s the sign of the honest mean, and e the honest minimum where s = 1, the maximum where s = -1:

        entry ~ U[e, b e]  where e is on the far side of 0 already (s e < 0)
                U[e, e/b]  where it is not

    Each row is drawn by itself. A trimmed mean cuts off the other end instead, and a median comes to lie
    as far out as f rows can bring it. The largest of the f rows is hardly out of the ordinary in any
    coordinate; all coordinates together are what tells.

    The paper takes extremes of local models, so that b is a factor of weights: with models the honest
    rows are the broadcast model plus what they send, and it is taken off again in the end. Weights are
    mostly longer than updates, and rows go much further out then.

    Sees: `honest`; `model` too with models.

    Source: Fang, Cao, Jia, Gong, "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning",
    USENIX Security 2020 (arXiv 1911.11815), the attack with full knowledge on the trimmed mean and the
    median. Deviations: the sign is that of the honest mean, which stands for the change of the model
    without an attack; without models the extremes are those of the updates, as in Blades' `Adaptive`;
    where the honest mean is 0, so is the entry.

    Attributes:
        factor: b, above 1.
        models: take extremes of models instead of updates.
    """

    name = "fang"

    factor: float = 2.0
    models: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.factor > 1, "factor must be above 1")

    def __call__(self, view: View, rng: np.random.Generator) -> Tensor:
        """Draw entries between the extreme and b times, or one b-th of, it."""
        honest, signs = view.honest, view.honest.mean(dim=0).sign()
        start = view.model if self.models else torch.zeros_like(signs)
        extreme = start + torch.where(signs > 0, honest.amin(dim=0), honest.amax(dim=0))
        beyond = torch.where(signs * extreme > 0, extreme / self.factor, extreme * self.factor)
        drawn = torch.from_numpy(rng.random((view.malicious, view.size), dtype=np.float32))
        rows = extreme + drawn.to(extreme.device) * (beyond - extreme) - start
        return torch.where(signs == 0, 0.0, rows)


@dataclass(frozen=True, repr=False)
class FangKrum(Attack):
    """As far against the honest mean's signs as Krum still chooses: every row is -lambda s.

    With D the distances, d' the signs that are not 0, and N_i the n - f - 2 honest updates nearest to
    x_i, Krum chooses such a row only if

        lambda <= (min_i sum_{j in N_i} D(x_j, x_i)^2 / ((n - 2f - 1) d'))^1/2 + max_i |x_i| / d'^1/2

    From there lambda is halved until Krum does choose one, or it is below the threshold. Rows that are
    all alike are each other's nearest neighbours, which is how a row far from all honest ones gets a
    small score. The rule is taken to be Krum with f its number of attackers, whatever it is.

    Sees: `honest`.

    Source: Fang, Cao, Jia, Gong, USENIX Security 2020 (arXiv 1911.11815), the attack with full knowledge
    on Krum. Deviations: the paper draws the other rows within a small distance of the first, so as not
    to look alike, after it has found lambda for rows that are; here they are alike. It counts all d
    signs; coordinates in which nobody moves are left alone here. Where n < 2f + 3, for which Krum is not
    defined, one neighbour is counted at least.

    Attributes:
        threshold: the least lambda, in the updates' own units, above 0.
    """

    name = "fang_krum"

    threshold: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.threshold > 0, "threshold must be above 0")

    def __call__(self, view: View, rng: np.random.Generator) -> Tensor:  # noqa: ARG002
        """Halve lambda until Krum chooses."""
        mean = torch.nan_to_num(view.honest.mean(dim=0))
        signs = mean.sign()
        arena = _Arena.of(view.honest, mean, signs, view.malicious)
        scale = arena.largest()
        while scale >= self.threshold and not arena.chosen(scale):
            scale /= 2
        return (-scale * signs).repeat(view.malicious, 1)


@dataclass(frozen=True, eq=False)
class _Arena:
    """Krum on n - f honest rows and f that are -lambda s.

    Attributes:
        between: (h, h) squared distances of the honest rows, infinite from themselves.
        across: (h, 3) their squared distances from -lambda s: coefficients of 1, lambda and lambda^2.
        malicious: f.
    """

    between: Matrix
    across: Matrix
    malicious: int

    @classmethod
    def of(cls, honest: Tensor, mean: Tensor, signs: Tensor, malicious: int) -> _Arena:
        # About their mean: what nearly equal rows differ by would drown in what they have in common.
        centred = torch.nan_to_num(honest - mean, 0.0, 0.0, 0.0)
        gram = kernels.gram(Block((*centred, mean, signs)))
        inner, (along, against) = gram[:-2, :-2], gram[-2:, :-2]
        squares = inner.diagonal()
        between = np.maximum(squares[:, None] + squares - 2 * inner, 0.0)
        np.fill_diagonal(between, np.inf)
        constant = np.maximum(squares + 2 * along + gram[-2, -2], 0.0)
        linear, square = 2 * (against + gram[-2, -1]), np.full_like(squares, gram[-1, -1])
        return cls(between, np.stack([constant, linear, square], axis=1), malicious)

    @property
    def neighbours(self) -> int:
        """How many Krum counts."""
        return max(len(self.between) - 2, 1)

    def largest(self) -> float:
        """The bound on lambda."""
        dimensions = max(float(self.across[0, 2]), 1.0)
        honest = np.sort(self.between, axis=1)[:, : max(len(self.between) - 2, 0)].sum(axis=1).min()
        room = honest / max(len(self.between) - self.malicious - 1, 1)
        return float((np.sqrt(room) + np.sqrt(self.across[:, 0].max())) / np.sqrt(dimensions))

    def chosen(self, scale: float) -> bool:
        """Whether Krum chooses one of the malicious rows; they come first, and win ties."""
        to: Vector = np.maximum(self.across @ [1.0, scale, scale**2], 0.0)
        own = np.sort(to)[: max(self.neighbours - (self.malicious - 1), 0)].sum()
        every = np.hstack([self.between, np.repeat(to[:, None], self.malicious, axis=1)])
        return bool(own <= np.sort(every, axis=1)[:, : self.neighbours].sum(axis=1).min())
