"""`fedrobust ledger`: what happened in a run, who is excluded and why."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedrobust.cli.parsing import complain
from fedrobust.text import finite

_LEDGER = """\
examples, while the server runs or afterwards:
  fedrobust ledger show runs/first
  fedrobust ledger show runs/first --client st-mary
  fedrobust ledger export runs/first --client st-mary --to evidence.jsonl
  fedrobust ledger release runs/first st-mary --reason "their scanner was replaced"
  fedrobust ledger verify runs/first
"""


def add(commands: Any) -> None:  # noqa: ANN401 (argparse keeps this type to itself)
    """Add the command."""
    ledger = commands.add_parser(
        "ledger",
        help="what happened in a run, who is excluded and why",
        description="What happened in a run, who is excluded and why.",
        epilog=_LEDGER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = ledger.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], what: str, *, client: bool = False
    ) -> argparse.ArgumentParser:
        text = what[0].upper() + what[1:] + "."
        parser: argparse.ArgumentParser = kinds.add_parser(
            name, help=what, description=text, allow_abbrev=False
        )
        parser.set_defaults(run=run)
        parser.add_argument("folder", metavar="RUN", help="folder of the run, or its name in --runs-dir")
        if client:
            parser.add_argument("client", metavar="CLIENT", help="the client's name")
            parser.add_argument("--reason", required=True, help="why; kept in the ledger")
            parser.add_argument("--who", default="", help="who decides [this user]")
        parser.add_argument(
            "--runs-dir", type=Path, default=Path("runs"), help="folder of all runs [runs]"
        )
        parser.add_argument("--json", action="store_true", help="print JSON lines for programs")
        return parser

    show = command("show", _ledger_show, "the rounds of a run, its clients, or one client")
    which = show.add_mutually_exclusive_group()
    which.add_argument("--clients", action="store_true", help="all clients, the most suspicious first")
    which.add_argument("--events", action="store_true", help="faults that were survived, resumptions")
    which.add_argument("--client", help="one client: its updates, and why it was excluded")
    export = command("export", _ledger_export, "write the evidence about a client to a file")
    export.add_argument("--client", required=True, help="the client's name")
    export.add_argument("--to", type=Path, required=True, help="a new file, .jsonl or .csv")
    command("verify", _ledger_verify, "check that a ledger is whole")
    command("release", _ledger_decide, "forget what is held against a client", client=True).set_defaults(
        action="release"
    )
    command("ban", _ledger_decide, "exclude a client for good", client=True).set_defaults(action="ban")
    exclude = command("exclude", _ledger_decide, "exclude a client for some rounds", client=True)
    exclude.add_argument("--rounds", type=int, required=True, help="for how many")
    exclude.set_defaults(action="exclude")


def _run_folder(options: argparse.Namespace) -> Path:
    named = Path(options.folder)
    return named if named.is_dir() else Path(options.runs_dir) / named


def _ledger_show(options: argparse.Namespace) -> int:
    from fedrobust_server import audit
    from fedrobust_server.dossier import dossier
    from fedrobust_server.listing import (
        CLIENT_COLUMNS,
        EVENT_COLUMNS,
        ROUND_COLUMNS,
        described,
        table,
    )

    with audit.reading(_run_folder(options)) as db:
        if options.client is not None:
            found = dossier(db, options.client)
            print(json.dumps(finite(found)) if options.json else described(found))  # noqa: T201
            return 0
        if options.clients:
            rows, columns = audit.clients(db), CLIENT_COLUMNS
        elif options.events:
            rows, columns = audit.events(db), EVENT_COLUMNS
        else:
            rows, columns = audit.rounds(db), ROUND_COLUMNS
    if options.json:
        for row in rows:
            print(json.dumps(row))  # noqa: T201
    else:
        print(table(rows, columns))  # noqa: T201
    return 0


def _ledger_export(options: argparse.Namespace) -> int:
    from fedrobust_server import audit
    from fedrobust_server.dossier import export

    with audit.reading(_run_folder(options)) as db:
        count = export(db, options.client, options.to)
    figures = {"answers": count, "file": str(options.to)}
    print(json.dumps(figures) if options.json else f"wrote {count} answers to {options.to}")  # noqa: T201
    return 0


def _ledger_verify(options: argparse.Namespace) -> int:
    from fedrobust_server import audit

    folder = _run_folder(options)
    with audit.reading(folder) as db:
        checked = audit.verify(db)
    if options.json:
        print(json.dumps(dataclasses.asdict(checked)))  # noqa: T201
    else:
        for problem in checked.problems:
            print(problem)  # noqa: T201
        print(  # noqa: T201
            f"{checked.rounds} rounds closed, {checked.accepted} updates accepted in them, "
            f"{checked.refused} refused"
        )
    faults = len(checked.problems)
    return complain(f"the ledger of {folder} is not whole: {faults} problems", 1) if faults else 0


def _ledger_decide(options: argparse.Namespace) -> int:
    from fedrobust_server import audit
    from fedrobust_server.quarantine import parse_action

    action = f"exclude({options.rounds})" if options.action == "exclude" else options.action
    folder = _run_folder(options)
    decided = audit.decide(folder, options.client, parse_action(action), options.reason, options.who)
    if options.json:
        figures = {**dataclasses.asdict(decided), "action": repr(decided.action)}
        print(json.dumps(figures))  # noqa: T201
    else:
        print(f"{decided.action!r} {decided.client}: from the next round on")  # noqa: T201
    return 0
