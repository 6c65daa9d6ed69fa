"""What is promised, as data: each target is a ratio of median times, or a bound on extra memory."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import (
    BARE,
    GRAM,
    GRAM_REFERENCE,
    LAST_PIECE,
    LAST_ROW,
    PRODUCT,
    WEIGHTED_SUM,
    weightings,
)
from benchmarks.rounds import Shape

ROW_FLOATS = 2
SPARE = 64e6
"""Extra memory of a rule that is not coordinate-wise: two rows of floats and this many bytes."""
PART = 0.1
"""Extra memory of any rule, as a part of the rows, unless the page says why it is more."""
HOSTILE_RATIO = 1.5
"""The time of a rule on hostile values over its time on Gaussian ones, at most."""


@dataclass(frozen=True)
class Target:
    """A ratio that must not pass, or must reach, a limit.

    Attributes:
        what: in words.
        shape: where it is measured.
        over: cases whose times are added up.
        under: those that they are divided by.
        limit: the ratio.
        at_least: whether more is better.
    """

    what: str
    shape: Shape
    over: tuple[str, ...]
    under: tuple[str, ...]
    limit: float
    at_least: bool = True

    def met(self, ratio: float) -> bool:
        """Whether this ratio is good enough."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit


_WIDE = [Shape(20, 10**5), Shape(50, 10**6), Shape(100, 10**6), Shape(100, 10**7)]
_MIDDLE = Shape(100, 10**6)
_MANY = Shape(1000, 10**5)
_LONG = Shape(100, 10**7)


def _faster(peer: str, rule: str, shape: Shape, limit: float, mine: str | None = None) -> Target:
    own = mine or rule
    beside = f"{peer}'s {rule}" if own != rule else peer
    return Target(f"`{own}` against {beside}", shape, (f"{peer}/{rule}",), (f"ours/{own}",), limit)


GEOMETRIC, CLIPPING = "geometric_median(steps=3)", "centered_clipping(radius=100.0, steps=3)"
TARGETS: list[Target] = [
    *(
        Target(
            f"{name} over one product X X^T",
            shape,
            (f"kernel/{kernel}",),
            (f"floor/{PRODUCT}",),
            limit,
            at_least=False,
        )
        for shape in [*_WIDE, _MANY]
        for name, kernel, limit in [
            ("Gram pass", GRAM, 1.15),
            ("Gram pass about a reference", GRAM_REFERENCE, 1.3),
        ]
    ),
    _faster("byzfl", "caf", _MIDDLE, 15, "filter"),
    _faster("byzfl", f"nnm | {GEOMETRIC}", Shape(50, 10**6), 80),
    _faster("byzfl", GEOMETRIC, _MIDDLE, 9),
    _faster("byzfl", "krum", _MIDDLE, 7),
    _faster("byzfl", "multi_krum", _MIDDLE, 7),
    _faster("byzfl", CLIPPING, _MIDDLE, 7),
    _faster("byzfl", "median", _MIDDLE, 14),
    _faster("byzfl", "trimmed_mean", _MIDDLE, 14),
    _faster("byzfl", "meamed", _MIDDLE, 12),
    *(
        Target(
            f"`{rule}` {BARE} against byzfl",
            _MANY,
            (f"byzfl/{rule}",),
            (f"ours {BARE}/{rule}",),
            10,
        )
        for rule in ["monna(index=0)", GEOMETRIC, CLIPPING]
    ),
    _faster("flower", "median", _MIDDLE, 10),
    _faster("flower", "trimmed_mean", _MIDDLE, 10),
    _faster("flower strategy", "multi_krum", _MIDDLE, 8),
    _faster("flower", "multi_krum", _MIDDLE, 30),
    *(
        Target(f"`{case}` against anew", shape, ("ours/filter",), (f"arrival/{case}",), limit)
        for case, shape, limit in [(LAST_ROW, _MIDDLE, 2.7), (LAST_PIECE, _LONG, 5)]
    ),
]
OVER_FLOOR: list[Target] = [
    Target(
        f"`{rule}` over product and weighted sum",
        shape,
        (f"ours/{rule}",),
        (f"floor/{PRODUCT}", f"floor/{WEIGHTED_SUM}"),
        1.3,
        at_least=False,
    )
    for shape in _WIDE
    for rule in weightings()
]
UNAIDED = (f"ours/nnm | {GEOMETRIC}", _LONG, 100e6)
"""A case, its shape and the extra bytes that it may take where the peer cannot run at all."""
