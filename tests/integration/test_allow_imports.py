"""A client imports what a server names only where its operator allows that."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
from fedrobust_server.config import RunConfig
from fedrobust_server.gateway import listen
from fedrobust_server.launch import federation
from fedrobust_server.runs import RunFolder

from fedrobust.training import Task

from .processes import COMMAND, in_process, played

WARD = """
import os
from pathlib import Path

from fedrobust.data import load
from fedrobust.training import parse_model

with Path(__file__).with_suffix(".importers").open("a") as file:
    print(os.getpid(), file=file)


def model(shape, classes):
    return parse_model("softmax").build(shape, classes)


def data():
    return load("digits")
"""


def test_a_client_imports_only_what_it_is_allowed_to(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ward.py").write_text(WARD)
    monkeypatch.syspath_prepend(tmp_path)
    here = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    async def client(address: str, *options: str) -> tuple[int, int, str]:
        command = (*COMMAND, "client", "--server", address, "--id", "0", *options)
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, "PYTHONPATH": here},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        assert process.returncode is not None
        return process.pid, process.returncode, output.decode()

    task = Task(model="ward:model", dataset="ward:data", clients=1)
    config = RunConfig(run="first", task=task, rounds=2)
    folder = RunFolder.create(tmp_path / "runs", config)
    with federation(
        config, folder, data_dir=None, ray_address=None, watch=lambda _report: None
    ) as ready:

        async def scenario() -> tuple[tuple[int, int, str], tuple[int, int, str]]:
            door = await listen(ready.coordinator, "127.0.0.1:0")
            try:
                refusing = await client(f"127.0.0.1:{door.port}")
                running = asyncio.create_task(ready.coordinator.run())
                allowing = await client(f"127.0.0.1:{door.port}", "--allow-imports")
                await running
            finally:
                await door.stop(grace=0.5)
            return refusing, allowing

        (refused, code, complaint), (allowed, success, output) = asyncio.run(scenario())
    assert code == 2
    assert complaint.count("\n") == 1
    assert "ward:model" in complaint
    assert "--allow-imports" in complaint
    assert (success, output) == (0, "round 1: accepted\nround 2: accepted\n")
    importers = list(map(int, (tmp_path / "ward.importers").read_text().split()))
    assert refused not in importers
    assert allowed in importers


@pytest.mark.slow
def test_simulated_clients_need_no_permission(ray_cluster: None, tmp_path: Path) -> None:
    task = Task(model="fedrobust.training.published:bucketing_cnn", clients=3, outsiders=1, steps=2)
    config = RunConfig(task=task, rounds=2, rule="mean")
    found = in_process(tmp_path, config, workers=2)
    np.testing.assert_allclose(found, played(config), rtol=1e-4, atol=1e-6)  # for all its dropout
