"""A record is a line, it says which round and client, and it holds no secret."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fedrobust_proto.v1.federation_pb2 import Chunk
from fedrobust_server.logs import Human, JSONLines, about, logging_to
from fedrobust_server.tokens import Token, sign
from hypothesis import given
from hypothesis import strategies as st

from fedrobust import InputError

LOG = logging.getLogger("fedrobust_server.test")


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    return LOG.makeRecord(LOG.name, logging.INFO, __file__, 1, message, args, None, extra=extra)


@given(st.text(), st.text(), st.dictionaries(st.from_regex(r"x[a-z_]{0,8}", fullmatch=True), st.text()))
def test_a_record_is_one_printable_line(message: str, client: str, extra: dict[str, str]) -> None:
    with about(round=1, client=client):
        made = record("%s", message, **extra)
        line, human = JSONLines().format(made), Human().format(made)
    assert line.isprintable()
    assert line.isascii()
    assert human.isprintable()
    assert json.loads(line)["round"] == 1


def test_a_line_for_people_says_where_and_what() -> None:
    with about(round=3, client="st-mary"):
        line = Human().format(record("update %s", "refused", bytes=12))
    assert line.endswith("info     round 3, st-mary: update refused (bytes=12)")
    assert "\x1b" not in Human().format(record("\x1b[2J", client="\x1b]0;owned\x07"))


def test_tasks_know_what_they_are_about() -> None:
    async def work() -> str:
        await asyncio.sleep(0)
        return JSONLines().format(record("done"))

    async def both() -> list[str]:
        tasks = []
        for name in ("a", "b"):
            with about(round=2), about(client=name):
                tasks.append(asyncio.create_task(work()))
        return list(await asyncio.gather(*tasks))

    found = [json.loads(line) for line in asyncio.run(both())]
    assert [(line["round"], line["client"]) for line in found] == [(2, "a"), (2, "b")]
    assert "round" not in json.loads(JSONLines().format(record("later")))


SECRET = "hunter2hunter2"  # noqa: S105 (a stand-in)
PEM = f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----\n"
TOKEN = f"eyJjbGllbnQiOiJhIiwic2VyaWFsIjoi.{SECRET}"


@pytest.mark.parametrize(
    "made",
    [
        record("%s", SECRET.encode()),
        record("%(v)r", {"v": memoryview(SECRET.encode())}),
        record("got", token=SECRET),
        record("got", api_key=SECRET, session=SECRET, password=SECRET),
        record("got", chunk=Chunk(data=SECRET.encode())),
        record("got %s", Chunk(data=SECRET.encode())),
        record("got", values=[SECRET]),
        record(PEM),
        record("cut off %s", PEM[:40]),
        record("Authorization: Bearer %s", TOKEN),
        record("%s", np.frombuffer(SECRET.encode(), np.uint8)),
    ],
)
def test_secrets_and_updates_are_not_rendered(made: logging.LogRecord) -> None:
    for formatter in (JSONLines(), Human()):
        line = formatter.format(made)
        assert SECRET[:7] not in line
        assert "104 117" not in line  # the first bytes of an array of it


@pytest.mark.parametrize("name", ["a", "ab", "abc", "st-mary", "a-rather-long-name.of-a-client"])
def test_no_token_that_we_sign_is_rendered(name: str) -> None:
    token = Token(client=name, serial="0" * 32, not_before=0, expires=10)
    text = sign(token, Ed25519PrivateKey.generate()).decode()
    for formatter in (JSONLines(), Human()):
        line = formatter.format(record("a call with %s failed", text))
        assert not any(part.rstrip("=")[-12:] in line for part in text.split("."))


def test_a_digest_and_a_client_with_key_in_its_name_are_fine() -> None:
    line = json.loads(JSONLines().format(record("ok", digest="ff00", monkey=1, client="keys-r-us")))
    assert (line["digest"], line["monkey"], line["client"]) == ("ff00", 1, "keys-r-us")


def test_values_that_json_has_not_are_text() -> None:
    line = json.loads(
        JSONLines().format(record("ok", loss=float("nan"), where=Path("a"), long="x" * 9000))
    )
    assert (line["loss"], line["where"], len(line["long"])) == ("nan", "a", 2000)


def test_the_file_gets_all_and_the_terminal_gets_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "server.log"
    with logging_to(path, "info"):
        LOG.debug("too much")
        LOG.info("fine")
        path.rename(tmp_path / "server.log.1")  # as logrotate does
        try:
            raise ValueError("what\nnow")  # noqa: TRY301
        except ValueError:
            LOG.exception("broken")
    LOG.warning("nobody listens")
    (first,) = (tmp_path / "server.log.1").read_text().splitlines()
    (second,) = path.read_text().splitlines()
    assert json.loads(first)["message"] == "fine"
    assert "ValueError: what\nnow" in json.loads(second)["error"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (line,) = capsys.readouterr().err.splitlines()
    assert "error    broken: now" in line


def test_without_a_file_the_terminal_gets_all(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(None, "debug"):
        LOG.debug("detail")
    assert "debug    detail" in capsys.readouterr().err


def test_bad_settings_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown log level 'loud'"), logging_to(None, "loud"):
        pass
    with pytest.raises(InputError, match="cannot write the log"), logging_to(tmp_path / "no" / "file"):
        pass
