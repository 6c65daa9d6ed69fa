"""How far an aggregate can be from the honest mean, by theorem: one place for all coefficients.

A rule is (f, kappa)-robust if for any n rows and any S of n - f of them

    ||aggregate - mean_S||^2 <= kappa D,    D = 1/|S| sum_S ||x_i - mean_S||^2

(Allouah, Farhadkhani, Guerraoui, Gupta, Pinot, Stephan 2023, arXiv 2302.01772, definition 2). Some
theorems have another measure in the place of D: the top eigenvalue of the honest covariance, never
larger than D and up to d times smaller; or the honest rows' squared diameter. No rule has a kappa
below f / (n - 2 f) (proposition 6 there), whichever of D and the top eigenvalue is meant: with honest
rows in two camps of f and n - 2f nobody knows which camp is malicious.

`published` gives what the literature states for a rule as the literature defines it, `proved` what is
proved below for the rule as it is implemented here; both for eps = f/n and equal shares, and both None
where there is nothing. Write m = n - f, z for the honest mean, D as above; sums over S.

Subsets. The mean of a subset of share 1 - t of S is within sqrt(t/(1-t) D) of z, and each coordinate's
within the same of its own. (Cauchy-Schwarz.)

Trimmed mean, kappa = f/(n-2f), which no rule can better. The k-th smallest of n values is at most the
k-th smallest of the m honest ones. So what is left between the trimmed ends has a mean of at most that
of the largest n - 2f honest values, and likewise from below: subsets with t = f/m.

Median, kappa = h/(m-h), h = floor((n-1)/2). The same with k = h + 1: the k-th smallest honest value is
at most the mean of the m - h from it upwards; for even n so is the mean of the k-th and the next.

Meamed, kappa = (f + sqrt f)^2 / m (1 + kappa_median). The window W and S differ by p <= f values each.
No value in W is farther from the median M than S's farthest, and sum_S (x - M)^2 <= m (1 +
kappa_median) D; so (1/m) (sum_{W-S} |x - M| + sum_{S-W} |x - M|) is at most (p + sqrt p) / m of its
root. For the m values nearest to M it would be 2 sqrt p / m, and kappa 4f/m (1 + kappa_median); but
where many values tie for the farthest place, the window may hold them all and leave out nearer ones.

Geometric median, kappa = 4 (m/(n-2f))^2. For the minimiser g, sum_i ||x_i - g|| <= sum_i ||x_i - z||;
the triangle inequality, one way round for S and the other for the rest: (n-2f) ||g - z|| <= 2 sum
||x_i - z||. Stated, as what is published, only where the rule's steps come to g: at least 1000 of them,
nu <= 1e-3 and n <= 1000. Otherwise rows of 1e30 may keep it far away.

Medoid, kappa = ((2m + n)/(n-2f))^2. The same, with sum_i ||x_i - z|| + n min_S ||x_j - z|| on the
right.

Krum, kappa = (sqrt(2 m (m-2) / ((m-1) h)) + sqrt((f+1)/h))^2, h = n-2f-1. The scores of S average to
at most 2 m D (m-2)/(m-1), so the smallest score s is no larger. Chosen row and the m - 2 rows that its
score counts hold h honest ones at least, H: its distance to mean_H is at most sqrt(s/h), and that of
mean_H to z as for subsets. With sums over m rather than m - 2 neighbours the same lines give (sqrt(2m)
+ sqrt f)^2 / (n-2f), just below the published 6 m/(n-2f), which is for that rule.

Multi-Krum of m rows: kappa = (sqrt((m/h) f n) + f sqrt((f+1)/h) + sqrt(f m))^2 / m^2. Each chosen row
outside S replaces a row j of S that scores no less, and j's score is at most m (D + ||x_j - z||^2).
Sum Krum's inequality and ||x_j - z|| over these p <= f pairs by Cauchy-Schwarz.

MDA, within 2f/m diameters. Each chosen row outside S replaces a row of S, and both are within a
diameter of a row that is in both sets; there is one, for n > 2f.

MoNNA with the server's row r, within 2f/m of S's farthest distance from r: each replaces a row of S
that is no nearer to r.

SMEA, kappa = 4f/(n-2f) about the top eigenvalue. The certificate (`fedrobust.certificate`): the chosen
rows and S are at a total variation of at most f/m, and their top eigenvalue is at most S's. Two camps
reach it. It implies 4f/(n-2f) (1 + f/(n-2f))^2.

CAF, about the top eigenvalue L of S: with c = 2m/(n-2f), e = f/n, sqrt(kappa) = min(sqrt(2e/(1-3e)) (1
+ sqrt c), sqrt(e/(1-2e)) (1 + (1 + 2 sqrt 2) sqrt c)), the first for e < 1/3. Until a step at which S
loses no less than the others lose, S has lost at most e; there is such a step, since 2e is removed in
all. Its iterate w has lambda <= c L: at least half of lambda |w| is S's second moment about mu_w,
which is at most m/n L and (w(others)/|w|) times what tells the groups apart; solve for lambda. It is
at a variation of at most e/(1-e) from S. The iterate returned has no larger lambda, and keeps 1 - 2e
of the mass: it is at a variation of at most 2e from w, and of 2e/(1-e) from S.

Nearest-neighbour mixing before an (f, kappa)-robust rule: 8f/m (1 + kappa), as published (lemma 1
there). Row i of S and its neighbours differ from S by p <= f rows, each no farther from x_i than the
one that it replaces: ||y_i - z||^2 <= 4f/m^2 sum_j ||x_j - x_i||^2, and these average to 8f/m D.

Clipping of the k longest rows: kappa + k/(m-k); for ARC this is at most the published kappa +
2f/(n-2f) (Allouah et al. 2025, arXiv 2405.14432, theorem 3.2). Let l <= k rows of S be clipped, by
delta_i. Clipping is a projection, so it takes at least (m-l)/m^2 sum delta_i^2 from D, and moves the
mean by B with B^2 <= l/m^2 sum delta_i^2. Then (sqrt(kappa D') + B)^2 <= (kappa + r) (D' + B^2/r) with
r = l/(m-l). A fixed radius keeps no robustness (lemma 3.1 there), since the mean may be anywhere.

Buckets of s | n rows, at most f of them spoilt: (kappa' + 1) m/(n-sf), kappa' for n/s rows. The mean
squared distance from z of n/s - f clean buckets is at most that of their n - sf rows. (The published
guarantee, arXiv 2006.09365, is in expectation over the permutation.)

FLTrust: the value is no longer than the server's row.

None for mean (unbounded), filter, entropy_filter and no_regret (their levels depend on the round's own
bulk: the certificate gives their number), centered_clipping and clip | mean (they depend on the
starting point), dnc, bulyan, clustering, clipped_clustering, flame, foolsgold, signguard,
sign_majority, auto_gm (its bound is in distances from the geometric median: see there).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial

import numpy as np

from fedrobust.gram import most_malicious
from fedrobust.kernels import Matrix, Vector
from fedrobust.rules.caf import CAF
from fedrobust.rules.coordinate_wise import Meamed, Median, TrimmedMean
from fedrobust.rules.fltrust import FLTrust
from fedrobust.rules.geometric_median import GeometricMedian
from fedrobust.rules.krum import Krum, MultiKrum
from fedrobust.rules.mda import MDA
from fedrobust.rules.medoid import Medoid
from fedrobust.rules.mixings import ARC, NNM, Bucketing, Clip
from fedrobust.rules.monna import MoNNA
from fedrobust.rules.rule import Aggregator, Rule
from fedrobust.rules.smea import SMEA


class Measure(Enum):
    """What kappa multiplies, of the honest rows S."""

    DEVIATION = "mean squared deviation"
    EIGENVALUE = "top eigenvalue"
    DIAMETER = "squared diameter"
    FROM_ROOT = "largest squared distance from the server's row"
    LENGTH = "square of the lengths of the server's row and the honest mean together"


@dataclass(frozen=True)
class Guarantee:
    """||aggregate - mean_S||^2 <= kappa times a measure of S, for all rows of f malicious clients.

    Attributes:
        kappa: the coefficient.
        measure: of the honest rows.
        source: where it is stated, or that it is proved here.
    """

    kappa: float
    measure: Measure
    source: str

    def bound(self, honest: Matrix, root: Vector | None = None) -> float:
        """The largest distance from the honest mean, in the rows' own units.

        Args:
            honest: (n - f, d) the honest rows.
            root: (d,) the server's own row, for rules that look at it.
        """
        return math.sqrt(self.kappa * _measured(self.measure, honest, root))

    def about_deviation(self, honest: int) -> Guarantee | None:
        """The same in mean squared deviations of that many rows; None if that does not follow."""
        factors = {Measure.DEVIATION: 1.0, Measure.EIGENVALUE: 1.0, Measure.DIAMETER: 2.0 * honest}
        if self.measure not in factors:
            return None
        return Guarantee(self.kappa * factors[self.measure], Measure.DEVIATION, self.source)


def published(rule: Aggregator, n: int, f: int) -> Guarantee | None:
    """What the literature states for a rule with f = eps n malicious of n clients; None for nothing."""
    return _guarantee(rule, n, f, _PUBLISHED, _PUBLISHED_MIXINGS)


def proved(rule: Aggregator, n: int, f: int) -> Guarantee | None:
    """What is proved here for a rule with f = eps n malicious of n clients; None for nothing."""
    return _guarantee(rule, n, f, _PROVED, _PROVED_MIXINGS)


Stated = Callable[[Rule, int, int], Guarantee | None]
"""(rule, n, f) -> its guarantee."""
Inner = Callable[[int, int], Guarantee | None]
"""(n, f) -> the guarantee of what stands behind a mixing."""


def _guarantee(
    rule: Aggregator,
    n: int,
    f: int,
    ends: Mapping[type[Rule], Stated],
    mixings: Mapping[type[Rule], Callable[[Rule, int, int, Inner], Guarantee | None]],
) -> Guarantee | None:
    if not 0 <= 2 * f < n or isinstance(rule.eps, str):
        return None
    if rule.eps is not None and most_malicious(np.full(n, 1 / n), rule.eps) != f:
        return None  # the rule assumes another number of malicious clients
    *before, last = rule.rules
    if isinstance(last, CAF) and rule.eps is not None and not math.isclose(rule.eps * n, f):
        return None  # its budget is a mass, not a number of rows
    if type(last) not in ends:
        return None
    inner: Inner = partial(ends[type(last)], last)
    for mixing in reversed(before):
        if type(mixing) not in mixings:
            return None
        inner = partial(_behind, mixings[type(mixing)], mixing, inner)
    return inner(n, f)


def _behind(
    mixed: Callable[[Rule, int, int, Inner], Guarantee | None],
    mixing: Rule,
    inner: Inner,
    n: int,
    f: int,
) -> Guarantee | None:
    return mixed(mixing, n, f, inner)


def _measured(measure: Measure, honest: Matrix, root: Vector | None) -> float:
    mean = honest.mean(axis=0)
    centred = honest - mean
    if measure is Measure.DEVIATION:
        return float((centred**2).sum()) / len(honest)
    if measure is Measure.EIGENVALUE:
        return float(np.linalg.norm(centred, 2)) ** 2 / len(honest)
    if measure is Measure.DIAMETER:
        return max(float(((honest - row) ** 2).sum(axis=1).max()) for row in honest)
    if root is None:
        raise ValueError(f"the {measure.value} is asked for, without a row of the server's")
    if measure is Measure.FROM_ROOT:
        return float(((honest - root) ** 2).sum(axis=1).max())
    return float(np.linalg.norm(root) + np.linalg.norm(mean)) ** 2


# The literature -------------------------------------------------------------------------------------

_FIXING = "Allouah et al. 2023 (arXiv 2302.01772), table 1"
_PROOF = "proved in fedrobust.rules.guarantees"


def _about(kappa: Callable[[int, int], float], measure: Measure, source: str) -> Stated:
    """A guarantee that depends on n and f alone."""

    def stated(_: Rule, n: int, f: int) -> Guarantee | None:
        return Guarantee(kappa(n, f), measure, source)

    return stated


def _wide_median(n: int, f: int) -> float:
    return 4 * (1 + f / (n - 2 * f)) ** 2


def _geometric_median(source: str) -> Stated:
    def stated(rule: Rule, n: int, f: int) -> Guarantee | None:
        if not isinstance(rule, GeometricMedian) or not rule.arrives(n):
            return None
        return Guarantee(_wide_median(n, f), Measure.DEVIATION, source)

    return stated


_PUBLISHED: dict[type[Rule], Stated] = {
    TrimmedMean: _about(
        lambda n, f: 6 * f / (n - 2 * f) * (1 + f / (n - 2 * f)), Measure.DEVIATION, _FIXING
    ),
    Median: _about(_wide_median, Measure.DEVIATION, _FIXING),
    GeometricMedian: _geometric_median(_FIXING),
    Krum: _about(lambda n, f: 6 * (1 + f / (n - 2 * f)), Measure.DEVIATION, _FIXING),
    MDA: _about(
        lambda n, f: (2 * f / (n - f)) ** 2,
        Measure.DIAMETER,
        "El Mhamdi et al. 2021 (arXiv 2008.00742), section 4",
    ),
}


def _nnm(source: str) -> Callable[[Rule, int, int, Inner], Guarantee | None]:
    def mixed(_: Rule, n: int, f: int, inner: Inner) -> Guarantee | None:
        return _raised(inner(n, f), n - f, lambda kappa: 8 * f / (n - f) * (kappa + 1), source)

    return mixed


def _raised(
    inner: Guarantee | None, honest: int, kappa: Callable[[float], float], source: str
) -> Guarantee | None:
    """What becomes of a guarantee about the deviation of that many mixed rows."""
    about = None if inner is None else inner.about_deviation(honest)
    if about is None:
        return None
    return Guarantee(kappa(about.kappa), Measure.DEVIATION, f"{source}; {about.source}")


def _published_arc(_: Rule, n: int, f: int, inner: Inner) -> Guarantee | None:
    source = "Allouah et al. 2025 (arXiv 2405.14432), theorem 3.2"
    return _raised(inner(n, f), n - f, lambda kappa: kappa + 2 * f / (n - 2 * f), source)


_PUBLISHED_MIXINGS: dict[type[Rule], Callable[[Rule, int, int, Inner], Guarantee | None]] = {
    NNM: _nnm("Allouah et al. 2023 (arXiv 2302.01772), lemma 1"),
    ARC: _published_arc,
}


# Proofs: see the module's docstring -----------------------------------------------------------------


def _median(n: int, f: int) -> float:
    below = (n - 1) // 2
    return below / (n - f - below)


def _meamed(n: int, f: int) -> float:
    return (f + math.sqrt(f)) ** 2 / (n - f) * (1 + _median(n, f))


def _krum(_: Rule, n: int, f: int) -> Guarantee | None:
    m, h = n - f, n - 2 * f - 1
    if n < 2 * f + 3:
        return None
    root = math.sqrt(2 * m * (m - 2) / ((m - 1) * h)) + math.sqrt((f + 1) / h)
    return Guarantee(root**2, Measure.DEVIATION, _PROOF)


def _multi_krum(rule: Rule, n: int, f: int) -> Guarantee | None:
    m, h = n - f, n - 2 * f - 1
    if n < 2 * f + 3 or not isinstance(rule, MultiKrum) or rule.m not in {None, m}:
        return None
    root = math.sqrt(m / h * f * n) + f * math.sqrt((f + 1) / h) + math.sqrt(f * m)
    return Guarantee((root / m) ** 2, Measure.DEVIATION, _PROOF)


def _monna(rule: Rule, n: int, f: int) -> Guarantee | None:
    if not isinstance(rule, MoNNA) or rule.index is not None:
        return None  # whoever holds that place decides
    return Guarantee((2 * f / (n - f)) ** 2, Measure.FROM_ROOT, _PROOF)


def _caf(n: int, f: int) -> float:
    spread = math.sqrt(2 * (n - f) / (n - 2 * f))
    root = math.sqrt(f / (n - 2 * f)) * (1 + (1 + 2 * math.sqrt(2)) * spread)
    if 3 * f < n:
        root = min(root, math.sqrt(2 * f / (n - 3 * f)) * (1 + spread))
    return root**2


_PROVED: dict[type[Rule], Stated] = {
    TrimmedMean: _about(lambda n, f: f / (n - 2 * f), Measure.DEVIATION, _PROOF),
    Median: _about(_median, Measure.DEVIATION, _PROOF),
    Meamed: _about(_meamed, Measure.DEVIATION, _PROOF),
    GeometricMedian: _geometric_median(_PROOF),
    Medoid: _about(lambda n, f: ((2 * (n - f) + n) / (n - 2 * f)) ** 2, Measure.DEVIATION, _PROOF),
    Krum: _krum,
    MultiKrum: _multi_krum,
    MDA: _about(lambda n, f: (2 * f / (n - f)) ** 2, Measure.DIAMETER, _PROOF),
    MoNNA: _monna,
    SMEA: _about(lambda n, f: 4 * f / (n - 2 * f), Measure.EIGENVALUE, _PROOF),
    CAF: _about(_caf, Measure.EIGENVALUE, _PROOF),
    FLTrust: _about(lambda _n, _f: 1.0, Measure.LENGTH, _PROOF),
}


def _clipped(n: int, f: int, longest: int, inner: Inner) -> Guarantee | None:
    more = longest / (n - f - longest)
    return _raised(inner(n, f), n - f, lambda kappa: kappa + more, _PROOF)


def _clip(mixing: Rule, n: int, f: int, inner: Inner) -> Guarantee | None:
    if not isinstance(mixing, Clip) or mixing.radius is not None:
        return None
    return _clipped(n, f, f, inner)


def _arc(_: Rule, n: int, f: int, inner: Inner) -> Guarantee | None:
    return _clipped(n, f, 2 * f * (n - f) // n, inner)


def _bucketing(mixing: Rule, n: int, f: int, inner: Inner) -> Guarantee | None:
    if not isinstance(mixing, Bucketing) or n % mixing.s or 2 * f * mixing.s >= n:
        return None
    buckets, clean = n // mixing.s, n - f * mixing.s
    return _raised(inner(buckets, f), buckets - f, lambda kappa: (kappa + 1) * (n - f) / clean, _PROOF)


_PROVED_MIXINGS: dict[type[Rule], Callable[[Rule, int, int, Inner], Guarantee | None]] = {
    NNM: _nnm(_PROOF),
    ARC: _arc,
    Clip: _clip,
    Bucketing: _bucketing,
}
