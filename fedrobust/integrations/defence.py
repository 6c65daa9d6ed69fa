"""What every host needs: a door, capped shares, a quorum, and a report for the operator.

A client that sends something malformed loses its turn; the round goes on with the others. Where too few
are left, the round is skipped and the model stays as it is. Nothing of a report is for the clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from fedrobust.aggregate import Aggregated, aggregate, check_seed, composition
from fedrobust.errors import InputError
from fedrobust.kernels import Vector
from fedrobust.rules import Aggregator, Rule
from fedrobust.rules.fraction import at_least, check_eps
from fedrobust.text import brief, printable
from fedrobust.trees import Tree, as_tensor
from fedrobust.verdict import Verdict

Client = Hashable
"""What the host calls a client: a node's number, a site's name."""

Figures = dict[str, int | float | list[int] | list[float]]

_MOST_EXAMPLES = 1e15
"""What a client may say it has; more is a lie that overflows sums."""


@dataclass(frozen=True)
class Offer:
    """What one client sent.

    Attributes:
        client: who.
        update: a tree of arrays, or the line that says why it cannot be read.
        examples: the number that it reports, unchecked.
    """

    client: Client
    update: Tree | Unreadable
    examples: object = None


@dataclass(frozen=True)
class Unreadable:
    """Why there is no update in what a client sent."""

    reason: str


@dataclass(frozen=True)
class Round:
    """What became of a round, for the operator.

    Attributes:
        number: of the round, as the host counts.
        asked: how many clients were asked.
        clients: those that answered, in the order of `result.weights` and `result.scores`.
        refused: those of them whose answers were malformed, and why.
        failed: those that reported a failure of their own, and what they said.
        repeated: those that answered more than once; the first answer counts.
        result: what the rule made of it; None if it could not be applied.
        skipped: why the model stays as it is; empty if it does not.
    """

    number: int
    asked: int
    clients: tuple[Client, ...]
    refused: Mapping[Client, str]
    failed: Mapping[Client, str] = field(default_factory=dict)
    repeated: tuple[Client, ...] = ()
    result: Aggregated | None = None
    skipped: str = ""

    @property
    def accepted(self) -> int:
        """How many updates the rule saw."""
        return len(self.clients) - len(self.refused)

    @property
    def influential(self) -> list[Client]:
        """The clients whose updates were used: all accepted ones if the rule gives no weights."""
        if self.result is None or self.result.weights is None:
            return [client for client in self.clients if client not in self.refused]
        return [c for c, weight in zip(self.clients, self.result.weights, strict=True) if weight > 0]

    def figures(self) -> Figures:
        """The report as numbers and lists of numbers, none of them empty, which every host can store."""
        found: Figures = {
            "asked": self.asked,
            "accepted": self.accepted,
            "refused": len(self.refused),
            "failed": len(self.failed),
            "absent": max(self.asked - len(self.clients) - len(self.failed), 0),
            "skipped": int(bool(self.skipped)),
        }
        if self.result is None:
            return found
        found["attack-visible"] = int(self.result.verdict in (Verdict.REMOVED, Verdict.EXCEEDED))
        found["bound-exceeded"] = int(self.result.verdict is Verdict.EXCEEDED)
        if (certificate := self.result.certificate) is not None:
            found["certificate"] = certificate.bound(certificate.spread)
            found["certificate-without-assumption"] = certificate.bound()
        if self.result.weights is not None:
            found["weights"] = self.result.weights.tolist()
        if self.result.scores is not None:
            found["scores"] = self.result.scores.tolist()
        return found

    def lines(self) -> list[str]:
        """The report for the host's log, the names of those refused and of those outvoted in it."""
        found = self.figures()
        line = (
            f"round {self.number}: {self.accepted} of {self.asked} updates, {found['refused']} refused, "
            f"{found['failed']} failed, {found['absent']} absent"
        )
        if self.skipped:
            line += f"; the model stays as it is: {self.skipped}"
        elif self.result is not None:
            line += f"; {self.result.verdict}"
            if "certificate" in found:
                line += f"; certificate {found['certificate']:.3g}"
        used = set(self.influential)
        outvoted = [c for c in self.clients if c not in used and c not in self.refused]
        lines = [line]
        if outvoted:
            lines.append(f"no weight for {', '.join(map(str, outvoted))}")
        lines += [f"{client} answers twice; the first counts" for client in self.repeated]
        lines += [f"refused {client}: {printable(why)}" for client, why in self.refused.items()]
        return lines + [f"failed {client}: {printable(why)}" for client, why in self.failed.items()]


