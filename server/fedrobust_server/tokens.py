"""Enrolment tokens: what lets a client in that has no certificate of its own.

A token is a JSON document and an Ed25519 signature over exactly these bytes, both in base64url, joined
by a dot. Nothing of it is looked at before the signature has been found good.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedrobust import InputError

MAX_TOKEN_BYTES = 1024
"""Longer ones are refused unread; ours have some 350 bytes."""

_PURPOSE = b"fedrobust enrolment token 1\n"  # so that no other signature of this key passes for one


@dataclass(frozen=True)
class Token:
    """What a token says. It holds no secret: that is the signature.

    Attributes:
        client: who may enrol with it.
        serial: names it in a revocation list.
        not_before: from when it is good, in seconds since 1970.
        expires: until when.
        federation: the run that it is good for; empty for any.
    """

    client: str
    serial: str
    not_before: int
    expires: int
    federation: str = ""


def sign(token: Token, key: Ed25519PrivateKey) -> bytes:
    """The token as it is handed to its client: a secret of that client's."""
    document = json.dumps(dataclasses.asdict(token), sort_keys=True, separators=(",", ":")).encode()
    return b".".join(map(base64.urlsafe_b64encode, (document, key.sign(_PURPOSE + document))))


def verify(data: bytes, key: Ed25519PublicKey, now: float | None = None) -> Token:
    """Read a token.

    Args:
        data: as a client sent it.
        key: the public half of the key that signed it.
        now: seconds since 1970; None asks the clock.

    Raises:
        InputError: it is malformed, forged, expired or not good yet.
    """
    now = time.time() if now is None else now
    if len(data) > MAX_TOKEN_BYTES:
        raise InputError(f"the token has {len(data)} bytes, at most {MAX_TOKEN_BYTES} are read")
    try:
        document, signature = (base64.b64decode(part, b"-_", validate=True) for part in data.split(b"."))
        key.verify(signature, _PURPOSE + document)
    except ValueError:
        raise InputError("this is no enrolment token; send the whole file as it was issued") from None
    except InvalidSignature:
        raise InputError("the token's signature is not of this federation's authority") from None
    try:
        token = Token(**json.loads(document))
    except TypeError:
        raise InputError("the token is of another version of fedrobust; ask for a new one") from None
    if now < token.not_before:
        raise InputError(f"the token is not good for another {token.not_before - now:.0f} seconds")
    if now >= token.expires:
        raise InputError(f"the token expired {now - token.expires:.0f} seconds ago; ask for a new one")
    return token
