"""Puts a federation together: Ray, the run's folder, the shards and the coordinator."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
import ray
import torch
from ray._private import ray_constants, worker
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import AuthenticationError, RayError

from fedrobust import InputError, parse_rule
from fedrobust.data import Dataset, load
from fedrobust.optimisers import parse_optimiser
from fedrobust.rules import Last
from fedrobust.training import Evaluation, evaluate, load_vector, manifest, root_learner, to_vector
from fedrobust_server import lifeline
from fedrobust_server.aftermath import RoundReport
from fedrobust_server.config import RunConfig
from fedrobust_server.coordinator import Coordinator, Root
from fedrobust_server.metrics import Metrics
from fedrobust_server.round import KEEPS_TURN
from fedrobust_server.runs import RunFolder, read_checkpoint
from fedrobust_server.shards import Shards
from fedrobust_server.spool import Floats

log = logging.getLogger(__name__)

_ATTEMPTS = 4
"""How often shards are started before the run ends."""


@dataclass(frozen=True)
class Federation:
    """A federation ready to run."""

    coordinator: Coordinator
    folder: RunFolder


@contextlib.contextmanager
def start_ray(address: str | None) -> Iterator[None]:
    """Join a Ray cluster, or start one on loopback with just what is needed.

    Where the program uses Ray already, that is used and left alone.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray runs its workers at nice 15: beside busy clients on the same machine the shards would starve.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if ray.is_initialized():
        yield
        return
    before = _descendants()
    worker.print_to_stdstream = _note  # Ray would print what its nodes say among our JSON lines
    if address is not None:
        _join_ray(address)
    else:
        _start_ray()
    started = _descendants() - before
    try:
        yield
    finally:
        with _uninterrupted():
            started |= _descendants() - before
            # Taking leave of a node that is gone can end this process before it has said what happened.
            # Ray does it once more when the interpreter ends.
            if lifeline.alive():
                ray.shutdown()
            # On a busy machine Ray kills its node process before that has ended its helpers, which
            # then linger for minutes.
            for process in psutil.wait_procs(started, timeout=3.0)[1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def _note(data: Any, ignore_prefix: bool) -> None:  # noqa: ANN401, ARG001 (as Ray has it)
    """Log what Ray's nodes say; what matters of it comes as an error to whoever is concerned."""
    log.info("Ray says: %s", " ".join(data["lines"]))


def _join_ray(address: str) -> None:
    try:
        found = canonicalize_bootstrap_address(address) if "://" not in address else None
        if found is None:
            raise ValueError("a cluster's address is HOST:PORT, or auto")  # noqa: TRY301
        _knock(found)
        ray.init(address=found, logging_level=logging.ERROR, log_to_driver=False)
    except AuthenticationError as error:
        why = str(error).partition(". ")[0]
        raise InputError(
            f"the Ray cluster at {address} asks for its token, see docs/operating.md: {why}"
        ) from None
    except (ConnectionError, ValueError, OSError) as error:
        raise InputError(f"there is no Ray cluster at {address}: {error}") from None


def _knock(address: str) -> None:
    """Ask once whether a cluster would let us in; Ray itself tries for minutes, and says why nowhere.

    Raises:
        AuthenticationError: not without its token.
        ConnectionError: there is none.
    """
    # With the token and the TLS that Ray is set up for here. The empty message asks after no node.
    with init_grpc_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=10.0)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise AuthenticationError(error.details() or "") from None
            raise ConnectionError(f"{error.code().name}: {error.details()}") from None


