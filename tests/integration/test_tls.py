"""The gateway over real connections: who gets in, who does not, and that nobody takes too much."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from fedrobust_clients.credentials import Credentials, open_channel
from fedrobust_proto.v1 import federation_pb2 as pb
from fedrobust_proto.v1.federation_pb2_grpc import FederationStub
from fedrobust_server.gateway import SERVICE, Listening, listen
from fedrobust_server.keys import Authority
from fedrobust_server.limits import Limits
from fedrobust_server.security import Security
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from fedrobust import InputError

COMMAND = [sys.executable, "-m", "fedrobust.cli"]
PAST = datetime.now(UTC) - timedelta(days=10)
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
        return pb.EnrolReply(session=session)

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
    yield recorder, listening
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


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it does not come to that")


def enrol(stub: FederationStub, name: str, token: bytes = b"") -> Any:
    return stub.Enrol(pb.EnrolRequest(client=name, token=token))


def submit(stub: FederationStub, session: bytes, *parts: pb.SubmitRequest, pause: float = 0) -> Any:
    async def stream() -> AsyncIterator[pb.SubmitRequest]:
        yield pb.SubmitRequest(header=pb.SubmitHeader(session=session))
        for part in parts:
            await asyncio.sleep(pause)
            yield part

    return stub.Submit(stream())


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


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Certificates for alice and bob, a token for bob."""
    authority = Authority.create(tmp_path / "keys")
    authority.server(["localhost", "127.0.0.1"])
    authority.client("alice")
    authority.client("bob")
    authority.token("bob", federation="first")
    return authority


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


# ---- who gets in ------------------------------------------------------------------------------------


def test_a_client_with_a_certificate_takes_part(authority: Authority) -> None:
    async def scenario() -> None:
        async with door(mutual(authority)) as (recorder, listening):
            for host in ("127.0.0.1", "localhost"):
                async with client(listening, certified(authority), host) as stub:
                    session = (await enrol(stub, "alice")).session
                    recorder.offers.put_nowait(7)
                    answers = {name: await call for name, call in calls(stub, session).items()}
                    assert answers["Rounds"].round == 7
                    assert answers["Model"].data == b"model"
                    assert answers["Submit"].status == pb.STATUS_ACCEPTED
                await until(lambda: recorder.listening == 0)
            assert recorder.enrolled == [("alice", "alice", b"")] * 2
            assert recorder.received == [2, 2]

    asyncio.run(scenario())


def test_a_client_with_a_token_takes_part_and_the_token_goes_no_further(authority: Authority) -> None:
    async def scenario() -> None:
        credentials = token_of(authority)
        async with (
            door(by_token(authority)) as (recorder, listening),
            client(listening, credentials) as stub,
        ):
            session = (await enrol(stub, "bob", credentials.token)).session
            recorder.offers.put_nowait(7)
            for call in calls(stub, session).values():
                await call
            assert recorder.enrolled == [("bob", "bob", b"")]

    asyncio.run(scenario())


async def shown(listening: Listening, authority: Authority) -> int:
    """The serial number of the certificate that the server shows to alice, who connects anew."""
    context = ssl.create_default_context(cafile=authority.folder / "authority.pem")
    context.load_cert_chain(*(authority.folder / "clients" / "alice" / f"{n}.pem" for n in PAIR))
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", listening.port, ssl=context)
    encoded = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(encoded).serial_number


PAIR = ("certificate", "key")


