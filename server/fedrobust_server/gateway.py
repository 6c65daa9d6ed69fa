"""The coordinator's door to the network: who is calling, how much of it, and gRPC."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from fedrobust_proto.v1 import federation_pb2, federation_pb2_grpc
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
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedrobust import InputError
from fedrobust.addresses import host_and_port
from fedrobust.text import printable
from fedrobust_server.doorkeeper import Doorkeeper, take
from fedrobust_server.limits import Cut, Limits, Slots
from fedrobust_server.refusals import ForbiddenError
from fedrobust_server.security import Security
from fedrobust_server.sessions import Session, Sessions

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

SERVICE: str = federation_pb2.DESCRIPTOR.services_by_name["Federation"].full_name
"""Our service's name: in health checks, too."""


class Served(Protocol):
    """What the gateway is the door of: the coordinator."""

    async def enrol(self, request: EnrolRequest, identity: str | None = None) -> EnrolReply:
        """Join, as the client that the identity names; None trusts the name in the request."""
        ...

    def owner(self, session: bytes) -> str | None:
        """The client that a session belongs to; None if it is over, or never was."""
        ...

    def rounds(self, request: RoundsRequest, /) -> AsyncGenerator[Assignment, None]:
        """Wait for work."""
        ...

    def model(self, request: ModelRequest, /) -> AsyncGenerator[Chunk, None]:
        """Download the model."""
        ...

    async def progress(self, request: ProgressRequest, /) -> ProgressReply:
        """What is here of an update."""
        ...

    async def submit(self, requests: AsyncIterator[SubmitRequest], /) -> Receipt:
        """Upload an update."""
        ...


class Gateway(federation_pb2_grpc.FederationServicer):
    """Lets calls through to the coordinator from those who may make them; raises `RefusedError`."""

    def __init__(self, served: Served, security: Security | None, limits: Limits) -> None:
        """Be the door of a coordinator.

        Args:
            served: the coordinator.
            security: tells who is calling; None takes names on trust.
            limits: on what callers may take.
        """
        self._served, self._security = served, security
        self._sessions = Sessions(served.owner, limits.sessions)
        self._calls = Slots("calls", limits.calls, limits.calls_per_client)
        self._uploads = Slots("uploads", limits.uploads, limits.uploads_per_client)

    async def Enrol(self, request: EnrolRequest, context: Context) -> EnrolReply:  # noqa: N802
        """Join."""
        identity = None
        if self._security is not None:
            identity = self._security.identify(context.auth_context(), request.token)
            if identity.name != request.client:
                raise ForbiddenError(
                    f"the {self._security.proof} is of {identity.name}, who cannot enrol as "
                    f"'{printable(request.client, 64)}'"
                )
        request.ClearField("token")  # a secret, of no use to anything further in
        self._sessions.check_room()
        reply = await self._served.enrol(request, identity.name if identity else None)
        self._sessions.open(reply.session, identity)
        return reply

    def Rounds(self, request: RoundsRequest, context: Context) -> AsyncGenerator[Assignment, None]:  # noqa: N802
        """Wait for work."""
        caller = self._caller(request.session, context)
        take(self._calls, caller.client, context)
        return self._while_admitted(caller, self._served.rounds(request))

    def Model(self, request: ModelRequest, context: Context) -> AsyncGenerator[Chunk, None]:  # noqa: N802
        """Download the model."""
        caller = self._caller(request.session, context)
        take(self._calls, caller.client, context)
        return self._while_admitted(caller, self._served.model(request))

    async def Progress(self, request: ProgressRequest, context: Context) -> ProgressReply:  # noqa: N802
        """Ask what is here of an update."""
        caller = self._caller(request.session, context)
        take(self._calls, caller.client, context)
        return await self._served.progress(request)

    async def Submit(  # noqa: N802
        self, request_iterator: AsyncGenerator[SubmitRequest, None], context: Context
    ) -> Receipt:
        """Upload an update."""
        first = await anext(request_iterator, None)
        requests = _following(first, request_iterator)
        headless = first is None or first.WhichOneof("part") != "header"
        if headless and self._security is None:
            return await self._served.submit(requests)  # which says what is wrong
        caller = self._caller(first.header.session if first else b"", context)
        take(self._calls, caller.client, context)
        take(self._uploads, caller.client, context)
        upload = Cut(self._while_admitted(caller, requests))
        receipt = await self._served.submit(upload)
        if upload.refused is not None:
            raise upload.refused
        return receipt

    def _caller(self, key: bytes, context: Context) -> Session:
        """Whose session this is, if it is the caller's.

        Raises:
            UnknownError: it is nobody's.
            ForbiddenError: it is another client's, or the caller is shut out.
        """
        session = self._sessions.find(key)
        if self._security is not None and self._security.proof == "certificate":
            shown = self._security.of_certificate(context.auth_context())
            if shown.name != session.client:
                raise ForbiddenError(f"the session is not of {shown.name}, whom the certificate names")
            session = Session(key, session.client, shown)  # renewed, perhaps, since it was opened
        self._admit(session)
        return session

    def _admit(self, session: Session) -> None:
        if self._security is not None and session.identity is not None:
            self._security.admit(session.identity)

    async def _while_admitted(
        self, caller: Session, items: AsyncGenerator[T, None]
    ) -> AsyncGenerator[T, None]:
        """Pass on what goes to or comes from a client, until it is shut out."""
        async with contextlib.aclosing(items):
            async for item in items:
                self._admit(caller)
                yield item


