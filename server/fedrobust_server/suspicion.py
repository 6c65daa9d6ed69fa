"""Suspicion in the ledger: two tables, written by the server at round ends and by operators at any time.

Nothing here commits: the caller's `with db:` holds what belongs together, so that after a crash the
suspicion of a round is there as a whole or not at all. Any row factory that gives sequences will do.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from typing import Any

from fedrobust import InputError
from fedrobust_server.quarantine import (
    Changed,
    Client,
    Override,
    Policy,
    Standing,
    State,
    override,
    parse_action,
)

SCHEMA = """
CREATE TABLE suspicion (
    round INTEGER NOT NULL,
    client TEXT NOT NULL,
    evidence REAL,              -- of this round, 0 .. 1; empty where only its standing changed
    suspicion REAL NOT NULL,    -- gathered so far, 0 .. the policy's threshold
    state TEXT NOT NULL,        -- free | suspect | excluded | on probation | banned
    until INTEGER NOT NULL,     -- the last round of its exclusion; 0 if there is none, or for good
    strikes INTEGER NOT NULL,   -- exclusions so far
    PRIMARY KEY (round, client)
);
CREATE INDEX suspicion_by_client ON suspicion (client, round);
CREATE TABLE overrides (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,           -- seconds since 1970
    client TEXT NOT NULL,
    action TEXT NOT NULL,       -- release | ban | exclude(rounds)
    reason TEXT NOT NULL,
    who TEXT NOT NULL,
    applied INTEGER             -- the first round it holds for; empty: none yet; -1: not understood
);
"""


def restore(db: sqlite3.Connection) -> State:
    """The state after the last round that was kept: what a resumed server goes on from."""
    rows = db.execute(
        "SELECT client, suspicion, state, until, strikes, max(round) FROM suspicion GROUP BY client"
    )
    return State(
        {
            name: Client(suspicion, Standing(state), until, strikes)
            for name, suspicion, state, until, strikes, _ in rows
        }
    )


def keep(
    db: sqlite3.Connection, number: int, before: State, after: State, found: Mapping[str, float]
) -> None:
    """Write a round: a row for every client that was judged or whose state changed.

    Args:
        db: the ledger; within the transaction that closes the round.
        number: of the round.
        before: the state before `observe`.
        after: the state after it.
        found: the round's evidence by client.
    """
    rows = [
        (number, name, found.get(name), c.suspicion, c.standing.value, c.until, c.strikes)
        for name, c in after.clients.items()
        if name in found or c != before.clients.get(name)
    ]
    db.executemany("INSERT OR REPLACE INTO suspicion VALUES (?, ?, ?, ?, ?, ?, ?)", rows)


def request(db: sqlite3.Connection, decided: Override) -> None:
    """Leave a decision for the server, which reads it before its next round."""
    db.execute(
        "INSERT INTO overrides (at, client, action, reason, who) VALUES (?, ?, ?, ?, ?)",
        (time.time(), decided.client, repr(decided.action), decided.reason, decided.who),
    )


def applied(db: sqlite3.Connection, decided: Override, number: int) -> bool:
    """Whether this client has been decided about by the same, to hold from the round `number` on."""
    query = "SELECT 1 FROM overrides WHERE client = ? AND who = ? AND applied = ?"
    return db.execute(query, (decided.client, decided.who, number)).fetchone() is not None


def apply_requests(
    db: sqlite3.Connection, policy: Policy, state: State, number: int
) -> tuple[State, list[Changed]]:
    """Do what operators decided since the last round, in their order, and write that it is done.

    Args:
        db: the ledger, within a transaction.
        policy: of the run.
        state: before.
        number: of the round that is about to begin.

    Returns:
        The state to choose this round's clients by, and what changed.
    """
    waiting = db.execute(
        "SELECT id, client, action, reason, who FROM overrides WHERE applied IS NULL ORDER BY id"
    ).fetchall()
    before, changes = state, []
    for key, client, action, reason, who in waiting:
        applied = number
        try:
            decided = Override(client, parse_action(action), reason, who)
        except InputError:  # written by another version or by hand: it must not stop the federation
            applied = -1
        else:
            state, change = override(policy, state, number, decided)
            changes.append(change)
        db.execute("UPDATE overrides SET applied = ? WHERE id = ?", (applied, key))
    keep(db, number, before, state, {})
    return state, changes


def latest(db: sqlite3.Connection) -> list[dict[str, Any]]:
    """How every client stands: its last row as columns by name, the most suspicious first."""
    found = _rows(
        db,
        "SELECT max(round) AS round, client, evidence, suspicion, state, until, strikes FROM suspicion"
        " GROUP BY client",
    )
    return sorted(found, key=lambda row: (-row["suspicion"], row["client"]))


def history(db: sqlite3.Connection, client: str) -> list[dict[str, Any]]:
    """All rows of one client, by round."""
    return _rows(db, "SELECT * FROM suspicion WHERE client = ? ORDER BY round", client)


def decisions(db: sqlite3.Connection, client: str) -> list[dict[str, Any]]:
    """All that operators decided about one client, in order."""
    return _rows(db, "SELECT * FROM overrides WHERE client = ? ORDER BY id", client)


def _rows(db: sqlite3.Connection, query: str, *values: str) -> list[dict[str, Any]]:
    cursor = db.execute(query, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]
