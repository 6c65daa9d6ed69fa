"""The life of a federation as a pure state machine: step(state, event) -> (state, actions).

No clock, no network, no randomness but the seed: the coordinator turns what happens into events and
performs the actions. A refusal costs a client its turn, never the round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from fedrobust_proto.v1.federation_pb2 import Status

from fedrobust.rules.fraction import at_least


@dataclass(frozen=True)
class Plan:
    """What the machine needs of the configuration; the meanings are `RunConfig`'s."""

    rounds: int
    needed: int
    sample: float
    quorum: float
    seed: int


class Phase(Enum):
    """Where the federation stands."""

    WAITING = "waiting for clients"
    COLLECTING = "collecting updates"
    AGGREGATING = "aggregating"
    DONE = "done"


@dataclass(frozen=True)
class State:
    """Everything that the next step depends on.

    Attributes:
        plan: fixed for the run.
        phase: what is going on.
        round: the number of the current round, from 1; 0 before the first.
        present: clients that wait for work or work now.
        selected: clients asked in this round.
        accepted: clients whose update counts in this round.
        failed: clients whose turn in this round is lost.
        awaited: clients that the server knew before it was resumed, and that have not come back yet; the
            next round begins when they have, or a deadline later.
        excluded: clients that are not asked.
        draining: whether no further round begins.
    """

    plan: Plan
    phase: Phase = Phase.WAITING
    round: int = 0
    present: frozenset[str] = frozenset()
    selected: frozenset[str] = frozenset()
    accepted: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    awaited: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()
    draining: bool = False


@dataclass(frozen=True)
class Fault:
    """Why an update does not count: a status of the wire and words for people."""

    status: Status
    reason: str


@dataclass(frozen=True)
class Joined:
    """A client waits for work."""

    client: str


@dataclass(frozen=True)
class Left:
    """A client's connection is gone."""

    client: str


@dataclass(frozen=True)
class Submitted:
    """A client's upload for a round came to an end; `fault` is what is wrong with its content."""

    client: str
    round: int
    fault: Fault | None = None


@dataclass(frozen=True)
class DeadlinePassed:
    """The time of a round is up."""

    round: int


@dataclass(frozen=True)
class Settled:
    """A closed round has been dealt with: aggregated, or given up."""

    round: int


@dataclass(frozen=True)
class Resumed:
    """The server is back, in or after a round that is known from the ledger.

    Attributes:
        round: its number.
        selected: who was asked.
        accepted: whose update counts.
        failed: whose turn is lost.
        collected: whether the round had been closed to further updates.
        closed: whether it had been dealt with.
    """

    round: int
    selected: frozenset[str]
    accepted: frozenset[str]
    failed: frozenset[str]
    collected: bool = False
    closed: bool = False


@dataclass(frozen=True)
class Excluded:
    """These clients, and no others, are not asked from the next round on."""

    clients: frozenset[str]


@dataclass(frozen=True)
class Draining:
    """The server is to stop: no further round begins."""


Event = Joined | Left | Submitted | DeadlinePassed | Settled | Resumed | Excluded | Draining


@dataclass(frozen=True)
class Open:
    """Begin a round: ask these clients."""

    round: int
    clients: tuple[str, ...]


@dataclass(frozen=True)
class Offer:
    """Ask one client again, which came back while its round is still open."""

    round: int
    client: str


@dataclass(frozen=True)
class Accept:
    """Tell this client that its update counts."""

    client: str


@dataclass(frozen=True)
class Refuse:
    """Tell this client that its update does not count."""

    client: str
    fault: Fault


@dataclass(frozen=True)
class Aggregate:
    """Close the round and combine these clients' updates, in this order."""

    round: int
    clients: tuple[str, ...]


@dataclass(frozen=True)
class Skip:
    """Close the round without changing the model."""

    round: int
    reason: str


@dataclass(frozen=True)
class Finish:
    """The last round is over."""


Action = Open | Offer | Accept | Refuse | Aggregate | Skip | Finish

KEEPS_TURN = {
    Status.STATUS_TRUNCATED,
    Status.STATUS_LATE,
    Status.STATUS_DUPLICATE,
    Status.STATUS_UNAVAILABLE,
    # Not about an update, but about when it came; where it might count it is still awaited.
    Status.STATUS_WRONG_ROUND,
    Status.STATUS_NOT_SELECTED,
    Status.STATUS_EXCLUDED,
}
"""Answers after which a client may submit again while the round is open."""


