"""With what credentials the open sessions were opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fedrobust_server.refusals import ExhaustedError, UnknownError
from fedrobust_server.security import Identity


@dataclass(frozen=True)
class Session:
    """One enrolment.

    Attributes:
        key: what its calls carry; where clients show tokens, whoever has it is the client.
        client: the client's name.
        identity: what its certificate or token said; None where names are taken on trust.
    """

    key: bytes = field(repr=False)
    client: str
    identity: Identity | None


class Sessions:
    """The sessions opened here, at most so many; the coordinator says whose they are, and ends them."""

    def __init__(self, owner: Callable[[bytes], str | None], most: int) -> None:
        """Keep the credentials of sessions.

        Args:
            owner: of a session, by its key; None once it has ended.
            most: sessions that may be open at a time.
        """
        self._owner, self._most = owner, most
        self._opened: dict[bytes, Identity | None] = {}

    def find(self, key: bytes) -> Session:
        """The session that a call carries.

        Raises:
            UnknownError: there is none (any more).
        """
        # A lookup by hash tells a guesser of 128 random bits nothing by the time it takes.
        owner = self._owner(key) if key in self._opened else None
        if owner is None:
            raise UnknownError("unknown session; enrol first")
        return Session(key, owner, self._opened[key])

    def check_room(self) -> None:
        """Whether one more can be opened.

        Raises:
            ExhaustedError: too many are open.
        """
        if len(self._opened) >= self._most:
            open_still = ((k, who) for k, who in self._opened.items() if self._owner(k) is not None)
            self._opened = dict(open_still)
        if len(self._opened) >= self._most:
            raise ExhaustedError(f"the server has {self._most} sessions already; try again later")

    def open(self, key: bytes, identity: Identity | None) -> None:
        """Remember with what a session was opened."""
        self._opened[key] = identity
