"""The list of who is shut out: names of clients and serial numbers, one a line; # begins a comment."""

from __future__ import annotations

import logging
from pathlib import Path

from fedrobust import InputError
from fedrobust.text import printable
from fedrobust_server.files import read_bytes
from fedrobust_server.names import check_name, is_serial

LOG = logging.getLogger(__name__)


def read_revoked(path: Path) -> frozenset[str]:
    """The names and serial numbers in a revocation list.

    Raises:
        InputError: it cannot be read, or a line is neither a name nor a serial number.
    """
    lines = (
        line.partition("#")[0].strip() for line in read_bytes(path).decode(errors="replace").split("\n")
    )
    entries = frozenset(line for line in lines if line)
    for entry in entries:
        if not is_serial(entry):
            try:
                check_name(entry)
            except InputError:
                raise InputError(
                    f"{path}: expected a client's name or a serial number, got '{printable(entry, 64)}'"
                ) from None
    return entries


class Revoked:
    """A revocation list that is read again whenever its file has changed.

    A list that becomes unreadable is reported in the log, and the last readable one stays in force:
    a slip of the editor must neither let anyone back in nor stop the federation.
    """

    def __init__(self, path: Path) -> None:
        """Read the list.

        Raises:
            InputError: as `read_revoked`.
        """
        self._path = path
        self._stamp = _stamp(path)
        self._entries = read_revoked(path)

    def any(self, *entries: str) -> bool:
        """Whether any of these names and serial numbers is shut out by now."""
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._entries = read_revoked(self._path)
            except InputError as error:
                LOG.error("the list as it was stays in force: %s", error)  # noqa: TRY400
        return not self._entries.isdisjoint(entries)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
