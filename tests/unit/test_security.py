"""Keys, tokens, revocations and limits, without a network."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import stat
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fedrobust_clients.credentials import Credentials
from fedrobust_server.config import RunConfig
from fedrobust_server.files import append_line, write_new
from fedrobust_server.gateway import check_address
from fedrobust_server.keys import Authority
from fedrobust_server.limits import Cut, Limits, Slots, due, prompt
from fedrobust_server.names import check_name, is_serial, new_serial
from fedrobust_server.refusals import ExhaustedError, StalledError, UnauthenticatedError, UnknownError
from fedrobust_server.revoked import Revoked, read_revoked
from fedrobust_server.security import Identity, Security
from fedrobust_server.sessions import Session, Sessions
from fedrobust_server.tokens import MAX_TOKEN_BYTES, Token, sign, verify
from hypothesis import given
from hypothesis import strategies as st

from fedrobust import InputError
from fedrobust.cli import main
from fedrobust.text import printable

PAST = datetime.now(UTC) - timedelta(days=10)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything, in files made under the most open umask."""
    before = os.umask(0)
    try:
        authority = Authority.create(tmp_path_factory.mktemp("keys") / "keys")
        authority.server(["localhost", "127.0.0.1", "::1"])
        authority.client("alice")
        authority.token("bob")
    finally:
        os.umask(before)
    return authority.folder


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


# ---- names and strangers' text ----------------------------------------------------------------------


@given(st.text(), st.integers(0, 50))
def test_strangers_text_cannot_command_a_terminal(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    if text.isprintable() and len(text) <= limit:
        assert shown == text


def test_what_strangers_text_looks_like() -> None:
    assert printable("\x1b[31mred\n\u202eback") == "\\x1b[31mred\\n\\u202eback"
    assert printable("a" * 300) == "a" * 197 + "..."
    assert printable("\ud800") == "\\ud800"


@given(st.text() | st.from_regex(r"[A-Za-z0-9._/\\-]*"))
def test_a_name_stays_in_its_place(name: str) -> None:
    try:
        check_name(name)
    except InputError as error:
        message = str(error)
    else:
        message = "none"
        assert (Path("folder") / name).parent == Path("folder")
        assert name.isprintable()
        assert name.isascii()
        assert not name.startswith((".", "-"))
    assert message.isprintable()


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a\n", "-x", "a" * 65, "\x1b[31m", "a" * 32])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="name"):
        check_name(name)


def test_serial_numbers_are_long_and_differ() -> None:
    serials = {new_serial() for _ in range(100)}
    assert len(serials) == 100
    assert all(is_serial(serial) for serial in serials)


# ---- files ------------------------------------------------------------------------------------------

PUBLIC = {"authority.pem", "certificate.pem", "tokens.pub"}


def test_private_files_are_their_owners_alone(keys: Path) -> None:
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files(keys)}
    assert found.keys() > {"authority.key", "tokens.key", "key.pem", "bob.token", "issued", "revoked"}
    for name, mode in found.items():
        assert mode == (0o644 if name in PUBLIC else 0o600), name
    for folder in (keys, *(path for path in keys.rglob("*") if path.is_dir())):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder


def test_the_mode_is_set_when_a_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[int, int]] = []
    real = os.open

    def spy(path: Any, flags: int, mode: int = 0o777) -> int:
        opened.append((flags, mode))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", spy)
    write_new(tmp_path / "key", b"secret")
    assert opened == [(os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)]


def test_nothing_is_overwritten(keys: Path) -> None:
    before = {path: path.read_bytes() for path in files(keys)}
    authority = Authority(keys)
    for again in (
        lambda: Authority.create(keys),
        lambda: authority.server(["localhost"]),
        lambda: authority.client("alice"),
        lambda: authority.token("bob"),
    ):
        with pytest.raises(InputError, match="exists already"):
            again()
    assert {path: path.read_bytes() for path in files(keys)} == before


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(InputError, match="exists already"):
        write_new(tmp_path / "link", b"secret")
    assert not (tmp_path / "target").exists()


def test_a_line_is_added_after_a_last_line_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("one")
    append_line(path, "two")
    append_line(path, "three")
    assert path.read_text() == "one\ntwo\nthree\n"
    with pytest.raises(InputError, match="cannot add"):
        append_line(tmp_path / "absent", "one")


@pytest.mark.parametrize("hosts", [[], ["a b"], ["http://x"], ["x:7070"], ["-x"], ["a." * 200]])
def test_bad_hosts_are_refused(tmp_path: Path, hosts: list[str]) -> None:
    authority = Authority.create(tmp_path / "keys")
    with pytest.raises(InputError, match="host"):
        authority.server(hosts)
    assert not (tmp_path / "keys/server").exists()


