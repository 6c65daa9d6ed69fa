"""What every dataset is, once loaded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width
