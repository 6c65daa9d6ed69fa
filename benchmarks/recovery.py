"""How long a round takes that loses a shard: from the kill to the finished round.

python -m benchmarks.recovery [--blind] prints one JSON line of seconds: 20 updates of 1e7 coordinates
are accepted, a shard is killed (kill -9) or not, the last client's update comes, and the round ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from fedrobust_clients.runtime import Floats, Update, participate
from fedrobust_server import shards
from fedrobust_server.config import RunConfig
from fedrobust_server.launch import Federation, federation
from fedrobust_server.runs import RunFolder

from fedrobust.training import Task

CLIENTS = 21
HIDDEN = 133_333
"""Of the digits' MLP: 64 h + h + 10 h + 10 = 1e7 parameters."""


@dataclass
class Random:
    """A client that sends noise; the last one waits until it may."""

    seed: int
    gate: asyncio.Event | None

    async def update(self, round: int, model: Floats) -> Update:  # noqa: A002
        """Normal noise."""
        rng = np.random.default_rng([self.seed, round])
        values = rng.standard_normal(len(model), dtype=np.float32)
        if self.gate:
            await self.gate.wait()
        return Update(values, 1)


def shard_processes() -> list[psutil.Process]:
    """The shards' processes, by the titles that Ray gives them."""
    family = psutil.Process().children(recursive=True)
    return [p for p in family if "".join(p.cmdline()[:1]).startswith("ray::Shard")]


async def rounds(ready: Federation) -> dict[str, float]:
    """Three rounds, the second one with a kill; seconds from when the last update may come."""
    gate, coordinator = asyncio.Event(), ready.coordinator
    running = asyncio.ensure_future(coordinator.run())
    clients = []
    for i in range(CLIENTS):
        runtime = Random(i, gate if i == CLIENTS - 1 else None)
        clients.append(
            asyncio.ensure_future(participate(coordinator, f"c{i:02}", lambda _, r=runtime: r))
        )
    took: dict[str, float] = {}
    for number, kind in ((1, "first round"), (2, "shard killed"), (3, "undisturbed")):
        while coordinator._round.number < number or len(coordinator._round.norms) < CLIENTS - 1:  # noqa: ASYNC110, SLF001
            await asyncio.sleep(0.01)
        await asyncio.sleep(5.0)  # what has come is in the Gram matrix
        began = time.monotonic()
        if kind == "shard killed":
            os.kill(shard_processes()[0].pid, signal.SIGKILL)
        gate.set()
        while coordinator._round.number == number and not running.done():  # noqa: SLF001
            await asyncio.sleep(0.005)
            if coordinator._state.phase.value == "aggregating":  # noqa: SLF001
                gate.clear()
        took[kind] = time.monotonic() - began
    await running
    await asyncio.gather(*clients)
    return took


def main() -> None:
    """Run it once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blind", action="store_true", help="no shard sees the spool")
    if parser.parse_args().blind:
        shards.identity = lambda _: ("another machine", 0, 0)
    task = Task(model=f"mlp({HIDDEN})", clients=CLIENTS)
    config = RunConfig(run="recovery", task=task, rounds=3, deadline=600.0, eps=0.2, shards=2)
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder.create(Path(place), config)
        with federation(config, folder, data_dir=None, ray_address=None, watch=lambda _: None) as ready:
            took = asyncio.run(rounds(ready))
    load = os.getloadavg()[0]
    sys.stdout.write(json.dumps({k: round(v, 2) for k, v in took.items()} | {"load": load}) + "\n")


if __name__ == "__main__":
    main()
