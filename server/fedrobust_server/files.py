"""Files that hold secrets: private from the start, never overwritten, errors in one line."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from fedrobust import InputError

T = TypeVar("T")

LOG = logging.getLogger(__name__)


def make_folder(path: Path, *, exist_ok: bool = False) -> None:
    """Make a folder that only its owner can enter.

    Raises:
        InputError: it exists already, or cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=exist_ok)
    except FileExistsError:
        raise InputError(_exists(path)) from None
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}") from None


def write_new(path: Path, data: bytes, *, public: bool = False) -> None:
    """Write a file that is not there yet; unless public, no one but its owner can ever read it.

    Raises:
        InputError: it exists already, or cannot be written.
    """
    try:
        # The mode is set at birth: no moment in which others can open the file.
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644 if public else 0o600)
        with os.fdopen(file, "wb") as stream:
            stream.write(data)
    except FileExistsError:
        raise InputError(_exists(path)) from None
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, in one piece.

    Raises:
        InputError: it is not there, or cannot be written.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        with os.fdopen(file, "r+b", buffering=0) as stream:
            size = os.fstat(file).st_size
            whole = size == 0 or os.pread(file, 1, size - 1) == b"\n"  # an editor may leave it so
            stream.write(("" if whole else "\n").encode() + line.encode() + b"\n")
    except OSError as error:
        raise InputError(f"cannot add to {path}: {error.strerror}") from None


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


class Watched(Generic[T]):
    """What some files hold, read again whenever one of them has changed.

    Files that become unreadable, or do not fit each other, are reported in the log, and what was read
    last stays in force: a slip of the editor must neither let anyone in nor stop the federation.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T], otherwise: str) -> None:
        """Read the files.

        Args:
            paths: of all of them.
            read: gives what they hold, or raises an `InputError`.
            otherwise: what the log says is the case while they cannot be read.

        Raises:
            InputError: as `read`.
        """
        self._paths, self._read, self._otherwise = paths, read, otherwise
        self._stamps = self._now()
        self._value = read()

    def value(self) -> T:
        """What they hold by now; from any thread."""
        stamps = self._now()
        if stamps != self._stamps:
            self._stamps = stamps
            try:
                self._value = self._read()
            except InputError as error:
                LOG.error("%s: %s", self._otherwise, error)  # noqa: TRY400
        return self._value

    def _now(self) -> Sequence[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _exists(path: Path) -> str:
    return f"{path} exists already and is left as it is; move it away to make a new one"
