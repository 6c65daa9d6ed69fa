"""The threat model: what malicious clients, acting as one, can see in a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy.typing as npt
import torch
from torch import Tensor

from fedrobust.errors import InputError
from fedrobust.rules import Aggregator
from fedrobust.training import FREE, Leash, Poison


@dataclass(frozen=True, eq=False)
class View:
    """What the coalition sees; each part is worked out when first looked at, and then kept.

    That laziness is the point: what an attack does not look at costs nothing, and which parts it
    looks at is how strong a threat it needs. `own`, `earlier` and `train` need only the coalition's own
    data, `model` what is broadcast to everybody; `honest` needs to read everybody's traffic; `rule` and
    `eps` need to know the server's defence.

    Attributes:
        round: the number of the round.
        clients: n, how many clients take part.
        malicious: f, how many of them are malicious; at least 1, and fewer than n.
        size: d, the length of an update.
        classes: how many classes the task has.
        see_honest: makes what the n - f honest clients send, (n - f, d).
        see_own: makes what the malicious clients would send if they were honest, (f, d).
        see_trained: makes what they get by training on poisoned data, on a leash or not, (f, d).
        see_earlier: makes `own` as it was a number of rounds ago, (f, d), or in the first round if that
            is later; None in the first round.
        rule: how the server aggregates; None if the coalition does not know.
        eps: the malicious fraction that the server assumes where the rule names none; None if the
            coalition does not know.
        seed: of what the rule draws in this round.
        see_model: makes the broadcast model, (d,); None where there is none.
    """

    round: int
    clients: int
    malicious: int
    size: int
    classes: int
    see_honest: Callable[[], Tensor]
    see_own: Callable[[], Tensor]
    see_trained: Callable[[Poison, Leash], Tensor]
    see_earlier: Callable[[int], Tensor] | None = None
    rule: Aggregator | None = None
    eps: float | None = None
    seed: int = 0
    see_model: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.malicious < self.clients:
            raise InputError(
                f"{self.malicious} of {self.clients} clients are malicious; "
                "an attack needs at least one malicious and one honest client"
            )

    @classmethod
    def of(
        cls,
        honest: Tensor | npt.ArrayLike,
        own: Tensor | npt.ArrayLike,
        classes: int = 10,
        *,
        earlier: Sequence[Tensor] = (),
        rule: Aggregator | None = None,
        eps: float | None = None,
        model: Tensor | npt.ArrayLike | None = None,
    ) -> View:
        """A view of given updates, to try an attack without training anything.

        Args:
            honest: (n - f, d), what the honest clients send; anything that makes a float32 tensor.
            own: (f, d), what the malicious clients would honestly send.
            classes: how many classes the task has.
            earlier: `own` of earlier rounds, each (f, d) float32, the last round first.
            rule: how the server aggregates.
            eps: the malicious fraction that the server assumes.
            model: (d,) the broadcast model.

        Raises:
            InputError: the shapes are wrong. `train` raises it too: there is nothing to train. So does
                `model` if none is given.
        """
        kept, mine = (torch.as_tensor(rows, dtype=torch.float32) for rows in (honest, own))
        start = None if model is None else torch.as_tensor(model, dtype=torch.float32)
        if kept.ndim != 2 or mine.ndim != 2:
            raise InputError(
                f"honest has shape {tuple(kept.shape)} and own {tuple(mine.shape)}; "
                "each must be (rows, d)"
            )
        view = cls(
            round=0,
            clients=len(kept) + len(mine),
            malicious=len(mine),
            size=kept.shape[1],
            classes=classes,
            see_honest=lambda: kept,
            see_own=lambda: mine,
            see_trained=_no_training,
            see_earlier=(lambda age: earlier[min(age, len(earlier)) - 1]) if earlier else None,
            rule=rule,
            eps=eps,
            see_model=None if start is None else lambda: start,
        )
        view._checked(mine, view.malicious, "own")
        return view

    @cached_property
    def honest(self) -> Tensor:
        """(n - f, d) float32: what the honest clients send."""
        return self._checked(self.see_honest(), self.clients - self.malicious, "honest")

    @cached_property
    def own(self) -> Tensor:
        """(f, d) float32: what the malicious clients would send if they were honest."""
        return self._checked(self.see_own(), self.malicious, "own")

    @cached_property
    def model(self) -> Tensor:
        """(d,) float32: the broadcast model, from which all updates are counted."""
        if self.see_model is None:
            raise InputError(
                "this attack looks at the broadcast model, but the view has none; "
                "construct View with see_model, or View.of with model"
            )
        model = self.see_model()
        if model.shape != (self.size,) or model.dtype != torch.float32:
            raise InputError(
                f"the view's model has shape {tuple(model.shape)} and type {model.dtype}, "
                f"expected ({self.size},) and torch.float32"
            )
        return model

    def earlier(self, age: int) -> Tensor:
        """(f, d) float32: `own` as it was `age` >= 1 rounds ago, or in the first round."""
        if self.see_earlier is None:
            return self.own
        return self._checked(self.see_earlier(age), self.malicious, "earlier")

    def train(self, poison: Poison, leash: Leash = FREE) -> Tensor:
        """(f, d) float32: what the malicious clients get by training on poisoned data.

        Args:
            poison: what becomes of each member's data.
            leash: what keeps their updates inconspicuous; without it they train as honest clients do.
        """
        return self._checked(self.see_trained(poison, leash), self.malicious, "trained")

    def _checked(self, rows: Tensor, count: int, what: str) -> Tensor:
        if rows.shape != (count, self.size) or rows.dtype != torch.float32:
            raise InputError(
                f"the view's {what} updates have shape {tuple(rows.shape)} and type {rows.dtype}, "
                f"expected ({count}, {self.size}) and torch.float32"
            )
        return rows


def _no_training(_: Poison, __: Leash) -> Tensor:
    raise InputError(
        "this attack trains on poisoned data, but the view is of given updates; "
        "construct View with see_trained"
    )
