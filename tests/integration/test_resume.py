"""Nothing that was acknowledged is lost: servers killed or stopped at any moment, damaged files."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedrobust_proto.v1 import federation_pb2 as pb
from fedrobust_proto.v1 import vectors
from fedrobust_server.config import RunConfig
from fedrobust_server.ledger import Answer
from fedrobust_server.round import KEEPS_TURN
from fedrobust_server.runs import RunFolder

from fedrobust.cli import main
from fedrobust.training import Task

from .processes import Clients, clients, process, wait_for
from .test_federation import model

CLIENTS, ROUNDS = 4, 4
RUN = [
    *("--clients", str(CLIENTS), "--rounds", str(ROUNDS), "--model", "softmax", "--momentum", "0.5"),
    *("--optimiser", "adam", "--eps", "0.25", "--run", "kept", "--deadline", "60"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def attending(port: int) -> contextlib.AbstractContextManager[Clients]:
    """All clients of the federation, which wait for their server as long as it takes."""
    return clients(f"127.0.0.1:{port}", range(CLIENTS), patience=120)


def serve(folder: Path, port: int) -> list[str]:
    """The command of the server: a new one, or the one that goes on."""
    place = ("--json", "--bind", f"127.0.0.1:{port}")
    if (folder / "kept").exists():
        return ["serve", *place, "--resume", str(folder / "kept")]
    return ["serve", *place, "--runs-dir", str(folder), *RUN]


def rows(folder: Path, query: str) -> list[Any]:
    path = folder / "kept" / "ledger.sqlite"
    if not path.exists():
        return []
    with contextlib.closing(sqlite3.connect(path)) as database:
        try:
            return database.execute(query).fetchall()
        except sqlite3.OperationalError:  # it is being made
            return []


def acknowledgements(folder: Path) -> int:
    found = rows(folder, "SELECT COUNT(*) FROM answers WHERE status = 'ACCEPTED'")
    return found[0][0] if found else 0


def run_through(
    folder: Path, kills: Sequence[tuple[int, float]], kind: signal.Signals = signal.SIGKILL
) -> None:
    """Run the federation to its end, and end its server again and again.

    Args:
        folder: of all runs.
        kills: the server ends so many seconds after so many updates have been acknowledged in all.
        kind: the signal.
    """
    port = free_port()
    with attending(port) as there:
        for count, delay in kills:
            with process(*serve(folder, port)) as server:
                wait_for(lambda enough=count: acknowledgements(folder) >= enough, server)
                time.sleep(delay)
                server.send_signal(kind)
                server.wait(60)
                before = rows(
                    folder, "SELECT round, client, digest FROM answers WHERE status = 'ACCEPTED'"
                )
        with process(*serve(folder, port)) as server:
            server.communicate(timeout=120)
            assert server.returncode == 0
        there.leave()
        for rounds in there.told:  # a receipt may be lost with the server; no second update follows it
            assert len(rounds) == len(set(rounds))
    if kills:
        after = rows(folder, "SELECT round, client, digest FROM answers WHERE status = 'ACCEPTED'")
        assert set(before) <= set(after)


def acknowledged(folder: Path) -> None:
    """Every round has exactly one accepted update of each client, and each has a weight."""
    for number, count, distinct, weighed in rows(
        folder,
        "SELECT round, COUNT(*), COUNT(DISTINCT client), COUNT(weight) FROM answers "
        "WHERE status = 'ACCEPTED' GROUP BY round",
    ):
        assert (count, distinct, weighed) == (CLIENTS, CLIENTS, CLIENTS), number
    assert rows(folder, "SELECT COUNT(*) FROM rounds WHERE outcome = 'aggregated'") == [(ROUNDS,)]


@pytest.fixture(scope="module")
def uninterrupted(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to; simulated, which leads to the same model."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main(["simulate", "--json", "--runs-dir", str(folder), "--workers", "1", *RUN]) == 0
    acknowledged(folder)
    return folder


def same_model(folder: Path, uninterrupted: Path) -> None:
    acknowledged(folder)
    expected = model(uninterrupted, "kept", ROUNDS)
    for name, tensor in model(folder, "kept", ROUNDS).items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        (signal.SIGKILL, [(CLIENTS + 1, 0.0)]),  # in the middle of a round
        pytest.param(signal.SIGKILL, [(2, 0.0), (2 * CLIENTS + 1, 0.0)], marks=pytest.mark.slow),
        pytest.param(  # about when a round is being dealt with
            signal.SIGTERM, [(CLIENTS, 0.01)], marks=pytest.mark.slow
        ),
    ],
)
def test_a_server_that_was_ended_goes_on_to_the_same_model(
    tmp_path: Path, uninterrupted: Path, kind: signal.Signals, kills: list[tuple[int, float]]
) -> None:
    run_through(tmp_path, kills, kind)
    same_model(tmp_path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_servers_killed_at_random_moments(tmp_path: Path, uninterrupted: Path, seed: int) -> None:
    rng = random.Random(seed)
    counts = sorted(rng.randrange(CLIENTS * ROUNDS) for _ in range(4))
    run_through(tmp_path, [(count, rng.expovariate(20.0)) for count in counts])
    same_model(tmp_path, uninterrupted)


SIZE = 650
A, C = np.full((2, SIZE), [[1], [3]], np.float32)


def cut_off(folder: Path) -> RunFolder:
    """A run that ended in its first round, with the updates of two clients of three."""
    run = RunFolder.create(folder, RunConfig(run="kept", task=Task(model="softmax"), gateways=2))
    with contextlib.closing(run.ledger()) as ledger:
        ledger.open_round(1, ["a", "b", "c"])
        spool = run.spool(1, 3, SIZE)
        for slot, name, row in ((0, "a", A), (2, "c", C)):
            spool.write(slot, 0, row)
            digest = vectors.digest(vectors.pack(row, pb.DTYPE_FLOAT32)).hex()
            ledger.answer(Answer(1, name, "ACCEPTED", "", digest, 1.0))
    return run


def test_whoever_still_has_the_file_of_an_open_round_cannot_write_into_the_resumed_one(
    tmp_path: Path,
) -> None:
    folder = cut_off(tmp_path)
    spool = folder.spool(1, 3, SIZE)
    with contextlib.closing(folder.ledger()) as ledger:
        standing = ledger.standing(KEEPS_TURN)
    assert standing is not None
    folder.check_spool(standing, SIZE, shared=True)
    for slot in range(3):  # the gateway that has outlived its server
        spool.write(slot, 0, np.full(SIZE, np.nan, np.float32))
    found = folder.spool(1, 3, SIZE)
    np.testing.assert_array_equal(found.map(), [A, np.zeros(SIZE), C])
    assert [path.name for path in (folder.path / "spool").iterdir()] == ["round-000001.rows"]


@pytest.mark.slow
def test_a_gateway_that_outlives_its_server_changes_nothing(tmp_path: Path, uninterrupted: Path) -> None:
    port = free_port()
    with attending(port) as there:
        with process(*serve(tmp_path, port), "--gateways", "2") as server:
            wait_for(lambda: acknowledgements(tmp_path) >= 2, server)
            server.kill()
            server.wait()
        (path,) = (tmp_path / "kept" / "spool").glob("*.rows")
        ((selected,),) = rows(tmp_path, "SELECT selected FROM rounds ORDER BY round DESC LIMIT 1")
        done = {name for (name,) in rows(tmp_path, "SELECT client FROM answers WHERE weight IS NULL")}
        slots = [slot for slot, name in enumerate(json.loads(selected)) if name not in done]
        size = path.stat().st_size // len(json.loads(selected))
        assert slots
        orphan = os.open(path, os.O_RDWR)
        with process(*serve(tmp_path, port)) as server:
            while server.poll() is None:
                for slot in slots:
                    os.pwrite(orphan, bytes(size), slot * size)
                time.sleep(0.002)
            assert server.returncode == 0
        os.close(orphan)
        there.leave()
    same_model(tmp_path, uninterrupted)


Line = Callable[..., str]


@pytest.fixture
def one_line(capsys: pytest.CaptureFixture[str]) -> Line:
    """The one line with which a command refuses."""

    def told(*arguments: str) -> str:
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return told


def test_what_cannot_be_gone_on_with_is_told_in_one_line_and_left_alone(
    tmp_path: Path, uninterrupted: Path, one_line: Line
) -> None:
    run = tmp_path / "kept"
    shutil.copytree(uninterrupted / "kept", run)
    resume = ("serve", "--bind", "127.0.0.1:0", "--resume", str(run))
    state = max((run / "state").glob("round-*.f32"))
    good = state.read_bytes()
    for bad in (good[:-1], good[:100] + bytes([good[100] ^ 1]) + good[101:], b""):
        state.write_bytes(bad)
        assert f"{state.name} is not what was saved after round {ROUNDS}" in one_line(*resume)
        assert state.read_bytes() == bad
    state.unlink()
    assert "No such file" in one_line(*resume)
    state.write_bytes(good)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('"adam"', '"sgd"'))
    assert "model and optimiser need 650; put config.toml back as it was" in one_line(*resume)
    (run / "config.toml").write_text(config)
    with contextlib.closing(sqlite3.connect(run / "ledger.sqlite")) as database:
        database.execute("PRAGMA user_version = 99")
    assert "is a ledger of version 99" in one_line(*resume)
    assert "there is no run in" in one_line("serve", "--resume", str(tmp_path / "nowhere"))
    assert "leave --rounds out" in one_line(*resume, "--rounds", "9")
    assert "exists already" in one_line("serve", "--runs-dir", str(tmp_path), "--run", "kept")


def test_a_damaged_spool_is_told_in_one_line_and_left_alone(tmp_path: Path, one_line: Line) -> None:
    run = cut_off(tmp_path).path
    (spool,) = (run / "spool").glob("*.rows")
    good = spool.read_bytes()
    spool.write_bytes(bytes(len(good)))
    resume = ("serve", "--bind", "127.0.0.1:0", "--resume", str(run))
    assert "does not hold the acknowledged update of" in one_line(*resume)
    assert spool.read_bytes() == bytes(len(good))
    spool.unlink()
    assert "is not there" in one_line(*resume)


def test_a_finished_run_is_not_begun_again(
    tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(uninterrupted / "kept", tmp_path / "kept")
    before = (tmp_path / "kept" / "ledger.sqlite").stat().st_size
    assert main(serve(tmp_path, free_port())) == 0
    told = capsys.readouterr().out.splitlines()
    assert json.loads(told[-1])["rounds_aggregated"] == ROUNDS
    assert (tmp_path / "kept" / "ledger.sqlite").stat().st_size == before
