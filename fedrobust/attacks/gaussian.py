"""Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedrobust.attacks.attack import Attack
from fedrobust.attacks.view import View


@dataclass(frozen=True, repr=False)
class Gaussian(Attack):
    """Noise: every entry is drawn from N(0, (scale * r)^2), with r the RMS of the own updates.

    In the place of what the clients would honestly send, or added to it.

    Sees: `own`.

    Source: Blanchard, El Mhamdi, Guerraoui, Stainer, "Machine Learning with Adversaries: Byzantine
    Tolerant Gradient Descent", NeurIPS 2017 ("Gaussian Byzantine"). Deviation: there the
    standard deviation is 200 whatever the problem; relative to an honest update the default means
    the same on every model. Added noise is what Flower's baseline FLANDERS has.

    Attributes:
        scale: above 0.
        added: add the noise to the own updates.
    """

    name = "gaussian"

    scale: float = 10.0
    added: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.scale > 0, "scale must be above 0")

    def __call__(self, view: View, rng: np.random.Generator) -> Tensor:
        """Draw noise of the shape of the coalition's updates."""
        noise = rng.standard_normal((view.malicious, view.size), dtype=np.float32)
        deviation = self.scale * view.own.square().mean().sqrt()
        rows = torch.from_numpy(noise).to(view.own.device) * deviation
        return view.own + rows if self.added else rows
