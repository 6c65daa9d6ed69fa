"""`fedrobust keys`: certificates and tokens."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedrobust.cli.parsing import command

_KEYS = """\
example:
  fedrobust keys authority keys
  fedrobust keys server keys --host fl.example.org 10.1.2.3
  fedrobust keys client keys st-mary st-john
  fedrobust serve --tls keys/server --bind 0.0.0.0:7070
  fedrobust client --key-dir keys/clients/st-mary --name st-mary --id 0 --server fl.example.org:7070
"""


def add(commands: Any) -> None:  # noqa: ANN401 (argparse keeps this type to itself)
    """Add the command."""
    keys = command(commands, "keys", "make and revoke certificates and tokens", _KEYS, None)
    actions = keys.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def action(
        name: str, help_text: str, run: Callable[[argparse.Namespace], int], days: int | None = None
    ) -> argparse.ArgumentParser:
        parser = command(actions, name, help_text, "", run)
        parser.add_argument("folder", type=Path, metavar="DIR", help="of the authority")
        if days:
            parser.add_argument("--days", type=int, default=days, help=f"how long it is good [{days}]")
        return parser

    action("authority", "a new authority, in a new folder", _keys_authority, 3650)
    server = action("server", "the server's certificate", _keys_server, 365)
    server.add_argument(
        *("--host", "--hosts"),
        nargs="+",
        action="extend",
        required=True,
        metavar="HOST",
        help="every host name and IP address by which clients reach the server",
    )
    client = action("client", "certificates of clients", _keys_client, 365)
    client.add_argument("names", nargs="+", metavar="NAME", help="of the client")
    token = action("token", "enrolment tokens, where clients have no certificates", _keys_token, 30)
    token.add_argument("names", nargs="+", metavar="NAME", help="of the client")
    token.add_argument("--run", dest="federation", default="", help="good for the run of this name only")
    revoke = action("revoke", "shut out a client, or one certificate or token", _keys_revoke)
    revoke.add_argument("what", metavar="NAME_OR_SERIAL", help="a client's name, or a serial number")
    action("list", "what was issued, and whether it is good", _keys_list)


def _keys_authority(options: argparse.Namespace) -> int:
    from fedrobust_server.keys import Authority

    return _made(options, [Authority.create(options.folder, options.days).folder])


def _keys_server(options: argparse.Namespace) -> int:
    from fedrobust_server.keys import Authority

    return _made(options, [Authority(options.folder).server(options.host, options.days)])


def _keys_client(options: argparse.Namespace) -> int:
    from fedrobust_server.keys import Authority

    authority = Authority(options.folder)
    return _made(options, (authority.client(name, options.days) for name in options.names))


def _keys_token(options: argparse.Namespace) -> int:
    from fedrobust_server.keys import Authority

    authority = Authority(options.folder)
    return _made(
        options, (authority.token(name, options.days, options.federation) for name in options.names)
    )


def _made(options: argparse.Namespace, paths: Iterable[Path]) -> int:
    """Say where the new keys are; what they are is nobody's business."""
    for path in paths:
        print(json.dumps({"made": str(path)}) if options.json else f"made {path}", flush=True)  # noqa: T201
    return 0


def _keys_revoke(options: argparse.Namespace) -> int:
    from fedrobust_server.keys import Authority

    for issued in Authority(options.folder).revoke(options.what):
        told = {"revoked": issued.name, "kind": issued.kind, "serial": issued.serial}
        line = (
            json.dumps(told) if options.json else f"revoked {issued.kind} {issued.name} {issued.serial}"
        )
        print(line)  # noqa: T201
    return 0


def _keys_list(options: argparse.Namespace) -> int:
    from fedrobust_server.keys import Authority

    authority = Authority(options.folder)
    for issued in authority.issued():
        state = authority.state(issued)
        if options.json:
            print(json.dumps({**dataclasses.asdict(issued), "state": state}))  # noqa: T201
        else:
            expires = time.strftime("%Y-%m-%d", time.gmtime(issued.expires))
            print(f"{issued.kind:<7} {state:<8} {expires}  {issued.serial}  {issued.name}")  # noqa: T201
    return 0
