"""The ledger keeps what it is told, and refuses files that are not its own."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
from fedrobust_server import suspicion
from fedrobust_server.ledger import Answer, Ledger
from fedrobust_server.quarantine import Ban, Override, Policy, Release, State
from fedrobust_server.round import KEEPS_TURN

from fedrobust import InputError


def test_it_keeps_rounds_and_answers_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.open_round(1, ["a", "b"])
    ledger.answer(Answer(1, "a", "ACCEPTED", "", "ff", 1.5, 10))
    ledger.answer(Answer(1, "b", "NON_FINITE", "nan"))
    ledger.close_round(1, {"outcome": "aggregated", "accuracy": 0.5}, {"a": 1.0}, {"a": 0.1})
    ledger.close()
    again = Ledger(path)
    (row,) = again.rounds()
    assert (row["round"], row["selected"], row["outcome"]) == (1, '["a", "b"]', "aggregated")
    first, second = again.answers()
    assert (first["weight"], first["score"], first["norm"]) == (1.0, 0.1, 1.5)
    assert (second["status"], second["reason"], second["weight"]) == ("NON_FINITE", "nan", None)
    again.close()


def refused(ledger: Ledger, client: str, count: int, status: str = "LATE") -> None:
    """Refuse a client so often, each time for another round of its making."""
    for number in range(count):
        ledger.answer(Answer(number, client, status, f"the {number}th", "ff", None, number))


def test_refusals_are_counted_and_do_not_make_it_grow(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_round(1, ["a", "b"])
    ledger.answer(Answer(1, "b", "ACCEPTED", "", "ff", 1.5, 10))
    refused(ledger, "a", 1000)
    refused(ledger, "a", 2, "DUPLICATE")
    refused(ledger, "b", 5)
    rows = [(a["client"], a["status"], a["reason"], a["times"]) for a in ledger.answers()]
    late = [("LATE", f"the {i}th", 1) for i in range(3)]
    assert rows == [
        ("b", "ACCEPTED", "", 1),
        *(("a", *row) for row in late),
        ("a", "LATE", "the 999th", 997),
        *(("a", "DUPLICATE", f"the {i}th", 1) for i in range(2)),
        *(("b", *row) for row in late),
        ("b", "LATE", "the 4th", 2),
    ]
    ledger.open_round(2, ["a"])  # and they are kept one by one again
    refused(ledger, "a", 1)
    assert [a["times"] for a in ledger.answers()[len(rows) :]] == [1]
    ledger.close()
    ledger = Ledger(tmp_path / "ledger.sqlite")  # where nothing is known of earlier rows
    refused(ledger, "a", 10)
    assert [a["times"] for a in ledger.answers()[len(rows) + 1 :]] == [1, 1, 1, 7]
    ledger.close()


def test_whoever_lost_its_turn_before_many_more_refusals_has_lost_it_after_a_restart(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_round(1, ["a", "b"])
    refused(ledger, "a", 10, "TRUNCATED")
    refused(ledger, "b", 10, "TRUNCATED")
    ledger.answer(Answer(1, "a", "NON_FINITE", "nan"))
    refused(ledger, "a", 10, "DUPLICATE")
    standing = ledger.standing(KEEPS_TURN)
    assert standing is not None
    assert standing.failed == {"a"}
    ledger.close()


def test_who_came_for_the_wrong_round_has_its_turn_after_a_restart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_round(1, ["a", "b", "c"])
    for client, status in (("a", "WRONG_ROUND"), ("b", "NOT_SELECTED"), ("c", "EXCLUDED")):
        ledger.answer(Answer(1, client, status, ""))
    standing = ledger.standing(KEEPS_TURN)
    assert standing is not None
    assert not standing.failed
    ledger.close()


def test_a_refusal_that_cannot_be_recorded_is_not_counted(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.open_round(1, ["a"])
    ledger._db.execute("PRAGMA query_only = 1")
    for _ in range(10):
        with pytest.raises(sqlite3.OperationalError):
            ledger.answer(Answer(1, "a", "LATE", "late"))
    ledger._db.execute("PRAGMA query_only = 0")
    refused(ledger, "a", 5)
    assert [a["times"] for a in ledger.answers()] == [1, 1, 1, 2]
    ledger.close()


def test_a_file_that_is_no_ledger_or_of_another_version_is_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("not a database, but long enough to be read as one" * 50)
    with pytest.raises(InputError, match="is not a ledger"):
        Ledger(text)
    old = tmp_path / "old"
    with sqlite3.connect(old) as database:
        database.execute("CREATE TABLE rounds (round)")
        database.execute("PRAGMA user_version = 99")
    database.close()
    before = old.read_bytes()
    with pytest.raises(InputError, match="version 99; this program needs 3"):
        Ledger(old)
    assert old.read_bytes() == before


def test_what_an_operator_decides_costs_no_rounds_evidence(tmp_path: Path) -> None:
    with contextlib.closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        policy, found = Policy(), {"a": 1.0, "b": 0.0}
        sent = Override("b", Ban(), "look 1", "sever")
        state, changes = ledger.judge_clients(policy, State(), 1, found, [sent])
        assert [(change.name, change.who) for change in changes] == [("b", "sever")]
        assert state.excluded == {"b"}
        for number in (2, 3):
            state, _ = ledger.judge_clients(policy, state, number, found)
        assert state.clients["a"].suspicion == 1.5
        again, changes = ledger.judge_clients(policy, state, 3, found, [sent])  # after a crash
        assert (again, changes) == (state, [])


def test_a_round_that_is_judged_again_does_not_undo_what_was_decided_since(tmp_path: Path) -> None:
    """A rule without weights leaves no evidence by which to tell that the round was judged."""
    with contextlib.closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        sent = [Override(name, Ban(), "look 1", "sever") for name in "ab"]
        state, _ = ledger.judge_clients(Policy(), State(), 2, {}, sent)
        assert state.excluded == {"a", "b"}
        with ledger._db:  # the server is killed, and an operator looks at what it did
            suspicion.request(ledger._db, Override("b", Release(), "an honest one", "operator"))
        state, _ = ledger.judge_clients(Policy(), ledger.suspects(), 2, {}, sent)
        assert state.excluded == {"a"}
        state, _ = ledger.judge_clients(Policy(), state, 4, {}, sent[1:])  # another look
        assert state.excluded == {"a", "b"}
