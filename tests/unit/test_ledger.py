"""The ledger keeps what it is told, and refuses files that are not its own."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from fedrobust_server.ledger import Answer, Ledger

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
    with pytest.raises(InputError, match="version 99; this program needs 2"):
        Ledger(old)
    assert old.read_bytes() == before
