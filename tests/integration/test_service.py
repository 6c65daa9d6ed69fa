"""The gateway over real connections: what operators see of it, and what it says to nonsense."""

from __future__ import annotations

import asyncio

import pytest
from fedrobust_clients.credentials import open_channel
from fedrobust_proto.v1 import federation_pb2 as pb
from fedrobust_proto.v1.federation_pb2_grpc import FederationStub
from fedrobust_server.gateway import SERVICE, listen
from fedrobust_server.keys import Authority
from fedrobust_server.limits import Limits
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from fedrobust import InputError

from .processes import until
from .recorder import (
    Recorder,
    certified,
    client,
    door,
    enrol,
    mutual,
    refused,
)


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


def test_callers_who_hang_up_while_they_are_refused_do_not_fill_it_either(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        async with door(limits=Limits(calls_per_client=1)) as (_, listening), client(listening) as stub:
            session = (await enrol(stub, "rude")).session
            held = stub.Model(pb.ModelRequest(session=session, round=64))
            await held.read()
            for pause in range(200):
                call = stub.Model(pb.ModelRequest(session=session, round=3))
                await asyncio.sleep(pause / 100000)
                call.cancel()
                await asyncio.sleep(0.002)
            held.cancel()

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
