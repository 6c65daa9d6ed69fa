"""What clients and their credentials are called."""

from __future__ import annotations

import re
import secrets

from fedrobust import InputError
from fedrobust.text import printable

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SERIAL = re.compile(r"[0-9a-f]{32,40}", re.IGNORECASE)


def check_name(name: str) -> str:
    """A client's name, fit for files, logs and certificates as it is.

    Raises:
        InputError: it is not, or could be taken for a serial number.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            "a client's name must be up to 64 letters, digits, '.', '_' or '-', starting with one of "
            f"the first two; got '{printable(name, 64)}'"
        )
    if is_serial(name):
        raise InputError(f"the name {name} looks like a serial number; choose another one")
    return name


def is_serial(text: str) -> bool:
    """Whether this is the serial number of a certificate or token rather than a name.

    Ours have 32 digits; another authority's certificates may have up to 40.
    """
    return _SERIAL.fullmatch(text) is not None


def new_serial() -> str:
    """A fresh serial number: 32 hexadecimal digits, nobody's guess."""
    return serial_text(1 << 126 | secrets.randbits(126))  # positive and of one length, as X.509 wants


def serial_text(number: int) -> str:
    """A certificate's serial number as we write it."""
    return f"{number:032x}"