def _start_ray() -> None:
    """A Ray of our own that nobody else can reach.

    Raises:
        ConnectionError: it does not start, tried twice.
    """
    # Ray replaces a loopback address by the machine's own, unless told that it is to be no cluster.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    for again in (True, False):
        try:
            ray.init(
                address="local",  # never another program's cluster that happens to run here
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:
            if type(error) is not Exception:  # what Ray raises when its node is not up within 30 s
                raise
            why = str(error).partition(". ")[0]
            if again:  # what has started of it ends with this process
                log.warning("Ray does not start and is tried once more: %s", why)
                continue
            raise ConnectionError(
                f"Ray does not start: {why}; this machine may be too busy, try again or join a cluster "
                "with --ray-address"
            ) from error
        else:
            return


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Putting things away takes seconds, and a second Ctrl-C must not stop it half way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {kind: signal.signal(kind, signal.SIG_IGN) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@contextlib.contextmanager
def federation(
    config: RunConfig,
    folder: RunFolder,
    *,
    data_dir: Path | None,
    ray_address: str | None,
    watch: Callable[[RoundReport], None],
    metrics: Metrics | None = None,
) -> Iterator[Federation]:
    """Start Ray and put a federation together, at its beginning or where its ledger ends.

    Args:
        config: of the run.
        folder: of the run.
        data_dir: where datasets are; None reads FEDROBUST_DATA.
        ray_address: a Ray cluster to join; None starts one on this machine.
        watch: is told of every finished round.
        metrics: are kept up to date; None keeps some that nobody sees.

    Raises:
        InputError: the dataset is not there, or what was saved cannot be gone on with.
        ConnectionError: Ray cannot start the shards.
    """
    dataset = load(config.task.dataset, data_dir)
    module = config.task.build_model(dataset)
    names, optimiser = manifest(module), parse_optimiser(config.optimiser)
    state = optimiser.begin(to_vector(module)).numpy()
    vectors, size = state.shape
    _check(config.rule, size)
    shards = Shards(size, config.shards, optimiser)
    durable = config.durability == "machine"
    with folder.held(), contextlib.closing(folder.ledger(sync=durable)) as ledger:
        standing = ledger.standing(KEEPS_TURN)
        if standing is not None and standing.state:
            state = folder.load_state(standing.state_round, standing.state, vectors, size)
        elif config.initial:
            state = optimiser.begin(read_checkpoint(Path(config.initial), module)).numpy()
        if standing is not None and not standing.closed:
            folder.check_spool(standing, size, shared=config.gateways > 1)
        with start_ray(ray_address):
            _start(shards, state)
            coordinator = Coordinator(
                config,
                names,
                shards,
                ledger,
                partial(_judge, module, dataset),
                _root(config, dataset),
                folder=folder,
                state=state,
                standing=standing,
                watch=watch,
                metrics=metrics or Metrics(),
            )
            yield Federation(coordinator, folder)
            if lifeline.alive():  # else there is nothing to stop, and trying would take a minute
                shards.stop()


def _check(rule: str, size: int) -> None:
    """Refuse a rule that no round of this model could be aggregated by."""
    for part in parse_rule(rule).rules:
        if isinstance(part, Last) and part.count > size:
            raise InputError(f"{part!r}: the model has only {size} parameters")


def _start(shards: Shards, state: Floats) -> None:
    """Start the shards; again, where a node has just died and Ray does not know of it yet."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            shards.start(state)
        except RayError as error:
            what = f"shards cannot be started: {lifeline.reason(error)}"
            if not left:
                raise ConnectionError(what) from None
            log.warning("%s; trying again", what)
        else:
            return


def _root(config: RunConfig, dataset: Dataset) -> Root | None:
    """Trains the server's own update of a round, where the run has examples for it."""
    if not config.root:
        return None
    learner = root_learner(config.task, dataset, config.root)

    def work(number: int, model: Floats) -> Floats:
        # That of a round which was skipped may still be at work when the next one's begins.
        bench = copy.deepcopy(learner.module)
        update: Floats = learner.update(number, torch.from_numpy(model), module=bench).numpy()
        return update

    return work


def _judge(module: torch.nn.Module, dataset: Dataset, model: Floats) -> Evaluation:
    load_vector(module, torch.from_numpy(model))
    return evaluate(module, dataset.test_x, dataset.test_y)
