"""Suspicion gathers, honest clients that stand out now and then stay, attackers do not."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pytest
from fedrobust_server import suspicion
from fedrobust_server.quarantine import (
    MALFORMED,
    WATCH,
    Ban,
    Changed,
    Client,
    Exclude,
    Override,
    Policy,
    Release,
    Standing,
    State,
    evidence,
    observe,
    override,
    parse_action,
    parse_policy,
)
from hypothesis import given
from hypothesis import strategies as st

from fedrobust import InputError, Verdict, aggregate
from fedrobust.attacks import View, parse_attack

ON = Policy()
ONE_OF_FOUR = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0}


def after(
    rounds: Iterable[Mapping[str, float]], policy: Policy = ON, state: State | None = None
) -> tuple[State, dict[int, list[Changed]]]:
    """The state after rounds of this evidence, and the changes by round."""
    state, log = state or State(), {}
    for number, found in enumerate(rounds, 1):
        state, changes = observe(policy, state, number, found)
        if changes:
            log[number] = changes
    return state, log


# ---- what a round says of its clients -----------------------------------------------------------------


def test_evidence_is_the_part_of_the_fair_weight_that_is_gone() -> None:
    found = evidence(Verdict.REMOVED, {"a": 0.0, "b": 0.1, "c": 0.3, "d": 0.3, "e": 0.3}, ["f"])
    assert found == pytest.approx({"a": 1, "b": 0.5, "c": 0, "d": 0, "e": 0, "f": 1})


def test_a_rule_that_picks_one_client_holds_nothing_against_the_others() -> None:
    weights = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0}
    assert evidence(Verdict.REMOVED, weights) == dict.fromkeys("abcd", 0.0)


def test_only_removal_is_held_against_anyone() -> None:
    weights = {"a": 0.0, "b": 0.5, "c": 0.5}
    assert evidence(Verdict.CLEAR, weights) == dict.fromkeys("abc", 0.0)
    for verdict in (Verdict.EXCEEDED, Verdict.NOT_JUDGED, None):
        assert evidence(verdict, weights) == {}
    assert evidence(Verdict.REMOVED, {}, ["z"]) == {"z": 1.0}
    assert "LATE" not in MALFORMED
    assert "NON_FINITE" in MALFORMED


# ---- the test -----------------------------------------------------------------------------------------


def test_a_client_without_weight_is_out_after_six_rounds_then_three_then_for_good() -> None:
    state, log = after([ONE_OF_FOUR] * 6)
    assert state.excluded == {"a"}
    assert list(log) == [6]
    (change,) = log[6]
    assert (change.before, change.client.standing, change.who) == (Standing.FREE, Standing.EXCLUDED, "")
    assert change.client.until == 26
    for number in range(7, 27):
        assert state.excluded == {"a"}
        state, changes = observe(ON, state, number, dict.fromkeys("bcd", 0.0))
    assert changes[0].client.standing is Standing.PROBATION
    assert state.excluded == frozenset()
    for number in range(27, 30):
        state, changes = observe(ON, state, number, ONE_OF_FOUR)
    assert changes[0].client.until == 49
    for number in range(30, 53):
        found = ONE_OF_FOUR if number > 49 else {}
        state, changes = observe(ON, state, number, found)
    assert changes[0].client.standing is Standing.BANNED
    assert "for the 3. time" in changes[0].reason


def test_good_behaviour_ends_probation() -> None:
    state = State({"a": Client(1.5, Standing.PROBATION, 0, 1), "b": Client(), "c": Client()})
    state, log = after([dict.fromkeys("abc", 0.0)] * 3, state=state)
    assert log[3][0].client == Client(0.0, Standing.FREE, 0, 1)


def test_rounds_that_say_nothing_change_nothing() -> None:
    state, _ = after([ONE_OF_FOUR] * 4)
    again, log = after([{}] * 50, state=state)
    assert again == state
    assert not log


def test_no_more_than_most_are_excluded_and_the_rest_are_named() -> None:
    guilty = {**dict.fromkeys("abc", 1.0), **dict.fromkeys("defgh", 0.0)}
    state, log = after([guilty] * 7)
    assert state.excluded == {"a", "b"}
    assert state.clients["c"].standing is Standing.SUSPECT
    assert "enough clients are excluded" in log[6][2].reason
    state, _ = override(ON, state, 8, Override("a", Release(), "mistake", "op"))
    state, _ = observe(ON, state, 8, {"c": 1.0})
    assert state.excluded == {"b", "c"}


def test_the_default_only_watches() -> None:
    state, log = after([ONE_OF_FOUR] * 50, parse_policy(WATCH))
    assert state.excluded == frozenset()
    assert state.clients["a"] == Client(3.0, Standing.SUSPECT)
    assert list(log) == [6]
    assert "only watches" in log[6][0].reason


@given(st.lists(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1)), max_size=60))
def test_suspicion_stays_in_range_and_exclusions_end(rounds: list[dict[str, float]]) -> None:
    state, _ = after(rounds)
    assert all(0 <= client.suspicion <= ON.threshold for client in state.clients.values())
    assert len(state.excluded) <= ON.most * max(len(state.clients), 1)
    assert sum(state.standings.values()) == len(state.clients)
    state, _ = after([{}] * (len(rounds) + ON.rounds), state=state)
    assert all(client.standing is not Standing.EXCLUDED for client in state.clients.values())


@pytest.mark.parametrize("p", [0.2, 0.3])
def test_false_alarms_are_no_more_frequent_than_the_docstring_says(p: float) -> None:
    """Every client loses all its weight with chance p; how many are excluded within 100 rounds?"""
    rng, clients, rounds = np.random.default_rng(0), 1000, 100
    names = [f"c{i}" for i in range(clients)]
    lost = (rng.random((rounds, clients)) < p).astype(float)
    policy = Policy(rounds=1000, most=1.0)
    state, _ = after((dict(zip(names, row.tolist(), strict=True)) for row in lost), policy)
    bound = rounds * (p / (1 - p)) ** (2 * policy.threshold)
    assert len(state.excluded) / clients <= bound


# ---- the real rule, honest clients that differ, and attacks -------------------------------------------


def federation(
    attack: str | None, seed: int, rounds: int = 40, n: int = 20, f: int = 4, d: int = 1000
) -> tuple[float, dict[int, list[Changed]]]:
    """What honest clients are charged with, and whose standing changes, by round.

    The filter over clients with centres of their own, each of which has a bad round in ten.

    The first f are malicious, if there is an attack; in a bad round an update is four times as far out.
    """
    rng = np.random.default_rng(seed)
    centres, truth = rng.normal(size=(n, d)), 3 * rng.normal(size=d)
    state, log, charged = State(), {}, 0.0
    for number in range(1, rounds + 1):
        asked = [i for i in range(n) if f"c{i}" not in state.excluded]
        far = np.where(rng.random(n) < 0.1, 4.0, 1.0)[:, None]
        X = truth * 0.98**number + far * (centres + 2 * rng.normal(size=(n, d)))
        rogues = [i for i in asked if i < f and attack is not None]
        if rogues:
            view = View.of(X[[i for i in asked if i >= f]], X[rogues])
            X[rogues] = parse_attack(attack or "")(view, rng).numpy()
        result = aggregate(X[asked], "filter", eps=0.2, seed=number)
        assert result.weights is not None
        weights = dict(zip((f"c{i}" for i in asked), result.weights.tolist(), strict=True))
        found = evidence(result.verdict, weights)
        charged += sum(found.get(f"c{i}", 0.0) for i in range(0 if attack is None else f, n))
        state, changes = observe(ON, state, number, found)
        if changes:
            log[number] = changes
    return charged, log


@pytest.mark.parametrize("seed", range(5))
def test_honest_clients_that_differ_stay(seed: int) -> None:
    charged, log = federation(None, seed)
    assert charged > 20  # there was something to forgive
    assert not log


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("attack", ["ipm", "sign_flip", "gaussian", "alie(1.5)"])
def test_persistent_attackers_are_out_within_ten_rounds_and_nobody_else(attack: str, seed: int) -> None:
    _, log = federation(attack, seed)
    changed = {change.name for changes in log.values() for change in changes}
    early = {change.name for number in log if number <= 10 for change in log[number]}
    assert changed == early == {"c0", "c1", "c2", "c3"}


# ---- operators, and the ledger ------------------------------------------------------------------------


@pytest.fixture
def db() -> Iterable[sqlite3.Connection]:
    database = sqlite3.connect(":memory:")
    database.executescript(suspicion.SCHEMA)
    yield database
    database.close()


def test_operators_release_ban_and_exclude(db: sqlite3.Connection) -> None:
    state, _ = after([ONE_OF_FOUR] * 6)
    for client, action in (("a", "release"), ("b", "ban"), ("c", "exclude(5)"), ("d", "unheard of")):
        db.execute(
            "INSERT INTO overrides (at, client, action, reason, who) VALUES (0, ?, ?, 'why', 'op')",
            (client, action),
        )
    state, changes = suspicion.apply_requests(db, ON, state, 7)
    assert state.clients["a"] == Client()
    assert state.excluded == {"b", "c"}
    assert state.clients["c"].until == 11
    assert [(c.name, c.who, c.reason) for c in changes] == [(x, "op", "why") for x in "abc"]
    assert [row[0] for row in db.execute("SELECT applied FROM overrides")] == [7, 7, 7, -1]
    assert suspicion.apply_requests(db, ON, state, 8) == (state, [])
    assert suspicion.restore(db).excluded == {"b", "c"}


def test_a_ban_outlasts_everything_but_a_release() -> None:
    state, change = override(ON, State(), 1, Override("a", Ban(), "rogue", "op"))
    assert change.before is Standing.FREE
    state, _ = after([{"b": 0.0}] * 100, state=state)
    assert state.excluded == {"a"}
    state, _ = override(ON, state, 101, Override("a", Release(), "appeal", "op"))
    assert state.excluded == frozenset()


def test_the_state_is_restored_from_the_ledger_after_every_round(db: sqlite3.Connection) -> None:
    state, rng = State(), np.random.default_rng(1)
    for number in range(1, 80):
        found = {name: float(rng.random() < p) for name, p in zip("abcdef", (1, 0.8, 0.2, 0, 0, 0))}  # noqa: B905
        found = {name: e for name, e in found.items() if name not in state.excluded}
        before = state
        state, _ = observe(ON, state, number, found)
        suspicion.keep(db, number, before, state, found)
        assert suspicion.restore(db) == state
    rows = suspicion.history(db, "a")
    assert rows[0]["evidence"] == 1
    assert [row["state"] for row in rows].count("excluded") >= 1
    assert any(row["evidence"] is None for row in rows)  # readmitted without being judged
    assert suspicion.latest(db)[0]["suspicion"] == 3


def test_decisions_are_kept_with_who_and_why(db: sqlite3.Connection) -> None:
    suspicion.request(db, Override("a", Exclude(5), "sends noise", "alice"))
    (row,) = suspicion.decisions(db, "a")
    assert (row["action"], row["reason"], row["who"]) == ("exclude(rounds=5)", "sends noise", "alice")
    assert row["applied"] is None
    _, (change,) = suspicion.apply_requests(db, ON, State(), 3)
    assert change.client.until == 7


# ---- text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["quarantine", "quarantine(rounds=0)", "quarantine(threshold=5.0)"])
def test_the_text_form_is_read_back(text: str) -> None:
    assert repr(parse_policy(text)) == text


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (parse_policy, "quarantine(tolerance=0)", "tolerance must be in"),
        (parse_policy, "quarantine(threshold=0.0)", "threshold must be above 0"),
        (parse_policy, "quarantine(rounds=-1)", "rounds must not be negative"),
        (parse_policy, "quarantine(strikes=0)", "strikes must be at least 1"),
        (parse_policy, "quarantine(most=2.0)", "most must be in"),
        (parse_policy, "jail", "unknown quarantine policy 'jail'"),
        (parse_action, "exclude(0)", "rounds must be at least 1"),
        (parse_action, f"exclude({2**63 - 1})", "rounds must be at most 2147483648"),
        (parse_policy, f"quarantine(rounds={2**31 + 1})", "rounds must be at most 2147483648"),
        (parse_action, "shoot", "choose from ban, exclude, release"),
    ],
)
def test_bad_text_is_one_line(read: Callable[[str], object], text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(text)
