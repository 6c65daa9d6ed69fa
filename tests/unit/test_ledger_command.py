"""`fedrobust ledger`: what happened, why a client is out, decisions, and whether the ledger is whole."""

from __future__ import annotations

import csv
import json
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fedrobust_server import audit, suspicion
from fedrobust_server.dossier import why
from fedrobust_server.ledger import Answer, Ledger
from fedrobust_server.quarantine import Policy, State, evidence, observe

from fedrobust import Verdict
from fedrobust.cli import main

CLIENTS = ("a", "b", "c", "d")
HOSTILE = "\x1b]0;owned\x07\u202e\nno"


def columns() -> str:
    """What a ledger lacks of the quarantine's tables, in this version."""
    return suspicion.SCHEMA.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS").replace(
        "CREATE INDEX", "CREATE INDEX IF NOT EXISTS"
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Seven rounds; client `a` never has weight, sends NaN once, and is out after six."""
    folder = tmp_path / "first"
    folder.mkdir()
    ledger, state = Ledger(folder / "ledger.sqlite"), State()
    db = sqlite3.connect(folder / "ledger.sqlite")
    db.executescript(columns())
    for number in range(1, 8):
        asked = [c for c in CLIENTS if c not in state.excluded]
        ledger.open_round(number, asked)
        weights = {c: 0.0 if c == "a" else 1 / 3 for c in asked}
        malformed = []
        if number == 3:
            del weights["a"]
            malformed = ["a"]
            ledger.answer(Answer(number, "a", "NON_FINITE", HOSTILE))
        for client in weights:
            ledger.answer(Answer(number, client, "ACCEPTED", "", "ff", 2.0, 100))
        figures = {"outcome": "aggregated", "reason": "", "verdict": Verdict.REMOVED.value}
        ledger.close_round(number, {**figures, "accuracy": 0.5, "bound_kept": 0.1}, weights, weights)
        found = evidence(Verdict.REMOVED, weights, malformed)
        before = state
        state, _ = observe(Policy(), state, number, found)
        with db:
            suspicion.keep(db, number, before, state, found)
    ledger.open_round(8, ["b", "c", "d"])
    ledger.answer(Answer(8, "b", "ACCEPTED", "", "ff"))
    ledger.close()
    db.close()
    return folder


@pytest.fixture
def connection(run: Path) -> Iterator[sqlite3.Connection]:
    database = sqlite3.connect(run / "ledger.sqlite", isolation_level=None)
    yield database
    database.close()


def lines(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> list[str]:
    assert main(["ledger", *map(str, arguments)]) == code
    return capsys.readouterr().out.splitlines()


def objects(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    """What a command prints with --json."""
    return [json.loads(line) for line in lines(capsys, *arguments, "--json")]


def test_show_lists_rounds(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, *rows = lines(capsys, "show", run)
    assert header.split()[:4] == ["round", "outcome", "asked", "accepted"]
    assert rows[0].split() == ["1", "aggregated", "4", "4", "0", "outliers", "removed", "0.1", "0.5"]
    assert rows[2].split()[:5] == ["3", "aggregated", "4", "3", "1"]
    assert rows[7].split()[:4] == ["8", "open", "3", "1"]
    found = [json.loads(line) for line in lines(capsys, "show", run, "--json")]
    assert [row["round"] for row in found] == list(range(1, 9))
    assert lines(capsys, "show", "first", "--runs-dir", run.parent)[0] == header


def test_json_lines_hold_no_infinity(
    run: Path, connection: sqlite3.Connection, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A score may be infinite, and the ledger keeps it so; JSON does not know it."""
    connection.execute("UPDATE answers SET score = 9e999")
    to = tmp_path / "a.jsonl"
    lines(capsys, "export", run, "--client", "a", "--to", to)
    told = lines(capsys, "show", run, "--client", "a", "--json")
    for line in [*told, *to.read_text().splitlines()]:
        json.loads(line, parse_constant=pytest.fail)
    assert json.loads(told[0])["answers"][0]["score"] is None


