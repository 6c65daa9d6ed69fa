"""The gateway over real connections: who gets in, and who does not."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from fedrobust_clients.credentials import Credentials
from fedrobust_proto.v1 import federation_pb2 as pb
from fedrobust_server.gateway import Listening
from fedrobust_server.keys import Authority
from fedrobust_server.security import Security
from grpc import StatusCode

from .processes import COMMAND, until
from .recorder import (
    CHUNK,
    by_token,
    calls,
    certified,
    client,
    door,
    enrol,
    mutual,
    refused,
    submit,
    token_of,
)

PAST = datetime.now(UTC) - timedelta(days=10)


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
