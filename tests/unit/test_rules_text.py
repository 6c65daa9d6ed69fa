"""The text form of rules: what is read, and what is said in one line of what cannot be read."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import pytest

from fedrobust import (
    NNM,
    Aggregator,
    Bucketing,
    Clip,
    Filter,
    GeometricMedian,
    InputError,
    Krum,
    Mean,
    Median,
    MultiKrum,
    aggregate,
    parse_rule,
)
from fedrobust.rules import Rule

WRONG: Any = {"text": "2", "class": Filter, "none": None, "number": 5}
ROUND = [[float(i), float(i * i)] for i in range(12)]


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("mean", [Mean()]),
        ("mean()", [Mean()]),
        (" krum ", [Krum()]),
        ("filter(eps=0.1)", [Filter(eps=0.1)]),
        ("filter(eps='auto')", [Filter(eps="auto")]),
        ("filter(sigma=2, eps=0)", [Filter(sigma=2, eps=0)]),
        ("multi_krum(3)", [MultiKrum(3)]),
        ("multi_krum(m=None)", [MultiKrum()]),
        ("bucketing(s=3)|nnm |  median", [Bucketing(3), NNM(), Median()]),
        ("clip(1e-2) | geometric_median(50, nu=1e-8)", [Clip(0.01), GeometricMedian(50, 1e-8)]),
        ("nnm(eps=0.1) | filter(eps=0.1)", [NNM(eps=0.1), Filter(eps=0.1)]),
    ],
)
def test_text_is_read(text: str, rules: list[Any]) -> None:
    assert parse_rule(text) == Aggregator(tuple(rules))


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Filter(), "filter"),
        (Filter(eps=0), "filter(eps=0)"),
        (Bucketing(2), "bucketing"),
        (
            Bucketing(3) | NNM(eps=0.1) | Filter(sigma=1.5),
            "bucketing(s=3) | nnm(eps=0.1) | filter(sigma=1.5)",
        ),
        (NNM() | (Clip(1.0) | Mean()), "nnm | clip(radius=1.0) | mean"),
        (parse_rule("nnm") | Mean(), "nnm | mean"),
    ],
)
def test_the_repr_is_the_text(rule: Any, text: str) -> None:
    assert repr(rule) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "flter",
            r"unknown rule 'flter' \(did you mean filter\?\); choose from arc, auto_gm, bucketing,",
        ),
        ("zzz", r"unknown rule 'zzz'; choose from .*trimmed_mean"),
        ("nnm | medain", r"did you mean median\?"),
        (
            "filter(epsilon=0.1)",
            r"unknown argument of filter 'epsilon' \(did you mean eps\?\).*eps, factor, removal, sigma",
        ),
        ("filter(0.2)", r"takes 0 arguments without a name, got 1; its arguments are eps, sigma"),
        ("multi_krum(1, 2)", r"takes 1 arguments without a name, got 2; its arguments are eps, m"),
        ("multi_krum(1, m=2)", r"m is given twice"),
        ("filter(eps=0.1, eps=0.2)", r"eps is given twice|not of the form"),
        ("filter(eps=0.5)", r"eps must be in \[0, 0\.5\)"),
        ("filter(eps=-0.1)", r"eps must be in"),
        ("filter(eps='0.1')", r"filter\(eps='0\.1'\): eps must be in .* or 'auto'"),
        ("filter(eps=True)", r"got True"),
        ("filter(sigma=0)", r"filter\(sigma=0\): sigma must be positive"),
        ("clip(-1)", r"radius must be positive"),
        ("clip(1e999)", r"radius must be"),
        ("clip(radius=open)", r"radius must be a plain value in 'clip\(radius=open\)'"),
        ("clip(radius=__import__('os'))", r"must be a plain value"),
        ("clip({[1]: 2})", r"must be"),
        ("bucketing(2.0)", r"s must be int, got 2\.0"),
        ("bucketing(0)", r"s must be at least 1"),
        ("multi_krum(0)", r"m must be at least 1"),
        ("auto_gm(0)", r"regulariser must be positive"),
        ("clustering('ward')", r"linkage must be one of complete, average, single"),
        ("clipped_clustering('ward')", r"linkage must be one of"),
        ("geometric_median(steps=0)", r"steps must be at least 1"),
        ("geometric_median(nu=0.0)", r"nu must be positive"),
        ("geometric_median(nu=1e999)", r"nu must be"),
        ("nnm(eps=0.1) | filter(eps=0.2)", r"more than one eps \(0\.1, 0\.2\)"),
        (
            "krum | nnm",
            r"krum gives the final answer and cannot stand before another rule; only mixings",
        ),
        ("median | mean", r"median gives the final answer"),
        ("", "not of the form"),
        ("|", "not of the form"),
        ("nnm |", "not of the form"),
        ("nnm & mean", "not of the form"),
        ("filter(eps=0.1", "not of the form"),
        ("filter()()", "not of the form"),
        ("rules.filter", "not of the form"),
        ("'filter'", "not of the form"),
        ("3", "not of the form"),
        ("filter(**{})", "not of the form"),
        ("filter(*[0.1])", "filter"),
        ("filter\nmean", "not of the form"),
        ("mean\0", "not of the form"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        parse_rule(text)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("value", ["0x{}", "[0x{}]"])
def test_a_number_that_has_no_text_is_named_by_its_type(value: str) -> None:
    """Python writes out no integer of more than 4300 digits, and reads it in hexadecimal."""
    with pytest.raises(InputError, match=r"filter: removal must be str, got <(int|list) that cannot be"):
        parse_rule(f"filter(removal={value.format('f' * 4000)})")


@pytest.mark.parametrize("text", ["nnm", "bucketing(2) | clip"])
def test_mixings_alone_give_no_answer(text: str) -> None:
    with pytest.raises(InputError, match=r"only mixes; end it with a rule, as in .* \| filter"):
        aggregate(ROUND, text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Krum() | NNM(), "krum gives the final answer"),
        (lambda: NNM(eps=0.1) | Filter(eps=0.2), "more than one eps"),
        (lambda: Filter(eps=float("nan")), "eps must be"),
        (lambda: Clip(float("inf")), "radius must be"),
        (lambda: Bucketing(WRONG["text"]), "s must be int"),
        (lambda: parse_rule(WRONG["number"]), r"rule must be a text of the form .*, got 5"),
        (lambda: parse_rule(WRONG["none"]), r"rule must be a text of the form .*, got None"),
        (lambda: aggregate(ROUND, WRONG["class"]), "rule"),
        (lambda: aggregate(ROUND, WRONG["none"]), "rule"),
        (lambda: aggregate(ROUND, Aggregator(())), "rule"),
        (lambda: aggregate(ROUND, "multi_krum(m=11)", eps=0.2), r"m must be at most n - f = 10 of 12"),
        (lambda: aggregate(ROUND, "bucketing(6) | mean", eps=0.2), "take fewer rows a bucket"),
    ],
)
def test_rules_made_in_code_are_checked_alike(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        make()
    assert len(str(error.value).splitlines()) == 1


def test_the_compositions_eps_comes_before_the_callers_and_the_default() -> None:
    def f(rule: str, eps: float | None = None) -> float:
        result = aggregate(ROUND, rule, eps=eps)
        assert result.certificate is not None
        return result.certificate.eps

    assert f("nnm(eps=0.1) | mean", eps=0.3) == 0.1
    assert f("nnm | mean", eps=0.3) == 0.3
    assert f("nnm | mean") == 0.2


class Size(IntEnum):
    """An integer of another type."""

    THREE = 3


class Kept(str):
    """Text of another type, with a repr of its own."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Kept({self!s})"


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Filter(eps=np.float64(0.25)), "filter(eps=0.25)"),
        (Filter(eps=Kept("auto")), "filter(eps='auto')"),
        (Bucketing(Size.THREE), "bucketing(s=3)"),
    ],
)
def test_numbers_and_text_of_other_types_are_kept_as_plain_ones(rule: Rule, text: str) -> None:
    assert repr(rule) == text
    assert parse_rule(text) == Aggregator((rule,))
