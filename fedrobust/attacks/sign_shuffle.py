"""Noise with the honest signs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedrobust.attacks.attack import Attack
from fedrobust.attacks.view import View


@dataclass(frozen=True, repr=False)
class SignShuffle(Attack):
    """Noise with as many positive, zero and negative entries as honest updates, and of their length.

        row = l u / |u|,    u a shuffle of p draws from U(0, 1], q from U[-1, 0), and z zeros

    where p, q and z are how many entries of an honest update are positive, negative and zero, on average
    and rounded, and l is the median honest length. All rows are the same. SignGuard looks at a row's
    length and at the fractions of its signs, never at where they are: to it this is the most ordinary of
    updates.

    Sees: `honest`.

    Source: `SignGuardAdversary` of Blades (Li, Ngai, Ye, Ju, Zhang, Voigt 2024, arXiv 2206.05359).
    Deviations: signs are counted in the honest updates instead of their mean, which has fewer zeros; the
    length, there whatever comes out, is an honest one, so that the row is neither rejected nor clipped.
    """

    name = "sign_shuffle"

    def __call__(self, view: View, rng: np.random.Generator) -> Tensor:
        """Draw the entries, shuffle them."""
        positive = round(float((view.honest > 0).sum(dim=1).double().mean()))
        zero = round(float((view.honest == 0).sum(dim=1).double().mean()))
        entries = 1 - rng.random(view.size, dtype=np.float32)
        entries[positive:] *= -1
        entries[view.size - min(zero, view.size - positive) :] = 0
        noise = torch.from_numpy(rng.permutation(entries)).to(view.honest.device)
        length = torch.linalg.vector_norm(view.honest, dim=1).median()
        scale: Tensor = length / torch.linalg.vector_norm(noise).clamp(min=1e-30)
        return (scale * noise).repeat(view.malicious, 1)
