"""A federation on a Ray cluster of several nodes that die: nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from fedrobust_clients.remote import run as take_part
from fedrobust_clients.runtime import Floats, Update

from .test_federation import model

CLIENTS, EARLY, ROUNDS = 6, 4, 2
RUN = [
    *("--clients", str(CLIENTS), "--rounds", str(ROUNDS), "--model", "softmax", "--shards", "2"),
    *("--optimiser", "sgd(momentum=0.5)", "--eps", "0.25", "--deadline", "120", "--log-level", "info"),
]
BLIND = "from fedrobust_server import shards; shards.identity = lambda path: ('another machine', 0, 0)"
"""Run in the server: its shards are told of another file than the one that they would see."""
HASTY = "from fedrobust_server import lifeline; lifeline.PATIENCE = 1.0; lifeline.PAUSE = 0.5"
"""Run in the server: it gives the cluster up soon."""


@dataclass
class Nodes:
    """A cluster that an operator has started with a token; the head has no room for shards."""

    process: subprocess.Popen[str]
    env: dict[str, str]
    address: str = ""
    live: list[int] = field(default_factory=list)

    def heard(self) -> dict[str, Any]:
        assert self.process.stdout
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def ask(self, *order: str) -> dict[str, Any]:
        assert self.process.stdin
        print(*order, file=self.process.stdin, flush=True)
        return self.heard()

    def add(self) -> None:
        self.live.append(self.ask("add")["node"])

    def replace(self) -> None:
        """Remove the node that is there longest, without a farewell; another comes in its place."""
        self.ask("remove", str(self.live.pop(0)))
        self.add()

    def shards(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Shard"):
                    found.append(process)
        return found


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[Nodes]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    env |= {"RAY_worker_niceness": "0"}  # else shards starve beside other tests
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("cluster_process.py")), "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
    ) as process:
        ready = Nodes(process, env)
        try:
            ready.address = ready.heard()["address"]
            for _ in range(nodes):
                ready.add()
            yield ready
        finally:
            everything = psutil.Process(process.pid).children(recursive=True)
            assert process.stdin
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            kill(everything)
            process.kill()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with cluster(2) as ready:
        yield ready


@pytest.fixture(scope="module")
def bare() -> Iterator[Nodes]:
    """A cluster without any node that could hold a shard."""
    with cluster(0) as ready:
        yield ready


@dataclass
class Late:
    """A client whose update waits until it may go."""

    seed: int
    gate: asyncio.Event

    async def update(self, round: int, model: Floats) -> Update:  # noqa: A002
        await self.gate.wait()
        rng = np.random.default_rng([self.seed, round])
        return Update(rng.normal(size=len(model)).astype(np.float32) - 0.1 * model, 1)


@dataclass
class Run:
    """A run on a cluster: its server in a process of its own, its clients in this one."""

    nodes: Nodes
    folder: Path
    name: str
    seam: str = "pass"
    server: subprocess.Popen[str] | None = None

    @contextlib.contextmanager
    def served(self, *options: str) -> Iterator[subprocess.Popen[str]]:
        command = f"{self.seam}; from fedrobust.cli import main; raise SystemExit(main())"
        log = ("--log", str(self.folder / f"{self.name}.log"), "--json", "--bind", "127.0.0.1:0")
        place = ("--ray-address", self.nodes.address, *log)
        begin = ("--runs-dir", str(self.folder), "--run", self.name, *RUN, *options)
        path = self.folder / self.name
        with subprocess.Popen(
            [
                *(sys.executable, "-c", command, "serve", *place),
                *(("--resume", str(path), "--log-level", "info") if path.exists() else begin),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.nodes.env,
        ) as server:
            try:
                yield server
            finally:
                server.kill()

    def rows(self, query: str) -> list[Any]:
        try:
            with contextlib.closing(sqlite3.connect(self.folder / self.name / "ledger.sqlite")) as db:
                return db.execute(query).fetchall()
        except sqlite3.OperationalError:
            return []

    def accepted(self) -> int:
        return int(self.rows("SELECT COUNT(*) FROM answers WHERE status = 'ACCEPTED'")[0][0])

    def collected(self) -> bool:
        return bool(self.rows("SELECT 1 FROM rounds WHERE collected IS NOT NULL"))

    def events(self) -> list[str]:
        return [what for (what,) in self.rows("SELECT what FROM events")]

    def model(self) -> dict[str, Any]:
        return model(self.folder, self.name, ROUNDS)

    def go(
        self, early: Callable[[], None] = lambda: None, late: Callable[[], None] | None = None
    ) -> tuple[int, list[str]]:
        """Run it from where it is to its end.

        Args:
            early: done when some, not all updates of the first round have been accepted.
            late: done when the round is being aggregated, with one shard held fast until then.

        Returns:
            The server's exit code, and its complaints; warnings are in its log as well.
        """
        with self.served("--checkpoint-every", str(ROUNDS)) as server:
            self.server = server
            assert server.stdout
            line = server.stdout.readline()
            assert line, server.communicate()[1]
            address = json.loads(line)["listening"]
            asyncio.run(self._go(address, server, early, late))
            output, complaints = (text.splitlines() for text in server.communicate(timeout=60))
            assert all(json.loads(line) for line in output)  # nothing of Ray's in between
            return server.returncode, [line for line in complaints if " warning " not in line]

    async def _go(
        self,
        address: str,
        server: subprocess.Popen[str],
        early: Callable[[], None],
        late: Callable[[], None] | None,
    ) -> None:
        gates = [asyncio.Event() for _ in range(CLIENTS)]
        clients = [
            asyncio.create_task(
                take_part(address, f"c{i}", lambda _, i=i: Late(i, gates[i]), lambda *_: None, 1.0)  # type: ignore[misc]
            )
            for i in range(CLIENTS)
        ]
        for gate in gates[:EARLY]:
            gate.set()
        await until(lambda: self.accepted() >= EARLY)
        await asyncio.to_thread(early)
        if late:
            self.nodes.shards()[0].suspend()
        for gate in gates[EARLY:]:
            gate.set()
        if late:
            await until(self.collected)
            await asyncio.to_thread(late)
        await asyncio.to_thread(server.wait, 120)
        for client in clients:
            with contextlib.suppress(ConnectionError):  # where the server came to a bad end
                await client


def kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run to which nothing happens; on the way, shards are seen to be spread over the nodes."""
    run, homes = Run(nodes, tmp_path_factory.mktemp("undisturbed"), "run"), []
    code, _ = run.go(lambda: homes.extend(shard.ppid() for shard in nodes.shards()))
    assert code == 0
    assert len(homes) == len(set(homes)) == 2
    assert not run.events()
    return run


