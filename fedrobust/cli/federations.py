"""`fedrobust simulate`, `serve` and `client`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedrobust.addresses import check_reachable
from fedrobust.cli.parsing import add_fields, command, complain, given_fields
from fedrobust.errors import InputError
from fedrobust.text import printable

if TYPE_CHECKING:
    from fedrobust_clients.malicious import Threat
    from fedrobust_clients.runtime import Runtime
    from fedrobust_proto.v1.federation_pb2 import Receipt
    from fedrobust_server.config import RunConfig
    from fedrobust_server.launch import Federation
    from fedrobust_server.runs import RunFolder
    from fedrobust_server.security import Security

T = TypeVar("T")

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
a client with data of its own:
  fedrobust client --server 127.0.0.1:7070 --id 5 --own-data hospital.data:records
"""


def add(commands: Any, chosen: str) -> None:  # noqa: ANN401 (argparse keeps this type to itself)
    """Add the commands; the many options of a run only to the one that was chosen."""
    simulate = command(commands, "simulate", "a federation on this machine", _SIMULATE, _simulate)
    _data_option(simulate)
    if chosen == "simulate":
        _run_options(simulate)
    simulate.add_argument("--workers", type=int, default=2, help="processes that hold clients")
    simulate.add_argument("--gpu", action="store_true", help="they share the GPUs, and train there")
    serve = command(commands, "serve", "the server of a federation", _SERVE, _serve)
    _data_option(serve)
    if chosen == "serve":
        _run_options(serve)
    serve.add_argument(
        "--bind", default="127.0.0.1:7070", help="host:port to listen on [127.0.0.1:7070]"
    )
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
    client = command(commands, "client", "one client of a federation", _CLIENT, _client)
    _data_option(client)
    client.add_argument("--server", required=True, help="host:port of the server")
    client.add_argument(
        "--id",
        type=int,
        required=True,
        help="which client of the task, from 0; it trains on that part of the dataset",
    )
    client.add_argument("--name", help="what the client is called [client- and its id]")
    client.add_argument(
        "--own-data",
        metavar="DATASET",
        help="train on all of this, package.module:attribute, not on a part of the task's dataset",
    )
    client.add_argument("--gpu", action="store_true", help="train on the GPU")
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
    client.add_argument(
        "--malicious", type=int, help="with --attack: size of the coalition, ids below it [1]"
    )
    client.add_argument("--rule", help="the server's rule, for attacks that try their rows on it")
    client.add_argument("--eps", type=float, help="the malicious fraction that the server assumes")
    client.add_argument(
        "--allow-imports",
        action="store_true",
        help="import the models and datasets that the server names by path: its word runs code here",
    )
    client.add_argument(
        "--patience",
        type=float,
        default=600.0,
        help="seconds that the server may be away [600]",
    )


def _data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, help="where datasets are [$FEDROBUST_DATA]")


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
    add_fields(parser, RunConfig, "the run", without=("task", "limits"))  # tables of the file
    add_fields(parser, Task, "the task")


def _run_config(options: argparse.Namespace) -> RunConfig:
    from fedrobust_server.config import RunConfig, read_config

    from fedrobust.training import Task

    values = read_config(options.config) if options.config else {}
    values.setdefault("run", time.strftime("%Y%m%d-%H%M%S"))
    given = given_fields(options, RunConfig)
    values |= given
    if task := given_fields(options, Task):
        values["task"] = {**values.get("task", {}), **task}
    config = RunConfig.from_dict(values)
    if "attack" in given and "malicious" not in given and not config.malicious:
        raise InputError(
            f"attack {config.attack!r} has no attacker: give --malicious, or leave --attack out"
        )
    return config


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
                on_gpu=options.gpu,
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
    security = _security(options, config.run, shared=config.gateways > 1)

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


def _security(options: argparse.Namespace, run: str, *, shared: bool) -> Security | None:
    """How a run's server is secured; refuses before anything is made or started."""
    from fedrobust_server.gateway import check_address, check_free
    from fedrobust_server.security import Security

    if options.proof and not options.tls:
        raise InputError(
            "--clients-show needs --tls DIR: proofs are shown over an encrypted channel only"
        )
    security = Security.load(options.tls, _proof(options), run) if options.tls else None
    check_address(options.bind, secured=security is not None, exposed=options.exposed)
    check_free(options.bind, shared=shared)
    if options.exposed and security is None:
        complain(
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
    from fedrobust_clients.malicious import Malicious
    from fedrobust_clients.remote import run
    from fedrobust_clients.runtime import Honest
    from fedrobust_proto.v1.federation_pb2 import Status

    from fedrobust import devices
    from fedrobust.data import load
    from fedrobust.training import Learner, Task, client_name, own_learner

    threat = _threat(options)
    if options.id < 0:
        raise InputError(f"--id must be at least 0, got {options.id}")
    if not options.patience > 0:
        raise InputError(f"--patience must be above 0 seconds, got {options.patience}")
    check_reachable(options.server)
    name = options.name or client_name(options.id)
    if any(0xD800 <= ord(character) <= 0xDFFF for character in name):
        raise InputError(f"--name must be text in UTF-8, got '{printable(name, 64)}'")
    credentials = Credentials.read(options.ca, options.key_dir, options.token)
    device = devices.chosen(gpu=options.gpu)
    own = load(options.own_data, options.data_dir) if options.own_data else None
    torch.set_num_threads(1)  # many clients share a machine in experiments

    def prepare(task: Task) -> Runtime:
        if own is not None:
            return Honest(own_learner(task, own, options.id).to(device))
        dataset = load(task.dataset, options.data_dir)
        honest = Honest(Learner(task, dataset, options.id).to(device))
        if threat is None:
            return honest
        return Malicious(honest, threat.coalition(task, dataset.to(device)), options.id)

    def watch(number: int, receipt: Receipt) -> None:
        status = Status.Name(receipt.status).removeprefix("STATUS_")
        if options.json:
            print(  # noqa: T201
                json.dumps({"round": number, "status": status, "reason": receipt.reason}), flush=True
            )
        else:
            reason = printable(receipt.reason)
            print(f"round {number}: {status.lower()} {reason}".rstrip(), flush=True)  # noqa: T201

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


def _threat(options: argparse.Namespace) -> Threat | None:
    """The coalition that a client is a member of; None if it is honest."""
    from fedrobust_clients.malicious import Threat

    from fedrobust.attacks import parse_attack
    from fedrobust.rules import parse_rule

    if not options.attack:
        idle = [name for name in ("malicious", "rule", "eps") if getattr(options, name) is not None]
        if idle:
            raise InputError(
                f"--{', --'.join(idle)} without --attack: the client would be honest; give --attack, "
                "or leave that out"
            )
        return None
    if options.own_data:
        raise InputError(
            "--own-data is for honest clients: members of a coalition know everybody's data"
        )
    parse_attack(options.attack)
    if options.rule:
        parse_rule(options.rule)
    if options.eps is not None and not 0 <= options.eps < 0.5:
        raise InputError(f"--eps must be in [0, 0.5), got {options.eps}")
    malicious = 1 if options.malicious is None else options.malicious
    if options.id >= malicious:
        raise InputError(
            f"client {options.id} is no member of a coalition of {malicious}: "
            "its ids are those below --malicious"
        )
    return Threat(malicious, options.attack, options.rule, options.eps)
