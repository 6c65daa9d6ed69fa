"""A chain of rows from the honest ones to their opposite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedrobust import kernels
from fedrobust.attacks.attack import Attack
from fedrobust.attacks.view import View
from fedrobust.kernels import Block, Matrix

_WITHIN = 0.95


@dataclass(frozen=True, repr=False)
class Chain(Attack):
    """Walk away from the honest mean in steps that a clustering by nearest neighbours bridges.

        row k = l (cos(t_k) m + sin(t_k) v),    t_k = min(t + 0.95 k g, pi),    k = 1 .. f

    g is the widest gap of angle between the honest updates: where single linkage would part them into
    two. Of the larger part, the update at the largest angle t from the honest mean is where the chain
    begins; m is the mean's direction, v the rest of that update's, l the median honest length. No link
    is as wide as the gap, so two clusters are the honest ones, and the chain belongs to the larger, even
    if its end points the other way.

    Sees: `honest`.

    Source: `AttackclippedclusteringAdversary` of Blades (Li, Ngai, Ye, Ju, Zhang, Voigt 2024, arXiv
    2206.05359), which evades clipped clustering (Li, Ngai, Voigt 2023). Deviations: its code takes the
    smallest angle of any two honest updates, less a tenth of a radian, for the gap, and looks the
    update to begin with up in another list than it found it in; here both are what the construction
    needs. Past the opposite of the mean it sends ten means, and unit vectors times ten before; here all
    rows have an honest length. Where nothing but the mean's own direction is known there is no way to
    walk, and every row is in that direction.
    """

    name = "chain"

    def __call__(self, view: View, rng: np.random.Generator) -> Tensor:  # noqa: ARG002
        """Find the gap and the update to begin with, walk."""
        honest = torch.nan_to_num(view.honest, 0.0, 0.0, 0.0)
        ahead = _unit(torch.nan_to_num(honest.mean(dim=0))[None])[0]
        units = _unit(honest)
        gram = kernels.gram(Block((*units, ahead)))
        angles = np.arccos(np.clip(gram, -1.0, 1.0))
        gap, larger = _parted(angles[:-1, :-1])
        first = larger[np.argmax(angles[larger, -1])]
        aside = units[first] - float(gram[first, -1]) * ahead
        start, step = float(angles[first, -1]), _WITHIN * gap
        if float(torch.linalg.vector_norm(aside)) < 1e-3:  # what is left is rounding
            aside, start, step = torch.zeros_like(aside), 0.0, 0.0
        turns = [min(start + step * (k + 1), math.pi) for k in range(view.malicious)]
        aside = _unit(aside[None])[0]
        rows = torch.stack([math.cos(turn) * ahead + math.sin(turn) * aside for turn in turns])
        length: Tensor = torch.linalg.vector_norm(honest, dim=1).median()
        return length * rows


def _unit(rows: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths.clamp(min=1e-30)


def _parted(angles: Matrix) -> tuple[float, npt.NDArray[np.int64]]:
    """The gap at which single linkage parts points into two, and who is in the larger part."""
    everyone = np.arange(len(angles))
    if len(angles) < 2:
        return 0.0, everyone
    from scipy.cluster.hierarchy import fcluster, linkage  # noqa: PLC0415 (takes a third of a second)

    tree = linkage(angles[np.triu_indices(len(angles), 1)], "single")
    labels = fcluster(tree, 2, "maxclust")
    return float(tree[-1, 2]), everyone[labels == np.bincount(labels).argmax()]
