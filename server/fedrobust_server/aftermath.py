"""What follows a round: its clients are judged, it is recorded, and its model kept and evaluated."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedrobust import Aggregated, Verdict
from fedrobust.training import Evaluation, Manifest
from fedrobust_server.config import RunConfig
from fedrobust_server.ledger import Ledger
from fedrobust_server.metrics import Metrics
from fedrobust_server.quarantine import Changed, Override, evidence, parse_policy
from fedrobust_server.record import columns
from fedrobust_server.runs import RunFolder
from fedrobust_server.schedule import parse_schedule
from fedrobust_server.spool import Floats, Spool

log = logging.getLogger(__name__)

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


@dataclass(frozen=True)
class ClosedRound:
    """A round that is over.

    Attributes:
        number: of the round.
        outcome: "aggregated" or "skipped".
        reason: why it was skipped.
        accepted: how many updates counted.
        refused: how many submissions did not.
        malformed: clients that sent what cannot be an update.
        spread: how far updates stand out, where the schedule looks at that after this round.
        aggregated: what the rule said, without the value; None where it was not asked.
        weights: of the clients; empty where the rule gives none.
        scores: likewise.
        seconds: that the round took.
        spool: where its updates are.
    """

    number: int
    outcome: str
    reason: str
    accepted: int
    refused: int
    malformed: frozenset[str]
    spread: Mapping[str, float]
    aggregated: Aggregated | None
    weights: Mapping[str, float]
    scores: Mapping[str, float]
    seconds: float
    spool: Spool | None

    @property
    def verdict(self) -> Verdict | None:
        """What the rule said of it."""
        return None if self.aggregated is None else self.aggregated.verdict


@dataclass(frozen=True)
class RoundReport:
    """A finished round, for whoever watches.

    Attributes:
        round: what became of it.
        evaluation: of the model after it.
    """

    round: ClosedRound
    evaluation: Evaluation


class Aftermath:
    """Sees to rounds that are over, while the next one goes on."""

    def __init__(
        self,
        config: RunConfig,
        manifest: Manifest,
        ledger: Ledger,
        folder: RunFolder,
        evaluate: Callable[[Floats], Evaluation],
        watch: Callable[[RoundReport], None],
        metrics: Metrics,
        spawn: Spawn,
    ) -> None:
        """Put the parts together.

        Args:
            config: of the run.
            manifest: names and shapes of the model's tensors.
            ledger: takes the record.
            folder: of the run.
            evaluate: judges a model; called in a thread.
            watch: is told of every finished round.
            metrics: are kept up to date.
            spawn: begins what goes on beside; an exception there ends the run.
        """
        self._config, self._names = config, manifest
        self._ledger, self._folder, self._metrics = ledger, folder, metrics
        self._evaluate, self._watch, self._spawn = evaluate, watch, spawn
        self._policy, self._schedule = parse_policy(config.quarantine), parse_schedule(config.schedule)
        self._suspects = ledger.suspects()
        self._recorded: asyncio.Task[None] | None = None
        self._judged: asyncio.Task[None] | None = None
        self._judged_before: asyncio.Task[None] | None = None

    @property
    def excluded(self) -> frozenset[str]:
        """Clients that are asked no more."""
        return self._suspects.excluded

    def heed(self, number: int) -> bool:
        """Do what operators have decided, before this round begins; whether there was anything to do."""
        self._suspects, changes = self._ledger.override(self._policy, self._suspects, number)
        self._tell(number - 1, changes)
        self._metrics.stand(self._suspects)
        return bool(changes)

    def catch_up(self, number: int, model: Floats) -> None:
        """Begin to evaluate the model after a round, which a server that was killed did not come to."""

        async def judge() -> None:
            await self.keep(number, model)

        self._judged = self._spawn(judge())

    def follow(self, closed: ClosedRound, model: Floats) -> None:
        """Judge a round's clients, and begin to save what it led to: this model."""
        self._recorded = self._spawn(self._record(closed))
        judge = self._judge(closed, model, self._recorded, self._judged)
        self._judged_before, self._judged = self._judged, self._spawn(judge)
        self._metrics.closed(closed.outcome, closed.seconds, closed.aggregated)
        log.info(
            "a round is over",
            extra={
                "round": closed.number,
                "outcome": closed.outcome,
                "reason": closed.reason,
                "accepted": closed.accepted,
                "refused": closed.refused,
            },
        )
        self._judge_clients(closed)

    async def room(self) -> None:
        """Wait until the last round cannot be lost any more, and no earlier model waits to be judged."""
        for earlier in (self._recorded, self._judged_before):
            if earlier is not None:
                await earlier

    async def over(self) -> None:
        """Wait until everything is saved and judged."""
        for last in (self._recorded, self._judged):
            if last is not None:
                await last

    async def keep(self, number: int, model: Floats) -> Evaluation:
        """Keep the model after a round if it is one to keep, and evaluate it."""
        if number % self._config.checkpoint_every == 0 or number == self._config.rounds:
            began = time.monotonic()
            await asyncio.to_thread(self._folder.checkpoint, number, model, self._names)
            self._metrics.checkpointed(time.monotonic() - began)
        evaluation = await asyncio.to_thread(self._evaluate, model)
        self._ledger.judge(number, evaluation.accuracy, evaluation.loss)
        return evaluation

    def _judge_clients(self, closed: ClosedRound) -> None:
        """Gather what a round says of its clients."""
        found = evidence(closed.verdict, closed.weights, closed.malformed)
        decided = list[Override]()
        if self._schedule is not None and closed.spread:
            seed = self._config.task.draws(closed.number)
            decided = self._schedule.decide(closed.number, closed.spread, self._config.eps, seed)
        self._suspects, changes = self._ledger.judge_clients(
            self._policy, self._suspects, closed.number, found, decided
        )
        self._tell(closed.number, changes)
        self._metrics.judged(found, self._suspects)

    def _tell(self, number: int, changes: Sequence[Changed]) -> None:
        for change in changes:
            log.warning(
                "a client's standing has changed",
                extra={
                    "round": number,
                    "client": change.name,
                    "standing": change.client.standing.value,
                    "reason": change.reason,
                    "who": change.who,
                },
            )

    async def _record(self, closed: ClosedRound) -> None:
        """Save what a round led to; only then its updates go."""
        figures: dict[str, Any] = {"outcome": closed.outcome, "reason": closed.reason}
        if closed.aggregated is not None:
            figures |= columns(closed.aggregated)
        if closed.outcome == "aggregated":
            figures["state"] = await asyncio.to_thread(self._folder.keep_state, closed.number)
        self._ledger.close_round(closed.number, figures, closed.weights, closed.scores)
        if closed.spool is not None:
            closed.spool.remove()

    async def _judge(
        self,
        closed: ClosedRound,
        model: Floats,
        recorded: asyncio.Task[None],
        before: asyncio.Task[None] | None,
    ) -> None:
        """Look at the model after a round, and tell; one round after the other."""
        if before is not None:
            await before
        await recorded
        self._watch(RoundReport(closed, await self.keep(closed.number, model)))