def test_show_lists_clients_by_suspicion(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, first, *rest = lines(capsys, "show", run, "--clients")
    assert first.split() == ["a", "excluded", "26", "3", "1", "5", "1"]
    assert [row.split()[:2] for row in rest] == [[name, "free"] for name in "bcd"]


def test_show_lists_events(
    run: Path, connection: sqlite3.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    connection.execute("DROP TABLE IF EXISTS events")
    assert lines(capsys, "show", run, "--events") == ["at  round  what"]
    connection.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, at REAL, round INTEGER, what TEXT)")
    connection.execute("INSERT INTO events (at, round, what) VALUES (0, 3, 'a shard was\x1b restarted')")
    _, line = lines(capsys, "show", run, "--events")
    assert line.split(maxsplit=4) == ["1970-01-01", "00:00", "UTC", "3", "a shard was\\x1b restarted"]


def test_show_says_why_a_client_is_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(lines(capsys, "show", run, "--client", "a"))
    assert "standing   excluded until round 26; excluded 1 times" in text
    assert (
        "in round 6, until round 26: since round 1 its evidence was 100% on average over 6 rounds"
        in text
    )
    assert "asked      in 6 rounds" in text
    assert "NON_FINITE" in text
    assert "\x1b" not in text
    assert "\\x1b]0;owned\\x07\\u202e\\nno" in text
    found = json.loads(lines(capsys, "show", run, "--client", "a", "--json")[0])
    assert [row["evidence"] for row in found["answers"]] == [1.0] * 6
    assert found["answers"][0]["equal_share"] == 0.25
    assert found["answers"][2]["reason"] == HOSTILE


def test_why_counts_from_the_last_exclusion() -> None:
    out = {"suspicion": 3.0, "state": "excluded", "until": 26, "evidence": 1.0}
    back = {"suspicion": 1.5, "state": "on probation", "until": 0, "evidence": None}
    again = {"suspicion": 2.0, "state": "on probation", "until": 0, "evidence": 0.5}
    judged = [{**row, "round": n} for n, row in ((6, out), (26, back), (27, again), (28, out))]
    text = "in round 28, until round 26: since round 26 its evidence was 75% on average over 2 rounds"
    assert why(judged, []) == text


def test_export_writes_the_evidence_once(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "a.jsonl"
    assert lines(capsys, "export", run, "--client", "a", "--to", to) == [f"wrote 6 answers to {to}"]
    first, *rest = map(json.loads, to.read_text().splitlines())
    assert (first["kind"], first["state"], len(rest)) == ("client", "excluded", 6)
    assert stat.S_IMODE(to.stat().st_mode) == 0o600
    assert main(["ledger", "export", str(run), "--client", "a", "--to", str(to)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_export_to_a_spreadsheet_holds_no_formulas(
    run: Path, connection: sqlite3.Connection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    connection.execute("UPDATE answers SET reason = '=cmd()' WHERE status <> 'ACCEPTED'")
    lines(capsys, "export", run, "--client", "a", "--to", tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[2]["reason"] == "'=cmd()"
    assert rows[0]["weight"] == "0.0"


def test_decisions_are_left_for_the_server(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    why = ("--reason", "new scanner", "--who", "alice")
    assert lines(capsys, "release", run, "a", *why) == ["release a: from the next round on"]
    lines(capsys, "exclude", run, "b", "--rounds", 2, *why)
    (line,) = lines(capsys, "ban", run, "c", *why, "--json")
    assert json.loads(line)["action"] == "ban"
    database = sqlite3.connect(run / "ledger.sqlite")
    with database:
        state, changes = suspicion.apply_requests(database, Policy(), suspicion.restore(database), 8)
    database.close()
    assert state.excluded == {"b", "c"}
    assert [change.who for change in changes] == ["alice"] * 3
    text = "\n".join(lines(capsys, "show", run, "--client", "c"))
    assert "by alice, from round 8 on, for good: new scanner" in text
    assert "standing   free" in "\n".join(lines(capsys, "show", run, "--client", "a"))


def test_the_server_may_go_on_writing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Ledger(run / "ledger.sqlite")
    with audit.reading(run) as db:
        before = len(audit.rounds(db))
        server.close_round(8, {"outcome": "skipped", "reason": "quorum"}, {}, {})
        server.open_round(9, ["b"])
        assert len(audit.rounds(db)) == before  # of one moment
    assert len(lines(capsys, "show", run)) == 10
    lines(capsys, "ban", run, "b", "--reason", "x")
    server.answer(Answer(9, "b", "ACCEPTED", ""))
    server.close()
    assert lines(capsys, "verify", run)[0].startswith("8 rounds closed")


def test_verify_accounts_for_every_accepted_answer(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lines(capsys, "verify", run) == ["7 rounds closed, 26 updates accepted in them, 1 refused"]
    assert json.loads(lines(capsys, "verify", run, "--json")[0])["problems"] == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("DELETE FROM rounds WHERE round = 4", "rounds are missing: 4"),
        ("DELETE FROM rounds WHERE round = 8", "round 8: accepted answers for a round that never began"),
        ("UPDATE rounds SET closed = NULL WHERE round = 2", "rounds were never closed: 2"),
        (
            "UPDATE answers SET weight = NULL WHERE client = 'b' AND round = 2",
            "round 2: 1 of 4 accepted have no weight",
        ),
        (
            "UPDATE answers SET weight = 0.5 WHERE round = 2",
            "round 2: the weights sum to 2, more than 1",
        ),
        ("UPDATE answers SET weight = 0 WHERE status <> 'ACCEPTED'", "1 refused answers have a weight"),
        (
            "INSERT INTO answers (round, client, at, status, reason) VALUES (8, 'b', 0, 'ACCEPTED', '')",
            "round 8: accepted more than once from b",
        ),
        (
            "UPDATE answers SET client = char(27) WHERE client = 'b' AND round = 2",
            "round 2: accepted from clients that were not asked: \\x1b",
        ),
        ("DELETE FROM answers WHERE round = 5", "round 5: aggregated without an accepted answer"),
        ("UPDATE rounds SET outcome = 'won' WHERE round = 5", "round 5: closed with the outcome 'won'"),
    ],
)
def test_verify_names_what_is_wrong(
    damage: str,
    problem: str,
    run: Path,
    connection: sqlite3.Connection,
    capsys: pytest.CaptureFixture[str],
) -> None:
    connection.execute(damage)
    assert problem in lines(capsys, "verify", run, code=1)


def test_verify_finds_a_damaged_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "ledger.sqlite"
    database = sqlite3.connect(path)
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 3 + 2048] = b"\xff" * 2048
    path.write_bytes(data)
    assert main(["ledger", "verify", str(run)]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "nowhere"), "it has no ledger.sqlite"),
        (("show", "RUN", "--client", "nobody\x1b"), "knows no client 'nobody\\x1b'"),
        (("ban", "RUN", "nobody", "--reason", "x"), "knows no client 'nobody'"),
        (("ban", "RUN", "a", "--reason", " "), "needs a reason"),
        (("ban", "RUN", "a"), "--reason"),
        (("exclude", "RUN", "a", "--reason", "x", "--rounds", "0"), "rounds must be at least 1"),
        (("export", "RUN", "--client", "a", "--to", "a.xls"), "ends in .jsonl or .csv"),
        (("export", "RUN", "--client", "a", "--to", "no/such/a.csv"), "cannot write"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ledger", *(str(run) if a == "RUN" else a for a in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_ledger_of_a_version_to_come_is_left_alone(
    run: Path, connection: sqlite3.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    connection.execute("PRAGMA user_version = 99")
    assert main(["ledger", "show", str(run)]) == 2
    assert "a ledger of version 99" in capsys.readouterr().err


def test_refusals_that_share_a_row_are_shown_by_their_number(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(run / "ledger.sqlite")
    for _ in range(50):
        ledger.answer(Answer(8, "b", "DUPLICATE", "again"))
    ledger.close()
    (shown,) = [row for row in objects(capsys, "show", run, "--clients") if row["client"] == "b"]
    assert (shown["accepted"], shown["refused"]) == (8, 50)
    assert objects(capsys, "show", run)[-1]["refused"] == 50
    assert objects(capsys, "verify", run)[0]["refused"] == 51
    assert any("  47  " in line for line in lines(capsys, "show", run, "--client", "b"))
    (found,) = objects(capsys, "show", run, "--client", "b")
    assert [a["times"] for a in found["answers"]] == [1] * 11 + [47]


def test_a_ledger_of_the_version_before_is_shown(
    run: Path, connection: sqlite3.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [lines(capsys, "show", run, *which) for which in ((), ("--clients",), ("--client", "a"))]
    connection.execute("ALTER TABLE answers DROP COLUMN times")
    connection.execute("PRAGMA user_version = 2")
    after = [lines(capsys, "show", run, *which) for which in ((), ("--clients",), ("--client", "a"))]
    assert after == before
    assert objects(capsys, "verify", run)[0]["refused"] == 1


def test_a_ledger_without_the_tables_shows_rounds_and_takes_no_decisions(
    run: Path, connection: sqlite3.Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    connection.executescript("DROP TABLE suspicion; DROP TABLE overrides")
    assert len(lines(capsys, "show", run)) == 9
    assert len(lines(capsys, "show", run, "--clients")) == 5
    assert "standing   free" in "\n".join(lines(capsys, "show", run, "--client", "a"))
    assert main(["ledger", "ban", str(run), "a", "--reason", "x"]) == 2
    assert "excludes nobody" in capsys.readouterr().err
