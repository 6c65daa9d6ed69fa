"""The rounds that are measured: Gaussian updates a fifth of which is malicious, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedrobust.attacks import View, parse_attack

PLAIN = "gaussian"


@dataclass(frozen=True)
class Shape:
    """n updates of d coordinates, f = n / 5 of them malicious."""

    n: int
    d: int

    @property
    def f(self) -> int:
        """How many rows are malicious."""
        return self.n // 5

    @property
    def bytes(self) -> int:
        """The rows' size."""
        return 4 * self.n * self.d

    def __str__(self) -> str:
        return f"{self.n} x {self.d:.0e}".replace("e+0", "e")


SHAPES = [Shape(20, 10**5), Shape(50, 10**6), Shape(100, 10**6), Shape(1000, 10**5), Shape(100, 10**7)]
QUICK = [Shape(20, 10**5), Shape(50, 10**5)]
HOSTILE = [Shape(100, 10**5), Shape(1000, 10**4)]
FEW, EXACT = Shape(20, 10**5), ("mda", "smea")
"""Where the rules that search meet hostile values: they refuse so many clients as there are above."""


def make(shape: Shape, kind: str = PLAIN) -> Tensor:
    """(n, d) rows; the malicious ones come first."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape.n, shape.d, generator=generator)
    rows[: shape.f] += 0.05
    if kind != PLAIN:
        _KINDS[kind](rows, shape.f)
    return rows


def _denormal(rows: Tensor, f: int) -> None:
    bits = np.random.default_rng(0).integers(1, 1 << 23, (f, rows.shape[1]), dtype=np.int32)
    rows[:f] = torch.from_numpy(bits.view(np.float32))


def _huge(rows: Tensor, f: int) -> None:
    rows[:f] *= 1e30


def _spread(rows: Tensor, f: int) -> None:
    rows[:f] *= torch.logspace(0, 16, f)[:, None]


def _slow(rows: Tensor, f: int) -> None:
    view = View.of(rows[f : f + 1].expand(len(rows) - f, -1), rows[:f])
    rows[:f] = parse_attack("slow")(view, np.random.default_rng(0))


_KINDS: dict[str, Callable[[Tensor, int], None]] = {
    "denormal": _denormal,
    "1e30": _huge,
    "16 magnitudes": _spread,
    "attack slow": _slow,
}
KINDS = {
    "denormal": "a fifth of the rows hold subnormal numbers only",
    "1e30": "a fifth of the rows are 1e30 times as long",
    "16 magnitudes": "a fifth of the rows are 1 to 1e16 times as long, spread evenly",
    "attack slow": "the catalogue's attack: subnormal rows, each with one entry from 1 to 1e30",
}