def whole(run: Run, undisturbed: Run) -> None:
    """Every acknowledged update counted, the model is the undisturbed run's, and people are told."""
    query = "SELECT round, COUNT(*), COUNT(DISTINCT client), COUNT(weight) FROM answers GROUP BY round"
    assert run.rows(query) == [(number, CLIENTS, CLIENTS, CLIENTS) for number in (1, 2)]
    expected = undisturbed.model()
    for name, tensor in run.model().items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-4, atol=1e-6)
    told = [what for what in run.events() if "shards were lost and are started anew" in what]
    assert told
    lines = (run.folder / f"{run.name}.log").read_text().splitlines()
    warned = [json.loads(line)["message"] for line in lines if json.loads(line)["level"] == "warning"]
    assert set(told) <= set(warned)
    assert any("read updates again" in line for line in lines)


def test_a_shard_killed_while_updates_come_in(nodes: Nodes, undisturbed: Run, tmp_path: Path) -> None:
    run = Run(nodes, tmp_path, "run")
    assert run.go(lambda: kill(nodes.shards()[:1])) == (0, [])
    whole(run, undisturbed)


@pytest.mark.slow
def test_a_node_removed_while_updates_come_in_and_no_shard_sees_the_spool(
    nodes: Nodes, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(nodes, tmp_path, "run", BLIND)
    assert run.go(nodes.replace) == (0, [])
    whole(run, undisturbed)


@pytest.mark.slow
def test_a_node_removed_during_aggregation(nodes: Nodes, undisturbed: Run, tmp_path: Path) -> None:
    run = Run(nodes, tmp_path, "run")

    def remove_the_nodes() -> None:
        for _ in (1, 2):  # one of them has the shard that is held fast
            nodes.replace()

    assert run.go(late=remove_the_nodes) == (0, [])
    whole(run, undisturbed)


@pytest.mark.slow
def test_shards_that_always_die_end_the_run_which_can_be_resumed(
    nodes: Nodes, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(nodes, tmp_path, "run")

    def kill_on_sight() -> None:
        deadline = time.monotonic() + 60
        while len(run.events()) < 4 and time.monotonic() < deadline:
            kill(nodes.shards())

    code, error = run.go(late=kill_on_sight)
    assert (code, error) == (
        1,
        ["fedrobust: shards were lost 4 times in round 1; its updates are kept, go on by --resume"],
    )
    assert run.accepted() == CLIENTS
    assert "shards were lost too often: ActorDiedError" in run.events()[-1]
    assert run.go() == (0, [])
    whole(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_shards_and_nodes_that_die_at_random_moments(
    nodes: Nodes, undisturbed: Run, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    run = Run(nodes, tmp_path, "run", BLIND if seed % 2 else "pass")

    def disturb() -> None:
        held = nodes.shards()[:1]
        for _ in range(rng.randrange(1, 4)):
            time.sleep(rng.expovariate(2.0))
            if rng.random() < 0.5:
                nodes.replace()
            else:
                kill(nodes.shards()[rng.randrange(2) :][:1])
        kill(held)  # so that something is lost in any case

    done = run.go(disturb) if seed % 4 < 2 else run.go(late=disturb)
    assert done == (0, [])
    whole(run, undisturbed)


# ---- clusters that are not there, or not for us ------------------------------------------------------


def refused(nodes: Nodes, tmp_path: Path, **env: str) -> str:
    """The one line with which the server ends at once."""
    nodes = Nodes(nodes.process, {**nodes.env, "HOME": str(tmp_path), **env}, nodes.address)
    began = time.monotonic()
    with Run(nodes, tmp_path, f"run-{len(list(tmp_path.iterdir()))}").served() as server:
        _, error = server.communicate(timeout=60)
        assert server.returncode == 2
    assert time.monotonic() - began < 30
    (line,) = error.splitlines()
    assert str(line).startswith("fedrobust: ")
    return str(line)


@pytest.mark.slow
def test_a_cluster_that_does_not_let_us_in_is_told_in_one_line(bare: Nodes, tmp_path: Path) -> None:
    asks = f"the Ray cluster at {bare.address} asks for its token, see docs/operating.md"
    assert asks in refused(bare, tmp_path, RAY_AUTH_TOKEN="b" * 64)
    assert asks in refused(bare, tmp_path, RAY_AUTH_TOKEN="")
    assert asks in refused(bare, tmp_path, RAY_AUTH_MODE="disabled")
    for address in ("127.0.0.1:1", "nowhere", "local", "ray://127.0.0.1:1"):
        nobody = Nodes(bare.process, bare.env, address)
        assert f"there is no Ray cluster at {address}" in refused(nobody, tmp_path)


@pytest.mark.slow
def test_a_cluster_without_room_is_not_waited_for_for_ever(bare: Nodes) -> None:
    program = f"""
import numpy as np, ray
from fedrobust.optimisers import SGD
from fedrobust_server.launch import start_ray
from fedrobust_server.shards import Shards
from fedrobust_server import lifeline
lifeline.PAUSE = 0.5
with start_ray({bare.address!r}):
    try:
        Shards(10, 2, SGD(), patience=1.0).start(np.ones((1, 10), "f4"))
    except ConnectionError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=bare.env,
        check=True,
    )
    assert done.stdout == (
        "waited 1 s for the Ray cluster to start 2 shards of 0.001 CPU in vain; it has 0 CPUs in all\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["idle", "aggregating"])
def test_a_cluster_that_is_gone_ends_the_server_in_one_line(kind: str, tmp_path: Path) -> None:
    with cluster(1) as gone:
        run = Run(gone, tmp_path, "run", HASTY)

        def kill_everything() -> None:
            kill(psutil.Process(gone.process.pid).children())
            kill(gone.shards())
            if kind == "idle":  # and stays so: no update is on its way
                assert run.server
                run.server.wait(60)

        code, error = run.go(kill_everything) if kind == "idle" else run.go(late=kill_everything)
        accepted = run.accepted()
    assert (code, len(error)) == (1, 1), (code, error, run.events())
    (line,) = error
    assert "the head of the Ray cluster is gone" in line
    assert "go on by --resume" in line
    with cluster(1) as again:
        run = Run(again, tmp_path, "run")
        assert run.go() == (0, [])
    assert accepted >= EARLY
    assert run.rows("SELECT COUNT(*) FROM rounds WHERE outcome = 'aggregated'") == [(ROUNDS,)]
