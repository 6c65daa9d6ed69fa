"""The `fedrobust` command: composes library, server and clients, and imports them when needed."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import shlex
import signal
import sqlite3
import sys
import time
import typing
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from fedrobust.errors import InputError
from fedrobust.text import printable

if TYPE_CHECKING:
    from fedrobust_clients.runtime import Runtime
    from fedrobust_proto.v1.federation_pb2 import Receipt
    from fedrobust_server.config import RunConfig
    from fedrobust_server.launch import Federation
    from fedrobust_server.runs import RunFolder
    from fedrobust_server.security import Security

    from fedrobust.trials import Trial
T = TypeVar("T")

_LEDGER = """\
examples, while the server runs or afterwards:
  fedrobust ledger show runs/first
  fedrobust ledger show runs/first --client st-mary
  fedrobust ledger export runs/first --client st-mary --to evidence.jsonl
  fedrobust ledger release runs/first st-mary --reason "their scanner was replaced"
  fedrobust ledger verify runs/first
"""
_SIMULATE = """\
example:
  fedrobust simulate --attack ipm --malicious 4 --clients 20 --rule filter
"""
_SERVE = """\
example, with ten clients in other terminals:
  fedrobust serve --bind 127.0.0.1:7070 --clients 10 --rounds 20
  fedrobust client --server 127.0.0.1:7070 --id 0
after the server was stopped, or died:
  fedrobust serve --bind 127.0.0.1:7070 --resume runs/20261125-101500
"""
_CLIENT = """\
examples, the second one as a member of a coalition of two:
  fedrobust client --server 127.0.0.1:7070 --id 3
  fedrobust client --server 127.0.0.1:7070 --id 1 --attack ipm --malicious 2
"""
_KEYS = """\
example:
  fedrobust keys authority keys
  fedrobust keys server keys --host fl.example.org 10.1.2.3
  fedrobust keys client keys st-mary st-john
  fedrobust serve --tls keys/server --bind 0.0.0.0:7070
  fedrobust client --key-dir keys/clients/st-mary --name st-mary --id 0 --server fl.example.org:7070
"""
_REDTEAM = """\
examples, the second one the table of docs/redteam.md:
  fedrobust redteam "nnm | filter" --clients 20 --eps 0.2
  fedrobust redteam --all --markdown
"""


_COMPARE = """\
examples, the first one lists what comes along:
  fedrobust compare
  fedrobust compare digits
  fedrobust compare --rule mean filter "nnm | trimmed_mean" --attack none alie ipm --eps 0.1 0.2
  fedrobust compare mnist --split iid --eps 0.2 --seed 0 1 2 --to comparisons/iid
"""
_DATA = """\
examples:
  fedrobust data
  fedrobust data mnist --to data
  FEDROBUST_DATA=data fedrobust simulate --dataset mnist