@pytest.mark.parametrize("days", [0, -1, 10**9])
def test_bad_days_are_refused(keys: Path, days: int) -> None:
    with pytest.raises(InputError, match="days"):
        Authority(keys).client("carol", days)
    assert not (keys / "clients/carol").exists()


# ---- tokens -----------------------------------------------------------------------------------------

KEY = Ed25519PrivateKey.generate()
GOOD = Token("bob", new_serial(), not_before=1000, expires=2000)
SIGNED = sign(GOOD, KEY)


def test_a_token_says_what_was_signed() -> None:
    assert verify(SIGNED, KEY.public_key(), now=1500) == GOOD
    assert len(SIGNED) < MAX_TOKEN_BYTES


@pytest.mark.parametrize(("now", "said"), [(999, "not good for another 1"), (2000, "expired 0 seconds")])
def test_a_token_has_its_time(now: float, said: str) -> None:
    with pytest.raises(InputError, match=said):
        verify(SIGNED, KEY.public_key(), now)


def test_a_changed_or_cut_token_is_refused_wherever_it_is_changed() -> None:
    document, _, _ = SIGNED.partition(b".")
    for i in range(len(SIGNED)):
        with pytest.raises(InputError):
            verify(SIGNED[:i], KEY.public_key(), 1500)
    for i in range(len(document)):
        changed = bytes([SIGNED[i] ^ 1])
        with pytest.raises(InputError):
            verify(SIGNED[:i] + changed + SIGNED[i + 1 :], KEY.public_key(), 1500)


def test_forged_and_huge_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="signature"):
        verify(sign(GOOD, Ed25519PrivateKey.generate()), KEY.public_key(), 1500)
    with pytest.raises(InputError, match="at most"):
        verify(SIGNED + b"A" * 10**7, KEY.public_key(), 1500)
    document = base64.urlsafe_b64decode(SIGNED.partition(b".")[0])
    elsewhere = b".".join(map(base64.urlsafe_b64encode, (document, KEY.sign(document))))
    with pytest.raises(InputError, match="signature"):  # signed by the same key for another purpose
        verify(elsewhere, KEY.public_key(), 1500)


@given(st.binary() | st.from_regex(rb"[A-Za-z0-9_=-]*\.[A-Za-z0-9_=-]*", fullmatch=True))
def test_no_bytes_break_the_reading_of_tokens(data: bytes) -> None:
    with pytest.raises(InputError):
        verify(data, KEY.public_key(), 1500)


# ---- revocation -------------------------------------------------------------------------------------


def test_a_revocation_is_noticed(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "keys")
    server = authority.server(["localhost"])
    authority.client("alice")
    authority.client("carol")
    revoked = Revoked(server / "revoked")
    assert not revoked.any("alice", "carol")
    authority.revoke("alice")
    serial = authority.issued()[2].serial
    assert revoked.any("alice", "0")
    assert not revoked.any("carol", serial)
    authority.revoke(serial)
    authority.revoke(serial)
    assert revoked.any("carol", serial)
    assert not revoked.any("carol", "0")
    assert (server / "revoked").read_text() == f"alice\n{serial}\n"
    assert [authority.state(issued) for issued in authority.issued()] == ["good", "revoked", "revoked"]
    (server / "revoked").write_text(f"{serial.upper()}\n")  # as other programs print it
    assert Revoked(server / "revoked").any("carol", serial)
    with pytest.raises(InputError, match="no client, certificate or token 'alcie'"):
        authority.revoke("alcie")


def test_a_damaged_list_lets_nobody_back_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "revoked"
    path.write_text("alice  # left the consortium\n\n")
    revoked = Revoked(path)
    for damage in (lambda: path.write_text("../x\n"), path.unlink):
        caplog.clear()
        damage()
        with caplog.at_level(logging.ERROR):
            assert revoked.any("alice")
            assert revoked.any("alice")
        assert len(caplog.records) == 1
    path.write_text("bob\n")
    assert not revoked.any("alice")
    with pytest.raises(InputError, match="cannot read"):
        read_revoked(tmp_path / "absent")


# ---- the server's folder ----------------------------------------------------------------------------


