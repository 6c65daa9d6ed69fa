"""The round machine: who is asked, what counts, when a round closes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from fedrobust_proto.v1.federation_pb2 import Status
from fedrobust_server import round as machine
from fedrobust_server.round import Action, Event, Fault, Phase, Plan, State, step
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

PLAN = Plan(rounds=3, needed=3, sample=1.0, quorum=0.5, seed=7)
NAN = Fault(Status.STATUS_NON_FINITE, "nan")
CUT = Fault(Status.STATUS_TRUNCATED, "cut")


def play(state: State, events: Iterable[Event]) -> tuple[State, list[Action]]:
    actions: list[Action] = []
    for event in events:
        state, new = step(state, event)
        actions += new
    return state, actions


def joined(*clients: str, plan: Plan = PLAN) -> tuple[State, list[Action]]:
    return play(State(plan), [machine.Joined(client) for client in clients])


def submitted(*clients: str, number: int = 1) -> list[Event]:
    return [machine.Submitted(client, number) for client in clients]


def test_the_first_round_waits_for_enough_clients() -> None:
    state, actions = joined("a", "b")
    assert (state.phase, actions) == (Phase.WAITING, [])
    state, actions = step(state, machine.Joined("c"))
    assert actions == [machine.Open(1, ("a", "b", "c"))]


def test_a_round_closes_when_everybody_has_answered_in_client_order() -> None:
    state, actions = play(joined("a", "b", "c")[0], submitted("c", "a", "b"))
    assert actions[-1] == machine.Aggregate(1, ("a", "b", "c"))
    assert state.phase is Phase.AGGREGATING
    assert step(state, machine.Settled(1))[1] == [machine.Open(2, ("a", "b", "c"))]


def test_a_refused_client_loses_its_turn_and_the_round_goes_on() -> None:
    state, _ = joined("a", "b", "c")
    state, actions = step(state, machine.Submitted("a", 1, NAN))
    assert actions == [machine.Refuse("a", NAN)]
    _, actions = play(state, submitted("a", "b", "c"))
    assert actions[0].fault.status == Status.STATUS_DUPLICATE  # type: ignore[union-attr]
    assert actions[-1] == machine.Aggregate(1, ("b", "c"))


def test_a_truncated_upload_may_be_sent_again() -> None:
    state, _ = step(joined("a", "b", "c")[0], machine.Submitted("a", 1, CUT))
    assert step(state, machine.Submitted("a", 1))[1] == [machine.Accept("a")]


def test_the_deadline_closes_a_round_with_a_quorum_and_skips_one_without() -> None:
    state, _ = play(joined("a", "b", "c")[0], submitted("a"))
    skipped, actions = step(state, machine.DeadlinePassed(1))
    assert actions == [machine.Skip(1, "1 of 3 updates, 2 needed")]
    assert step(skipped, machine.Settled(1))[1] == [machine.Open(2, ("a", "b", "c"))]
    state, _ = play(state, submitted("b"))
    assert step(state, machine.DeadlinePassed(1))[1] == [machine.Aggregate(1, ("a", "b"))]
    assert step(state, machine.DeadlinePassed(0)) == (state, [])


def test_late_early_and_uninvited_updates() -> None:
    state, _ = play(joined("a", "b", "c")[0], submitted("a", "b", "c"))
    assert machine.turn_fault(state, "a", 1).status == Status.STATUS_LATE  # type: ignore[union-attr]
    state, _ = step(state, machine.Settled(1))
    assert machine.turn_fault(state, "a", 1).status == Status.STATUS_LATE  # type: ignore[union-attr]
    assert machine.turn_fault(state, "a", 3).status == Status.STATUS_WRONG_ROUND  # type: ignore[union-attr]
    assert machine.turn_fault(state, "z", 2).status == Status.STATUS_NOT_SELECTED  # type: ignore[union-attr]
    assert machine.turn_fault(state, "a", 2) is None


def test_a_client_that_leaves_is_not_waited_for_and_may_come_back() -> None:
    state, _ = play(joined("a", "b", "c")[0], submitted("a", "b"))
    assert step(state, machine.Left("c"))[1] == [machine.Aggregate(1, ("a", "b"))]
    state, _ = play(joined("a", "b", "c")[0], [machine.Left("b"), machine.Left("c"), *submitted("a")])
    assert state.phase is Phase.COLLECTING  # one of three is no quorum: wait for them
    assert step(state, machine.Joined("b"))[1] == [machine.Offer(1, "b")]


def test_it_waits_when_everybody_is_gone_and_ends_after_the_last_round() -> None:
    state, _ = joined("a", plan=replace(PLAN, needed=1, rounds=2))
    state, actions = play(state, [*submitted("a"), machine.Left("a"), machine.Settled(1)])
    assert state.phase is Phase.WAITING
    state, actions = step(state, machine.Joined("a"))
    assert actions == [machine.Open(2, ("a",))]
    _, actions = play(state, [*submitted("a", number=2), machine.Settled(2)])
    assert actions[-1] == machine.Finish()


def test_few_get_no_round_to_themselves_when_all_others_are_gone_for_a_moment() -> None:
    state, _ = joined("a", "b", "c")
    gone = [machine.Left(client) for client in "abc"]
    state, actions = play(state, [*gone, machine.DeadlinePassed(1), machine.Settled(1)])
    assert state.phase is Phase.WAITING
    state, actions = step(state, machine.Joined("c"))
    assert (state.phase, actions) == (Phase.WAITING, [])
    assert step(state, machine.Joined("a"))[1] == [machine.Open(2, ("a", "c"))]


def test_it_goes_on_without_those_that_are_excluded() -> None:
    state, _ = joined("a", "b", "c")
    state, _ = play(state, [*submitted("a", "b", "c"), machine.Excluded(frozenset("ab"))])
    assert step(state, machine.Settled(1))[1] == [machine.Open(2, ("c",))]


@pytest.mark.parametrize(("quorum", "clients", "needed"), [(0.07, 100, 7), (0.55, 100, 55), (0.5, 3, 2)])
def test_a_quorum_is_no_more_than_it_says(quorum: float, clients: int, needed: int) -> None:
    names = [f"c{i:03}" for i in range(clients)]
    state, _ = joined(*names, plan=replace(PLAN, needed=clients, quorum=quorum))
    state, _ = play(state, submitted(*names[:needed]))
    assert isinstance(step(state, machine.DeadlinePassed(1))[1][0], machine.Aggregate)
    state, _ = joined(*names, plan=replace(PLAN, needed=clients, quorum=quorum))
    state, _ = play(state, submitted(*names[: needed - 1]))
    assert isinstance(step(state, machine.DeadlinePassed(1))[1][0], machine.Skip)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1.0), st.integers(1, 40))
def test_a_sample_depends_on_seed_and_round_alone(seed: int, sample: float, n: int) -> None:
    clients = [f"c{i:02d}" for i in range(n)]
    plan = Plan(rounds=9, needed=n, sample=sample, quorum=1.0, seed=seed)
    first = joined(*clients, plan=plan)[1]
    second = joined(*reversed(clients), plan=plan)[1]
    assert first == second
    assert 1 <= len(first[0].clients) <= n  # type: ignore[union-attr]


class Federation(RuleBasedStateMachine):
    """Any order of events: what was accepted is aggregated, once, and rounds only go up."""

    @initialize(quorum=st.sampled_from([0.3, 0.5, 1.0]), sample=st.sampled_from([0.5, 1.0]))
    def begin(self, quorum: float, sample: float) -> None:
        self.state = State(Plan(rounds=4, needed=2, sample=sample, quorum=quorum, seed=1))
        self.accepted: set[tuple[str, int]] = set()
        self.closed: list[int] = []

    def do(self, event: Event) -> None:
        before = self.state
        self.state, actions = step(before, event)
        for action in actions:
            match action:
                case machine.Accept(client):
                    assert before.phase is Phase.COLLECTING
                    assert (client, before.round) not in self.accepted
                    self.accepted.add((client, before.round))
                case machine.Aggregate(number, clients):
                    assert {(c, number) for c in clients} == {a for a in self.accepted if a[1] == number}
                    self.closed.append(number)
                case machine.Skip(number, reason):
                    assert reason
                    self.closed.append(number)
                case machine.Open(number, clients):
                    assert number == len(self.closed) + 1
                    assert clients
                    assert set(clients) <= self.state.present

    @rule(client=st.sampled_from("abcd"))
    def join(self, client: str) -> None:
        self.do(machine.Joined(client))

    @rule(client=st.sampled_from("abcd"))
    def leave(self, client: str) -> None:
        self.do(machine.Left(client))

    @rule(
        client=st.sampled_from("abcd"), ahead=st.integers(-1, 1), fault=st.sampled_from([None, NAN, CUT])
    )
    def submit(self, client: str, ahead: int, fault: Fault | None) -> None:
        self.do(machine.Submitted(client, self.state.round + ahead, fault))

    @rule(behind=st.integers(0, 1))
    def deadline(self, behind: int) -> None:
        self.do(machine.DeadlinePassed(self.state.round - behind))

    @precondition(lambda self: self.state.phase is Phase.AGGREGATING)
    @rule()
    def settle(self) -> None:
        self.do(machine.Settled(self.state.round))

    @invariant()
    def rounds_close_once_and_in_order(self) -> None:
        if hasattr(self, "closed"):
            assert self.closed == list(range(1, len(self.closed) + 1))


TestFederation = Federation.TestCase
TestFederation.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