"""
_REPRODUCE = """\
examples:
  fedrobust reproduce
  fedrobust reproduce robust-mean --quick
  fedrobust reproduce sever-regression --data-dir data
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 1 failed, 2 bad input)."""
    # A plain kill ends a run as Ctrl-C does, at whatever point, so that everything is put away.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        options = _parser(*arguments[:1]).parse_args(arguments)
        options.arguments = arguments
        code: int = options.run(options)
    except InputError as error:
        return _complain(str(error), 2)
    except ConnectionError as error:
        return _complain(str(error), 1)
    except OSError as error:  # such as a full disk
        return _complain(f"{error.strerror}: {error.filename or 'the run cannot be saved'}", 1)
    except sqlite3.OperationalError as error:  # a full disk, seen by the ledger
        return _complain(f"the ledger cannot be written: {error}; make room, and go on by --resume", 1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _complain("interrupted", 130)
    finally:
        signal.signal(signal.SIGTERM, before)
    return code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _parser(chosen: str = "") -> argparse.ArgumentParser:
    """The parser; the many options of a run are added only to the command that was chosen."""
    parser = _Parser(
        prog="fedrobust", description="Federated learning that malicious clients cannot steer."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    simulate = _command(commands, "simulate", "a federation on this machine", _SIMULATE, _simulate)
    if chosen == "simulate":
        _run_options(simulate)
    simulate.add_argument("--workers", type=int, default=2, help="processes that hold clients")
    serve = _command(commands, "serve", "the server of a federation", _SERVE, _serve)
    if chosen == "serve":
        _run_options(serve)
    serve.add_argument("--bind", default="127.0.0.1:7070", help="host:port to listen on")
    serve.add_argument(
        "--resume", type=Path, metavar="FOLDER", help="go on with this run, as it was configured"
    )
    serve.add_argument(
        "--tls",
        type=Path,
        metavar="DIR",
        help="encrypt; the server's folder, by `fedrobust keys server`",
    )
    serve.add_argument(
        "--clients-show",
        dest="proof",
        metavar="WHAT",
        help="with --tls, how clients show who they are: certificate, or token [certificate]",
    )
    serve.add_argument(
        "--insecure-anyone-can-read-and-poison-this-federation",
        dest="exposed",
        action="store_true",
        help="listen beyond loopback without --tls",
    )
    client = _command(commands, "client", "one client of a federation", _CLIENT, _client)
    client.add_argument("--server", required=True, help="host:port of the server")
    client.add_argument("--id", type=int, required=True, help="which client of the task, from 0")
    client.add_argument("--name", help="what the client is called [client- and its id]")
    client.add_argument(
        "--key-dir", type=Path, metavar="DIR", help="mutual TLS; the folder by `fedrobust keys client`"
    )
    client.add_argument(
        "--token", type=Path, metavar="FILE", help="from `fedrobust keys token`; with --ca"
    )
    client.add_argument(
        "--ca", type=Path, metavar="FILE", help="TLS; authority.pem [the one in --key-dir]"
    )
    client.add_argument("--attack", help="be malicious, and send this")
    client.add_argument("--malicious", type=int, default=1, help="size of the coalition: ids below it")
    client.add_argument("--rule", help="the server's rule, for attacks that try their rows on it")
    client.add_argument("--eps", type=float, help="the malicious fraction that the server assumes")
    client.add_argument(
        "--allow-imports",
        action="store_true",
        help="import the models and datasets that the server names by path: its word runs code here",
    )
    client.add_argument("--patience", type=float, default=60.0, help="seconds to wait for the server")
    _ledger_options(commands)
    redteam = _command(
        commands, "redteam", "the largest error that a search finds for a rule", _REDTEAM, _redteam
    )
    redteam.add_argument("rule", nargs="?", help='such as "nnm | filter"; none: all rules')
    redteam.add_argument("--all", action="store_true", help="a table of all rules")
    for name, kind, what in (
        ("clients", int, "how many clients, malicious ones included [20]"),
        ("eps", float, "the malicious fraction [0.2]"),
        ("parameters", int, "how many parameters an update has [100]"),
        ("budget", int, "how often a rule is tried for each seed [3000]"),
        ("seed", int, "the first seed; the same seed gives the same figures [0]"),
        ("seeds", int, "how many seeds; the worst counts [1]"),
    ):
        redteam.add_argument(f"--{name}", type=kind, help=what)
    redteam.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    compare = _command(commands, "compare", "many attacks on many rules", _COMPARE, _compare)
    if chosen == "compare":
        _compare_options(compare)
    _reproduce_options(
        _command(commands, "reproduce", "a published experiment, run again", _REPRODUCE, _reproduce)
    )
    data = _command(
        commands, "data", "which datasets there are, and whether their files are in place", _DATA, _data
    )
    data.add_argument("name", nargs="?", help="of the dataset to fetch; none: list all")
    data.add_argument(
        *("--to", "--data-dir"),
        dest="data_dir",
        type=Path,
        metavar="DIR",
        help="where datasets are, or are to be, each in a folder of its own [$FEDROBUST_DATA]",
    )
    _keys_commands(_command(commands, "keys", "make and revoke certificates and tokens", _KEYS, None))
    return parser


def _compare_options(compare: argparse.ArgumentParser) -> None:
    """A flag for every key of a grid, each of which takes several values."""
    from fedrobust_laboratory.grid import KEYS

    compare.add_argument("grid", nargs="?", help="a preset, or a TOML file; flags override it")
    compare.add_argument("--data-dir", type=Path, help="where datasets are [$FEDROBUST_DATA]")
    compare.add_argument("--ray-address", help="join this Ray cluster instead of starting one")
    compare.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="where runs, tables and pictures go; begun again, it goes on [comparisons/GRID]",
    )
    group = compare.add_argument_group("what is tried, one value or several")
    docs = {cls: (typing.get_type_hints(cls), _attribute_docs(cls)) for cls in set(KEYS.values())}
    for key, cls in KEYS.items():
        hints, texts = docs[cls]
        group.add_argument(
            f"--{key.replace('_', '-')}",
            dest=f"grid:{key}",
            nargs="+",
            type=hints[key],
            metavar=key.upper(),
            help=texts[key].replace("%", "%%"),
        )


def _reproduce_options(reproduce: argparse.ArgumentParser) -> None:
    reproduce.add_argument("name", nargs="?", help="of the experiment; none: list them")
    reproduce.add_argument("--quick", action="store_true", help="a smaller form, of two minutes at most")
    reproduce.add_argument("--seeds", type=int, help="how many for each setting [the form's own number]")
    reproduce.add_argument("--data-dir", type=Path, help="where datasets are [$FEDROBUST_DATA]")
    reproduce.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="where trials, tables and figure go; begun again, it goes on [reproductions/NAME]",
    )


def _keys_commands(keys: argparse.ArgumentParser) -> None:
    actions = keys.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def action(
        name: str, help_text: str, run: Callable[[argparse.Namespace], int], days: int | None = None
    ) -> argparse.ArgumentParser:
        parser = _command(actions, name, help_text, "", run)
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


def _command(
    commands: Any,  # noqa: ANN401 (argparse keeps this type to itself)
    name: str,
    help_text: str,
    example: str,
    run: Callable[[argparse.Namespace], int] | None,
) -> argparse.ArgumentParser:
    """Add a command; without `run` it is a group of commands, and has no options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if run is None:
        return parser
    parser.set_defaults(run=run)
    if run in (_simulate, _serve, _client):
        parser.add_argument(
            "--data-dir", type=Path, help="where datasets are (default: $FEDROBUST_DATA)"
        )
    parser.add_argument("--json", action="store_true", help="print JSON lines for programs")
    return parser