def step(state: State, event: Event) -> tuple[State, Sequence[Action]]:  # noqa: C901, PLR0911 (one case an event)
    """What one event does to the federation."""
    match event:
        case Joined(client):
            awaited = state.awaited - {client}
            return _joined(replace(state, present=state.present | {client}, awaited=awaited), client)
        case Left(client):
            return _close_if_answered(replace(state, present=state.present - {client}))
        case Submitted():
            return _submitted(state, event)
        case DeadlinePassed(number) if number == state.round:
            state = replace(state, awaited=frozenset())
            if state.phase is Phase.COLLECTING:
                return _close(state)
            if state.phase is Phase.WAITING:
                return _open(state)
        case Settled(number):
            if state.phase is Phase.AGGREGATING and number == state.round:
                return _open(state)
        case Resumed():
            return _resumed(state, event)
        case Excluded(clients):
            state = replace(state, excluded=clients)
            return _open(state) if state.phase is Phase.WAITING else (state, [])
        case Draining():
            state = replace(state, draining=True)
            if state.phase in {Phase.WAITING, Phase.COLLECTING}:  # what has come in is kept
                return replace(state, phase=Phase.DONE), [Finish()]
    return state, []


def turn_fault(state: State, client: str, number: int) -> Fault | None:  # noqa: PLR0911 (one a fault)
    """Why this client may not submit for this round just now; None if it may."""
    if number > state.round:
        return Fault(
            Status.STATUS_WRONG_ROUND, f"round {number} has not begun; the current one is {state.round}"
        )
    if number < state.round or state.phase is not Phase.COLLECTING:
        return Fault(Status.STATUS_LATE, f"round {number} is closed")
    if client in state.excluded:
        return Fault(Status.STATUS_EXCLUDED, f"{client} is excluded from round {number}")
    if client not in state.selected:
        return Fault(Status.STATUS_NOT_SELECTED, f"{client} was not asked in round {number}")
    if client in state.accepted:
        return Fault(Status.STATUS_DUPLICATE, f"{client} has already submitted in round {number}")
    if client in state.failed:
        return Fault(Status.STATUS_DUPLICATE, f"{client} has lost its turn in round {number}")
    return None


def _joined(state: State, client: str) -> tuple[State, Sequence[Action]]:
    if state.phase is Phase.WAITING:
        return _open(state)
    if state.phase is Phase.COLLECTING and turn_fault(state, client, state.round) is None:
        return state, [Offer(state.round, client)]
    return state, []


def _submitted(state: State, event: Submitted) -> tuple[State, Sequence[Action]]:
    fault = turn_fault(state, event.client, event.round) or event.fault
    if fault is None:
        state = replace(state, accepted=state.accepted | {event.client})
        answer: Action = Accept(event.client)
    else:
        if fault.status not in KEEPS_TURN and fault is event.fault:
            state = replace(state, failed=state.failed | {event.client})
        answer = Refuse(event.client, fault)
    state, actions = _close_if_answered(state)
    return state, [answer, *actions]


def _resumed(state: State, event: Resumed) -> tuple[State, Sequence[Action]]:
    state = replace(
        state,
        phase=Phase.COLLECTING,
        round=event.round,
        selected=event.selected,
        accepted=event.accepted,
        failed=event.failed,
        awaited=event.selected,
    )
    if event.closed:
        return _open(state)
    return _close(state) if event.collected else _close_if_answered(state)


def _close_if_answered(state: State) -> tuple[State, Sequence[Action]]:
    here = state.present | state.awaited
    waiting_for = (state.selected & here) - state.accepted - state.failed
    if state.phase is not Phase.COLLECTING or waiting_for:
        return state, []
    if len(state.accepted) < _quorum(state) and state.selected - here:
        return state, []  # those who left may come back before the deadline
    return _close(state)


def _close(state: State) -> tuple[State, Sequence[Action]]:
    if len(state.accepted) >= _quorum(state):
        clients = tuple(sorted(state.accepted))
        return replace(state, phase=Phase.AGGREGATING), [Aggregate(state.round, clients)]
    reason = f"{len(state.accepted)} of {len(state.selected)} updates, {_quorum(state)} needed"
    closed, number = replace(state, phase=Phase.AGGREGATING), state.round
    return closed, [Skip(number, reason)]


def _open(state: State) -> tuple[State, Sequence[Action]]:
    if state.draining or state.round == state.plan.rounds:
        return replace(state, phase=Phase.DONE), [Finish()]
    willing, needed = state.present - state.excluded, state.plan.needed
    if state.round:  # no few get a round to themselves because all others are gone for a moment
        needed = at_least(min(state.plan.quorum, 0.5), max(needed - len(state.excluded), 1))
    if state.awaited or len(willing) < needed:
        return replace(state, phase=Phase.WAITING), []
    number = state.round + 1
    selected = _select(state, number)
    state = replace(
        state,
        phase=Phase.COLLECTING,
        round=number,
        selected=frozenset(selected),
        accepted=frozenset(),
        failed=frozenset(),
    )
    return state, [Open(number, selected)]


def _select(state: State, number: int) -> tuple[str, ...]:
    """A random sample of those who may be asked that depends on the seed and the round alone."""
    present = sorted(state.present - state.excluded)
    count = at_least(state.plan.sample, len(present))
    rng = np.random.default_rng(np.random.SeedSequence(state.plan.seed, spawn_key=(2, number)))
    return tuple(sorted(rng.choice(present, size=count, replace=False).tolist()))


def _quorum(state: State) -> int:
    return at_least(state.plan.quorum, len(state.selected))
