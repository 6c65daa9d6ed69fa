"""A door without a federation behind it: what comes through is recorded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Coroutine
from typing import Any

import grpc
import grpc.aio
import pytest
from fedrobust_clients.credentials import Credentials, open_channel
from fedrobust_proto.v1 import federation_pb2 as pb
from fedrobust_proto.v1.federation_pb2_grpc import FederationStub
from fedrobust_server.gateway import Listening, listen
from fedrobust_server.keys import Authority
from fedrobust_server.limits import Limits
from fedrobust_server.security import Security
from grpc import StatusCode

from fedrobust.training import Task

CHUNK = pb.SubmitRequest(chunk=pb.Chunk(data=b"1234"))


class Recorder:
    """In the coordinator's place: takes anything, and remembers what it was given."""

    def __init__(self) -> None:
        self.enrolled: list[tuple[str, str | None, bytes]] = []
        self.sessions: dict[bytes, str] = {}
        self.received: list[int] = []
        self.listening = 0
        self.offers: asyncio.Queue[int] = asyncio.Queue()

    async def enrol(self, request: pb.EnrolRequest, identity: str | None = None) -> pb.EnrolReply:
        self.enrolled.append((request.client, identity, request.token))
        if request.client == "broken":
            raise RuntimeError("a secret of the server's")
        session = f"{request.client}-{len(self.enrolled)}".encode()
        self.sessions[session] = request.client
        return pb.EnrolReply(session=session, task=Task().to_json())

    def owner(self, session: bytes) -> str | None:
        return self.sessions.get(session)

    async def rounds(self, _request: pb.RoundsRequest) -> AsyncGenerator[pb.Assignment, None]:
        self.listening += 1
        try:
            while True:
                yield pb.Assignment(round=await self.offers.get())
        finally:
            self.listening -= 1

    async def model(self, request: pb.ModelRequest) -> AsyncGenerator[pb.Chunk, None]:
        self.listening += 1
        try:
            yield pb.Chunk(data=b"model")
            for _ in range(request.round):  # a large model, in MiB
                yield pb.Chunk(data=bytes(1 << 20))
        finally:
            self.listening -= 1

    async def progress(self, _request: pb.ProgressRequest) -> pb.ProgressReply:
        return pb.ProgressReply()

    async def submit(self, requests: AsyncIterator[pb.SubmitRequest]) -> pb.Receipt:
        self.received.append(0)
        turn = len(self.received) - 1
        async for _ in requests:
            self.received[turn] += 1
        return pb.Receipt(status=pb.STATUS_ACCEPTED)


@contextlib.asynccontextmanager
async def door(
    security: Security | None = None, limits: Limits | None = None
) -> AsyncIterator[tuple[Recorder, Listening]]:
    recorder = Recorder()
    listening = await listen(recorder, "127.0.0.1:0", security, limits)
    try:
        yield recorder, listening
    finally:
        await listening.stop(grace=0)


@contextlib.asynccontextmanager
async def client(
    listening: Listening, credentials: Credentials | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[FederationStub]:
    async with open_channel(f"{host}:{listening.port}", credentials) as channel:
        yield FederationStub(channel)


async def refused(call: Awaitable[Any]) -> tuple[StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, 20)
    return caught.value.code(), caught.value.details() or ""


async def drained(stream: AsyncIterator[Any]) -> int:
    return len([message async for message in stream])


def enrol(stub: FederationStub, name: str, token: bytes = b"") -> Any:
    return stub.Enrol(pb.EnrolRequest(client=name, token=token))


def submit(
    stub: FederationStub, session: bytes, *parts: pb.SubmitRequest, pause: float = 0
) -> asyncio.Task[pb.Receipt]:
    """Upload, and once more where gRPC lost the refusal.

    A write on its way when the server ends the call makes the client forget the status that came:
    https://github.com/grpc/grpc/issues/36066.
    """

    async def stream() -> AsyncIterator[pb.SubmitRequest]:
        yield pb.SubmitRequest(header=pb.SubmitHeader(session=session))
        for part in parts:
            await asyncio.sleep(pause)
            yield part

    async def sent() -> pb.Receipt:
        for _ in range(20):
            try:
                receipt: pb.Receipt = await stub.Submit(stream())
            except grpc.aio.AioRpcError as error:
                if error.details() != "Internal error from Core":
                    raise
            else:
                return receipt
        pytest.fail("gRPC lost the answers to 20 uploads")

    return asyncio.ensure_future(sent())


async def accepted(stub: FederationStub, session: bytes) -> None:
    """Upload as soon as earlier calls are over."""
    for _ in range(1000):
        try:
            assert (await submit(stub, session, CHUNK)).status == pb.STATUS_ACCEPTED
        except grpc.aio.AioRpcError as error:
            if error.code() != StatusCode.RESOURCE_EXHAUSTED:
                raise
            await asyncio.sleep(0.01)
        else:
            return
    pytest.fail("earlier calls are never over")


def calls(stub: FederationStub, session: bytes) -> dict[str, Coroutine[Any, Any, Any]]:
    """One of each call that carries a session."""

    async def first(stream: Any) -> Any:
        answer = await stream.read()
        stream.cancel()
        return answer

    async def upload() -> Any:
        return await submit(stub, session, CHUNK)

    async def ask() -> Any:
        return await stub.Progress(pb.ProgressRequest(session=session))

    return {
        "Progress": ask(),
        "Rounds": first(stub.Rounds(pb.RoundsRequest(session=session))),
        "Model": first(stub.Model(pb.ModelRequest(session=session))),
        "Submit": upload(),
    }


def certified(authority: Authority, name: str = "alice", ca: Authority | None = None) -> Credentials:
    found = Credentials.read(
        (ca or authority).folder / "authority.pem", authority.folder / "clients" / name
    )
    assert found
    return found


def token_of(authority: Authority, name: str = "bob") -> Credentials:
    folder = authority.folder
    found = Credentials.read(folder / "authority.pem", token=folder / "tokens" / f"{name}.token")
    assert found
    return found


def mutual(authority: Authority) -> Security:
    return Security.load(authority.folder / "server", "certificate")


def by_token(authority: Authority) -> Security:
    return Security.load(authority.folder / "server", "token", "first")