def _run_options(parser: argparse.ArgumentParser) -> None:
    """One flag for every configuration key, described by the dataclasses' own docstrings."""
    from fedrobust_server.config import RunConfig

    from fedrobust.training import Task

    parser.add_argument("--config", type=Path, help="a TOML file; flags override it")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="folder of all runs [runs]")
    parser.add_argument("--ray-address", help="join this Ray cluster instead of starting one")
    parser.add_argument(
        "--metrics", metavar="HOST:PORT", help="where Prometheus finds metrics [nowhere]"
    )
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="log there, in JSON lines [standard error]"
    )
    parser.add_argument("--log-level", default="warning", help="debug, info, warning or error [warning]")
    for cls, title in ((RunConfig, "the run"), (Task, "the task")):
        group = parser.add_argument_group(title)
        hints, help_texts = typing.get_type_hints(cls), _attribute_docs(cls)
        for field in dataclasses.fields(cls):
            if field.name in ("task", "limits"):  # tables of the file
                continue
            group.add_argument(
                f"--{field.name.replace('_', '-')}",
                dest=f"{cls.name}:{field.name}",
                type=hints[field.name],
                metavar=field.name.upper(),
                help=f"{help_texts[field.name]} [{_default(field)}]".replace("%", "%%"),
            )


def _default(field: dataclasses.Field[Any]) -> object:
    return "the date and time" if field.name == "run" else field.default


def _attribute_docs(cls: type) -> dict[str, str]:
    """The `Attributes:` of a Google-style docstring."""
    docs: dict[str, str] = {}
    last = ""
    for line in (cls.__doc__ or "").partition("Attributes:")[2].splitlines():
        name, colon, text = line.strip().partition(": ")
        if colon and name.isidentifier() and len(line) - len(line.lstrip()) == 8:
            docs[name], last = text.rstrip("."), name
        elif last and line.strip():
            docs[last] = f"{docs[last]} {line.strip().rstrip('.')}"
    return docs


def _ledger_options(commands: Any) -> None:  # noqa: ANN401 (argparse keeps this type to itself)
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


def _run_config(options: argparse.Namespace) -> RunConfig:
    from fedrobust_server.config import RunConfig, read_config

    values = read_config(options.config) if options.config else {}
    given = {
        tuple(key.split(":")): value
        for key, value in vars(options).items()
        if ":" in key and value is not None
    }
    values.setdefault("run", time.strftime("%Y%m%d-%H%M%S"))
    values |= {field: value for (table, field), value in given.items() if table == "run"}
    task = {field: value for (table, field), value in given.items() if table == "task"}
    if task:
        values["task"] = {**values.get("task", {}), **task}
    return RunConfig.from_dict(values)


