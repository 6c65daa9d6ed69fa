"""The Flower example in real processes: the simulation engine, SuperLink and SuperNodes on loopback."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs Flower: pip install 'fedrobust[flower]'")

APP = Path(__file__).parents[2] / "examples" / "flower"
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(home: Path) -> dict[str, str]:
    """Of Flower's processes: their files in a folder of the test's, their commands found."""
    return {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


@contextlib.contextmanager
def started(home: Path, name: str, *command: str) -> Iterator[Path]:
    """A process with all that it starts, which do not outlive the test; gives its log."""
    log = home / f"{name}.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(home),
            start_new_session=True,
        ) as process,
    ):
        try:
            yield log
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def superlink(home: Path, *options: str) -> Iterator[int]:
    """A SuperLink of the test's own; gives its port."""
    port = free_port()
    address = f'address = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(f'[superlink]\ndefault = "mine"\n[superlink.mine]\n{address}')
    command = ["flower-superlink", "--insecure", "--port", str(port), *options]
    with started(home, "superlink", *command) as log:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield port


def flwr(home: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(BIN / "flwr"), *arguments],
        cwd=APP,
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    return done.stdout + done.stderr


def accuracy(home: Path, **config: object) -> float:
    """What a run of the example comes to."""
    values = " ".join(f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in config.items())
    told = flwr(home, "run", ".", "mine", "--stream", "--run-config", values)
    found = re.search(r"test accuracy (\S+) by", told)
    assert found, told[-5000:]
    return float(found[1])


def test_in_the_simulation_engine(tmp_path: Path) -> None:
    with superlink(tmp_path, "--simulation", "--disable-runtime-dependency-installation"):
        flwr(
            tmp_path, "federation", "simulation-config", "@none/default", "mine", "--num-supernodes", "8"
        )
        assert accuracy(tmp_path, rule="filter(eps=0.3)", malicious=2, rounds=5) > 0.75
        assert accuracy(tmp_path, rule="", malicious=2, rounds=5) < 0.2
        assert accuracy(tmp_path, rule="", malicious=0, rounds=5) > 0.75


def test_superlink_and_supernodes_over_loopback(tmp_path: Path) -> None:
    nodes = 5
    with (
        superlink(tmp_path, "--disable-runtime-dependency-installation") as port,
        contextlib.ExitStack() as stack,
    ):
        for part in range(nodes):
            command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
            own = ["--port", str(free_port()), "--node-config"]
            config = f"partition-id={part} num-partitions={nodes}"
            stack.enter_context(started(tmp_path, f"node-{part}", *command, *own, config))
        found = accuracy(tmp_path, rule="filter(eps=0.2)", malicious=1, rounds=4)
        assert found > 0.6


def test_the_comparison_with_flowers_own_strategies() -> None:
    rows = ["--only", "FedAvg", 'RobustStrategy("filter")', "--attacks", "none", "ipm", "keys"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.flower", "--rounds", "4", *rows],
        cwd=APP.parents[1],
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| `")]
    (theirs, ours) = ([cell.strip("| `") for cell in row] for row in table)
    assert (theirs[0], ours[0]) == ("FedAvg", 'RobustStrategy("filter")')
    assert float(theirs[1]) > 80
    assert float(theirs[2]) < 50
    assert theirs[3].startswith("ends: ")
    assert all(float(cell) > 80 for cell in ours[1:4])
