"""Who has lost its weight round after round: suspicion gathered over rounds, and who is excluded.

Pure: no clock, no ledger, no randomness. The coordinator calls `observe` at the end of every round and
`override` for what an operator decided; `fedrobust_server.suspicion` keeps the state in the ledger.

Evidence e of a round in [0, 1]: the part of its fair weight that a client lost, if the verdict is that
outliers were removed; 1 for a submission that could not be read as an update. Suspicion is Page's
cumulative sum, a sequential test that forgets good behaviour as slowly as bad:

    S <- min(threshold, max(0, S + e - tolerance)),     alarm when S reaches the threshold

An attacker without weight is found in threshold / (1 - tolerance) rounds, 6 by default, and one that
loses a part q of its weight on average, q > tolerance, in about threshold / (q - tolerance).

False alarms. Take a client whose evidence, whatever has happened before, is p < 1/2 or less in
expectation, and tolerance 1/2. From one restart at 0 to the next, z^S with z = ((1 - p) / p)^2 is a
supermartingale (the exponential is convex: losing all weight with chance p is the worst case), so it
gets from 0 to the threshold with chance z^-threshold at most, and

    P(an alarm within T rounds) <= T z^-threshold = T (p / (1 - p))^(2 threshold)

per round that is, with the default threshold 3, 2e-6 for a client that loses all its weight in every
tenth round, 2e-4 for every fifth, 0.6 % for three of ten. Rounds need not be independent for it. On
probation the client starts from half the threshold, and the chance that it does not get back to 0 is
z^(-threshold / 2): 0.1 %, 1.6 %, 8 %.

What no test on weights can tell from an attacker is an honest client whose data is so unlike the others'
that it stands out in most rounds: it would be excluded (how many of them are is in docs/operating.md,
by examples/quarantine_on_digits.py). That is why exclusion is off by default
(`WATCH`): the rule takes the weight of outliers in every round anyway, while shutting out a hospital
with rare patients is a harm that an operator should have chosen. Suspicion is gathered and kept all the
same, so `fedrobust ledger show` tells who would be excluded; the policy `quarantine` excludes them.

Suspicion is for the operator. Told to a client it would be an oracle for the attacker.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from statistics import median

from fedrobust import InputError, Verdict
from fedrobust.text import Textual, parse

WATCH = "quarantine(rounds=0)"
"""The default policy: gather suspicion, exclude nobody."""

MOST_ROUNDS = 2**31
"""Longer than any run; the ledger's numbers have 64 bits."""
MALFORMED = frozenset({"NON_FINITE", "WRONG_LENGTH", "WRONG_DTYPE", "WRONG_DIGEST", "MALFORMED"})
"""Answers that are evidence; being late, cut off or sent twice may be the network's fault."""


@dataclass(frozen=True, repr=False)
class Policy(Textual):
    """When a client is excluded, and for how long.

    Attributes:
        tolerance: the part of its weight that a client may lose on average, in (0, 1).
        threshold: how much more than that, added up over rounds, excludes it.
        rounds: for how many rounds, at most 2^31; 0 excludes nobody and only watches.
        strikes: which exclusion is for good; 1 for the first.
        most: at most this part of the clients is excluded at one time without an operator, in (0, 1];
            more would contradict the assumption that most clients are honest.
    """

    name = "quarantine"

    tolerance: float = 0.5
    threshold: float = 3.0
    rounds: int = 20
    strikes: int = 3
    most: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.tolerance < 1, "tolerance must be in (0, 1)")
        self.require(self.threshold > 0, "threshold must be above 0")
        self.require(self.rounds >= 0, "rounds must not be negative; 0 excludes nobody")
        self.require(self.rounds <= MOST_ROUNDS, f"rounds must be at most {MOST_ROUNDS}")
        self.require(self.strikes >= 1, "strikes must be at least 1")
        self.require(0 < self.most <= 1, "most must be in (0, 1]")


def parse_policy(text: str) -> Policy:
    """Read `quarantine` or `quarantine(threshold=5, rounds=50)`.

    Raises:
        InputError: the text is no policy, or an argument is wrong.
    """
    return parse(text, {Policy.name: Policy}, "quarantine policy")


