"""The gateway over real connections: nobody takes too much."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from fedrobust_clients.credentials import open_channel
from fedrobust_proto.v1 import federation_pb2 as pb
from fedrobust_proto.v1.federation_pb2_grpc import FederationStub
from fedrobust_server.gateway import SERVICE, Listening
from fedrobust_server.keys import Authority
from fedrobust_server.limits import Limits
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from .processes import until
from .recorder import (
    CHUNK,
    accepted,
    calls,
    certified,
    client,
    door,
    drained,
    enrol,
    mutual,
    refused,
    submit,
)


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
            rounds = []
            for _ in range(5):  # one by one, for they count until they have said it
                rounds.append(stub.Rounds(pb.RoundsRequest(session=session)))
                await until(lambda: recorder.listening == len(rounds))

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
            assert (await enrol(FederationStub(elsewhere), "elsewhere")).session
            waiting.pop().cancel()
            await accepted(stub, session)
            for call in (*waiting, *rounds):
                call.cancel()

    asyncio.run(scenario())


def test_no_address_takes_all_health_checks() -> None:
    async def scenario() -> None:
        async with (
            door(limits=Limits(strangers=4)) as (_, listening),
            open_channel(f"127.0.0.1:{listening.port}", None) as channel,
            from_another_address(listening) as elsewhere,
        ):
            asked = HealthCheckRequest()
            watches = [HealthStub(channel).Watch(asked) for _ in range(2)]
            for watch in watches:
                await watch.read()
            assert (await refused(HealthStub(channel).Check(asked)))[0] == StatusCode.RESOURCE_EXHAUSTED
            assert (await HealthStub(elsewhere).Check(asked)).status == HealthCheckResponse.SERVING
            for watch in watches:
                watch.cancel()

    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def from_another_address(listening: Listening) -> AsyncIterator[grpc.aio.Channel]:
    """A channel that the server sees at 127.0.0.2."""

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
            yield channel
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
            code, said = await refused(submit(stub, session, CHUNK))
            assert code == StatusCode.RESOURCE_EXHAUSTED, said
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
