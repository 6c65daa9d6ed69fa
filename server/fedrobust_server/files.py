"""Files that hold secrets: private from the start, never overwritten, errors in one line."""

from __future__ import annotations

import os
from pathlib import Path

from fedrobust import InputError


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


def _exists(path: Path) -> str:
    return f"{path} exists already and is left as it is; move it away to make a new one"