class Standing(StrEnum):
    """What a client may do."""

    FREE = "free"
    SUSPECT = "suspect"
    """Above the threshold, but the policy only watches or enough clients are excluded already."""
    EXCLUDED = "excluded"
    """Not asked for updates until its time is up."""
    PROBATION = "on probation"
    """Back, half way to the next exclusion."""
    BANNED = "banned"
    """Excluded for good."""


@dataclass(frozen=True)
class Client:
    """What is held against one client.

    Attributes:
        suspicion: S, from 0 to the policy's threshold.
        standing: what it may do.
        until: the last round for which it is excluded; 0 if it is not, or for good.
        strikes: how often it has been excluded.
    """

    suspicion: float = 0.0
    standing: Standing = Standing.FREE
    until: int = 0
    strikes: int = 0

    @property
    def shut_out(self) -> bool:
        """Whether it is not asked for updates."""
        return self.standing in (Standing.EXCLUDED, Standing.BANNED)


@dataclass(frozen=True)
class State:
    """Every client that was ever judged, by name."""

    clients: Mapping[str, Client] = field(default_factory=dict)

    @property
    def excluded(self) -> frozenset[str]:
        """Those that the next round must not ask."""
        return frozenset(name for name, client in self.clients.items() if client.shut_out)

    @property
    def standings(self) -> dict[Standing, int]:
        """How many clients stand how; every standing is there."""
        return dict.fromkeys(Standing, 0) | Counter(client.standing for client in self.clients.values())


@dataclass(frozen=True)
class Changed:
    """A client's standing changed, for the log.

    Attributes:
        name: of the client.
        before: its standing until now.
        client: how it stands now.
        reason: why, in words.
        who: decided it; empty for the policy.
    """

    name: str
    before: Standing
    client: Client
    reason: str
    who: str = ""


@dataclass(frozen=True, repr=False)
class Release(Textual):
    """Forget everything that is held against a client."""

    name = "release"


@dataclass(frozen=True, repr=False)
class Ban(Textual):
    """Exclude a client for good."""

    name = "ban"


@dataclass(frozen=True, repr=False)
class Exclude(Textual):
    """Exclude a client for a number of rounds.

    Attributes:
        rounds: how many, from 1 to 2^31.
    """

    name = "exclude"
    rounds: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rounds >= 1, "rounds must be at least 1")
        self.require(self.rounds <= MOST_ROUNDS, f"rounds must be at most {MOST_ROUNDS}")


Action = Release | Ban | Exclude


def parse_action(text: str) -> Action:
    """Read `release`, `ban` or `exclude(5)`.

    Raises:
        InputError: the text is none of these.
    """
    action = parse(text, {cls.name: cls for cls in (Release, Ban, Exclude)}, "action")
    if not isinstance(action, Action):  # pragma: no cover (the catalogue holds nothing else)
        raise InputError(f"unknown action {text!r}")
    return action


@dataclass(frozen=True)
class Override:
    """What an operator decided about one client.

    Attributes:
        client: its name.
        action: what to do.
        reason: why, for those who read the ledger later.
        who: decided it.
    """

    client: str
    action: Action
    reason: str
    who: str


def evidence(
    verdict: Verdict | None, weights: Mapping[str, float], malformed: Iterable[str] = ()
) -> dict[str, float]:
    """What a round says of its clients.

    Fair is an equal share, or the median weight if that is less: a rule that picks a single client, as
    krum does, holds nothing against the others. Only the verdict "outliers removed" is held against
    anyone. "No visible attack" speaks for all; "bound exceeded" and rounds without a verdict or without
    weights say nothing: there the weights may be the attackers' choice.

    Args:
        verdict: on the round; None if it was skipped.
        weights: of the clients whose updates were accepted; empty if the rule gives none.
        malformed: clients that sent what could not be read (`MALFORMED`).

    Returns:
        Client to evidence in [0, 1]; whoever is not judged is left out.
    """
    found: dict[str, float] = {}
    if verdict is Verdict.CLEAR:
        found = dict.fromkeys(weights, 0.0)
    elif verdict is Verdict.REMOVED and weights:
        fair = min(1 / len(weights), median(weights.values()))
        found = {name: _lost(weight, fair) for name, weight in weights.items()}
    return found | dict.fromkeys(malformed, 1.0)