def _simulate(options: argparse.Namespace) -> int:
    from fedrobust.data import load

    config = _run_config(options)
    if options.workers < 1:
        raise InputError(f"--workers must be at least 1, got {options.workers}")
    # What the workers will do on Ray, tried here first: a bad task is told at once and in one line.
    config.task.partition(load(config.task.dataset, options.data_dir).train_y.numpy())

    from fedrobust_clients.malicious import Threat
    from fedrobust_clients.simulated import simulate

    async def run(federation: Federation) -> None:
        server = asyncio.ensure_future(federation.coordinator.run())
        clients = asyncio.ensure_future(
            simulate(
                federation.coordinator,
                config.task,
                options.data_dir,
                Threat(config.malicious, config.attack, config.rule, config.eps),
                workers=options.workers,
            )
        )
        await _both(server, clients)

    from fedrobust_server.runs import RunFolder

    with RunFolder.begun(options.runs_dir, config) as folder:
        return _run_federation(options, config, folder, run)


def _serve(options: argparse.Namespace) -> int:
    from fedrobust_server.gateway import listen
    from fedrobust_server.gateways import further_gateways
    from fedrobust_server.outpost import Front
    from fedrobust_server.runs import RunFolder

    if options.resume:
        if given := [key for key, value in vars(options).items() if ":" in key and value is not None]:
            flag = given[0].partition(":")[2].replace("_", "-")
            raise InputError(f"--resume goes on with the run as it was configured; leave --{flag} out")
        old, config = RunFolder.open(options.resume)
    else:
        old, config = None, _run_config(options)
    security = _security(options, config.run)

    async def run(federation: Federation) -> None:
        folder, several = federation.folder, config.gateways > 1
        door = await listen(
            federation.coordinator,
            options.bind,
            security,
            config.limits,
            exposed=options.exposed,
            shared=several,
        )
        address = f"{options.bind.rpartition(':')[0]}:{door.port}"
        tls = options.tls.resolve() if options.tls else None
        front = Front(address, tls, _proof(options), config.run, options.exposed, config.limits)
        try:
            async with further_gateways(
                federation.coordinator, folder, front, config.gateways - 1
            ) as further:
                if options.json:
                    print(json.dumps({"listening": address}), flush=True)  # noqa: T201
                else:
                    print(f"listening on {address} for {config.needed} clients", flush=True)  # noqa: T201

                draining: list[asyncio.Task[None]] = []

                def drain() -> None:
                    federation.coordinator.drain()
                    draining.extend(map(asyncio.ensure_future, (door.drain(), further.drain())))

                asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, drain)
                await federation.coordinator.run()
        finally:
            await door.stop(grace=2.0)

    new = RunFolder.begun(options.runs_dir, config)
    with new if old is None else contextlib.nullcontext(old) as folder:
        return _run_federation(options, config, folder, run)


def _security(options: argparse.Namespace, run: str) -> Security | None:
    """How a run's server is secured; refuses before anything is made or started."""
    from fedrobust_server.gateway import check_address
    from fedrobust_server.security import Security

    if options.proof and not options.tls:
        raise InputError(
            "--clients-show needs --tls DIR: proofs are shown over an encrypted channel only"
        )
    security = Security.load(options.tls, _proof(options), run) if options.tls else None
    check_address(options.bind, secured=security is not None, exposed=options.exposed)
    if options.exposed and security is None:
        _complain(
            f"WARNING: whoever reaches {options.bind} can read this federation's updates, and poison "
            "it in any client's name",
            0,
        )
    return security


def _proof(options: argparse.Namespace) -> str:
    return options.proof or "certificate"


def _run_federation(
    options: argparse.Namespace,
    config: RunConfig,
    folder: RunFolder,
    run: Callable[[Federation], Coroutine[Any, Any, None]],
) -> int:
    """Start a federation, let `run` run it, and leave a report behind, come what may."""
    from fedrobust_server.launch import federation
    from fedrobust_server.logs import logging_to
    from fedrobust_server.metrics import Metrics, serve_metrics
    from fedrobust_server.report import write_report
    from fedrobust_server.summary import summarise
    from fedrobust_server.terminal import terminal

    metrics = Metrics(folder.path)
    with (
        terminal(config, as_json=options.json) as display,
        logging_to(options.log, options.log_level),
        serve_metrics(metrics, options.metrics) if options.metrics else contextlib.nullcontext(),
        federation(
            config,
            folder,
            data_dir=options.data_dir,
            ray_address=options.ray_address,
            watch=display.show,
            metrics=metrics,
        ) as ready,
    ):
        try:
            asyncio.run(_interruptible(run(ready)))
        finally:
            report = write_report(ready.folder.path)
        display.summary({**summarise(ready.folder.path), "report": str(report)})
    return 0


