"""What every dataset is, once loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

Limits = tuple[float, float]


@dataclass(frozen=True)
class Normalisation:
    """How a dataset's numbers come from pixels: (pixel - mean) / std, channel by channel.

    Noise and perturbations are measured in pixels, whatever a dataset was normalised by.

    Attributes:
        mean: a number for each channel, or one for all.
        std: likewise.
        limits: the least and the largest value of a pixel; None where that is not known.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    limits: Limits | None = None

    def pixels(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) float32, normalised -> pixels."""
        return x * _channels(self.std, x) + _channels(self.mean, x)

    def of_pixels(self, module: nn.Module) -> nn.Module:
        """The same model, for images that are not normalised; it shares the module's parameters."""
        return nn.Sequential(_Normalise(self), module)


class _Normalise(nn.Module):
    def __init__(self, normalisation: Normalisation) -> None:
        super().__init__()
        self.normalisation = normalisation

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.normalisation.mean, self.normalisation.std
        return (x - _channels(mean, x)) / _channels(std, x)


def _channels(values: tuple[float, ...], x: Tensor) -> Tensor:
    return torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, 1, 1)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification task, ready to train on.

    Attributes:
        name: the name under which `load` found it.
        train_x: float32, (n, channels, height, width), normalised.
        train_y: int64, (n,), in 0 .. classes - 1.
        test_x: float32, (m, channels, height, width), normalised as `train_x`.
        test_y: int64, (m,).
        classes: how many classes there are.
        normalisation: how train_x and test_x come from pixels.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    normalisation: Normalisation = Normalisation()

    def to(self, device: torch.device) -> Dataset:
        """The same, with its tensors on a device: there models are built, trained and judged."""
        names = "train_x", "train_y", "test_x", "test_y"
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width
