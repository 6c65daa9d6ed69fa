"""How bad can it get: the worst error of a rule that a white-box search finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedrobust.aggregate import aggregate
from fedrobust.attacks.adaptive import Adaptive
from fedrobust.attacks.view import View
from fedrobust.errors import InputError
from fedrobust.kernels import Matrix, Vector
from fedrobust.rules import Aggregator
from fedrobust.rules.guarantees import Guarantee, proved, published


@dataclass(frozen=True)
class Found:
    """A round that goes badly for a rule. Lengths are in the updates' own units.

    Attributes:
        error: |aggregate - mean_S|, S the honest clients, as the rule itself answers on the real rows.
        spread: square root of the largest eigenvalue of the honest covariance.
        deviation: root mean square distance of the honest updates from their mean.
        bound: the certificate's, with the true spread as sigma; infinite for a rule that has none.
        honest: what the honest updates look like.
        attack: what the malicious ones are made of.
        published: what the literature bounds the error by in this round; infinite for no such bound.
        proved: what `fedrobust.rules.guarantees` proves of it; infinite for nothing.
    """

    error: float
    spread: float
    deviation: float
    bound: float
    honest: str
    attack: str
    published: float = math.inf
    proved: float = math.inf

    @property
    def error_over_spread(self) -> float:
        """What a rule with a dimension-free guarantee keeps bounded, by O(sqrt eps)."""
        return self.error / self.spread

    @property
    def bound_over_spread(self) -> float:
        """The certificate's bound in the same unit; the error never exceeds it."""
        return self.bound / self.spread

    @property
    def kappa(self) -> float:
        """A lower bound on the rule's robustness coefficient, from this round.

        |aggregate - mean_S|^2 <= kappa / |S| sum_S |x_i - mean_S|^2 for all rounds makes a rule
        (f, kappa)-robust (Allouah et al. 2023, arXiv 2302.01772, definition 2).
        """
        return (self.error / self.deviation) ** 2

    @property
    def exceeds(self) -> bool:
        """Whether the error is above one of the three bounds, by more than float32 rows explain."""
        least = min(self.bound, self.published, self.proved)
        return self.error > least * (1 + 1e-4) + 1e-4 * self.deviation


def worst_error(
    rule: Aggregator, n: int, eps: float, d: int, budget: int = 3000, seed: int = 0
) -> Found:
    """The largest |aggregate - mean_S| / sqrt(lambda_S) that the adaptive search finds for a rule.

    The honest updates are drawn in several ways, of which some favour the attacker: Gaussian, with few
    large directions, in two camps, with heavy tails, with one client far out. In two camps of f and
    n - 2f, no rule can tell the smaller one from the attackers; with one client more in it, Krum has the
    fewest good neighbours to count; with halves a median is at its worst. Camps may also differ from
    coordinate to coordinate: rules that look at one coordinate at a time lose a factor sqrt d there. A
    rule that looks at a row of the server's own is given one more honest draw.

    Args:
        rule: the rule; an eps that it names is the fraction it assumes, whatever the attackers' is.
        n: how many clients.
        eps: the fraction that is malicious: floor(eps n) clients, at least 1, fewer than half.
        d: how many parameters.
        budget: how often the rule is tried in all, at least 50 for each kind of honest updates.
        seed: of everything that is drawn.

    Raises:
        InputError: no malicious client, or half of them; too small a budget; n too small for the rule.
    """
    found = rounds(rule, n, eps, d, budget, seed)
    return max(found, key=lambda round_: round_.error_over_spread)