async def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Let SIGTERM cancel the work rather than break into the event loop."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.default_int_handler)


async def _both(server: asyncio.Future[Any], clients: asyncio.Future[Any]) -> None:
    """Wait for a simulation's two halves; if one breaks, do not wait for the other."""
    done, _ = await asyncio.wait({server, clients}, return_when=asyncio.FIRST_EXCEPTION)
    for future in (server, clients):
        if future not in done:
            future.cancel()
    for future in done:
        future.result()


def _client(options: argparse.Namespace) -> int:
    import torch
    from fedrobust_clients.credentials import Credentials
    from fedrobust_clients.malicious import Malicious, Threat
    from fedrobust_clients.remote import run
    from fedrobust_clients.runtime import Honest
    from fedrobust_proto.v1.federation_pb2 import Status

    from fedrobust.attacks import parse_attack
    from fedrobust.data import load
    from fedrobust.rules import parse_rule
    from fedrobust.training import Learner, Task, client_name

    if options.attack:
        parse_attack(options.attack)
    if options.rule:
        parse_rule(options.rule)
    if options.attack and options.id >= options.malicious:
        raise InputError(
            f"client {options.id} is no member of a coalition of {options.malicious}: "
            "its ids are those below --malicious"
        )
    if options.id < 0:
        raise InputError(f"--id must be at least 0, got {options.id}")
    credentials = Credentials.read(options.ca, options.key_dir, options.token)
    torch.set_num_threads(1)  # many clients share a machine in experiments

    def prepare(task: Task) -> Runtime:
        dataset = load(task.dataset, options.data_dir)
        honest = Honest(Learner(task, dataset, options.id))
        if not options.attack:
            return honest
        threat = Threat(options.malicious, options.attack, options.rule, options.eps)
        return Malicious(honest, threat.coalition(task, dataset), options.id)

    def watch(number: int, receipt: Receipt) -> None:
        status = Status.Name(receipt.status).removeprefix("STATUS_")
        if options.json:
            print(  # noqa: T201
                json.dumps({"round": number, "status": status, "reason": receipt.reason}), flush=True
            )
        else:
            reason = printable(receipt.reason)
            print(f"round {number}: {status.lower()} {reason}".rstrip(), flush=True)  # noqa: T201

    name = options.name or client_name(options.id)
    work = run(
        options.server,
        name,
        prepare,
        watch,
        options.patience,
        credentials,
        imports=options.allow_imports,
    )
    asyncio.run(_interruptible(work))
    return 0


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


def _redteam(options: argparse.Namespace) -> int:
    import torch

    from fedrobust import redteam
    from fedrobust.attacks.search import HONEST

    if options.rule and options.all:
        raise InputError("name a rule or give --all, not both")
    fields = {"n": "clients", "d": "parameters", **{k: k for k in ("eps", "budget", "seed", "seeds")}}
    given = {field: getattr(options, flag) for field, flag in fields.items()}
    setting = redteam.Setting(**{k: v for k, v in given.items() if v is not None})
    torch.set_num_threads(1)  # small problems: threads only get in each other's way
    if options.rule:
        with _progress(len(HONEST) * setting.seeds) as watch:
            assessments = [redteam.assess(options.rule, setting, watch)]
        lines = [redteam.cells(assessments[0].rule, found) for found in assessments[0].found]
    else:
        with _progress(len(redteam.RULES)) as watch:
            assessments = redteam.assess_all(setting, watch=watch)
        lines = redteam.table(assessments)
    if options.json:
        for assessment in assessments:
            print(json.dumps(redteam.figures(assessment)))  # noqa: T201
    elif options.markdown:
        print(redteam.markdown(assessments))  # noqa: T201
    else:
        print(f"{setting}; lengths in units of sqrt(lambda_S)\n")  # noqa: T201
        print(redteam.aligned([redteam.HEADER, *lines]))  # noqa: T201
        for assessment in assessments:
            if assessment.refused:
                print(f"no answer: {assessment.refused}")  # noqa: T201
    above = [a.rule for a in assessments if a.exceeding]
    return _complain(f"found above a bound: {', '.join(above)}", 1) if above else 0


