"""Addresses as host:port."""

from __future__ import annotations

from fedrobust.errors import InputError


def host_and_port(address: str) -> tuple[str, int]:
    """The host, of IPv6 without brackets, and the port.

    Raises:
        InputError: there is no port in 0 .. 65535. The host may be empty.

    >>> host_and_port("[::1]:7070")
    ('::1', 7070)
    """
    host, colon, port = address.rpartition(":")
    if not (colon and port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= 65535):
        raise InputError(f"expected an address as host:port, got {address!r}; ports end at 65535")
    return host.strip("[]"), int(port)


def check_reachable(address: str) -> str:
    """The address, if it names a host and a port that can be connected to.

    Raises:
        InputError: it does not.
    """
    host, port = host_and_port(address)
    if not host or not port:
        raise InputError(
            f"expected an address as host:port, got {address!r}; there is no connecting to it without "
            "a host, or to port 0"
        )
    return address