def test_a_certificate_is_renewed_while_the_server_runs(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = authority.folder / "server"

    async def scenario() -> None:
        async with (
            door(mutual(authority)) as (_, listening),
            client(listening, certified(authority)) as stub,
        ):
            await enrol(stub, "alice")
            first = await shown(listening, authority)
            folder.rename(tmp_path / "old")
            assert await shown(listening, authority) == first  # nothing is there
            assert authority.server(["localhost", "127.0.0.1"]) == folder
            second = await shown(listening, authority)
            assert second != first
            await enrol(stub, "alice")  # by the connection that there was
            certificate, key = (folder / f"{name}.pem" for name in PAIR)
            for damage in (b"", (tmp_path / "old" / "key.pem").read_bytes()):
                key.write_bytes(damage)
                assert await shown(listening, authority) == second
            expired = Authority.create(tmp_path / "past", now=PAST)
            late = expired.server(["127.0.0.1"], days=1)
            certificate.write_bytes((late / "certificate.pem").read_bytes())
            key.write_bytes((late / "key.pem").read_bytes())
            assert await shown(listening, authority) == second
            certificate.write_bytes((tmp_path / "old" / "certificate.pem").read_bytes())
            key.write_bytes((tmp_path / "old" / "key.pem").read_bytes())
            assert await shown(listening, authority) == first

    asyncio.run(scenario())
    told = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert all(line.startswith("the certificate as it was stays in use: ") for line in told)
    parts = ("cannot read", "does not hold a private key", "is not the key of", "expired on")
    assert all(any(part in line for line in told) for part in parts)


def test_another_authority_of_clients_is_noticed_while_the_server_runs(
    authority: Authority, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "other")
    other.client("alice")

    async def scenario() -> None:
        async with door(mutual(authority)) as (_, listening):
            async with client(listening, certified(other, ca=authority)) as stub:
                assert (await refused(enrol(stub, "alice")))[0] == StatusCode.UNAVAILABLE
            own = authority.folder / "server" / "authority.pem"
            own.write_bytes((other.folder / "authority.pem").read_bytes())
            async with client(listening, certified(other, ca=authority)) as stub:
                await enrol(stub, "alice")
            async with client(listening, certified(authority)) as stub:
                assert (await refused(enrol(stub, "alice")))[0] == StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def test_on_loopback_without_tls_the_name_is_believed() -> None:
    async def scenario() -> None:
        async with door() as (recorder, listening), client(listening) as stub:
            await enrol(stub, "carol")
            assert recorder.enrolled == [("carol", None, b"")]

    asyncio.run(scenario())


# ---- who does not -----------------------------------------------------------------------------------


def strangers(authority: Authority, folder: Path) -> dict[str, Credentials | None]:
    """Who must not even get a connection where certificates are asked for."""
    other = Authority.create(folder / "other")
    other.client("alice")
    old = Authority(authority.folder, PAST)
    old.client("carol", days=1)
    server, ca = authority.folder / "server", (authority.folder / "authority.pem").read_bytes()
    return {
        "in the clear": None,
        "no certificate": Credentials(ca),
        "another authority's certificate": certified(other, ca=authority),
        "believes another authority": certified(authority, ca=other),
        "expired certificate": certified(authority, "carol"),
        "the server's certificate": Credentials(
            ca, (server / "certificate.pem").read_bytes(), (server / "key.pem").read_bytes()
        ),
    }


def test_strangers_get_no_connection_and_harm_nobody(authority: Authority, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with door(mutual(authority)) as (recorder, listening):
            for name, credentials in strangers(authority, tmp_path).items():
                async with client(listening, credentials) as stub:
                    code, _ = await refused(enrol(stub, "alice"))
                    assert code == StatusCode.UNAVAILABLE, name
            assert recorder.enrolled == []
            async with client(listening, certified(authority)) as stub:
                await enrol(stub, "alice")

    asyncio.run(scenario())


def test_a_clients_certificate_makes_no_server(authority: Authority, tmp_path: Path) -> None:
    """Else a malicious client could pose as the server to the others."""

    async def scenario() -> None:
        rogue = authority.folder / "clients/bob"
        for name in ("tokens.pub", "revoked"):
            (rogue / name).write_bytes((authority.folder / name).read_bytes())
        async with (
            door(Security.load(rogue)) as (recorder, listening),
            client(listening, certified(authority)) as stub,
        ):
            assert (await refused(enrol(stub, "alice")))[0] == StatusCode.UNAVAILABLE
            assert recorder.enrolled == []

    asyncio.run(scenario())


def test_one_certificate_is_one_identity(authority: Authority) -> None:
    async def scenario() -> None:
        async with (
            door(mutual(authority)) as (recorder, listening),
            client(listening, certified(authority)) as alice,
            client(listening, certified(authority, "bob")) as bob,
        ):
            for name in ("bob", "", "alice ", "\x1b[31m" * 100):
                code, details = await refused(enrol(alice, name))
                assert code == StatusCode.PERMISSION_DENIED
                assert "is of alice" in details
                assert details.isprintable()
            assert recorder.enrolled == []
            session = (await enrol(alice, "alice")).session
            for name, call in calls(bob, session).items():
                code, details = await refused(call)
                assert code == StatusCode.PERMISSION_DENIED, name
                assert "not of bob" in details
            for name, call in calls(alice, b"guess").items():
                assert await refused(call) == (
                    StatusCode.FAILED_PRECONDITION,
                    "unknown session; enrol first",
                ), name
            assert recorder.received == []

    asyncio.run(scenario())


def test_bad_tokens_are_refused(authority: Authority, tmp_path: Path) -> None:
    good = token_of(authority).token
    other = Authority.create(tmp_path / "other")
    forged = other.token("bob").read_bytes()
    expired = Authority(authority.folder, PAST).token("carol", days=1).read_bytes()
    elsewhere = authority.token("dora", federation="second").read_bytes()
    bad = {
        "none": (b"", "asks for an enrolment token"),
        "forged": (forged, "signature"),
        "cut": (good[:-5], "no enrolment token"),
        "huge": (good * 10_000, "at most"),
        "noise": (b"\xff\x00" * 100, "no enrolment token"),
        "expired": (expired, "expired"),
        "another run's": (elsewhere, "for the federation second"),
    }

    async def scenario() -> None:
        async with (
            door(by_token(authority)) as (recorder, listening),
            client(listening, token_of(authority)) as stub,
        ):
            for name, (token, said) in bad.items():
                code, details = await refused(enrol(stub, "bob", token))
                assert code == StatusCode.UNAUTHENTICATED, name
                assert said in details, name
            code, details = await refused(enrol(stub, "alice", good))
            assert code == StatusCode.PERMISSION_DENIED
            assert "is of bob" in details
            assert recorder.enrolled == []
            await enrol(stub, "bob", good)

    asyncio.run(scenario())


@pytest.mark.parametrize("by", ["name", "serial"])
@pytest.mark.parametrize("proof", [mutual, by_token])
def test_a_revoked_client_is_out_at_once(
    authority: Authority, proof: Callable[[Authority], Security], by: str
) -> None:
    async def scenario() -> None:
        authority.token("alice")
        credentials = {
            name: certified(authority, name) if proof is mutual else token_of(authority, name)
            for name in ("alice", "bob")
        }
        async with (
            door(proof(authority)) as (recorder, listening),
            client(listening, credentials["alice"]) as alice,
            client(listening, credentials["bob"]) as bob,
        ):
            hers = (await enrol(alice, "alice", credentials["alice"].token)).session
            his = (await enrol(bob, "bob", credentials["bob"].token)).session
            listens = alice.Rounds(pb.RoundsRequest(session=hers))
            recorder.offers.put_nowait(1)
            assert (await listens.read()).round == 1
            uploads = submit(alice, hers, CHUNK, CHUNK, pause=0.5)

            kind = "client" if proof is mutual else "token"
            serials = [i.serial for i in authority.issued() if (i.name, i.kind) == ("alice", kind)]
            authority.revoke("alice" if by == "name" else serials[0])
            for name, call in calls(alice, hers).items():
                code, details = await refused(call)
                assert code == StatusCode.PERMISSION_DENIED, name
                assert "revoked" in details
            assert (await refused(enrol(alice, "alice", credentials["alice"].token)))[
                0
            ] == StatusCode.PERMISSION_DENIED
            assert (await refused(uploads))[0] == StatusCode.PERMISSION_DENIED
            recorder.offers.put_nowait(2)  # to her old call
            assert (await refused(listens.read()))[0] == StatusCode.PERMISSION_DENIED
            recorder.offers.put_nowait(3)
            for call in calls(bob, his).values():
                await call

    asyncio.run(scenario())


# ---- and nobody takes too much ----------------------------------------------------------------------


def test_the_slow_are_cut_off_and_an_honest_client_goes_on() -> None:
    async def scenario() -> None:
        limits = Limits(message_timeout=0.4, bytes_per_second=100)
        async with (
            door(limits=limits) as (recorder, listening),
            client(listening) as stub,
            open_channel(f"127.0.0.1:{listening.port}", None) as channel,
        ):
            session = (await enrol(stub, "slow")).session
            honest = (await enrol(stub, "honest")).session

            async def silence() -> AsyncIterator[bytes]:
                await asyncio.sleep(60)
                yield b""

            slow = [
                submit(stub, session, CHUNK, pause=60),  # a header, and nothing more
                submit(stub, session, *[CHUNK] * 100, pause=0.1),  # drop by drop
                *(  # calls that begin and do not say what they want
                    channel.stream_unary(f"/{SERVICE}/{method}")(silence())
                    for method in ("Enrol", "Rounds", "Model", "Submit")
                ),
                channel.stream_unary("/grpc.health.v1.Health/Check")(silence()),
            ]
            answers = asyncio.gather(*map(refused, slow))
            while not answers.done():
                assert (await submit(stub, honest, CHUNK)).status == pb.STATUS_ACCEPTED
                await asyncio.sleep(0.05)
            assert {code for code, _ in await answers} == {StatusCode.DEADLINE_EXCEEDED}
            assert 1 in recorder.received  # the header: who reads the stream sees it end

    asyncio.run(scenario())


def test_an_address_has_so_many_calls_that_do_not_say_whose_they_are() -> None:
    async def scenario() -> None:
        limits = Limits(message_timeout=20.0, arriving_per_address=3)
        async with (
            door(limits=limits) as (recorder, listening),
            client(listening) as stub,
            open_channel(f"127.0.0.1:{listening.port}", None) as channel,
            from_another_address(listening) as elsewhere,
        ):
            session = (await enrol(stub, "early")).session
            rounds = [stub.Rounds(pb.RoundsRequest(session=session)) for _ in range(5)]
            await until(lambda: recorder.listening == 5)  # they have said it, and do not count

            async def silence() -> AsyncIterator[bytes]:
                await asyncio.sleep(60)
                yield b""

            methods = ("Enrol", "Rounds", "Submit", "Model")
            silent = [
                asyncio.ensure_future(refused(channel.stream_unary(f"/{SERVICE}/{method}")(silence())))
                for method in methods
            ]
            (one_too_many,), waiting = await asyncio.wait(silent, return_when=asyncio.FIRST_COMPLETED)
            for code, why in (await one_too_many, await refused(enrol(stub, "late"))):
                assert code == StatusCode.RESOURCE_EXHAUSTED
                assert why.startswith("ipv4:127.0.0.1 has 3 calls that have not said whose they are")
            assert (await enrol(elsewhere, "elsewhere")).session
            waiting.pop().cancel()
            await accepted(stub, session)
            for call in (*waiting, *rounds):
                call.cancel()

    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def from_another_address(listening: Listening) -> AsyncIterator[FederationStub]:
    """A client that the server sees at 127.0.0.2."""

    over = asyncio.Event()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = ("127.0.0.1", listening.port)
        answers, requests = await asyncio.open_connection(*there, local_addr=("127.0.0.2", 0))
        await asyncio.gather(carry(reader, requests), carry(answers, writer))
        over.set()

    async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with open_channel(f"127.0.0.1:{port}", None) as channel:
            yield FederationStub(channel)
        await over.wait()


def test_who_does_not_take_the_model_does_not_keep_it_in_memory() -> None:
    async def scenario() -> None:
        limits = Limits(message_timeout=0.4, calls_per_client=2)
        async with door(limits=limits) as (recorder, listening), client(listening) as stub:
            session = (await enrol(stub, "slow")).session
            streams = [stub.Model(pb.ModelRequest(session=session, round=64)) for _ in range(2)]
            await until(lambda: recorder.listening == 2)
            await until(lambda: recorder.listening == 0)
            # The calls end only when their caller hears of it; until then they count.
            assert (await refused(submit(stub, session, CHUNK)))[0] == StatusCode.RESOURCE_EXHAUSTED
            assert (await refused(drained(streams[0])))[0] == StatusCode.DEADLINE_EXCEEDED
            streams[1].cancel()
            await accepted(stub, session)

    asyncio.run(scenario())


def test_what_is_too_large_or_compressed_is_refused_and_an_honest_client_goes_on() -> None:
    async def scenario() -> None:
        async with door() as (_, listening), client(listening) as stub, client(listening) as other:
            session = (await enrol(stub, "large")).session
            honest = (await enrol(other, "honest")).session
            fits = pb.SubmitRequest(chunk=pb.Chunk(data=bytes(4 << 20)))
            large = pb.SubmitRequest(chunk=pb.Chunk(data=bytes((4 << 20) + (65 << 10))))
            assert (await refused(submit(stub, session, large)))[0] == StatusCode.RESOURCE_EXHAUSTED
            code, _ = await refused(enrol(stub, "x", bytes(5 << 20)))
            assert code == StatusCode.RESOURCE_EXHAUSTED
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Enrol(pb.EnrolRequest(client="x"), metadata=(("m", "x" * (20 << 10)),))
            packed = grpc.Compression.Gzip
            call = stub.Enrol(pb.EnrolRequest(client="x", token=bytes(1 << 20)), compression=packed)
            assert (await refused(call))[0] == StatusCode.UNIMPLEMENTED
            assert (await submit(other, honest, fits)).status == pb.STATUS_ACCEPTED

    asyncio.run(scenario())


def test_a_client_has_so_many_calls_and_uploads() -> None:
    async def scenario() -> None:
        limits = Limits(calls_per_client=4, uploads_per_client=2)
        async with door(limits=limits) as (recorder, listening), client(listening) as stub:
            greedy = (await enrol(stub, "greedy")).session
            honest = (await enrol(stub, "honest")).session
            uploads = [submit(stub, greedy, CHUNK, pause=60) for _ in range(2)]
            await until(lambda: recorder.received == [1, 1])
            code, details = await refused(submit(stub, greedy, CHUNK))
            assert code == StatusCode.RESOURCE_EXHAUSTED
            assert "greedy has 2 uploads" in details
            listens = [stub.Rounds(pb.RoundsRequest(session=greedy)) for _ in range(2)]
            await until(lambda: recorder.listening == 2)
            for name, call in calls(stub, greedy).items():
                code, details = await refused(call)
                assert code == StatusCode.RESOURCE_EXHAUSTED, name
                assert "greedy has 4 calls" in details
            assert (await submit(stub, honest, CHUNK)).status == pb.STATUS_ACCEPTED
            for ended in (*uploads, *listens):
                ended.cancel()
            await accepted(stub, greedy)

    asyncio.run(scenario())


def test_there_are_so_many_sessions() -> None:
    async def scenario() -> None:
        async with door(limits=Limits(sessions=2)) as (recorder, listening), client(listening) as stub:
            first, second = [(await enrol(stub, name)).session for name in ("alice", "bob")]
            assert (await refused(enrol(stub, "carol")))[0] == StatusCode.RESOURCE_EXHAUSTED
            assert [client for client, _, _ in recorder.enrolled] == ["alice", "bob"]
            del recorder.sessions[first]
            await enrol(stub, "carol")
            assert (await refused(submit(stub, first, CHUNK)))[0] == StatusCode.FAILED_PRECONDITION
            await accepted(stub, second)

    asyncio.run(scenario())


def test_there_are_so_many_connections() -> None:
    async def scenario() -> None:
        async with door(limits=Limits(connections=3)) as (_, listening), client(listening) as stub:
            await enrol(stub, "early")
            opened = [await asyncio.open_connection("127.0.0.1", listening.port) for _ in range(4)]
            greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
            answered = []
            for reader, writer in opened:
                writer.write(greeting)
                with contextlib.suppress(ConnectionError):
                    answered.append(bool(await asyncio.wait_for(reader.read(9), 5)))
            assert sum(answered) == 2
            await enrol(stub, "early")
            for _, writer in opened:
                writer.close()

    asyncio.run(scenario())


def test_a_connection_must_say_what_it_wants(authority: Authority) -> None:
    async def scenario() -> None:
        async with door(mutual(authority), Limits(handshake_timeout=0.3)) as (_, listening):
            reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
            assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()
            async with client(listening, certified(authority)) as stub:
                await enrol(stub, "alice")

    asyncio.run(scenario())


def test_an_upload_without_a_header_is_nobodys(authority: Authority) -> None:
    async def scenario() -> None:
        async with (
            door(mutual(authority)) as (recorder, listening),
            client(listening, certified(authority)) as stub,
        ):
            for parts in ([], [CHUNK]):
                assert (await refused(stub.Submit(iter(parts))))[0] == StatusCode.FAILED_PRECONDITION
            assert recorder.received == []

    asyncio.run(scenario())


# ---- operating --------------------------------------------------------------------------------------


def test_health_says_when_no_more_clients_should_come() -> None:
    async def scenario() -> None:
        async with (
            door(limits=Limits(strangers=1)) as (_, listening),
            open_channel(f"127.0.0.1:{listening.port}", None) as channel,
        ):
            health, ours = HealthStub(channel), health_pb2.HealthCheckRequest(service=SERVICE)
            for request in (ours, health_pb2.HealthCheckRequest()):
                assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
            watches = health.Watch(ours)
            assert (await watches.read()).status == health_pb2.HealthCheckResponse.SERVING
            assert (await refused(health.Check(ours)))[0] == StatusCode.RESOURCE_EXHAUSTED
            await enrol(FederationStub(channel), "alice")
            await listening.drain()
            assert (await watches.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await enrol(FederationStub(channel), "alice")  # those who are here go on
            watches.cancel()

    asyncio.run(scenario())


def test_reflection_lists_the_service(authority: Authority) -> None:
    async def scenario() -> None:
        async with (
            door(mutual(authority)) as (_, listening),
            open_channel(f"127.0.0.1:{listening.port}", certified(authority)) as channel,
        ):
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            stream = ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]))
            names = {s.name for s in (await stream.read()).list_services_response.service}
            assert SERVICE in names

    asyncio.run(scenario())


