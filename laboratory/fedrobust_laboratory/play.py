"""A whole federation in one process: a real one's round machine, rules and clients, without messages.

A played federation comes to the model that a served one comes to, up to rounding: the same clients are
asked, they train on the same batches, and the same rows are combined. What is left out is what costs
time and changes nothing: packing, checksums, the ledger, the wire.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fedrobust_clients.malicious import Coalition, Threat
from fedrobust_proto.v1.federation_pb2 import Status
from fedrobust_server import quarantine
from fedrobust_server import round as machine
from fedrobust_server.combination import Combination
from fedrobust_server.config import RunConfig
from fedrobust_server.quarantine import evidence, parse_policy
from fedrobust_server.record import by_client
from fedrobust_server.runs import read_checkpoint
from fedrobust_server.schedule import parse_schedule
from torch import Tensor

from fedrobust import Aggregated, InputError, Verdict, kernels
from fedrobust.aggregate import LocalRows
from fedrobust.data import Dataset
from fedrobust.kernels import Block, Vector
from fedrobust.optimisers import parse_optimiser
from fedrobust.training import (
    Learner,
    Shared,
    client_name,
    load_vector,
    root_learner,
    to_vector,
    updates,
)

_NON_FINITE = machine.Fault(Status.STATUS_NON_FINITE, "the update holds values that are not finite")


@dataclass(frozen=True, eq=False)
class Played:
    """A finished round.

    Attributes:
        round: its number, from 1.
        clients: whose updates counted, in the order of the result's weights.
        rows: (n, d) float32, their updates.
        result: what the rule made of them; None if there were too few for it.
        reason: why the model did not move; empty if it did.
        model: (d,) float32, after the round.
        excluded: who is not asked in the next round.
    """

    round: int
    clients: tuple[str, ...]
    rows: Tensor
    result: Aggregated | None
    reason: str
    model: Tensor
    excluded: frozenset[str]


def play(config: RunConfig, dataset: Dataset) -> Iterator[Played]:
    """Run a federation, round by round.

    All clients are there from the beginning and answer in time, so that deadlines make no difference,
    nor does what is about processes and transport alone.

    Args:
        config: of the run.
        dataset: that its task names; clients train on its device, and the server is on the processor.

    Raises:
        InputError: the task does not fit the dataset, or the attack does not fit the task.
    """
    shared = Shared.of(config.task, dataset)
    if config.initial:
        load_vector(shared.module, read_checkpoint(Path(config.initial), shared.module))
    cast = Cast.of(config, dataset, shared)
    table = _Table(config, dataset, to_vector(shared.module).cpu())
    plan = machine.Plan(config.rounds, config.needed, config.sample, config.quorum, config.task.seed)
    *others, last = map(client_name, range(config.task.clients))
    state = machine.State(plan, present=frozenset(others))
    state, actions = machine.step(state, machine.Joined(last))
    waiting = deque(actions)
    while waiting:
        events: list[machine.Event] = []
        match waiting.popleft():
            case machine.Open(number, clients):
                table.take(number, clients, cast.work(number, clients, table.model))
                events = [machine.Submitted(c, number, table.faults.get(c)) for c in clients]
            case machine.Aggregate(number, clients):
                yield table.settle(number, clients)
                events = [machine.Excluded(table.suspects.excluded), machine.Settled(number)]
            case machine.Skip(number, reason):
                yield table.settle(number, (), reason)
                events = [machine.Excluded(table.suspects.excluded), machine.Settled(number)]
        for event in events:
            state, actions = machine.step(state, event)
            waiting.extend(actions)


@dataclass(frozen=True)
class Cast:
    """All clients of a federation.

    Attributes:
        honest: their learners, by the client's index.
        coalition: the malicious ones, if there are any: the first ones.
        always: whether every client takes part in every round.
    """

    honest: Mapping[int, Learner]
    coalition: Coalition | None
    always: bool

    @classmethod
    def of(cls, config: RunConfig, dataset: Dataset, shared: Shared) -> Cast:
        """Gather the clients of a run. Raises as `play`."""
        task, f = config.task, config.malicious
        honest = {i: Learner(task, dataset, i, shared=shared) for i in range(f, task.clients)}
        threat = Threat(f, config.attack, config.rule, config.eps)
        policy, schedule = parse_policy(config.quarantine), parse_schedule(config.schedule)
        always = config.sample == 1 and schedule is None and policy.rounds == 0
        return cls(honest, threat.coalition(task, dataset, shared) if f else None, always)

    def work(self, number: int, clients: Sequence[str], model: Tensor) -> Tensor:
        """(k, d) float32: what these clients send in a round, a row a client.

        Args:
            number: of the round.
            clients: their names, in the names' order.
            model: (d,) float32, the broadcast model.
        """
        indices = [int(name.rpartition("-")[2]) for name in clients]
        chosen = sorted(indices)  # malicious clients first, which from 10 000 on the names are not
        learners = [self.honest[i] for i in chosen if i in self.honest]
        rogues = chosen[: len(chosen) - len(learners)]
        rows = model.new_empty(len(chosen), len(model))
        honest = rows[len(rogues) :]
        if learners:
            updates(learners, number, model, out=honest)
        if rogues and self.coalition is not None:
            # Else it trains all honest clients by itself from the first round on, as it would have to
            # over the network, where it cannot know who is asked: their momentum depends on that.
            seen = honest if self.always else None
            rows[: len(rogues)] = self.coalition.rows(number, model, seen)[rogues]
        return rows if chosen == indices else rows[np.searchsorted(chosen, indices)]


class _Table:
    """The server's side of a federation: the round's updates, the model, and who is suspect.

    Attributes:
        faults: what is wrong with whose update in this round.
        suspects: how the clients stand.
    """

    def __init__(self, config: RunConfig, dataset: Dataset, model: Tensor) -> None:
        self._config, self._optimiser = config, parse_optimiser(config.optimiser)
        self._state = self._optimiser.begin(model)
        self._policy, self._combination = parse_policy(config.quarantine), Combination.of(config)
        own = config.root and self._combination.anchors
        self._learner = root_learner(config.task, dataset, config.root) if own else None
        self._anchors: tuple[Tensor, ...] = ()
        self._clients: Sequence[str] = ()
        self._rows, self._squares = model.new_empty(0, len(model)), np.empty(0)
        self.faults: dict[str, machine.Fault] = {}
        self.suspects = quarantine.State()

    @property
    def model(self) -> Tensor:
        """(d,) float32, as it is at the moment."""
        return self._state[0].clone()

    def take(self, number: int, clients: Sequence[str], rows: Tensor) -> None:
        """A round's updates, of which some may be of no use."""
        if self._learner is not None:
            self._anchors = (self._learner.update(number, self.model),)
        self._clients, self._rows = clients, rows
        self._squares = kernels.squared_norms(Block(rows))
        unsound = [c for c, s in zip(clients, self._squares, strict=True) if not math.isfinite(s)]
        self.faults = dict.fromkeys(unsound, _NON_FINITE)

    def settle(self, number: int, clients: tuple[str, ...], reason: str = "") -> Played:
        """The end of a round: combine these clients' updates; none if there is a reason not to."""
        result, spread, rows = None, dict[str, float](), self._rows[:0]
        if clients:
            rows, squares = self._of(clients)
            try:
                local = LocalRows((Block(rows, anchors=self._anchors),))
                result, spread = self._combination(
                    number, clients, local, local.width, squares, lambda: local.sum(kernels.gram)
                )
            except InputError as error:  # too few clients for the rule: the round's fault
                reason = str(error)
        if result is not None and result.verdict is Verdict.EXCEEDED and self._config.exceeded == "skip":
            reason = result.verdict.value
        elif result is not None:
            self._optimiser.step(self._state, result.value[0])
        self._judge(number, clients, result, spread)
        return Played(number, clients, rows, result, reason, self.model, self.suspects.excluded)

    def _of(self, clients: Sequence[str]) -> tuple[Tensor, Vector]:
        """Their updates and the squares of those."""
        if len(clients) == len(self._clients):
            return self._rows, self._squares
        place = {client: i for i, client in enumerate(self._clients)}
        chosen = [place[client] for client in clients]
        return self._rows[chosen], self._squares[chosen]

    def _judge(
        self,
        number: int,
        clients: Sequence[str],
        result: Aggregated | None,
        spread: Mapping[str, float],
    ) -> None:
        weights = by_client(clients, result)[0] if result is not None else {}
        found = evidence(result.verdict if result else None, weights, self.faults)
        self.suspects, _ = quarantine.observe(self._policy, self.suspects, number, found)
        schedule = self._combination.schedule
        if schedule is not None and spread:
            seed = self._config.task.draws(number)
            for decided in schedule.decide(number, spread, self._config.eps, seed):
                self.suspects, _ = quarantine.override(self._policy, self.suspects, number + 1, decided)
