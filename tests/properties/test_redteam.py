"""What the adaptive search finds stays within what is proven: certificates, published coefficients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedrobust import CATALOG, InputError, aggregate
from fedrobust.attacks.search import HONEST, Found, rounds, worst_error
from fedrobust.kernels import Matrix
from fedrobust.redteam import COMPOSITIONS, RULES
from fedrobust.rules import Aggregator, Mixing, Weighting, parse_rule
from fedrobust.rules.guarantees import Guarantee, proved, published

ENDS = sorted(name for name, cls in CATALOG.items() if issubclass(cls, Weighting))
MIXINGS = sorted(name for name, cls in CATALOG.items() if issubclass(cls, Mixing))
BUDGET = 50 * len(HONEST)


def search(rule: str, n: int, eps: float, d: int, budget: int = BUDGET, seed: int = 0) -> list[Found]:
    """The worst round of each kind of honest updates; skips what the rule has no answer to."""
    try:
        return rounds(parse_rule(rule), n, eps, d, budget, seed)
    except InputError as error:
        pytest.skip(str(error))


CERTIFIED = [
    *((rule, 14, 0.2, 50) for rule in ENDS),
    *((rule, 13, 0.31, 4) for rule in ENDS),
    *((f"{mixing} | {end}", 14, 0.2, 50) for mixing in MIXINGS for end in ("filter", "krum")),
]


@pytest.mark.parametrize(("rule", "n", "eps", "d"), CERTIFIED)
def test_nothing_exceeds_the_certificate(rule: str, n: int, eps: float, d: int) -> None:
    for found in search(rule, n, eps, d):
        assert found.error <= found.bound * (1 + 1e-5) + 1e-5 * found.deviation, found


# Guarantees: what the literature states, and what is proved -------------------------------------------

BOUNDED = [
    rule
    for rule in (
        *RULES,
        "nnm | multi_krum",
        "nnm | smea",
        "nnm | meamed",
        "arc | krum",
        "bucketing | krum",
    )
    if proved(parse_rule(rule), 12, 2) or published(parse_rule(rule), 12, 2)
]


@pytest.mark.parametrize("rule", BOUNDED)
@pytest.mark.parametrize(("n", "f", "d"), [(12, 2, 30), (9, 3, 2)])
def test_nothing_exceeds_a_guarantee(rule: str, n: int, f: int, d: int) -> None:
    for found in search(rule, n, f / n, d):
        assert not found.exceeds, found


@pytest.mark.slow
@pytest.mark.parametrize("rule", BOUNDED)
@pytest.mark.parametrize(
    ("n", "eps", "d"),
    [
        *itertools.product([10, 20], [0.1, 0.2, 0.3, 0.4], [2, 1000]),
        *itertools.product([40], [0.2, 0.4], [10]),
    ],
)
def test_nothing_exceeds_a_guarantee_on_the_grid(rule: str, n: int, eps: float, d: int) -> None:
    if "smea" in rule and math.comb(n, round(eps * n)) > 1000:
        pytest.skip("a trial takes too long")
    for found in search(rule, n, eps, d):
        assert not found.exceeds, found


TIGHT = {
    "trimmed_mean": ["two camps", "two camps by coordinate"],
    "median": ["halves", "halves by coordinate"],
    "smea": ["two camps"],
    "mda": ["two camps"],
}


@pytest.mark.parametrize("rule", TIGHT)
@pytest.mark.parametrize(
    ("n", "f"), [(10, 2), *(pytest.param(*size, marks=pytest.mark.slow) for size in [(11, 3), (12, 4)])]
)
def test_the_search_reaches_the_tight_cases(rule: str, n: int, f: int) -> None:
    """Of a guarantee that is tight, the search has to find the case: otherwise it is too weak."""
    by_kind = {found.honest: found for found in search(rule, n, f / n, 30, 150 * len(HONEST))}
    for kind in TIGHT[rule]:
        assert by_kind[kind].error >= 0.9 * by_kind[kind].proved, by_kind[kind]


@pytest.mark.parametrize("rule", ["krum", "geometric_median", "median", "trimmed_mean", "filter", "caf"])
def test_the_search_reaches_what_no_rule_can_avoid(rule: str) -> None:
    """kappa is at least f / (n - 2 f), about the top eigenvalue too (2302.01772, proposition 6)."""
    n, f = 10, 2
    found = max(f.error_over_spread**2 for f in search(rule, n, f / n, 30))
    assert found >= 0.95 * f / (n - 2 * f)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "medoid", "meamed"])
def test_the_search_makes_dimension_dependent_rules_lose(rule: str) -> None:
    """These lose a factor that grows with d; a spectral filter does not."""
    few, many = (max(f.error_over_spread for f in search(rule, 20, 0.2, d)) for d in (2, 100))
    robust = max(f.error_over_spread for f in search("filter", 20, 0.2, 100))
    assert many > 1.5 * few
    assert many > 1.3 * robust


@pytest.mark.parametrize("rule", ["mean", "filter(eps=0.0)", "trimmed_mean(eps=0.1)"])
def test_the_search_breaks_what_is_known_to_break(rule: str) -> None:
    """The mean, and rules that are told of fewer attackers than there are."""
    assert max(found.kappa for found in search(rule, 10, 0.2, 30)) > 1e6


def test_a_fixed_radius_keeps_no_robustness() -> None:
    """Honest rows that agree far from the reference: arXiv 2405.14432, lemma 3.1."""
    X = 100 + np.random.default_rng(0).normal(size=(10, 5))
    clipped = aggregate(X, "clip(1.0) | trimmed_mean", eps=0.2)
    assert np.linalg.norm(clipped.value - X.mean(0)) > 100
    assert proved(parse_rule("clip(1.0) | trimmed_mean"), 10, 2) is None


def test_the_worst_round_is_one_of_them() -> None:
    rule = parse_rule("filter")
    assert worst_error(rule, 10, 0.2, 30, BUDGET, 1) in rounds(rule, 10, 0.2, 30, BUDGET, 1)
    assert math.isfinite(worst_error(rule, 10, 0.2, 30, BUDGET).bound)


# The guarantees themselves ----------------------------------------------------------------------------


def known(rule: str, n: int, f: int) -> list[Guarantee]:
    return [g for g in (published(parse_rule(rule), n, f), proved(parse_rule(rule), n, f)) if g]


@pytest.mark.parametrize("rule", ["trimmed_mean", "median", "geometric_median", "arc | median", "mda"])
def test_what_is_proved_is_not_worse_than_what_is_published(rule: str) -> None:
    for n in range(5, 60):
        for f in range(1, (n + 1) // 2):
            stated, shown = known(rule, n, f)
            assert shown.kappa <= stated.kappa * (1 + 1e-12)


@pytest.mark.parametrize("rule", BOUNDED)
def test_no_guarantee_is_below_what_no_rule_can_better(rule: str) -> None:
    for n in (10, 12, 20, 40):
        for f in range(1, (n + 1) // 2):
            for guarantee in known(rule, n, f):
                about = guarantee.about_deviation(n - f)
                assert about is None or about.kappa >= f / (n - 2 * f) * (1 - 1e-12)


def test_a_rule_that_assumes_another_number_has_no_guarantee() -> None:
    assert known("trimmed_mean(eps=0.3)", 10, 2) == []
    assert known("trimmed_mean(eps=0.2)", 10, 2) != []
    assert known("caf(eps=0.25)", 10, 2) == []  # its budget is a mass
    assert known("trimmed_mean", 10, 5) == []
    assert known("multi_krum(m=3)", 10, 2) == []
    assert known("monna(index=0)", 10, 2) == []
    assert known("nnm", 10, 2) == []


@pytest.mark.parametrize("rule", ["mean", "filter", "clip | mean", "nnm | filter", "centered_clipping"])
def test_what_has_none(rule: str) -> None:
    assert known(rule, 10, 2) == []


@pytest.mark.parametrize(
    ("rule", "n", "f"),
    [
        ("geometric_median(steps=1)", 10, 2),
        ("geometric_median(steps=999)", 10, 2),
        ("geometric_median(nu=100)", 10, 2),
        ("arc | geometric_median(nu=0.01)", 10, 2),
        ("geometric_median", 1001, 490),
        ("bucketing(2) | geometric_median", 2002, 1),
    ],
)
def test_a_median_that_may_not_be_come_to_has_no_guarantee(rule: str, n: int, f: int) -> None:
    assert known(rule, n, f) == []


@pytest.mark.parametrize(
    ("rule", "n", "f"),
    [
        ("geometric_median", 10, 2),
        ("geometric_median(nu=0.001)", 10, 2),
        ("geometric_median(steps=2000)", 300, 149),
        ("geometric_median", 1000, 490),
    ],
)
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_the_geometric_median_forgets_rows_of_any_length(rule: str, n: int, f: int, size: float) -> None:
    X = np.random.default_rng(0).normal(size=(n, 5))
    X[:f] = size
    error = np.linalg.norm(aggregate(X, rule, eps=f / n).value - X[f:].mean(axis=0))
    for guarantee in known(rule, n, f):
        assert error <= guarantee.bound(X[f:])
    assert len(known(rule, n, f)) == 2


# Breakdown, weights: any rows whatever ----------------------------------------------------------------

ANSWERING = sorted(name for name, cls in CATALOG.items() if not issubclass(cls, Mixing))
BREAKS = {"mean", "clustering", "foolsgold", "dnc"}
"""The mean is unbounded by design; clustering and foolsgold do not look at lengths; dnc looks once,
about a mean that one row can pull to the other."""


@st.composite
def outnumbered(draw: Any) -> tuple[Matrix, int, str]:
    """Rows of which the first f are of any size, and a rule."""
    n, d = draw(st.integers(11, 16)), draw(st.sampled_from([1, 2, 7, 40]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    f = draw(st.integers(1, 2))
    X = rng.normal(size=(n, d)) + rng.normal(size=d)
    size = 10.0 ** draw(st.integers(-30, 30))
    forms = {
        "alike": np.tile(rng.normal(size=d), (f, 1)),
        "apart": rng.normal(size=(f, d)),
        "opposed": np.outer(np.where(np.arange(f) % 2, 1.0, -1.0), rng.normal(size=d)),
    }
    X[:f] = size * forms[draw(st.sampled_from(sorted(forms)))]
    rule = draw(st.sampled_from([*sorted(set(ANSWERING) - BREAKS), *sorted(set(COMPOSITIONS))]))
    return X, f, rule


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(outnumbered())
def test_rows_of_any_size_move_no_rule_far(case: tuple[Matrix, int, str]) -> None:
    X, f, rule = case
    honest = X[f:]
    try:
        result = aggregate(X, rule, eps=(f + 1e-9) / len(X), anchors={"root": honest[0]})
    except InputError:  # too few clients for this rule
        return
    reach = np.linalg.norm(honest, axis=1).max() + math.sqrt(X.shape[1])  # a sign vote has length sqrt d
    assert np.isfinite(result.value).all()
    assert np.linalg.norm(result.value - honest.mean(0)) <= 10 * reach


def test_dnc_is_led_past_one_row_by_a_larger_one() -> None:
    """Why it is not among the rules above: the mean comes near the smaller row, which looks honest."""
    X = np.vstack([[-1245.0], [-218.0], np.linspace(-1, 1, 9)[:, None]])
    weights = aggregate(X, "dnc", eps=2.001 / 11).weights
    assert weights is not None
    assert weights[0] == 0 < weights[1]
    assert aggregate(X, "filter", eps=2.001 / 11).weights[:2].sum() == 0


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(outnumbered(), st.booleans(), st.integers(0, 2**32 - 1))
def test_weights_are_a_distribution(case: tuple[Matrix, int, str], uniform: bool, seed: int) -> None:
    X, f, rule = case
    shares = None if uniform else np.random.default_rng(seed).uniform(0.5, 1, len(X))
    try:
        result = aggregate(X, rule, shares, eps=(f + 0.5) / len(X), anchors={"root": X[-1]})
    except InputError:
        return
    if result.weights is None:
        return
    assert (result.weights >= -1e-12).all()
    if "fltrust" in rule:  # lengthens short rows
        return
    assert result.weights.sum() <= 1 + 1e-9
    shortens = ("clip", "arc", "centered_clipping", "flame", "signguard")
    if not rule.startswith(shortens):
        assert result.weights.sum() == pytest.approx(1)


def test_every_rule_with_weights_is_in_the_certificates_test() -> None:
    """tests/properties/test_certificate.py draws from all that end in a weighting, and all mixings."""
    ending = {name for name, cls in CATALOG.items() if isinstance(cls().parts[-1], Weighting)}
    X = np.random.default_rng(0).normal(size=(15, 3))
    for name in ANSWERING:
        result = aggregate(X, Aggregator((CATALOG[name](),)), anchors={"root": X[0]})
        assert (result.weights is not None) == (name in ending)
        assert (result.certificate is not None) == (name in ending)