def test_unknown_methods_and_bytes_that_are_no_message_are_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        async with (
            door() as (recorder, listening),
            open_channel(f"127.0.0.1:{listening.port}", None) as channel,
        ):
            unknown = channel.unary_unary(f"/{SERVICE}/Shell")
            assert (await refused(unknown(b"")))[0] == StatusCode.UNIMPLEMENTED
            for method in ("Enrol", "Rounds", "Model", "Submit"):
                code, details = await refused(channel.unary_unary(f"/{SERVICE}/{method}")(b"\xff" * 99))
                assert code == StatusCode.INVALID_ARGUMENT, method
                assert "cannot be read" in details
            assert recorder.enrolled == []
            await enrol(FederationStub(channel), "alice")

    asyncio.run(scenario())
    assert caplog.text == ""  # strangers do not fill the log


def test_callers_who_hang_up_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with door() as (recorder, listening), client(listening) as stub:
            session = (await stub.Enrol(pb.EnrolRequest(client="rude"))).session
            for pause in range(60):
                call = stub.Model(pb.ModelRequest(session=session, round=3))
                await asyncio.sleep(pause / 20000)
                call.cancel()
                await asyncio.sleep(0.002)
            await until(lambda: recorder.listening == 0)

    asyncio.run(scenario())
    assert caplog.text == ""