@dataclass(frozen=True)
class Defence:
    """How the updates of a round are combined.

    Attributes:
        rule: a rule, a composition, or its text, as for `fedrobust.aggregate`.
        eps: the fraction of clients that may be malicious, where the rule does not name it, or "auto".
        max_share: the most mass that a client may have by its reported number of examples, as a
            fraction of all; None gives all clients the same, whatever they report.
        quorum: the fraction of the clients asked whose updates a round needs.
        seed: for rules that draw.

    Raises:
        InputError: a bad rule, one that looks at a row of the server's own, or a number out of its
            range.
    """

    rule: str | Rule | Aggregator = "filter"
    eps: float | str | None = None
    max_share: float | None = None
    quorum: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        rule = composition(self.rule)
        if rule.anchors:
            raise InputError(
                f"{rule!r} looks at an update of the server's own, which cannot be given here: "
                "choose another rule, or run `fedrobust serve` with --root"
            )
        check_seed(self.seed)
        if self.eps is not None:
            check_eps(self.eps)
        if self.max_share is not None and not 0 < self.max_share <= 1:
            raise InputError(f"max_share must be in (0, 1], got {self.max_share}")
        if not 0 <= self.quorum <= 1:
            raise InputError(f"quorum must be in [0, 1], got {self.quorum}")

    def decide(
        self,
        number: int,
        asked: int,
        offers: Sequence[Offer],
        failed: Mapping[Client, str],
        reference: Mapping[str, np.ndarray[Any, Any]],
    ) -> Round:
        """Combine what was sent, all of it at hand.

        Args:
            number: of the round.
            asked: how many clients were asked.
            offers: what they sent.
            failed: those that reported a failure, and what they said.
            reference: the arrays that were broadcast; updates are models of this form, and are measured
                from it.

        Returns:
            The round, whose `result.value` has the reference's form and dtypes. It is skipped, with the
            reason, if the rule or the reference does not allow for an aggregate.
        """
        kept, trees, refused = list[int](), list[Tree](), dict[Client, str]()
        answers, firsts = Counter(offer.client for offer in offers), dict[Client, Offer]()
        for offer in offers:
            firsts.setdefault(offer.client, offer)
        offers = list(firsts.values())
        for index, offer in enumerate(offers):
            if why := self.refusal(offer):
                refused[offer.client] = why
            else:
                kept.append(index)
                trees.append(offer.update)
        clients = tuple(offer.client for offer in offers)
        repeated = tuple(client for client, times in answers.items() if times > 1)
        plain = Round(number, asked, clients, refused, failed, repeated)
        if not trees:
            return replace(plain, skipped="there is no usable update")
        while True:
            shares = self.shares([offers[i].examples for i in kept])
            try:
                found = aggregate(
                    trees, self.rule, shares, eps=self.eps, reference=reference, seed=self.seed + number
                )
            except InputError as error:
                return replace(plain, skipped=str(error))
            refused |= {offers[kept[i]].client: why for i, why in found.refused.items()}
            if self.max_share is None or not found.refused:
                break
            # What was theirs would go to the others, above the most that one may have.
            left = [i for i in range(len(kept)) if i not in found.refused]
            kept, trees = [kept[i] for i in left], [trees[i] for i in left]
        with np.errstate(over="ignore"):  # which is looked for below
            value = {
                key: np.asarray(leaf).astype(reference[key].dtype, copy=False)
                for key, leaf in found.value.items()
            }
        found = found.over(len(offers), kept, value, {})
        return self.judge(replace(plain, refused=refused, result=found), value.values())

    def refusal(self, offer: Offer) -> str | None:
        """Why an offer cannot be used, as far as can be told without the others."""
        if isinstance(offer.update, Unreadable):
            return offer.update.reason
        if self.max_share is not None and not _counts(offer.examples):
            return f"reports {brief(offer.examples)} examples"
        return None

    def shares(self, examples: Sequence[object]) -> Vector:
        """(n,) the mass of clients that report such numbers of examples, which `refusal` has passed."""
        if self.max_share is None:
            return np.ones(len(examples))
        return capped(np.array(examples, dtype=np.float64), self.max_share)

    def judge(self, found: Round, leaves: Iterable[np.ndarray[Any, Any]]) -> Round:
        """Skip the round if too few updates are left, or the value is not finite."""
        needed = max(at_least(self.quorum, found.asked), 1)
        if found.accepted < needed:
            return replace(found, skipped=f"{found.accepted} updates, {needed} are needed")
        if not all(np.isfinite(leaf).all() for leaf in leaves):
            return replace(found, skipped="the aggregate is not finite")
        return found


