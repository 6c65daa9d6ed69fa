"""Which sessions are open, whose they are, and with what credential they were opened."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedrobust_server.limits import Limits
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
    """The open sessions, at most so many in all and of each client."""

    def __init__(self, limits: Limits) -> None:
        """Keep to these limits."""
        self._limits = limits
        self._by_key: dict[bytes, Session] = {}
        self._by_client: dict[str, list[Session]] = {}

    def find(self, key: bytes) -> Session:
        """The session that a call carries.

        Raises:
            UnknownError: there is none.
        """
        try:
            # A lookup by hash tells a guesser of 128 random bits nothing by the time it takes.
            return self._by_key[key]
        except KeyError:
            raise UnknownError("unknown session; enrol first") from None

    def check_room(self, client: str) -> None:
        """Whether a client may open one more.

        Raises:
            ExhaustedError: no more sessions can be open.
        """
        if client not in self._by_client and len(self._by_key) >= self._limits.sessions:
            raise ExhaustedError(f"the server has {self._limits.sessions} sessions already")

    def open(self, session: Session) -> list[Session]:
        """Add a session; returns those of the client's older ones that end by it."""
        mine = self._by_client.setdefault(session.client, [])
        mine.append(session)
        self._by_key[session.key] = session
        full = len(self._by_key) > self._limits.sessions
        excess = max(len(mine) - self._limits.sessions_per_client, int(full and len(mine) > 1))
        ended, mine[:] = mine[:excess], mine[excess:]
        for old in ended:
            del self._by_key[old.key]
        return ended
