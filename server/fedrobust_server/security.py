"""Tells who a caller is, by certificate or token, and whether it is still let in."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import NameOID

from fedrobust import InputError
from fedrobust.text import choose
from fedrobust_server import tokens
from fedrobust_server.files import Watched, read_bytes
from fedrobust_server.keys import CLIENT_URI, read_certificate
from fedrobust_server.names import check_name, serial_text
from fedrobust_server.refusals import ForbiddenError, UnauthenticatedError
from fedrobust_server.revoked import Revoked

PROOFS = ("certificate", "token")
"""How clients may show who they are."""

Connection = Mapping[str, Iterable[bytes]]


@dataclass(frozen=True)
class Identity:
    """Who a credential says that its bearer is.

    Attributes:
        name: of the client.
        serial: of the certificate or token.
        expires: when calls with it end, in seconds since 1970; infinite for a token, whose expiry
            ends enrolling and not the session.
    """

    name: str
    serial: str
    expires: float


@dataclass(frozen=True)
class Security:
    """A server's side of TLS: what it shows, whom it believes and whom it shuts out.

    Attributes:
        proof: how clients show who they are, one of `PROOFS`.
        federation: the run's name; a token for another one is refused.
        pair: the server's certificate and key, and the authority by which clients' certificates are
            signed, as gRPC takes them.
        tokens_key: tokens are signed with its private half.
        revoked: who is shut out.
    """

    proof: str
    federation: str
    pair: Watched[grpc.ServerCertificateConfiguration] = field(repr=False)
    tokens_key: Watched[Ed25519PublicKey] = field(repr=False)
    revoked: Revoked = field(repr=False)

    @classmethod
    def load(cls, folder: Path, proof: str = "certificate", federation: str = "") -> Security:
        """Read a server's folder, as `fedrobust keys server` makes it.

        Raises:
            InputError: a file is missing or not what it should be, or the certificate has expired.
        """
        choose(proof, PROOFS, "proof of identity")
        return cls(
            proof=proof,
            federation=federation,
            pair=Watched(
                [folder / name for name in ("certificate.pem", "key.pem", "authority.pem")],
                partial(_read_pair, folder, mutual=proof == "certificate"),
                "the certificate as it was stays in use",
            ),
            tokens_key=Watched(
                [folder / "tokens.pub"],
                partial(_tokens_key, folder / "tokens.pub"),
                "tokens go on being judged by the key as it was",
            ),
            revoked=Revoked(folder / "revoked"),
        )

    def credentials(self) -> grpc.ServerCredentials:
        """For the port to listen on; where certificates are asked for, nobody gets in without.

        Every handshake is by the files as they are then.
        """
        shown = self.pair.value()

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown
            before, shown = shown, self.pair.value()
            return None if shown is before else shown  # each new one costs gRPC a new context

        mutual = self.proof == "certificate"
        # The stubs do not know that None means no change.
        return grpc.dynamic_ssl_server_credentials(shown, renewed, mutual)  # type: ignore[arg-type]

    def identify(self, connection: Connection, token: bytes) -> Identity:
        """Who enrols.

        Args:
            connection: as for `of_certificate`.
            token: from the request.

        Raises:
            UnauthenticatedError: the proof asked for is missing or bad.
            ForbiddenError: as `admit`.
        """
        by_token = self.proof == "token"
        identity = self.of_token(token) if by_token else self.of_certificate(connection)
        self.admit(identity)
        return identity

    def of_certificate(self, connection: Connection) -> Identity:
        """Who the certificate of a connection names.

        Args:
            connection: what gRPC says of it (`auth_context()`).

        Raises:
            UnauthenticatedError: there is no certificate, or it names no client.
        """
        for pem in connection.get("x509_pem_cert", ()):
            return _identity(bytes(pem))
        raise UnauthenticatedError("connect with a client's certificate")

    def of_token(self, data: bytes) -> Identity:
        """Who a token names.

        Raises:
            UnauthenticatedError: it is missing, malformed, forged, expired, or for another federation.
        """
        if not data:
            raise UnauthenticatedError("this federation asks for an enrolment token")
        try:
            token = tokens.verify(data.strip(), self.tokens_key.value())
        except InputError as error:
            raise UnauthenticatedError(str(error)) from None
        if token.federation not in ("", self.federation):
            raise UnauthenticatedError(
                f"the token is for the federation {token.federation}, not this one"
            )
        return Identity(token.client, token.serial, float("inf"))

    def admit(self, identity: Identity) -> None:
        """Let a client in, at every call and every message of a long one.

        Raises:
            ForbiddenError: it has been revoked, or its certificate has expired.
        """
        if self.revoked.any(identity.name, identity.serial):
            raise ForbiddenError(f"the access of {identity.name} has been revoked")
        if time.time() >= identity.expires:
            raise ForbiddenError(f"the certificate of {identity.name} has expired")


def _read_pair(folder: Path, *, mutual: bool) -> grpc.ServerCertificateConfiguration:
    """Read a server's certificate and key, and say what is wrong with them, which gRPC would not."""
    path = folder / "certificate.pem"
    certificate = read_certificate(path)
    expires = certificate.not_valid_after_utc
    if expires.timestamp() <= time.time():
        raise InputError(f"{path} expired on {expires:%Y-%m-%d}; issue a new one: fedrobust keys server")
    data = read_bytes(folder / "key.pem")
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InputError(f"{folder / 'key.pem'} does not hold a private key in PEM form") from None
    if key.public_key() != certificate.public_key():
        raise InputError(f"{folder / 'key.pem'} is not the key of {path}")
    authority = read_certificate(folder / "authority.pem").public_bytes(Encoding.PEM)
    # The file rather than the certificate: it may go on with those that link it to the authority.
    return grpc.ssl_server_certificate_configuration(
        [(data, read_bytes(path))], root_certificates=authority if mutual else None
    )


def _tokens_key(path: Path) -> Ed25519PublicKey:
    data = read_bytes(path)
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path} does not hold the key that tokens are checked with")
    return key


@functools.lru_cache(maxsize=4096)  # the same few certificates, at every call
def _identity(pem: bytes) -> Identity:
    """Who a certificate names that the handshake has found good."""
    certificate = x509.load_pem_x509_certificate(pem)
    expires = certificate.not_valid_after_utc.timestamp()
    name = _client_name(certificate)
    try:
        check_name(name)
    except InputError as error:
        raise UnauthenticatedError(f"the certificate names no client: {error}") from None
    return Identity(name, serial_text(certificate.serial_number), expires)


def _client_name(certificate: x509.Certificate) -> str:
    """The name in our URI; else, in another authority's certificate, the common name."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    ours = [uri.removeprefix(CLIENT_URI) for uri in uris if uri.startswith(CLIENT_URI)]
    common = [
        str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    ]
    found = ours or common
    return found[0] if len(found) == 1 else ""