def test_what_is_wrong_with_a_servers_folder_is_said(tmp_path: Path, keys: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        Security.load(tmp_path / "absent")
    with pytest.raises(InputError, match=r"unknown proof of identity 'tokn' \(did you mean token"):
        Security.load(keys / "server", "tokn")
    old = Authority.create(tmp_path / "old", now=PAST).server(["localhost"], days=1)
    with pytest.raises(InputError, match="expired on"):
        Security.load(old)
    server = Authority.create(tmp_path / "new").server(["localhost"])
    for name, said in (
        ("key.pem", "not the key of"),
        ("tokens.pub", "does not hold the key"),
        ("certificate.pem", "does not hold a certificate"),
    ):
        whole = (server / name).read_bytes()
        other = (keys / "clients/alice/key.pem").read_bytes()
        (server / name).write_bytes(other)
        with pytest.raises(InputError, match=said):
            Security.load(server)
        (server / name).write_bytes(whole)
    Security.load(server)


def test_tokens_are_judged_by_the_key_that_is_there(tmp_path: Path) -> None:
    old, new = (Authority.create(tmp_path / name) for name in ("old", "new"))
    server, path = old.server(["localhost"]), new.token("bob")
    security, token = Security.load(server, "token"), path.read_bytes()
    with pytest.raises(UnauthenticatedError):
        security.identify({}, token)
    replacement = (new.folder / "tokens.pub").read_bytes()
    (server / "tokens.pub").write_bytes(b"nothing yet")
    with pytest.raises(UnauthenticatedError):
        security.identify({}, token)  # by the key as it was
    (server / "tokens.pub").write_bytes(replacement)
    assert security.identify({}, token).name == "bob"


def test_secrets_do_not_show(keys: Path) -> None:
    token = (keys / "tokens/bob.token").read_bytes().strip()
    objects = [
        Security.load(keys / "server"),
        Credentials.read(keys=keys / "clients/alice", token=keys / "tokens/bob.token"),
        Session(b"sesame", "alice", Identity("alice", "0", 0.0)),
        verify(token, Security.load(keys / "server").tokens_key.value()),
    ]
    for thing in objects:
        assert "BEGIN" not in repr(thing)
        assert "sesame" not in repr(thing)
        assert token.decode()[-20:] not in repr(thing)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1"])
def test_beyond_loopback_tls_is_required(address: str) -> None:
    with pytest.raises(InputError, match="without TLS"):
        check_address(address, secured=False)
    check_address(address, secured=True)
    check_address(address, secured=False, exposed=True)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost:0"])
def test_on_loopback_tls_is_not_required(address: str) -> None:
    check_address(address, secured=False)


@pytest.mark.parametrize("address", ["127.0.0.1", "x:y", "127.0.0.1:65536", ":"])
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="host:port"):
        check_address(address, secured=True, exposed=True)


def test_a_token_is_not_sent_in_the_clear(keys: Path) -> None:
    with pytest.raises(InputError, match="encrypted channel only"):
        Credentials.read(token=keys / "tokens/bob.token")
    with pytest.raises(InputError, match="cannot read"):
        Credentials.read(keys=keys / "clients/nobody")
    assert Credentials.read() is None


# ---- limits -----------------------------------------------------------------------------------------


async def trickle(
    sizes: list[int], seconds: float, clock: list[float]
) -> AsyncIterator[tuple[str, int]]:
    for size in sizes:
        clock[0] += seconds
        yield "message", size


def passed(sizes: list[int], seconds: float, limits: Limits) -> int:
    """How many messages get through, if they come `seconds` apart."""
    clock = [0.0]

    async def count() -> int:
        n = 0
        stream = Cut(prompt(trickle(sizes, seconds, clock), limits, lambda: clock[0]))
        async for _ in stream:
            n += 1
            clock[0] += 1000.0  # the server takes its time, for which the client is not blamed
        assert (stream.refused is None) == (n == len(sizes))
        return n

    return asyncio.run(count())


def test_an_upload_must_keep_its_pace() -> None:
    limits = Limits(message_timeout=10, bytes_per_second=100)
    assert passed([1000] * 50, 1.0, limits) == 50
    assert passed([100] * 50, 1.0, limits) == 50
    assert (
        passed([50] * 50, 1.0, limits) == 20
    )  # from when half the pace no longer makes up for ten seconds
    assert passed([1] * 50, 9.0, limits) == 1
    assert passed([], 1.0, limits) == 0


def test_a_message_must_come_in_time() -> None:
    async def never() -> AsyncIterator[tuple[str, int]]:
        await asyncio.sleep(60)
        yield "message", 1

    with pytest.raises(StalledError, match="no message came"):
        asyncio.run(due(never(), 0.01))


@pytest.mark.parametrize("turns", range(4))
def test_a_call_ends_when_its_message_comes_as_the_caller_leaves(turns: int) -> None:
    """Were the cancelling lost, the server would go on with a call that nobody is at the end of."""

    async def scenario() -> None:
        coming: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()

        async def stream() -> AsyncIterator[tuple[str, int]]:
            yield await coming

        call = asyncio.create_task(due(stream(), 60))
        await asyncio.sleep(0)
        coming.set_result(("message", 1))
        for _ in range(turns):
            await asyncio.sleep(0)
        if call.cancel():  # it was not over
            with pytest.raises(asyncio.CancelledError):
                await call

    asyncio.run(scenario())