def _compare(options: argparse.Namespace) -> int:
    from fedrobust_laboratory import page
    from fedrobust_laboratory.grid import Grid, presets, read_grid
    from fedrobust_laboratory.runner import compare

    given = {
        key.removeprefix("grid:"): value
        for key, value in vars(options).items()
        if key.startswith("grid:") and value is not None
    }
    if options.grid is None and not given:
        for name, title in presets().items():
            print(f"{name:<20} {title}")  # noqa: T201
        return 0
    grid = read_grid(options.grid) if options.grid else Grid("Attacks and rules")
    grid = grid.given(given)
    folder = options.to or Path("comparisons", Path(options.grid or "grid").stem)
    total = sum(1 for _ in grid.settings())
    with _progress(total) as watch:
        watch("")  # counts what has ended, and not what begins

        def ended(trial: Trial) -> None:
            watch(f"{trial.setting['rule']}, {trial.setting['attack']}")

        trials = compare(grid, folder, options.data_dir, options.ray_address, ended)
    written = page.write(trials, grid, folder, shlex.join(["fedrobust", *options.arguments]))
    if options.json:
        for trial in trials:
            print(json.dumps(trial.__dict__))  # noqa: T201
    else:
        print(page.tables(trials, grid)[0])  # noqa: T201
        print(f"\n{written}, {folder / 'tables.md'}, {folder / 'runs.csv'}")  # noqa: T201
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from fedrobust.reproductions import CATALOG
    from fedrobust.text import choose

    if options.name is None:
        for name, experiment in CATALOG.items():
            print(f"{name:<20} {experiment.title}")  # noqa: T201
        return 0
    experiment = CATALOG[choose(options.name, CATALOG, "experiment")]
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("figures are drawn by matplotlib: pip install 'fedrobust[reproduce]'")
    if options.seeds is not None and options.seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {options.seeds}")
    folder = options.to or Path("reproductions", options.name + ("-quick" if options.quick else ""))
    plan = experiment.plan(quick=options.quick, seeds=options.seeds)
    with _progress(len(plan)) as watch:
        trials = experiment.run(plan, folder, options.data_dir, watch)
    if options.json:
        for trial in trials:
            print(json.dumps(trial.__dict__))  # noqa: T201
    else:
        print(experiment.tables(trials))  # noqa: T201
        print(f"\n{folder / 'README.md'}, {folder / 'figure.png'}")  # noqa: T201
    return 0


def _data(options: argparse.Namespace) -> int:
    from fedrobust.data import sources
    from fedrobust.data.files import data_directory
    from fedrobust.text import choose

    data_dir = data_directory(options.data_dir)
    if options.name is None:
        states = [sources.look(source, data_dir) for source in sources.SOURCES.values()]
        states.insert(0, sources.State("digits", sources.IN_PLACE, "(comes with scikit-learn)"))
        for state in states:
            text = f"{state.state}: {state.damaged}" if state.damaged else state.state
            line = f"{state.name:<15} {text:<35} {state.folder}".rstrip()
            print(json.dumps(dataclasses.asdict(state)) if options.json else line)  # noqa: T201
        return int(any(state.damaged for state in states))
    source = sources.SOURCES[choose(options.name, sources.SOURCES, "dataset to fetch")]
    if data_dir is None:
        raise InputError("say where datasets are to be, with --to or FEDROBUST_DATA")
    with _progress(len(source.downloads)) as watch:
        written = sources.fetch(source, data_dir, watch=watch)
    state = sources.look(source, data_dir)
    if options.json:
        print(json.dumps({**dataclasses.asdict(state), "written": list(map(str, written))}))  # noqa: T201
    else:
        for path in written:
            print(f"wrote {path}")  # noqa: T201
        print(f"{state.name} is {state.state}: {state.folder}")  # noqa: T201
    return 0


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
            print(json.dumps(found) if options.json else described(found))  # noqa: T201
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
    return _complain(f"the ledger of {folder} is not whole: {faults} problems", 1) if faults else 0


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


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal, where rich is installed; told what is done next."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:  # the bare library
        yield lambda _: None
        return
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("", total=total)
        begun = False

        def watch(name: str) -> None:
            nonlocal begun
            progress.update(bar, description=name.replace("[", "\\["), advance=int(begun))
            begun = True

        yield watch


def _complain(message: str, code: int) -> int:
    print(f"fedrobust: {printable(' '.join(message.split()), 2000)}", file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main())
