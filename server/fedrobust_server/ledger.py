"""What happened, for good: every round and every answer, accepted or refused, in SQLite."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrobust_proto.v1.federation_pb2 import Status

from fedrobust import InputError
from fedrobust_server import suspicion
from fedrobust_server.quarantine import Changed, Override, Policy, State, observe

VERSION = 3

_SINGLY = 3
"""Refusals of one kind of one client in one round that are kept one by one; the others share a row."""

_SCHEMA = """
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY,
    opened REAL NOT NULL,       -- seconds since 1970
    selected TEXT NOT NULL,     -- JSON list of clients; a client's slot is its place in it
    collected REAL,             -- when it closed to further updates
    closed REAL,                -- when it had been dealt with
    state TEXT,                 -- BLAKE3 of the server's state after it, hexadecimal
    outcome TEXT,               -- aggregated | skipped
    reason TEXT,
    verdict TEXT,
    top_eigenvalue REAL,        -- of the raw round's covariance
    variation REAL,             -- the certificate: t*,
    spread REAL,                -- kept spread,
    honest_spread REAL,         -- assumption-free honest spread,
    bound REAL,                 -- bound without assumption,
    bound_kept REAL,            -- bound if honest clients spread no more than those kept
    notes TEXT,                 -- JSON figures of the rule
    accuracy REAL,
    loss REAL
);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY,
    round INTEGER NOT NULL,     -- as the client claimed it
    client TEXT NOT NULL,
    at REAL NOT NULL,
    status TEXT NOT NULL,       -- a status of the wire
    reason TEXT NOT NULL,
    digest TEXT,
    norm REAL,
    examples INTEGER,           -- as the client claimed it
    weight REAL,
    score REAL,
    times INTEGER NOT NULL DEFAULT 1    -- submissions that it stands for; the last of them is shown
);
CREATE INDEX answers_by_round ON answers (round, client);
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    round INTEGER NOT NULL,
    what TEXT NOT NULL          -- a fault that was survived, a resumption, in words
);
"""


@dataclass(frozen=True)
class Answer:
    """One submission and what became of it; columns as in the table."""

    round: int
    client: str
    status: str
    reason: str
    digest: str = ""
    norm: float | None = None
    examples: int = 0


@dataclass(frozen=True)
class Standing:
    """Where a run stood when its server ended.

    Attributes:
        round: the last round that began.
        selected: who was asked in it, in the order of their slots.
        accepted: the updates that count: client to digest, hexadecimal, and norm.
        failed: whose turn in it is lost: they sent what cannot be an update.
        collected: whether it had closed to further updates.
        closed: whether it had been dealt with.
        judged: whether the model that it began with had been evaluated, or needs not be.
        state_round: the last round that moved the model, 0 before the first.
        state: digest of the server's state after that, hexadecimal; empty before the first.
    """

    round: int
    selected: tuple[str, ...]
    accepted: Mapping[str, tuple[str, float]]
    failed: frozenset[str]
    collected: bool
    closed: bool
    judged: bool
    state_round: int
    state: str


class Ledger:
    """The record of a run, of which nothing is taken back; one writer.

    A client can be refused as often as it likes, and must not fill the disk by it: of each round and
    status a few of its refusals are kept as they are, and the others counted in one row.

    What a method was told survives the death of the process once it has returned, and a loss of power
    as well where `sync` was asked for.
    """

    def __init__(self, path: Path, *, sync: bool = False) -> None:
        """Open the ledger, or begin one.

        Raises:
            InputError: the file is no ledger, or of another version.
        """
        self._db = sqlite3.connect(path, check_same_thread=False)
        try:
            empty = _is_empty(self._db, path)
        except InputError:
            self._db.close()
            raise
        self._refused: dict[tuple[str, str], list[int]] = {}  # their rows, since the last round began
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(f"PRAGMA synchronous = {'FULL' if sync else 'NORMAL'}")
        if empty:
            with self._db:
                self._db.executescript(_SCHEMA + suspicion.SCHEMA)
                self._db.execute(f"PRAGMA user_version = {VERSION}")

    def open_round(self, number: int, selected: Sequence[str]) -> None:
        """A round begins."""
        with self._db:
            self._db.execute(
                "INSERT INTO rounds (round, opened, selected) VALUES (?, ?, ?)",
                (number, time.time(), json.dumps(list(selected))),
            )
        self._refused.clear()

    def answer(self, answer: Answer) -> None:
        """A client submitted something."""
        values = {**vars(answer), "at": time.time()}
        rows: list[int] = []
        if answer.status != "ACCEPTED":
            rows = self._refused.setdefault((answer.client, answer.status), rows)
        if len(rows) > _SINGLY:
            last = ", ".join(f"{column} = :{column}" for column in values)
            with self._db:
                self._db.execute(
                    f"UPDATE answers SET {last}, times = times + 1 WHERE id = :id",  # noqa: S608
                    {**values, "id": rows[-1]},
                )
            return
        names, places = ", ".join(values), ", ".join(f":{column}" for column in values)
        insert = f"INSERT INTO answers ({names}) VALUES ({places})"  # noqa: S608
        with self._db:
            made = self._db.execute(insert, values)
        rows.append(made.lastrowid or 0)

    def collect(self, number: int) -> None:
        """A round closes to further updates."""
        with self._db:
            self._db.execute("UPDATE rounds SET collected = ? WHERE round = ?", (time.time(), number))

    def event(self, number: int, what: str) -> None:
        """Something happened in a round that an operator should know of."""
        with self._db:
            self._db.execute(
                "INSERT INTO events (at, round, what) VALUES (?, ?, ?)", (time.time(), number, what)
            )

    def judge(self, number: int, accuracy: float, loss: float) -> None:
        """The model after a round has been evaluated."""
        with self._db:
            self._db.execute(
                "UPDATE rounds SET accuracy = ?, loss = ? WHERE round = ?", (accuracy, loss, number)
            )

    def close_round(
        self,
        number: int,
        figures: Mapping[str, Any],
        weights: Mapping[str, float],
        scores: Mapping[str, float],
    ) -> None:
        """A round ends: columns of the table by name, and the clients' weights and scores."""
        columns = ", ".join(f"{column} = :{column}" for column in figures)
        with self._db:
            self._db.execute(
                f"UPDATE rounds SET closed = :closed, {columns} WHERE round = :round",  # noqa: S608
                {**figures, "closed": time.time(), "round": number},
            )
            for column, values in (("weight", weights), ("score", scores)):
                self._db.executemany(
                    f"UPDATE answers SET {column} = ? WHERE round = ? AND client = ?"  # noqa: S608
                    " AND status = 'ACCEPTED'",
                    [(value, number, client) for client, value in values.items()],
                )

    def suspects(self) -> State:
        """How the clients stand after the last round."""
        return suspicion.restore(self._db)

    def judge_clients(
        self,
        policy: Policy,
        before: State,
        number: int,
        found: Mapping[str, float],
        decided: Sequence[Override] = (),
    ) -> tuple[State, list[Changed]]:
        """A round's evidence is gathered, and what operators decided meanwhile is done.

        Args:
            policy: of the run.
            before: how the clients stood.
            number: of the round that is over.
            found: what it says of whom, in [0, 1].
            decided: what the run's schedule decides after it.

        Returns:
            How they stand in the next round, and whose standing changed.
        """
        changes: list[Changed] = []
        with self._db:
            (last,) = self._db.execute(
                "SELECT MAX(round) FROM suspicion WHERE evidence IS NOT NULL"
            ).fetchone()
            state = before
            if last is None or last < number:  # else the server was killed before it closed the round
                state, changes = observe(policy, before, number, found)
                suspicion.keep(self._db, number, before, state, found)
                for override in decided:
                    if not suspicion.applied(self._db, override, number + 1):
                        suspicion.request(self._db, override)
            state, overridden = suspicion.apply_requests(self._db, policy, state, number + 1)
        return state, [*changes, *overridden]

    def override(self, policy: Policy, before: State, number: int) -> tuple[State, list[Changed]]:
        """What operators decided is done, between two rounds.

        Args:
            policy: of the run.
            before: how the clients stood.
            number: of the round that is about to begin.

        Returns:
            As `judge_clients`.
        """
        with self._db:
            return suspicion.apply_requests(self._db, policy, before, number)

    def rounds(self) -> list[dict[str, Any]]:
        """All rounds in order, as columns by name."""
        return [dict(row) for row in self._db.execute("SELECT * FROM rounds ORDER BY round")]

    def answers(self) -> list[dict[str, Any]]:
        """All answers in order of arrival, as columns by name."""
        return [dict(row) for row in self._db.execute("SELECT * FROM answers ORDER BY id")]

    def events(self) -> list[dict[str, Any]]:
        """All events in order, as columns by name."""
        return [dict(row) for row in self._db.execute("SELECT * FROM events ORDER BY id")]

    def standing(self, keeps_turn: Collection[Status]) -> Standing | None:
        """Where the run stands; None before its first round.

        Args:
            keeps_turn: answers that leave a client its turn.
        """
        last = self._db.execute("SELECT * FROM rounds ORDER BY round DESC LIMIT 1").fetchone()
        if last is None:
            return None
        answers = self._db.execute(
            "SELECT client, status, digest, norm FROM answers WHERE round = ?", (last["round"],)
        ).fetchall()
        moved = self._db.execute(
            "SELECT round, state FROM rounds WHERE state IS NOT NULL ORDER BY round DESC LIMIT 1"
        ).fetchone()
        before = self._db.execute(
            "SELECT accuracy FROM rounds WHERE round = ?", (last["round"] - 1,)
        ).fetchone()
        selected = tuple(json.loads(last["selected"]))
        accepted = {
            a["client"]: (a["digest"], a["norm"] or 0.0) for a in answers if a["status"] == "ACCEPTED"
        }
        kept = {"ACCEPTED", *(Status.Name(status).removeprefix("STATUS_") for status in keeps_turn)}
        lost = {a["client"] for a in answers if a["status"] not in kept}
        return Standing(
            round=last["round"],
            selected=selected,
            accepted=accepted,
            failed=frozenset(lost & set(selected)) - accepted.keys(),
            collected=last["collected"] is not None,
            closed=last["closed"] is not None,
            judged=before is None or before["accuracy"] is not None,
            state_round=moved["round"] if moved else 0,
            state=moved["state"] if moved else "",
        )

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _is_empty(db: sqlite3.Connection, path: Path) -> bool:
    """Whether a ledger is still to be made there. Raises `InputError`: something else is there."""
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        empty = not db.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path} is not a ledger: {error}") from None
    if not empty and version != VERSION:
        raise InputError(f"{path} is a ledger of version {version}; this program needs {VERSION}")
    return empty
