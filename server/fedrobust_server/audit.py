"""A run's ledger for its operator, also while the server writes to it: what happened, and is it whole.

Reading opens the file read-only; the write-ahead log lets the server go on meanwhile.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedrobust import InputError
from fedrobust.text import printable
from fedrobust_server import suspicion
from fedrobust_server.ledger import VERSION
from fedrobust_server.quarantine import Action, Override

Row = Mapping[str, Any]

_PATIENCE = 10.0
"""Seconds to wait for the server's own writing to end."""
_TOLERANCE = 1e-6
"""How far beyond 1 rounding may bring the sum of a round's weights."""

_ROUNDS = """
SELECT r.round, r.outcome, r.reason, r.verdict, r.selected, r.top_eigenvalue,
       r.bound_kept AS certificate, r.accuracy,
       coalesce(a.accepted, 0) AS accepted, coalesce(a.refused, 0) AS refused
FROM rounds r LEFT JOIN (
    SELECT round, sum(status = 'ACCEPTED') AS accepted, sum({times} * (status <> 'ACCEPTED')) AS refused
    FROM answers GROUP BY round
) a ON a.round = r.round ORDER BY r.round
"""

_CLIENTS = """
SELECT client, sum(status = 'ACCEPTED') AS accepted, sum({times} * (status <> 'ACCEPTED')) AS refused
FROM answers GROUP BY client
"""


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[sqlite3.Connection]:
    """A run's ledger, to read from; what is read within is of one moment.

    Raises:
        InputError: the folder holds no ledger, or one that cannot be read.
    """
    with _connected(folder, "ro") as db:
        db.execute("BEGIN")
        yield db


def decide(folder: Path, client: str, action: Action, reason: str, who: str = "") -> Override:
    """Leave an operator's decision in the ledger; the server acts on it before its next round.

    Args:
        folder: of the run.
        client: its name, which the ledger must know: a misspelt ban would go unnoticed.
        action: what to do.
        reason: why.
        who: decides; empty for this process's user.

    Raises:
        InputError: no such client, no reason, or the ledger cannot be written.
    """
    if not reason.strip():
        raise InputError("a decision needs a reason for those who read the ledger later; give --reason")
    decided = Override(client, action, reason.strip(), who or getpass.getuser())
    with _connected(folder, "rw") as db:
        _require_quarantine(db, folder)
        require_client(db, client)
        with db:
            suspicion.request(db, decided)
    return decided


def require_client(db: sqlite3.Connection, client: str) -> None:
    """Complain unless the ledger knows the client.

    Raises:
        InputError: it does not.
    """
    if client not in _names(db):
        raise InputError(
            f"the ledger knows no client '{printable(client, 64)}'; "
            "`fedrobust ledger show RUN --clients` lists them"
        )


def has_quarantine(db: sqlite3.Connection) -> bool:
    """Whether the ledger is of a version that keeps suspicion."""
    return _has(db, "suspicion") and _has(db, "overrides")


