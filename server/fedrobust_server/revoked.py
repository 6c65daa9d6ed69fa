"""The list of who is shut out: names of clients and serial numbers, one a line; # begins a comment."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from fedrobust import InputError
from fedrobust.text import printable
from fedrobust_server.files import Watched, read_bytes
from fedrobust_server.names import check_name, is_serial


def read_revoked(path: Path) -> frozenset[str]:
    """The names and serial numbers in a revocation list.

    Raises:
        InputError: it cannot be read, or a line is neither a name nor a serial number.
    """
    lines = (
        line.partition("#")[0].strip() for line in read_bytes(path).decode(errors="replace").split("\n")
    )
    entries = frozenset(line.lower() if is_serial(line) else line for line in lines if line)
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
    """A revocation list that is read again whenever its file has changed."""

    def __init__(self, path: Path) -> None:
        """Read the list.

        Raises:
            InputError: as `read_revoked`.
        """
        self._list = Watched([path], partial(read_revoked, path), "the list as it was stays in force")

    def any(self, *entries: str) -> bool:
        """Whether any of these names and serial numbers is shut out by now."""
        return not self._list.value().isdisjoint(entries)