def _lost(weight: float, fair: float) -> float:
    return min(max(1 - weight / fair, 0.0), 1.0) if fair > 0 and math.isfinite(weight) else 0.0


def observe(
    policy: Policy, state: State, number: int, found: Mapping[str, float]
) -> tuple[State, list[Changed]]:
    """A round is over: gather its evidence, exclude, and readmit.

    Call it once at the end of every round, skipped ones too, since exclusions end by round.

    Args:
        policy: when to exclude.
        state: before the round.
        number: of the round, from 1.
        found: as `evidence` gives it.

    Returns:
        The state after it, and whose standing changed, by name.
    """
    clients = {name: _readmit(policy, client, number) for name, client in state.clients.items()}
    for name, e in found.items():
        client = clients.get(name, Client())
        if not client.shut_out:  # an update that was under way when an operator shut it out
            clients[name] = _gather(policy, client, e)
    room = math.floor(policy.most * len(clients)) - sum(c.shut_out for c in clients.values())
    alarms = (name for name in sorted(clients) if _alarming(policy, clients[name]))
    for name in sorted(alarms, key=lambda name: -clients[name].strikes):
        clients[name] = _strike(policy, clients[name], number, allowed=room > 0)
        room -= clients[name].shut_out
    return State(clients), _changes(policy, state.clients, clients)


def override(policy: Policy, state: State, number: int, decided: Override) -> tuple[State, Changed]:
    """Do what an operator decided; it holds from the round `number` on, which is about to begin."""
    before = state.clients.get(decided.client, Client())
    match decided.action:
        case Release():
            after = Client()
        case Ban():
            after = replace(before, standing=Standing.BANNED, until=0)
        case Exclude(rounds):
            until = number - 1 + rounds
            after = replace(before, suspicion=policy.threshold, standing=Standing.EXCLUDED, until=until)
    clients = {**state.clients, decided.client: after}
    return State(clients), Changed(decided.client, before.standing, after, decided.reason, decided.who)


def _gather(policy: Policy, client: Client, e: float) -> Client:
    suspicion = min(max(client.suspicion + e - policy.tolerance, 0.0), policy.threshold)
    cleared = suspicion == 0 and client.standing in (Standing.SUSPECT, Standing.PROBATION)
    return replace(client, suspicion=suspicion, standing=Standing.FREE if cleared else client.standing)


def _alarming(policy: Policy, client: Client) -> bool:
    return not client.shut_out and client.suspicion >= policy.threshold


def _strike(policy: Policy, client: Client, number: int, *, allowed: bool) -> Client:
    """An alarm: exclude the client if that is allowed."""
    if policy.rounds == 0 or not allowed:
        return replace(client, standing=Standing.SUSPECT)
    strikes = client.strikes + 1
    if strikes >= policy.strikes:
        return replace(client, standing=Standing.BANNED, until=0, strikes=strikes)
    until = number + policy.rounds
    return replace(client, standing=Standing.EXCLUDED, until=until, strikes=strikes)


def _readmit(policy: Policy, client: Client, number: int) -> Client:
    if client.standing is not Standing.EXCLUDED or client.until > number:
        return client
    return replace(client, standing=Standing.PROBATION, until=0, suspicion=policy.threshold / 2)


def _changes(policy: Policy, old: Mapping[str, Client], new: Mapping[str, Client]) -> list[Changed]:
    changes = []
    for name in sorted(new):
        before, client = old.get(name, Client()).standing, new[name]
        if client.standing is not before:
            changes.append(Changed(name, before, client, _reason(policy, client)))
    return changes


def _reason(policy: Policy, client: Client) -> str:
    match client.standing:
        case Standing.EXCLUDED:
            return f"suspicion reached {policy.threshold:g}; excluded until round {client.until}"
        case Standing.BANNED:
            return f"suspicion reached {policy.threshold:g} for the {client.strikes}. time"
        case Standing.SUSPECT:
            only = "the policy only watches" if policy.rounds == 0 else "enough clients are excluded"
            return f"suspicion reached {policy.threshold:g}, but {only}"
        case Standing.PROBATION:
            return "its time is up"
        case _:
            return "its suspicion is gone"
