"""Makes the keys of a federation: an authority, certificates and tokens that it signs, revocations.

Everything is in the authority's folder:

    authority.pem, authority.key    the certificate authority; the key signs certificates
    tokens.pub, tokens.key          this key signs enrolment tokens
    issued                          what was issued, a JSON object a line; no secrets
    revoked                         who is shut out: names and serial numbers, one a line
    server/                         what the server needs: goes to its machine
    clients/NAME/                   what client NAME needs: goes to that client, and to nobody else
    tokens/NAME.token               likewise, where tokens are used

Private files are made readable for their owner alone, and nothing that exists is ever overwritten. The
authority's two keys are needed only to issue; they are best kept away from the server.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedrobust import InputError
from fedrobust.text import printable
from fedrobust_server.files import append_line, make_folder, read_bytes, write_new
from fedrobust_server.names import check_name, new_serial
from fedrobust_server.revoked import read_revoked
from fedrobust_server.tokens import Token, sign

CLIENT_URI = "urn:fedrobust:client:"
"""Begins the URI in a client's certificate; the client's name follows."""

_SKEW = timedelta(minutes=5)  # clocks differ: what is issued is good from a little earlier
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")
_Key = TypeVar("_Key", ec.EllipticCurvePrivateKey, Ed25519PrivateKey)


@dataclass(frozen=True)
class Issued:
    """A certificate or token that was issued.

    Attributes:
        kind: "server", "client" or "token".
        name: whose it is; a server's first host.
        serial: 32 hexadecimal digits.
        expires: seconds since 1970.
    """

    kind: str
    name: str
    serial: str
    expires: int


@dataclass(frozen=True)
class Authority:
    """Issues and revokes; all methods raise `InputError` where a file cannot be read or made.

    Attributes:
        folder: of the authority, made by `create`.
        now: what time it is; None asks the clock.
    """

    folder: Path
    now: datetime | None = None

    @classmethod
    def create(cls, folder: Path, days: int = 3650, now: datetime | None = None) -> Authority:
        """Make a new authority in a new folder, good for so many days."""
        authority = cls(folder, now)
        make_folder(folder)
        key, signing = ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedrobust authority")])
        builder = (
            authority._builder(new_serial(), key.public_key(), days)
            .subject_name(name)
            .issuer_name(name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(certificates=True), critical=True)
        )
        write_new(folder / "authority.key", _private_pem(key))
        write_new(folder / "authority.pem", _pem(builder.sign(key, hashes.SHA256())), public=True)
        write_new(folder / "tokens.key", _private_pem(signing))
        write_new(folder / "tokens.pub", _public_pem(signing.public_key()), public=True)
        write_new(folder / "issued", b"")
        write_new(folder / "revoked", b"")
        return authority

    def server(self, hosts: Sequence[str], days: int = 365) -> Path:
        """Issue a server's certificate; returns the folder for `fedrobust serve --tls`.

        Args:
            hosts: all names and IP addresses by which clients reach the server.
            days: for how long it is good.
        """
        if not hosts:
            raise InputError("name at least one host or IP address by which clients reach the server")
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedrobust server")])
        folder = self.folder / "server"
        serial = self._certify(folder, subject, names, ExtendedKeyUsageOID.SERVER_AUTH, days)
        write_new(folder / "tokens.pub", read_bytes(self.folder / "tokens.pub"), public=True)
        write_new(folder / "revoked", read_bytes(self.folder / "revoked"))
        self._record("server", hosts[0], serial, days)
        return folder

    def client(self, name: str, days: int = 365) -> Path:
        """Issue a client's certificate; returns the folder for `fedrobust client --key-dir`."""
        check_name(name)
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(CLIENT_URI + name)])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        folder = self.folder / "clients" / name
        serial = self._certify(folder, subject, names, ExtendedKeyUsageOID.CLIENT_AUTH, days)
        self._record("client", name, serial, days)
        return folder

    def token(self, name: str, days: int = 30, federation: str = "") -> Path:
        """Issue an enrolment token; returns the file for `fedrobust client --token`.

        Args:
            name: of the client.
            days: for how long one can enrol with it.
            federation: the run that it is good for; empty for any.
        """
        begins, expires = (int(moment.timestamp()) for moment in self._validity(days))
        token = Token(check_name(name), new_serial(), begins, expires, federation)
        key = _load(self.folder / "tokens.key", Ed25519PrivateKey)  # type: ignore[type-abstract]
        make_folder(self.folder / "tokens", exist_ok=True)
        path = self.folder / "tokens" / f"{name}.token"
        write_new(path, sign(token, key) + b"\n")
        self._record("token", name, token.serial, days)
        return path

    def revoke(self, name_or_serial: str) -> list[Issued]:
        """Shut out a client for good, or one certificate or token; returns what that concerns.

        The line is added to the list in the authority's folder and to those in the servers' folders
        within it; a running server notices. A server elsewhere needs the new list copied over.
        """
        found = [i for i in self.issued() if name_or_serial in (i.name, i.serial) and i.kind != "server"]
        if not found:
            raise InputError(
                f"no client, certificate or token '{printable(name_or_serial, 64)}' was issued in "
                f"{self.folder}; `fedrobust keys list` shows those that were"
            )
        for path in (self.folder / "revoked", *sorted(self.folder.glob("*/revoked"))):
            if name_or_serial not in read_revoked(path):
                append_line(path, name_or_serial)
        return found

    def issued(self) -> list[Issued]:
        """Everything issued so far, in order."""
        path = self.folder / "issued"
        lines = read_bytes(path).splitlines()
        try:
            return [Issued(**json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            raise InputError(f"{path} is damaged: expected a JSON object on every line") from None

    def state(self, issued: Issued) -> str:
        """Whether it is "good", "expired" or "revoked"."""
        if {issued.name, issued.serial} & read_revoked(self.folder / "revoked"):
            return "revoked"
        return "good" if issued.expires > self._now().timestamp() else "expired"

    # ---- certificates -----------------------------------------------------------------------------

    def _certify(
        self,
        folder: Path,
        subject: x509.Name,
        names: x509.SubjectAlternativeName,
        purpose: x509.ObjectIdentifier,
        days: int,
    ) -> str:
        """Make a folder with a key and its certificate; returns the serial number."""
        serial, key = new_serial(), ec.generate_private_key(ec.SECP256R1())
        authority_key = _load(
            self.folder / "authority.key",
            ec.EllipticCurvePrivateKey,  # type: ignore[type-abstract]
        )
        authority = read_certificate(self.folder / "authority.pem")
        certificate = (
            self._builder(serial, key.public_key(), days)
            .subject_name(subject)
            .issuer_name(authority.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(certificates=False), critical=True)
            # A client's certificate does not make a server: it could pose as ours to the other clients.
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(names, critical=False)
            .add_extension(_signer(authority_key), critical=False)
            .sign(authority_key, hashes.SHA256())
        )
        make_folder(folder.parent, exist_ok=True)
        make_folder(folder)
        write_new(folder / "key.pem", _private_pem(key))
        write_new(folder / "certificate.pem", _pem(certificate), public=True)
        write_new(folder / "authority.pem", _pem(authority), public=True)
        return serial

    def _builder(
        self, serial: str, key: ec.EllipticCurvePublicKey, days: int
    ) -> x509.CertificateBuilder:
        begins, expires = self._validity(days)
        return (
            x509.CertificateBuilder()
            .serial_number(int(serial, 16))
            .public_key(key)
            .not_valid_before(begins)
            .not_valid_after(expires)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )

    def _record(self, kind: str, name: str, serial: str, days: int) -> None:
        expires = int(self._validity(days)[1].timestamp())
        append_line(self.folder / "issued", json.dumps(asdict(Issued(kind, name, serial, expires))))

    def _validity(self, days: int) -> tuple[datetime, datetime]:
        if not 1 <= days <= 36500:
            raise InputError(f"the number of days must be from 1 to 36500, got {days}")
        return self._now() - _SKEW, self._now() + timedelta(days=days)

    def _now(self) -> datetime:
        return self.now or datetime.now(UTC)


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate in a PEM file.

    Raises:
        InputError: it cannot be read, or holds none.
    """
    data = read_bytes(path)
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError:
        raise InputError(f"{path} does not hold a certificate in PEM form") from None


def _load(path: Path, kind: type[_Key]) -> _Key:
    """A private key of ours."""
    data = read_bytes(path)
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, kind):
        raise InputError(f"{path} does not hold a private key as `fedrobust keys authority` makes it")
    return key


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if len(host) > 253 or not _HOST.fullmatch(host):
            raise InputError(
                "expected the server's host name or IP address, without a port; "
                f"got '{printable(host, 64)}'"
            ) from None
        return x509.DNSName(host)


def _usage(*, certificates: bool) -> x509.KeyUsage:
    """What a key is for: signing certificates, or signing in a handshake."""
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _signer(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _public_pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _private_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