def test_a_fault_of_the_servers_keeps_its_secrets(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with door() as (_, listening), client(listening) as stub:
            code, details = await refused(enrol(stub, "broken"))
            assert code == StatusCode.INTERNAL
            assert "secret" not in details

    asyncio.run(scenario())
    assert "a secret of the server's" in caplog.text


def test_a_port_is_not_shared() -> None:
    async def scenario() -> None:
        async with door() as (_, listening):
            with pytest.raises(InputError, match="is the port taken"):
                await listen(Recorder(), f"127.0.0.1:{listening.port}")
            with pytest.raises(InputError, match="without TLS"):
                await listen(Recorder(), "0.0.0.0:0")

    asyncio.run(scenario())


# ---- the command ------------------------------------------------------------------------------------


def test_a_federation_of_processes_over_tls(authority: Authority, tmp_path: Path) -> None:
    keys = authority.folder
    serve = [*COMMAND, "serve", "--json", "--bind", "0.0.0.0:0", "--tls", str(keys / "server")]
    run = ["--clients", "2", "--rounds", "2", "--model", "softmax", "--runs-dir", str(tmp_path / "runs")]
    with subprocess.Popen([*serve, *run], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            port = json.loads(server.stdout.readline())["listening"].rpartition(":")[2]

            def start(name: str, index: int, *options: str) -> subprocess.Popen[str]:
                where = ["--server", f"localhost:{port}", "--id", str(index), "--name", name]
                return subprocess.Popen(
                    [*COMMAND, "client", *where, *options],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )

            alice, bob = (str(keys / "clients" / name) for name in ("alice", "bob"))
            posing = start("bob", 1, "--key-dir", alice)
            _, errors = posing.communicate(timeout=60)
            assert posing.returncode == 1
            assert "the certificate is of alice, who cannot enrol as 'bob'" in errors
            assert errors.count("\n") == 1
            clients = [start("alice", 0, "--key-dir", alice), start("bob", 1, "--key-dir", bob)]
            for process in clients:
                output, _ = process.communicate(timeout=60)
                assert output.splitlines() == ["round 1: accepted", "round 2: accepted"]
            *_, summary = [json.loads(line) for line in server.stdout]
            assert summary["updates_accepted"] == 4
            assert server.wait(60) == 0
        finally:
            server.kill()
