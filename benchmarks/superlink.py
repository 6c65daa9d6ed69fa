"""A model by Flower's SuperLink and by our server, in turns: bytes a second from hand to hand.

    python -m benchmarks.superlink --parameters 1e7

Both are processes of this machine, reached over loopback in the clear by one client, which has the
update as a vector in memory and wants the model as one. Ours takes updates as it always does: checked,
hashed, in the round's file and in the ledger before the receipt. The SuperLink keeps messages in memory,
and what it has been given has yet to go to the ServerApp, a process of its own; that way is measured
beside. The ends of SuperNode and ServerApp are Flower's own code. The ClientApp would be one more
process, and is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import io
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import numpy.typing as npt
from fedrobust_clients.runtime import Update, _Work
from fedrobust_proto.v1 import vectors
from fedrobust_proto.v1.federation_pb2 import EnrolRequest, ModelRequest, RoundsRequest, Status
from fedrobust_proto.v1.federation_pb2_grpc import FederationStub

from benchmarks.ingest import Load, process, serve
from benchmarks.peers import NEEDS, flower, installed

Vector = npt.NDArray[np.float32]

_APP = """\
[project]
name = "bench"
version = "1.0.0"
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"
"""
_PATIENCE = 60.0
"""Seconds for the SuperLink to come up."""
_MESSAGES = 600.0
"""Seconds for which the SuperLink keeps one."""


@dataclass
class Times:
    """Seconds of every round, by the way that the vector went."""

    down: list[float] = field(default_factory=list)
    up: list[float] = field(default_factory=list)
    from_app: list[float] = field(default_factory=list)
    to_app: list[float] = field(default_factory=list)


# ---- Flower's -------------------------------------------------------------------------------------


@contextlib.contextmanager
def superlink(folder: Path) -> Iterator[str]:
    """The SuperLink's process; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    path = Path(sys.executable).with_name("flower-superlink")
    command = str(path) if path.exists() else shutil.which("flower-superlink")
    if command is None:
        raise SystemExit(f"there is no command flower-superlink; {NEEDS}")
    log = folder / "superlink.log"
    with log.open("w") as output:
        started = subprocess.Popen(
            [command, "--insecure", "--isolation", "process", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + _PATIENCE
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                if started.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the SuperLink does not come up:\n{log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            started.terminate()
            started.wait()


@dataclass(frozen=True)
class Peer:
    """A SuperLink with a run, the ServerApp's connection to it and a SuperNode's.

    Attributes:
        grid: the ServerApp's.
        run: its number.
        node: the SuperNode's.
        receive: the SuperNode's next message and what belongs to it.
        send: announces the SuperNode's message; gives what of it is to be pushed.
        pull: the SuperNode fetches an object.
        push: the SuperNode gives an object.
        confirm: the SuperNode has all of a message.
    """

    grid: Any
    run: int
    node: int
    receive: Callable[[], Any]
    send: Callable[..., Any]
    pull: Callable[[int, str], bytes]
    push: Callable[[int, str, str, bytes], None]
    confirm: Callable[[int, str], None]

    def round(self, model: Vector, update: Vector, times: Times) -> None:
        """The model goes out, an update comes back."""
        app, objects = flower("app"), flower("supercore.inflatable.inflatable_object")
        began = time.perf_counter()
        message = app.Message(_record(model), self.node, "train", ttl=_MESSAGES)
        (number,) = self.grid.push_messages([message])
        given = time.perf_counter()
        asked, taken = self._taken()
        had = time.perf_counter()
        _expect(np.array_equal(taken, model), "the SuperNode has another model")

        begun = time.perf_counter()
        answer = app.Message(_record(update), reply_to=asked, ttl=_MESSAGES / 2)
        with objects.no_object_id_recompute():
            answer.metadata.__dict__["_message_id"] = answer.object_id
            tree, parts = objects.get_object_tree(answer), objects.get_all_nested_objects(answer)
            wanted, session = self.send(answer, tree, 0.0)
            utils = flower("supercore.inflatable.inflatable_utils")
            push = partial(self.push, self.run, session)
            utils.push_objects(parts, push, object_ids_to_push=wanted)
        sent = time.perf_counter()
        (reply,) = self.grid.pull_messages([number])
        found = reply.content["arrays"]["vector"].numpy()
        ended = time.perf_counter()
        _expect(np.array_equal(found, update), "the ServerApp has another update")
        times.from_app.append(given - began)
        times.down.append(had - given)
        times.up.append(sent - begun)
        times.to_app.append(ended - sent)

    def _taken(self) -> tuple[Any, Vector]:
        """The SuperNode's message, and the vector in it."""
        utils = flower("supercore.inflatable.inflatable_utils")
        objects = flower("supercore.inflatable.inflatable_object")
        message, tree = self.receive()
        ids = [part.object_id for part in objects.iterate_object_tree(tree)]
        contents = utils.pull_objects(ids, pull_object_fn=lambda key: self.pull(self.run, key))
        self.confirm(self.run, message.metadata.message_id)
        whole = utils.inflate_object_from_contents(message.metadata.message_id, contents)
        whole.metadata.__dict__["_message_id"] = message.metadata.message_id
        vector: Vector = whole.content["arrays"]["vector"].numpy()
        return whole, vector


@contextlib.contextmanager
def peer(address: str) -> Iterator[Peer]:
    """Begin a run at a SuperLink, as its ServerApp and as a SuperNode."""
    version = flower("supercore.interceptors").RuntimeVersionHttpInterceptor
    fab = io.BytesIO()
    with zipfile.ZipFile(fab, "w") as archive:
        archive.writestr("pyproject.toml", _APP)
    bundle = flower("proto.fab_pb2").Fab(
        hash_str=hashlib.sha256(fab.getvalue()).hexdigest(), content=fab.getvalue()
    )
    control = flower("supercore.control.control_http_client").ControlHttpClient
    runtime = flower("supercore.runtime").RuntimeHttpClient
    messages = flower("proto.runtime_pb2")
    speaks = {"insecure": True, "interceptors": [version(component_name="benchmark")]}
    with control.from_server_address(address, root_certificates=None, **speaks) as client:
        client.StartRun(flower("proto.control_pb2").StartRunRequest(fab=bundle))
    with runtime.from_server_address(address, root_certificates=None, **speaks) as client:
        task = client.AcquireTask(messages.AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
    grid = flower("superlink.grid.http_grid").HttpGrid(address, insecure=True, token=task.token)
    given = grid._runtime_client.PullTaskInput(messages.PullTaskInputRequest())  # noqa: SLF001
    grid.set_run(flower("common.serde").run_from_proto(given.run))
    identity = flower("supercore.task_identity").TaskIdentity  # messages are made as the ServerApp
    identity.task_id, identity.run_id = given.task_id, given.run.run_id
    identity.node_id = given.context.node_id
    connection = flower("supernode.fleet_http_connection").http_request_response
    supernode = connection(address, insecure=True)
    node, receive, send, _run, _fab, pull, push, confirm = supernode.__enter__()
    heart = flower("supercore.heartbeat")
    heartbeats = heart.HeartbeatSender(heart.make_task_heartbeat_fn_http(grid._runtime_client))  # noqa: SLF001
    heartbeats.start()
    try:
        yield Peer(grid, given.run.run_id, node, receive, send, pull, push, confirm)
    finally:
        heartbeats.stop()
        supernode.__exit__(None, None, None)  # which would keep an exception to itself
        grid.close()


def _record(vector: Vector) -> Any:  # noqa: ANN401 (Flower's are not typed here)
    app = flower("app")
    return app.RecordDict({"arrays": app.ArrayRecord({"vector": app.Array(vector)})})


# ---- ours -----------------------------------------------------------------------------------------


class Client:
    """A client of our server."""

    def __init__(self, stub: FederationStub, session: bytes) -> None:
        """Use an open session."""
        self._stub, self._session, self._encoding = stub, session, vectors.encoding()
        self._offers = aiter(stub.Rounds(RoundsRequest(session=session)))

    async def round(self, number: int, update: Vector, times: Times) -> None:
        """The model comes in, an update goes out."""
        _expect((await anext(self._offers)).round == number, "another round was offered")
        began, data = time.perf_counter(), bytearray()
        request = ModelRequest(session=self._session, round=number, encoding=self._encoding)
        async for part in self._stub.Model(request):
            data += vectors.expand(part.data, self._encoding.compression)
        model = vectors.unpack(data, self._encoding.dtype)
        had = time.perf_counter()
        _expect(len(model) == len(update), "there was no model")
        work = _Work.of(number, Update(update, 1), self._encoding)
        receipt = await self._stub.Submit(work.requests(self._session, 0))
        times.up.append(time.perf_counter() - had)
        times.down.append(had - began)
        _expect(receipt.status == Status.STATUS_ACCEPTED, receipt.reason)


# ---- beside each other ----------------------------------------------------------------------------


async def run(parameters: int, rounds: int, folder: Path) -> tuple[Times, Times]:
    """Every round once by our server and once by the SuperLink; the first of each is not counted."""
    rng = np.random.default_rng(0)
    ours, theirs = Times(), Times()
    load = Load(1, parameters, 1, rounds + 1, 2, "mean", "float32", folder)
    with superlink(folder) as link, peer(link) as there:
        async with process(serve, load) as (_, address), grpc.aio.insecure_channel(address) as channel:
            stub = FederationStub(channel)
            session = (await stub.Enrol(EnrolRequest(client="client-0000"))).session
            client = Client(stub, session)
            for number in range(1, rounds + 2):
                model, update = (rng.standard_normal(parameters, dtype=np.float32) for _ in range(2))
                await client.round(number, update, ours)
                await asyncio.sleep(2.0)  # the round's end should not weigh on the other
                await asyncio.to_thread(there.round, model, update, theirs)
    for times in (ours, theirs):
        for way in vars(times).values():
            del way[:1]
    return ours, theirs


def report(parameters: int, ours: Times, theirs: Times) -> str:
    """Both as bytes a second, and ours as a multiple."""
    size, lines = 4 * parameters, []
    for what, own, other in (
        ("client to server", ours.up, theirs.up),
        ("client to server, and Flower's on to the ServerApp", ours.up, _sums(theirs.up, theirs.to_app)),
        ("server to client", ours.down, theirs.down),
        (
            "server to client, and Flower's from the ServerApp",
            ours.down,
            _sums(theirs.from_app, theirs.down),
        ),
    ):
        ratios = sorted(b / a for a, b in zip(own, other, strict=True))
        lines.append(
            f"{what:<51} ours {_rate(size, own)} MB/s, Flower's {_rate(size, other)} MB/s: "
            f"{statistics.median(ratios):.1f} times ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        )
    return "\n".join(lines)


def _sums(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _rate(size: int, seconds: Sequence[float]) -> str:
    return f"{size / statistics.median(seconds) / 1e6:.0f}"


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise RuntimeError(otherwise)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both, and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.superlink", description=__doc__)
    parser.add_argument("--parameters", type=float, default=1e7)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    found = installed("flwr")
    if found is None:
        raise SystemExit(f"Flower is not installed; {NEEDS}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ |= {
            "FLWR_HOME": folder,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        try:
            ours, theirs = asyncio.run(run(int(given.parameters), given.rounds, Path(folder)))
        except ModuleNotFoundError as error:
            raise SystemExit(
                f"flwr {found} is another than 1.42, which this is made for: {error}"
            ) from None
    print(f"{given.parameters:g} parameters, {given.rounds} rounds of each in turns, flwr {found}")
    print(report(int(given.parameters), ours, theirs))


if __name__ == "__main__":
    main()