def rounds(
    rule: Aggregator,
    n: int,
    eps: float,
    d: int,
    budget: int = 3000,
    seed: int = 0,
    watch: Callable[[str], None] = lambda _: None,
) -> list[Found]:
    """The worst that is found for each kind of honest updates.

    Arguments and errors as `worst_error`; `watch` is told each kind before it is searched.
    """
    malicious = math.floor(eps * n * (1 + 1e-9))
    if not 1 <= malicious < n / 2 or d < 1:
        raise InputError(
            f"{malicious} malicious of {n} clients with {d} parameters; the search needs at least one "
            "malicious client, fewer than half, and at least one parameter"
        )
    rng, search = np.random.default_rng(seed), Adaptive(budget // len(HONEST))
    found = []
    for name, draw in HONEST.items():
        watch(name)
        common = rng.standard_normal(d) / math.sqrt(d)
        own = int(bool(rule.anchors))
        honest, root = np.split(draw(rng, n - malicious + own, malicious, d) + common, [n - malicious])
        server = root[0] if own else None
        found.append(challenge(rule, honest, malicious, eps, search, rng, name, server))
    return found


def challenge(
    rule: Aggregator,
    honest: Matrix,
    malicious: int,
    eps: float,
    search: Adaptive,
    rng: np.random.Generator,
    name: str = "given",
    root: Vector | None = None,
) -> Found:
    """The worst that the search finds for a rule beside given honest updates.

    Args:
        rule: the rule.
        honest: (n - f, d), not all alike.
        malicious: f, how many rows the attacker has; they come first.
        eps: the malicious fraction that the rule assumes if it names none.
        search: how hard to try.
        rng: where randomness comes from.
        name: of the honest updates, for the record.
        root: (d,) the server's own row, for a rule that looks at one; the attacker knows it.

    Raises:
        InputError: n is too small for the rule.
    """
    view = View.of(honest, np.zeros((malicious, honest.shape[1])), rule=rule, eps=eps)
    server = None if root is None else torch.as_tensor(root, dtype=torch.float32)
    plan = search.plan(view, rng, server)
    kept = view.honest.double().numpy()
    rows = plan.stage.rows(plan.coefficients).double().numpy()
    anchors = None if server is None else {"root": server.double().numpy()}
    result = aggregate(np.vstack([rows, kept]), rule, eps=eps, seed=view.seed, anchors=anchors)
    mean = kept.mean(axis=0)
    scaled = (kept - mean) / math.sqrt(len(kept))
    spread = float(np.linalg.norm(scaled, 2))
    n = len(kept) + malicious
    # Guarantees are for eps = f / n: some rules' budget is the mass eps, not a number of clients.
    told = rule.eps is not None or math.isclose(eps * n, malicious)
    limits = [_limit(known(rule, n, malicious), kept, server) if told else math.inf for known in _KNOWN]
    return Found(
        float(np.linalg.norm(result.value - mean)),
        spread,
        float(np.linalg.norm(scaled)),
        math.inf if result.certificate is None else result.certificate.bound(spread),
        name,
        str(plan),
        *limits,
    )


_KNOWN = (published, proved)


def _limit(guarantee: Guarantee | None, honest: Matrix, root: Tensor | None) -> float:
    if guarantee is None:
        return math.inf
    return guarantee.bound(honest, None if root is None else root.double().numpy())


Draw = Callable[[np.random.Generator, int, int, int], Matrix]
"""(rng, honest, malicious, d) -> (honest, d) updates of spread about 1."""


def _camps(rng: np.random.Generator, honest: int, smaller: int, d: int) -> Matrix:
    """Two camps."""
    camp = np.arange(honest) < smaller
    return 0.01 * rng.standard_normal((honest, d)) + np.outer(camp, rng.standard_normal(d))


def _crossed(rng: np.random.Generator, honest: int, smaller: int, d: int) -> Matrix:
    """Two camps in every coordinate, of other clients in each."""
    members = rng.permuted(np.tile(np.arange(honest) < smaller, (d, 1)), axis=1).T
    apart: Matrix = members * rng.choice([-1.0, 1.0], d)
    return 0.01 * rng.standard_normal((honest, d)) + apart


def _half(honest: int, malicious: int) -> int:
    """So many honest clients in one camp that f attackers bring the median of all to the other."""
    return min((honest + malicious - 1) // 2, honest - 1)


HONEST: dict[str, Draw] = {
    "gaussian": lambda rng, honest, _, d: rng.standard_normal((honest, d)),
    "few large directions": lambda rng, honest, _, d: (
        rng.standard_normal((honest, d)) * np.exp(1.5 * rng.standard_normal(d))
    ),
    "two camps": lambda rng, honest, malicious, d: _camps(rng, honest, min(malicious, honest // 2), d),
    "heavy tails": lambda rng, honest, _, d: (
        rng.standard_t(2, (honest, 1)) * rng.standard_normal((honest, d))
    ),
    "one far out": lambda rng, honest, _, d: (
        rng.standard_normal((honest, d)) * np.where(np.arange(honest) == 0, 8.0, 1.0)[:, None]
    ),
    "two camps, one client more": lambda rng, honest, malicious, d: _camps(
        rng, honest, min(malicious + 1, honest // 2), d
    ),
    "halves": lambda rng, honest, malicious, d: _camps(rng, honest, _half(honest, malicious), d),
    "two camps by coordinate": lambda rng, honest, malicious, d: _crossed(
        rng, honest, min(malicious, honest // 2), d
    ),
    "halves by coordinate": lambda rng, honest, malicious, d: _crossed(
        rng, honest, _half(honest, malicious), d
    ),
}
"""Kinds of honest updates, by name. To all of them a common part of the spread's order is added."""
