"""What the server says while it runs: lines for people on the terminal, JSON lines in a file.

The standard library's logging does this with one formatter, and other libraries' records pass through it
as well; structlog would be a second way of logging beside it, so it is not used.

    log = logging.getLogger(__name__)
    with about(round=3, client="st-mary"):
        log.info("update accepted", extra={"bytes": 4096})

    {"time": "2026-03-01T12:00:00.000Z", "level": "info", "logger": "fedrobust_server.coordinator",
     "message": "update accepted", "round": 3, "client": "st-mary", "bytes": 4096}

One record is one line, whatever a client put into its name or a reason. Bytes, arrays and messages are
never rendered, fields named after secrets are blanked, and so is anything that looks like a private key
or an enrolment token: a log is read by more people than may see an update or hold a key.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedrobust import InputError
from fedrobust.text import choose, printable

LEVELS = ("debug", "info", "warning", "error")
LOGGERS = ("fedrobust", "fedrobust_server", "fedrobust_clients")
"""Ours; other libraries' loggers are left as they are."""

_BASE = ("time", "level", "logger", "message")
_LONGEST = 2000
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_SECRET_NAME = re.compile(
    r"token|secret|passw|private|credential|session|(^|_)key(s|$|_)", re.IGNORECASE
)
_SECRET_TEXT = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\bey[\w-]{16,}={0,2}(?:\.[\w-]+={0,2})+",  # base64url of a JSON document, signed
    re.DOTALL,
)
_BLANK = "[redacted]"

_about: ContextVar[Mapping[str, Any]] = ContextVar("about", default=MappingProxyType({}))


@contextlib.contextmanager
def about(*, round: int | None = None, client: str | None = None) -> Iterator[None]:  # noqa: A002
    """Say of every record within, also from tasks begun within, which round and client it concerns.

    Args:
        round: its number; None leaves what an outer context says.
        client: its name; likewise.
    """
    given = {"round": round, "client": client}
    before = _about.set({**_about.get(), **{k: v for k, v in given.items() if v is not None}})
    try:
        yield
    finally:
        _about.reset(before)


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """A record as plain JSON values, free of secrets."""
    given = {k: v for k, v in vars(record).items() if k not in _STANDARD and not k.startswith("_")}
    found: dict[str, Any] = {
        "time": _time(record),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": _text(_message(record)),
    }
    found |= {
        _text(k): _BLANK if _SECRET_NAME.search(k) else _plain(v)
        for k, v in {**_about.get(), **given}.items()
        if k not in found
    }
    if record.exc_info and record.exc_info[1] is not None:
        found["error"] = _text("".join(traceback.format_exception(record.exc_info[1])), 20 * _LONGEST)
    return found


class JSONLines(logging.Formatter):
    """One JSON object a line, printable ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        return json.dumps(fields(record), ensure_ascii=True, allow_nan=False)


class Human(logging.Formatter):
    """`12:00:00 warning  round 3, st-mary: update refused (bytes=12)`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        found = fields(record)
        clock = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        place = [f"round {found.pop('round')}"] if "round" in found else []
        place += [str(found.pop("client"))] if "client" in found else []
        error = found.pop("error", "").strip().rpartition("\n")[2]
        words = [found["message"], *([error] if error else [])]
        text = f"{', '.join(place)}: {': '.join(words)}" if place else ": ".join(words)
        more = ", ".join(f"{key}={value}" for key, value in found.items() if key not in _BASE)
        line = f"{clock} {found['level']:<8} {text}" + (f" ({more})" if more else "")
        return printable(line, _LONGEST)


@contextlib.contextmanager
def logging_to(file: Path | None, level: str = "info") -> Iterator[None]:
    """Log to the terminal's stderr, and to a file if one is named, until the context ends.

    The file gets JSON lines of this level. It is appended to, readable by its owner alone, and opened
    anew when logrotate has moved it. The terminal gets warnings, or this level if there is no file.

    Args:
        file: where to; None for none.
        level: one of `LEVELS`; what is below it is left out.

    Raises:
        InputError: no such level, or the file cannot be written.
    """
    lowest = logging.getLevelName(choose(level, LEVELS, "log level").upper())
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(Human())
    terminal.setLevel(lowest if file is None else max(lowest, logging.WARNING))
    handlers: list[logging.Handler] = [terminal]
    if file is not None:
        handlers.append(_file(file))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.setLevel(lowest)
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, (old, propagate) in zip(loggers, before, strict=True):
            logger.setLevel(old)
            logger.propagate = propagate
            for handler in handlers:
                logger.removeHandler(handler)
        for handler in handlers:
            handler.close()


class _Private(WatchedFileHandler):
    """A file for its owner alone."""

    def _open(self) -> Any:  # noqa: ANN401 (as in the base class)
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return os.fdopen(descriptor, "a", encoding="ascii")


def _file(path: Path) -> logging.Handler:
    try:
        handler = _Private(path)
    except OSError as error:
        raise InputError(f"cannot write the log {path}: {error.strerror}") from None
    handler.setFormatter(JSONLines())
    return handler


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    """The message with its arguments, these without content that must not be seen."""
    arguments: Any = record.args
    if isinstance(arguments, tuple):
        arguments = tuple(_veiled(value) for value in arguments)
    elif isinstance(arguments, Mapping):
        arguments = {key: _veiled(value) for key, value in arguments.items()}
    return str(record.msg) % arguments if arguments else str(_veiled(record.msg))


def _veiled(value: Any) -> Any:  # noqa: ANN401 (anything may be logged)
    """The value, or its type where the content may be an update or a key."""
    heavy = isinstance(value, bytes | bytearray | memoryview) or any(
        hasattr(value, method) for method in ("__array__", "SerializeToString")
    )
    return f"<{type(value).__name__}>" if heavy else value


def _plain(value: Any) -> Any:  # noqa: ANN401
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str | Path):
        return _text(str(value))
    return _text(str(_veiled(value))) if not isinstance(value, list | tuple | dict) else "<many values>"


def _text(text: str, longest: int = _LONGEST) -> str:
    clean = _SECRET_TEXT.sub(_BLANK, text)
    return clean if len(clean) <= longest else f"{clean[: longest - 3]}..."
