"""The form that every attack has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedrobust.attacks.view import View
from fedrobust.errors import InputError
from fedrobust.text import Textual
from fedrobust.training import evaluate


@dataclass(frozen=True, repr=False)
class Attack(Textual, ABC):
    """A pure function from what the malicious clients see to what they send."""

    @property
    def memory(self) -> int:
        """How many earlier rounds the attack looks back on, by `View.earlier`."""
        return 0

    @abstractmethod
    def __call__(self, view: View, rng: np.random.Generator) -> Tensor:
        """Make the malicious updates of one round.

        Args:
            view: all that the attack may look at.
            rng: where its randomness comes from, if it needs any.

        Returns:
            (f, d) float32, one row per malicious client.
        """


class Targeted(Attack):
    """An attack that wants certain images classified in a certain way, and all others correctly."""

    @abstractmethod
    def goal(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What the attack wants, on data that nobody has trained on.

        Args:
            x: (n, channels, height, width) images.
            y: (n,) their true labels.

        Returns:
            The images that the attack is about, changed as it wants them changed, and the label that it
            wants each to get, which is not the true one.
        """


def success_rate(module: nn.Module, attack: Targeted, x: Tensor, y: Tensor) -> float:
    """How far an attack has reached its goal: the fraction of its images that get the label it wants.

    For a backdoor these are the test images of other classes than the target, with the trigger.

    Args:
        module: maps images to logits.
        attack: what the attackers want.
        x: (n, channels, height, width) test images.
        y: (n,) their true labels.

    Raises:
        InputError: the attack is about none of these images, or wants a label that the model does not
            have; or there is not one label per image.
    """
    if not 0 < len(x) == len(y):
        raise InputError(
            f"cannot judge {attack!r} on {len(x)} images and {len(y)} labels; "
            "they must be as many, and at least one"
        )
    return evaluate(module, *attack.goal(x, y)).accuracy


def replacement(view: View, scale: float | None) -> float:
    """The factor that makes the mean of the round that of the malicious rows: n / f, unless given."""
    return view.clients / view.malicious if scale is None else scale


def typical_length(rows: Tensor) -> float:
    """The root mean square length of (n, d) updates; 0 where a model has diverged."""
    return float(torch.nan_to_num(rows).double().square().sum(dim=1).mean().sqrt())
