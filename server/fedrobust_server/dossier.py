"""Everything that a ledger holds about one client: why it was excluded, and the evidence to hand on."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedrobust import InputError
from fedrobust.text import finite
from fedrobust_server import suspicion
from fedrobust_server.audit import has_quarantine, require_client, times

_OUT = ("excluded", "banned")
_ANSWERS = """
SELECT a.round, r.outcome, r.verdict, a.at, a.status, a.reason, a.digest, a.norm, a.examples,
       {times} AS times, a.weight, 1.0 / n.accepted AS equal_share, a.score
FROM answers a LEFT JOIN rounds r ON r.round = a.round
LEFT JOIN (SELECT round, count(*) AS accepted FROM answers WHERE status = 'ACCEPTED' GROUP BY round) n
    ON n.round = a.round AND a.status = 'ACCEPTED'
WHERE a.client = ? ORDER BY a.id
"""


def dossier(db: sqlite3.Connection, client: str) -> dict[str, Any]:
    """What the ledger holds about a client, as plain values.

    Returns:
        `client`; `asked`, in how many rounds; `state`, `suspicion`, `until`, `strikes` as they are now;
        `why` in words; `answers`, its submissions with the round's verdict and the suspicion after it
        (where `times` is above 1, the last of so many refusals of a kind);
        `changes`, rows of suspicion without a submission; `decisions` of operators.

    Raises:
        InputError: the ledger knows no such client.
    """
    require_client(db, client)
    judged: list[dict[str, Any]] = []
    decisions: list[dict[str, Any]] = []
    if has_quarantine(db):
        judged, decisions = suspicion.history(db, client), suspicion.decisions(db, client)
    by_round = {row["round"]: row for row in judged}
    answers = [
        {
            **dict(row),
            **{k: by_round.get(row["round"], {}).get(k) for k in ("evidence", "suspicion", "state")},
        }
        for row in db.execute(_ANSWERS.format(times=times(db)), (client,))
    ]
    answered = {row["round"] for row in answers}
    last = judged[-1] if judged else {"state": "free", "suspicion": 0.0, "until": 0, "strikes": 0}
    (asked,) = db.execute(
        "SELECT count(*) FROM rounds, json_each(rounds.selected) WHERE value = ?", (client,)
    ).fetchone()
    return {
        "client": client,
        "asked": asked,
        **{key: last[key] for key in ("state", "suspicion", "until", "strikes")},
        "why": why(judged, decisions),
        "answers": answers,
        "changes": [row for row in judged if row["round"] not in answered],
        "decisions": decisions,
    }


def why(judged: Sequence[Mapping[str, Any]], decisions: Sequence[Mapping[str, Any]]) -> str:
    """Why a client was last excluded, in words; empty if it never was.

    Args:
        judged: its rows of suspicion by round.
        decisions: what operators decided about it.
    """
    states = ["free", *(row["state"] for row in judged)]
    turns = [i for i in range(len(judged)) if states[i + 1] in _OUT and states[i] != states[i + 1]]
    if not turns:
        return ""
    turn = turns[-1]
    row = judged[turn]
    long = f"until round {row['until']}" if row["until"] else "for good"
    decided = [d for d in decisions if d["applied"] == row["round"] and d["action"] != "release"]
    if decided:
        return f"by {decided[-1]['who']}, from round {row['round']} on, {long}: {decided[-1]['reason']}"
    ended = (i + 1 for i in range(turn) if judged[i]["suspicion"] == 0 or judged[i]["state"] in _OUT)
    begun = max(ended, default=0)
    grown = [r["evidence"] for r in judged[begun : turn + 1] if r["evidence"] is not None]
    return (
        f"in round {row['round']}, {long}: since round {judged[begun]['round']} its evidence was "
        f"{sum(grown) / max(len(grown), 1):.0%} on average over {len(grown)} rounds"
    )


def export(db: sqlite3.Connection, client: str, path: Path) -> int:
    """Write the evidence about a client to a new file that its owner alone may read.

    JSON lines hold everything, with a `kind` each: client, answer, change, decision. CSV holds the
    answers; text that a spreadsheet would take for a formula gets an apostrophe in front.

    Args:
        db: the ledger.
        client: its name.
        path: ends in .jsonl or .csv.

    Returns:
        How many answers were written.

    Raises:
        InputError: no such client, another ending, or the file exists or cannot be written.
    """
    found = dossier(db, client)
    answers: list[dict[str, Any]] = found.pop("answers")
    changes, decisions = found.pop("changes"), found.pop("decisions")
    if path.suffix == ".jsonl":
        rows = [{"kind": "client", **found}]
        for kind, part in (("answer", answers), ("change", changes), ("decision", decisions)):
            rows += [{"kind": kind, **row} for row in part]
        _write(path, (json.dumps(finite(row)) + "\n" for row in rows))
    elif path.suffix == ".csv":
        names = ["client", *(answers[0] if answers else ())]
        _write(path, _csv([names, *([client, *row.values()] for row in answers)]))
    else:
        raise InputError(f"cannot export to {path}: name a file that ends in .jsonl or .csv")
    return len(answers)


class _Line:
    """Where csv writes to: hands each line back."""

    def write(self, line: str) -> str:
        return line


def _csv(rows: Iterable[Sequence[Any]]) -> Iterable[str]:
    writer = csv.writer(_Line())
    for row in rows:
        cells = [
            f"'{c}" if isinstance(c, str) and c.startswith(("=", "+", "-", "@")) else c for c in row
        ]
        yield str(writer.writerow(cells))


def _write(path: Path, lines: Iterable[str]) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.writelines(lines)
    except FileExistsError:
        raise InputError(f"{path} exists already; name another file") from None
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