def capped(examples: Vector, most: float) -> Vector:
    """Shares in proportion to examples, none above `most`, as far as that is possible.

    Args:
        examples: (n,) positive.
        most: the largest share; below 1 / n all get 1 / n.

    >>> capped(np.array([1.0, 1.0, 2.0, 1e12]), 0.4)
    array([0.15, 0.15, 0.3 , 0.4 ])
    """
    n = len(examples)
    if most * n <= 1:
        return np.full(n, 1 / max(n, 1))
    shares: Vector = examples / examples.sum()
    at_most = np.zeros(n, dtype=bool)
    while (over := ~at_most & (shares > most)).any():
        at_most |= over
        rest = np.where(at_most, 0.0, examples)
        shares = np.where(at_most, most, rest / rest.sum() * (1 - most * at_most.sum()))
    return shares


def medians(records: Sequence[Mapping[str, Any]]) -> Figures:
    """What most clients report: the median of every figure that more than half of them have.

    Lists count if they are of the most common length, and give a list. What is not a finite number,
    Python's, numpy's or torch's, or a list of such, or has no text for its name, does not count: a
    report is a client's word, and must not spoil the others'.

    >>> medians([{"loss": 1.0}, {"loss": 2.0, "odd": 7}, {"loss": 1e300}, {"loss": float("nan")}])
    {'loss': 2.0}
    """
    found: Figures = {}
    names: set[object] = {key for record in records for key in record}
    for key in sorted(name for name in names if isinstance(name, str)):
        values = [v for record in records if (v := _finite(record.get(key))) is not None]
        if not 2 * len(values) > len(records):
            continue
        shape = Counter(value.shape for value in values).most_common(1)[0][0]
        middle = np.median([value for value in values if value.shape == shape], axis=0)
        found[key] = middle.tolist()
    return found


def _finite(value: object) -> Vector | None:
    try:
        if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
            value = as_tensor(value).item()
        if not isinstance(value, bool | int | float | list):
            return None
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of these is torch's
        return None
    sound = numbers.ndim <= 1 and bool(np.isfinite(numbers).all())
    return numbers if sound else None


def _counts(examples: object) -> bool:
    """Whether this can be a number of examples."""
    return (
        isinstance(examples, int | float | np.integer | np.floating)
        and not isinstance(examples, bool)
        and bool(0 < examples <= _MOST_EXAMPLES)
    )


__all__ = ["Defence", "Offer", "Round", "Unreadable", "capped", "medians"]
