"""The `fedrobust` command: composes library, server and clients, and imports them when needed."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import sys
from collections.abc import Sequence

from fedrobust.cli import federations, keys, ledgers, models, studies
from fedrobust.cli.parsing import Parser, complain
from fedrobust.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 failed, 2 bad input)."""
    # A plain kill ends a run as Ctrl-C does, at whatever point, so that everything is put away.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
    except InputError as error:
        return complain(str(error), 2)
    except ConnectionError as error:
        return complain(str(error), 1)
    except OSError as error:  # such as a full disk
        return complain(f"{error.strerror}: {error.filename or 'the run cannot be saved'}", 1)
    except sqlite3.OperationalError as error:  # a full disk, seen by the ledger
        return complain(f"the ledger cannot be written: {error}; make room, and go on by --resume", 1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return complain("interrupted", 130)
    finally:
        signal.signal(signal.SIGTERM, before)
    return code


def _run(arguments: Sequence[str]) -> int:
    try:
        options = _parser(*arguments[:1]).parse_args(arguments)
        options.arguments = arguments
        code: int = options.run(options)
    except ModuleNotFoundError as error:  # the bare library
        package = (error.name or "").partition(".")[0]
        if not package or package.startswith("fedrobust") or package in sys.stdlib_module_names:
            raise
        raise InputError(
            f"{arguments[0]} needs the extra 'server' ({error.name} is not installed): "
            "pip install 'fedrobust[server]'"
        ) from error
    return code


def _parser(chosen: str = "") -> Parser:
    parser = Parser(
        prog="fedrobust", description="Federated learning that malicious clients cannot steer."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    federations.add(commands, chosen)
    ledgers.add(commands)
    models.add(commands, chosen)
    studies.add(commands, chosen)
    keys.add(commands)
    return parser