@dataclass(frozen=True)
class Listening:
    """A gateway at work.

    Attributes:
        server: gRPC's.
        port: where it listens.
    """

    server: grpc.aio.Server
    port: int
    _health: health.aio.HealthServicer

    async def drain(self) -> None:
        """Tell health checks that no new clients should be sent here; calls go on."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Drain, refuse new calls, and end those still open after `grace` seconds."""
        await self.drain()
        await self.server.stop(grace)


async def listen(
    served: Served,
    address: str,
    security: Security | None = None,
    limits: Limits | None = None,
    *,
    exposed: bool = False,
    shared: bool = False,
) -> Listening:
    """Start serving; port 0 lets the system choose one.

    Args:
        served: what to serve, the coordinator.
        address: "host:port".
        security: TLS, and who is let in; None only for loopback.
        limits: on what callers may take.
        exposed: let anyone who reaches the address read and poison the federation.
        shared: let other gateways listen on the same port.

    Raises:
        InputError: as `check_address`, or the address is taken.
    """
    check_address(address, secured=security is not None, exposed=exposed)
    limits = limits or Limits()
    server = grpc.aio.server(
        interceptors=[Doorkeeper(SERVICE, limits)],
        options=limits.options(shared=shared),
        maximum_concurrent_rpcs=limits.calls,
    )
    federation_pb2_grpc.add_FederationServicer_to_server(Gateway(served, security, limits), server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        if security is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, security.credentials())
    except RuntimeError:
        raise InputError(_taken(address)) from None
    await healthy.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    return Listening(server, port, healthy)


def check_address(address: str, *, secured: bool, exposed: bool = False) -> None:
    """Refuse to carry updates in the clear beyond this machine.

    Args:
        address: "host:port".
        secured: there is TLS, and clients show who they are.
        exposed: never mind.

    Raises:
        InputError: the address is malformed, or beyond loopback and neither secured nor exposed.
    """
    host, _ = host_and_port(address)
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not (loopback or secured or exposed):
        raise InputError(
            f"refusing to listen on {address!r} without TLS: anyone on the way could read and change "
            "updates, anyone could send them in a client's name; give --tls DIR (`fedrobust keys` makes "
            "it), or bind 127.0.0.1 and reach it through a tunnel"
        )


def check_free(address: str, *, shared: bool = False) -> None:
    """Try to listen, before anything is started that takes its time.

    Args:
        address: "host:port".
        shared: let other gateways listen on the same port.

    Raises:
        InputError: the address is taken, or not this machine's.
    """
    host, port = host_and_port(address)
    errors = list[OSError]()
    try:
        places = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InputError(f"cannot listen on {address}: {error.strerror or error}") from None
    for family, kind, _, _, place in places:
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself does
            if shared:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            try:
                tried.bind(place)
            except OSError as error:
                errors.append(error)
    # Of a name's addresses some may be none here, such as ::1 where there is no IPv6.
    if len(errors) == len(places) or any(error.errno == errno.EADDRINUSE for error in errors):
        raise InputError(f"{_taken(address)} ({errors[0].strerror})")


def _taken(address: str) -> str:
    return f"cannot listen on {address}: is the port taken?"


async def _following(first: T | None, rest: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """Put back what has been read of a stream already."""
    if first is not None:
        yield first
    async for item in rest:
        yield item
