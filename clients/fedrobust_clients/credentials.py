"""What a client shows to a server, and whom it believes to be that server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from fedrobust import InputError

__all__ = ["Credentials"]

_MAX_BYTES = 1 << 20  # far above any of these files; a mistaken path is not read whole


@dataclass(frozen=True)
class Credentials:
    """For an encrypted channel; made by `read`.

    Attributes:
        authority: certificates of servers that are believed, PEM.
        certificate: the client's own, PEM; None where it shows none.
        key: its private key, PEM.
        token: the enrolment token; empty where it shows none.
    """

    authority: bytes = field(repr=False)
    certificate: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    token: bytes = field(default=b"", repr=False)

    @classmethod
    def read(
        cls, authority: Path | None = None, keys: Path | None = None, token: Path | None = None
    ) -> Credentials | None:
        """Read what `fedrobust keys` made; None if nothing is given: a channel in the clear.

        Args:
            authority: authority.pem; by default the one in `keys`.
            keys: a client's folder, for mutual TLS.
            token: an enrolment token's file.

        Raises:
            InputError: a file cannot be read, or there is a token without an authority.
        """
        if authority is None and keys is not None:
            authority = keys / "authority.pem"
        if authority is None:
            if token is not None:
                raise InputError(
                    "a token goes over an encrypted channel only: give the server's authority with --ca"
                )
            return None
        return cls(
            authority=_read(authority),
            certificate=_read(keys / "certificate.pem") if keys else None,
            key=_read(keys / "key.pem") if keys else None,
            token=_read(token).strip() if token else b"",
        )


def open_channel(
    address: str, credentials: Credentials | None, options: Sequence[tuple[str, int]] = ()
) -> grpc.aio.Channel:
    """A channel to "host:port", encrypted unless there are no credentials, with gRPC's options."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options)
    shown = grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate)
    return grpc.aio.secure_channel(address, shown, options)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not data:
        raise InputError(f"{path} is empty; `fedrobust keys` makes it")
    return data
