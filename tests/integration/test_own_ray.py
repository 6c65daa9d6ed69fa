"""The Ray that a server starts for itself: nobody else reaches it, and nothing of it stays."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
import ray
from fedrobust_server import launch

from fedrobust.cli import main

JOIN = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR')"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """As a user has it who never heard of Ray, with an empty home."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**kept, "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture
def family(tmp_path: Path, env: dict[str, str]) -> Iterator[list[psutil.Process]]:
    """A server and all processes that it has started."""
    arguments = ("serve", "--json", "--bind", "127.0.0.1:0", "--runs-dir", str(tmp_path / "runs"))
    with subprocess.Popen(
        [sys.executable, "-m", "fedrobust.cli", *arguments], stdout=subprocess.PIPE, text=True, env=env
    ) as server:
        try:
            assert server.stdout
            assert "listening" in json.loads(server.stdout.readline())
            yield [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        finally:
            server.terminate()
            server.communicate(timeout=60)
    assert server.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", ".cache", ".config"}


def doors(family: list[psutil.Process]) -> set[tuple[str, str, int]]:
    """Where these processes listen: name, address and port."""
    return {
        (process.name(), found.laddr.ip, found.laddr.port)
        for process in family
        for found in process.net_connections("inet")
        if found.status == psutil.CONN_LISTEN
    }


def head(family: list[psutil.Process]) -> str:
    (port,) = {port for name, _, port in doors(family) if name == "gcs_server"}
    return f"127.0.0.1:{port}"


def test_the_ray_that_we_start_is_on_loopback_and_asks_for_its_token(
    family: list[psutil.Process],
) -> None:
    assert {ip for _, ip, _ in doors(family) if not loopback(ip)} == set()
    lines = [" ".join(process.cmdline()) for process in family]
    # Ray's helper of that name runs without its modules for people, and serves no page.
    assert all("--disable-frontend" in line for line in lines if "dashboard/dashboard.py" in line)
    assert 8265 not in {port for *_, port in doors(family)}
    assert answer(head(family), token(family)) == grpc.StatusCode.OK
    for wrong in ("", "b" * 64):
        assert answer(head(family), wrong) == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.slow
def test_another_users_ray_does_not_join(family: list[psutil.Process], env: dict[str, str]) -> None:
    once = {**env, "RAY_NUM_REDIS_GET_RETRIES": "1"}  # rather than 20 times, each for most of a minute
    done = subprocess.run(
        [sys.executable, "-c", JOIN, head(family)],
        capture_output=True,
        timeout=300,
        env=once,
        check=False,
    )
    assert done.returncode == 1
    assert b"ConnectionError" in done.stderr


def loopback(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def token(family: list[psutil.Process]) -> str:
    """What the server and its Ray share; only their own user can read it."""
    (found,) = {p.environ()["RAY_AUTH_TOKEN"] for p in family if p.name() == "gcs_server"}
    return found


def answer(address: str, secret: str) -> grpc.StatusCode:
    """What Ray's head says to a call with this token."""
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            ask(b"", timeout=10, metadata=[("authorization", f"Bearer {secret}")] if secret else [])
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


def test_a_machine_too_busy_for_ray_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could be anything.")  # noqa: TRY002

    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert main(["compare", "--rounds", "1", "--to", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "Ray does not start: The current node timed out during startup; this machine may be" in told
    assert told.count("\n") == 1


def test_a_ray_that_is_not_up_in_time_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that is busy for a moment; Ray's patience is a number in its code."""
    late = Exception("The current node timed out during startup. This could happen because ...")
    for outcomes, ends in (([late, None], True), ([late, late], False)):
        left = list(outcomes)

        def init(*_: object, left: list[Exception | None] = left, **__: object) -> None:
            if (outcome := left.pop(0)) is not None:
                raise outcome

        monkeypatch.setattr(launch.ray, "init", init)
        monkeypatch.setattr(launch.ray_constants, "ENABLE_RAY_CLUSTER", False)  # and put back
        monkeypatch.setenv(launch.ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0")
        if ends:
            launch._start_ray()
        else:
            with pytest.raises(ConnectionError, match="timed out during startup; this machine may be"):
                launch._start_ray()
        assert not left
