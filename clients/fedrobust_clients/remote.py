"""A client in a process of its own, over gRPC."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio
from fedrobust_proto.v1.federation_pb2 import (
    Assignment,
    Chunk,
    EnrolReply,
    EnrolRequest,
    ModelRequest,
    ProgressReply,
    ProgressRequest,
    Receipt,
    RoundsRequest,
    SubmitRequest,
)
from fedrobust_proto.v1.federation_pb2_grpc import FederationStub

from fedrobust.text import printable
from fedrobust.training import Task
from fedrobust_clients.credentials import Credentials, open_channel
from fedrobust_clients.runtime import Participation, Runtime, pauses

__all__ = ["GrpcConnection", "run"]

log = logging.getLogger(__name__)

_OPTIONS = [
    ("grpc.keepalive_time_ms", 20_000),  # a dead connection is found out
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),  # a server is joined soon after it has come
]


class GrpcConnection:
    """A `Connection` over a gRPC channel."""

    def __init__(self, channel: grpc.aio.Channel, patience: float) -> None:
        """Use this channel; give the server `patience` seconds to appear."""
        self._stub = FederationStub(channel)
        self._patience = patience

    async def enrol(self, request: EnrolRequest) -> EnrolReply:
        """Join, waiting for the server to come up; why it is not there is said at once."""
        try:
            reply: EnrolReply = await self._stub.Enrol(request, timeout=self._patience)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            reason = printable(error.details() or "")
            log.warning("the server is waited for: %s", reason)
            try:
                reply = await self._stub.Enrol(request, wait_for_ready=True, timeout=self._patience)
            except grpc.aio.AioRpcError as later:
                if later.code() is grpc.StatusCode.DEADLINE_EXCEEDED:  # that says less
                    raise error from None
                raise
        return reply

    def rounds(self, request: RoundsRequest) -> AsyncIterator[Assignment]:
        """Wait for work."""
        stream: AsyncIterator[Assignment] = self._stub.Rounds(request)
        return stream

    def model(self, request: ModelRequest) -> AsyncIterator[Chunk]:
        """Download the model."""
        stream: AsyncIterator[Chunk] = self._stub.Model(request)
        return stream

    async def progress(self, request: ProgressRequest) -> ProgressReply:
        """What the server has of an update."""
        reply: ProgressReply = await self._stub.Progress(request)
        return reply

    async def submit(self, requests: AsyncIterator[SubmitRequest]) -> Receipt:
        """Upload an update."""
        receipt: Receipt = await self._stub.Submit(requests)
        return receipt


_FOR_GOOD = {
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
}
"""Answers that asking again does not change."""


async def run(
    address: str,
    client: str,
    prepare: Callable[[Task], Runtime],
    watch: Callable[[int, Receipt], None],
    patience: float = 600.0,
    credentials: Credentials | None = None,
    *,
    imports: bool = False,
) -> int:
    """Take part in the federation of a server until it ends, through lost connections and restarts.

    Args:
        address: "host:port" of the server.
        client: this client's name.
        prepare: makes the runtime for the server's task.
        watch: is told of every receipt, with its round.
        patience: seconds that the server may stay away before we give up; not for how long it says
            nothing while it is there.
        credentials: for TLS; None sends everything in the clear.
        imports: whether the server may name a model or dataset by import path; its code then runs here.

    Returns:
        How many updates were accepted.

    Raises:
        ConnectionError: the server is not there, refused, or stayed away.
        InputError: the task does not fit this client, or names what may not be imported.
    """
    token = credentials.token if credentials else b""
    part = Participation(client, prepare, watch, token=token, imports=imports)
    gone = time.monotonic()  # since when it may have been away
    while True:
        for pause in pauses():
            async with open_channel(address, credentials, _OPTIONS) as channel:
                try:
                    await part.attend(GrpcConnection(channel, patience))
                except grpc.aio.AioRpcError as error:
                    now = time.monotonic()
                    if was_there := part.heard > gone:
                        gone = now
                    if error.code() in _FOR_GOOD or now - gone > patience:
                        raise ConnectionError(_complaint(address, error)) from None
                else:
                    return part.accepted
            await asyncio.sleep(pause)
            if was_there:  # begin with short pauses again
                break


def _complaint(address: str, error: grpc.aio.AioRpcError) -> str:
    """What is wrong, and what to look at."""
    why = printable(error.details() or "no reason given")
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return (
            f"the server at {address} cannot be reached: {why}; is this its address, and TLS as it "
            "wants it?"
        )
    return f"the server at {address} answered {error.code().name}: {why}"
