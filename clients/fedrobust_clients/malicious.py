"""Malicious clients: a coalition that sees what its attack looks at, and each member's part in it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from fedrobust.attacks import Attack, View, parse_attack
from fedrobust.data import Dataset
from fedrobust.rules import Aggregator, parse_rule
from fedrobust.training import FREE, Learner, Leash, Poison, Shared, Task, updates
from fedrobust_clients.runtime import Floats, Honest, Update

# Among the random streams of a task's seed, the one that attacks draw from.
_ATTACK = 3


class Coalition:
    """The first f clients of a task, acting as one against the rest.

    It knows everybody's data: what honest clients send, it works out itself from the broadcast model,
    if its attack looks at it. So every member comes to the same rows, in whatever process it runs (on
    the same kind of device), and an attack over the network is the one that was simulated. It cannot
    know who else is asked, and takes all clients to be: with sampling, or once some are excluded, its
    rehearsals are of a larger round, and the honest clients' momentum is estimated from the rounds in
    which it is asked itself.
    """

    def __init__(
        self,
        task: Task,
        dataset: Dataset,
        malicious: int,
        attack: Attack,
        *,
        rule: Aggregator | None = None,
        eps: float | None = None,
        shared: Shared | None = None,
    ) -> None:
        """Gather a coalition.

        Args:
            task: what is trained.
            dataset: everybody's data.
            malicious: how many members there are.
            attack: what they do.
            rule: how the server aggregates, if they know.
            eps: the malicious fraction that the server assumes, if they know.
            shared: what other learners of this process have built already.

        Raises:
            InputError: not at least one malicious and one honest client.
        """
        self._task, self._dataset, self._attack = task, dataset, attack
        self._malicious, self._rule, self._eps = malicious, rule, eps
        self._shared = shared or Shared.of(task, dataset)
        self._learners: dict[tuple[range, Poison | None], list[Learner]] = {}
        self._last: tuple[int, Tensor] | None = None
        self._own: deque[Callable[[], Tensor]] = deque(maxlen=attack.memory)

    def rows(self, number: int, model: Tensor, honest: Tensor | None = None) -> Tensor:
        """(f, d): what the members send in this round. Worked out once a round.

        Args:
            number: of the round.
            model: (d,) float32, the broadcast model.
            honest: (n - f, d) what the honest clients send, where that is at hand.
        """
        if self._last is None or self._last[0] != number:
            f, n = self._malicious, self._task.clients
            own = cache(partial(self._train, range(f), number, model, None))
            view = View(
                round=number,
                seed=self._task.draws(number),
                clients=self._task.clients,
                malicious=self._malicious,
                size=len(model),
                classes=self._dataset.classes,
                see_honest=(lambda: honest)
                if honest is not None
                else partial(self._train, range(f, n), number, model, None),
                see_own=own,
                see_trained=partial(self._train, range(f), number, model),
                see_earlier=self._recall if self._own else None,
                rule=self._rule,
                eps=self._eps,
                see_model=lambda: model,
            )
            rng = np.random.default_rng(self._task.entropy(_ATTACK, number))
            self._last = number, self._attack(view, rng)
            self._own.append(own)
        return self._last[1]

    def _recall(self, age: int) -> Tensor:
        return self._own[max(len(self._own) - age, 0)]()

    def _train(
        self,
        members: range,
        number: int,
        model: Tensor,
        poison: Poison | None,
        leash: Leash = FREE,
    ) -> Tensor:
        key = members, poison  # not the leash, which may change with the round
        if key not in self._learners:
            self._learners[key] = [
                Learner(self._task, self._dataset, i, poison, shared=self._shared) for i in members
            ]
        return updates(self._learners[key], number, model, leash)


@dataclass(frozen=True)
class Threat:
    """Who is malicious in a federation, and how.

    Attributes:
        malicious: how many clients, the first ones.
        attack: what they send, as text.
        rule: how the server aggregates, as text, if they know.
        eps: the malicious fraction that the server assumes, if they know.
    """

    malicious: int = 0
    attack: str = "alie"
    rule: str | None = None
    eps: float | None = None

    def coalition(self, task: Task, dataset: Dataset, shared: Shared | None = None) -> Coalition:
        """The malicious clients of a task, as one. Raises as `Coalition` and the parsers."""
        rule = None if self.rule is None else parse_rule(self.rule)
        attack = parse_attack(self.attack)
        return Coalition(task, dataset, self.malicious, attack, rule=rule, eps=self.eps, shared=shared)


@dataclass(frozen=True)
class Malicious:
    """A member of a coalition in the place of an honest runtime.

    Attributes:
        honest: the runtime that it wraps; its example count is what the member claims to have.
        coalition: decides what is sent.
        member: which of the coalition's rows is this client's.
    """

    honest: Honest
    coalition: Coalition
    member: int

    async def update(self, round: int, model: Floats) -> Update:  # noqa: A002
        """This member's row of the attack."""
        return await asyncio.to_thread(self.train, round, model)

    def train(self, round: int, model: Floats) -> Update:  # noqa: A002
        """The same, for callers without an event loop."""
        rows = self.coalition.rows(round, torch.from_numpy(model.copy()))
        return Update(rows[self.member].numpy(), self.honest.learner.examples)
