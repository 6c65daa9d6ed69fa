"""Waiting for Ray without waiting for ever.

When Ray's head or our own node is gone, calls that are under way neither return nor fail, and a minute
later Ray ends our process. Before that happens, whoever waits here is told by a `ConnectionError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray._private import worker
from ray._raylet import NodeID
from ray.exceptions import GetTimeoutError, RayError, RayTaskError, RpcError

from fedrobust.errors import InputError
from fedrobust.text import printable

PATIENCE = 30.0
"""Seconds that the cluster's head may be away, as when it is started anew; Ray's own limit is 60."""
PAUSE = 5.0
"""Seconds between two looks."""


def get(references: Any) -> Any:  # noqa: ANN401 (Ray's references are untyped)
    """`ray.get`, as long as the cluster is there.

    Raises:
        ConnectionError: it is gone.
        RayError: an actor was lost, or something else of Ray's.
        Exception: what an actor itself raised: a full disk, say, which starting it anew would not mend.
    """
    while True:
        try:
            return ray.get(references, timeout=PAUSE)
        except GetTimeoutError:
            check()
        except RayTaskError as error:
            if isinstance(error.cause, RayError):
                raise
            raise error.cause from error


def check() -> None:
    """Return as soon as the cluster answers.

    Raises:
        ConnectionError: it has not for too long, or has given our node up.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            alive = _ask()
        except RpcError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(f"the head of the Ray cluster is gone: {error}; {_HELP}") from None
            time.sleep(1.0)
        else:
            if not alive:
                raise ConnectionError(f"this machine's Ray node is dead; {_HELP}")
            return


async def watch() -> None:
    """Look after the cluster until cancelled.

    Raises:
        ConnectionError: it is gone.
    """
    while True:
        await asyncio.sleep(PAUSE)
        await asyncio.to_thread(check)


def alive() -> bool:
    """Whether the cluster answers now."""
    try:
        return _ask()
    except RpcError:
        return False


def reason(error: RayError) -> str:
    """What Ray says became of something, in one line."""
    why = str(error).strip().rpartition("\n")[2]
    return printable(f"{type(error).__name__}: {why}", 400)


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Tell in one line that Ray lost what was under way, which can be gone on with.

    Raises:
        ConnectionError: in the place of what Ray raises.
        InputError: as the process that worked on it raised it.
    """
    try:
        yield
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, InputError) else error) from None
    except RayError as error:
        raise ConnectionError(f"{what} was lost: {reason(error)}; begin again, and it goes on") from None


_HELP = "when the cluster is back, go on by --resume, or, where there is none, by the same command"


def _ask() -> bool:
    """Whether the head thinks that the node that we are connected to is alive."""
    process: Any = worker.global_worker  # its attributes come and go, unseen by its type
    node = NodeID(process.core_worker.get_current_node_id().binary())
    (alive,) = process.gcs_client.check_alive([node], timeout=3.0)
    return bool(alive)
