"""The coordinator's door to the network: gRPC, and nothing but."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
from fedrobust_proto.v1 import federation_pb2_grpc
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

from fedrobust import InputError
from fedrobust_server.coordinator import Coordinator, DeniedError, LeavingError

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]


class Gateway(federation_pb2_grpc.FederationServicer):
    """Passes calls to the coordinator and its refusals back as gRPC statuses."""

    def __init__(self, coordinator: Coordinator) -> None:
        """Serve this coordinator."""
        self._coordinator = coordinator

    async def Enrol(self, request: EnrolRequest, context: Context) -> EnrolReply:  # noqa: N802
        """Join."""
        return await _or_abort(context, lambda: self._coordinator.enrol(request))

    async def Rounds(self, request: RoundsRequest, context: Context) -> AsyncIterator[Assignment]:  # noqa: N802
        """Wait for work."""
        async for assignment in _stream_or_abort(context, self._coordinator.rounds(request)):
            yield assignment

    async def Model(self, request: ModelRequest, context: Context) -> AsyncIterator[Chunk]:  # noqa: N802
        """Download the model."""
        async for chunk in _stream_or_abort(context, self._coordinator.model(request)):
            yield chunk

    async def Progress(self, request: ProgressRequest, context: Context) -> ProgressReply:  # noqa: N802
        """Ask what is here of an update."""
        return await _or_abort(context, lambda: self._coordinator.progress(request))

    async def Submit(  # noqa: N802
        self, request_iterator: AsyncIterator[SubmitRequest], context: Context
    ) -> Receipt:
        """Upload an update."""
        return await _or_abort(context, lambda: self._coordinator.submit(request_iterator))


async def listen(coordinator: Coordinator, address: str) -> tuple[grpc.aio.Server, int]:
    """Start serving; port 0 lets the system choose one.

    Args:
        coordinator: what to serve.
        address: "host:port", on loopback.

    Returns:
        The running server and its port.

    Raises:
        InputError: the address is beyond loopback, malformed or taken.
    """
    require_loopback(address)
    server = grpc.aio.server()
    federation_pb2_grpc.add_FederationServicer_to_server(Gateway(coordinator), server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        raise InputError(f"cannot listen on {address}: is the port taken?") from None
    await server.start()
    return server, port


def require_loopback(address: str) -> None:
    """Refuse to carry updates in the clear beyond this machine.

    Raises:
        InputError: the address is malformed, or not of the loopback interface.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"expected an address as host:port, got {address!r}")
    host = host.strip("[]")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise InputError(
            f"refusing to listen on {address!r} without TLS: anyone on the way could read and change "
            "updates; bind 127.0.0.1 and reach it through a tunnel"
        )


async def _or_abort(context: Context, call: Callable[[], Awaitable[T]]) -> T:
    try:
        return await call()
    except DeniedError as error:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        raise
    except LeavingError as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        raise


async def _stream_or_abort(context: Context, stream: AsyncGenerator[T, None]) -> AsyncIterator[T]:
    try:
        async with contextlib.aclosing(stream):
            async for item in stream:
                yield item
    except DeniedError as error:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except LeavingError as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