def test_slots_are_given_back() -> None:
    slots = Slots("uploads", total=3, each=2)
    for _ in range(2):
        held = [slots.take("a"), slots.take("a")]
        with pytest.raises(ExhaustedError, match="a has 2 uploads already"):
            slots.take("a")
        held.append(slots.take("b"))
        with pytest.raises(ExhaustedError, match="server has 3"):
            slots.take("c")
        held.pop()()
        held.append(slots.take("c"))
        for release in held:
            release()
    assert not slots._held
    assert slots._count == 0


def test_sessions_are_bounded() -> None:
    owners = {b"1": "a", b"2": "b", b"3": "c"}
    sessions = Sessions(owners.get, most=2)
    identity = Identity("a", "0", 0.0)
    for key in (b"1", b"2"):
        sessions.check_room()
        sessions.open(key, identity)
    assert sessions.find(b"1") == Session(b"1", "a", identity)
    with pytest.raises(ExhaustedError, match="2 sessions"):
        sessions.check_room()
    del owners[b"1"]  # the coordinator has ended it
    for key in (b"1", b"3", b"4"):
        with pytest.raises(UnknownError):
            sessions.find(key)
    sessions.check_room()
    assert list(sessions._opened) == [b"2"]


def test_bad_limits_are_refused() -> None:
    with pytest.raises(InputError, match="uploads must be above 0"):
        Limits(uploads=0)
    with pytest.raises(InputError, match="message_timeout"):
        Limits(message_timeout=float("nan"))
    with pytest.raises(InputError, match="idle must be above 0 and at most 2147483, got 3000000"):
        Limits(idle=3_000_000)


def test_a_runs_configuration_sets_limits() -> None:
    limits = RunConfig.from_toml("rounds = 3\n[limits]\nuploads = 7\nidle = 60\n").limits
    assert limits == Limits(uploads=7, idle=60)
    assert RunConfig.from_toml(RunConfig(limits=limits).to_toml()).limits == limits
    assert RunConfig.from_toml("").limits == Limits()
    for text, complaint in {
        "limits = 3": r"\[limits\] must be a table, got 3",
        "[limits]\nupload = 3": "unknown key of .limits. 'upload'.*did you mean uploads",
        "[limits]\nuploads = 1.5": "uploads must be int, got 1.5",
        "[limits]\nuploads = 0": "uploads must be above 0",
    }.items():
        with pytest.raises(InputError, match=complaint):
            RunConfig.from_toml(text)


# ---- the command ------------------------------------------------------------------------------------


def test_the_command_makes_keys_and_prints_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tmp_path / "keys")
    commands: list[list[str]] = [
        ["authority", folder],
        ["server", folder, "--host", "localhost", "--host", "127.0.0.1"],
        ["client", folder, "alice", "carol"],
        ["token", folder, "bob", "--days", "7", "--run", "first"],
        ["revoke", folder, "alice"],
        ["list", folder],
        ["list", folder, "--json"],
    ]
    with caplog.at_level(logging.DEBUG):
        for command in commands:
            assert main(["keys", *command]) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    for path in files(tmp_path):
        if path.suffix in {".key", ".token"} or path.name == "key.pem":
            lines = path.read_text().splitlines()
            secret = lines[1] if len(lines) > 1 else lines[0]
            assert secret not in output + caplog.text
    lines = output.splitlines()
    assert lines[:5] == [
        f"made {folder}{rest}"
        for rest in ("", "/server", "/clients/alice", "/clients/carol", "/tokens/bob.token")
    ]
    listed = [json.loads(line) for line in lines[-4:]]
    assert [(row["kind"], row["name"], row["state"]) for row in listed] == [
        ("server", "localhost", "good"),
        ("client", "alice", "revoked"),
        ("client", "carol", "good"),
        ("token", "bob", "good"),
    ]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["keys", "client", "{}/absent", "alice"], "cannot read"),
        (["keys", "list", "{}/absent"], "cannot read"),
        (["keys", "client", "{}/keys", "\x1b[31m"], "name"),
        (["keys", "server", "{}/keys", "--host", "x y"], "host"),
        (["keys"], "COMMAND"),
        (["keys", "revoke", "{}/keys", "nobody"], "nobody"),
        (["serve", "--bind", "0.0.0.0:0"], "without TLS"),
        (["serve", "--tls", "{}/absent"], "cannot read"),
        (["serve", "--clients-show", "token"], "needs --tls"),
        (["client", "--server", "x:1", "--id", "0", "--token", "{}/t"], "encrypted channel only"),
        (["client", "--server", "x:1", "--id", "0", "--ca", "{}/absent"], "cannot read"),
    ],
)
def test_bad_input_is_answered_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], command: list[str], said: str
) -> None:
    Authority.create(tmp_path / "keys")
    assert main([part.format(tmp_path) for part in command]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert said in errors
    assert errors.count("\n") == 1
    assert "\x1b" not in errors