def times(db: sqlite3.Connection) -> str:
    """How many submissions a row of answers stands for, in SQL: before version 3, one."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return "times" if version >= 3 else "1"


def rounds(db: sqlite3.Connection) -> list[dict[str, Any]]:
    """A row for every round: its outcome, counts of clients and answers, and figures."""
    found = []
    for row in map(dict, db.execute(_ROUNDS.format(times=times(db)))):
        asked = len(json.loads(row.pop("selected")))
        found.append({**row, "outcome": row["outcome"] or "open", "asked": asked})
    return found


def events(db: sqlite3.Connection) -> list[dict[str, Any]]:
    """What happened beside rounds and answers, in order: faults survived, resumptions."""
    return (
        [dict(row) for row in db.execute("SELECT * FROM events ORDER BY id")]
        if _has(db, "events")
        else []
    )


def clients(db: sqlite3.Connection) -> list[dict[str, Any]]:
    """A row for every client that was ever asked or answered, the most suspicious first."""
    counts = {row["client"]: dict(row) for row in db.execute(_CLIENTS.format(times=times(db)))}
    judged = {row["client"]: row for row in suspicion.latest(db)} if has_quarantine(db) else {}
    nothing = {"suspicion": 0.0, "state": "free", "until": 0, "strikes": 0}
    found = [
        {
            "client": name,
            "accepted": 0,
            "refused": 0,
            **counts.get(name, {}),
            **{key: judged.get(name, nothing)[key] for key in nothing},
        }
        for name in _names(db)
    ]
    return sorted(found, key=lambda row: (-row["suspicion"], row["state"] == "free", row["client"]))


@dataclass(frozen=True)
class Checked:
    """What `verify` found.

    Attributes:
        rounds: how many rounds are closed.
        accepted: how many accepted answers they have.
        refused: how many submissions were refused.
        problems: what is wrong, in words; empty if the ledger is whole.
    """

    rounds: int
    accepted: int
    refused: int
    problems: Sequence[str]


def verify(db: sqlite3.Connection) -> Checked:
    """Check that the file is sound and that every accepted answer of a closed round is accounted for."""
    damage = [row[0] for row in db.execute("PRAGMA integrity_check(10)") if row[0] != "ok"]
    if damage:  # nothing that such a file says can be relied on
        return Checked(0, 0, 0, [f"the file is damaged: {printable(line)}" for line in damage])
    answers: dict[int, list[Row]] = {}
    for row in db.execute("SELECT round, client, weight FROM answers WHERE status = 'ACCEPTED'"):
        answers.setdefault(row["round"], []).append(row)
    everything = db.execute("SELECT * FROM rounds ORDER BY round").fetchall()
    closed = [row for row in everything if row["closed"] is not None]
    problems = _order_problems([row["round"] for row in everything], [row["round"] for row in closed])
    for number in sorted(set(answers) - {row["round"] for row in everything}):
        problems.append(f"round {number}: accepted answers for a round that never began")
    for row in everything:
        problems += _round_problems(row, answers.get(row["round"], []))
    (refused,) = db.execute(
        f"SELECT coalesce(sum({times(db)}), 0) FROM answers WHERE status <> 'ACCEPTED'"  # noqa: S608
    ).fetchone()
    (weighted,) = db.execute(
        "SELECT count(*) FROM answers WHERE status <> 'ACCEPTED' AND weight IS NOT NULL"
    ).fetchone()
    if weighted:
        problems.append(f"{weighted} refused answers have a weight")
    return Checked(len(closed), sum(len(answers.get(r["round"], [])) for r in closed), refused, problems)


def _order_problems(opened: Sequence[int], closed: Sequence[int]) -> list[str]:
    problems = []
    if list(opened) != list(range(1, len(opened) + 1)):
        missing = sorted(set(range(1, max(opened) + 1)) - set(opened))
        problems.append(f"rounds are missing: {', '.join(map(str, missing))}")
    stuck = sorted(set(opened[:-1]) - set(closed))
    if stuck:
        problems.append(f"rounds were never closed: {', '.join(map(str, stuck))}")
    return problems


def _round_problems(row: Row, answers: Sequence[Row]) -> list[str]:
    place, problems = f"round {row['round']}: ", []
    names = [answer["client"] for answer in answers]
    twice = (
        sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    )
    if twice:
        problems.append(f"{place}accepted more than once from {_listed(twice)}")
    strangers = sorted(set(names) - set(json.loads(row["selected"])))
    if strangers:
        problems.append(f"{place}accepted from clients that were not asked: {_listed(strangers)}")
    if row["closed"] is None:
        return problems
    weights = [answer["weight"] for answer in answers if answer["weight"] is not None]
    if weights and len(weights) < len(answers):
        problems.append(
            f"{place}{len(answers) - len(weights)} of {len(answers)} accepted have no weight"
        )
    if sum(weights) > 1 + _TOLERANCE:
        problems.append(f"{place}the weights sum to {sum(weights):.9g}, more than 1")
    if row["outcome"] == "aggregated" and not answers:
        problems.append(f"{place}aggregated without an accepted answer")
    if row["outcome"] not in ("aggregated", "skipped"):
        problems.append(f"{place}closed with the outcome '{printable(str(row['outcome']))}'")
    return problems


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name, 64) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _names(db: sqlite3.Connection) -> list[str]:
    """Every client that was asked, answered or was decided on."""
    found = {row[0] for row in db.execute("SELECT DISTINCT client FROM answers")}
    for (selected,) in db.execute("SELECT DISTINCT selected FROM rounds"):
        found.update(json.loads(selected))
    if has_quarantine(db):
        found.update(row[0] for row in db.execute("SELECT DISTINCT client FROM suspicion"))
    return sorted(found)


def _has(db: sqlite3.Connection, table: str) -> bool:
    return db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone() is not None


def _require_quarantine(db: sqlite3.Connection, folder: Path) -> None:
    if not has_quarantine(db):
        raise InputError(f"the ledger of {folder} is of a version that excludes nobody")


@contextlib.contextmanager
def _connected(folder: Path, mode: str) -> Iterator[sqlite3.Connection]:
    path = folder / "ledger.sqlite"
    if not path.is_file():
        raise InputError(f"{folder} is not the folder of a run: it has no ledger.sqlite")
    uri = f"file:{quote(str(path.resolve()))}?mode={mode}"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=_PATIENCE)) as db:
            db.row_factory = sqlite3.Row
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if not 1 <= version <= VERSION:
                raise InputError(
                    f"{path} is a ledger of version {version}; this program reads 1 to {VERSION}"
                )
            yield db
    except sqlite3.Error as error:
        raise InputError(f"cannot read or write {path}: {error}") from None
