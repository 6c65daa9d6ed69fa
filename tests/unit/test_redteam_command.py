"""The red team's tables: what is said of a rule, in text, Markdown and JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedrobust import CATALOG, InputError, redteam
from fedrobust.attacks.search import HONEST, Found
from fedrobust.cli import main
from fedrobust.rules import Mixing, parse_rule

SMALL = ["--clients", "9", "--parameters", "5", "--budget", str(50 * len(HONEST))]
FOUND = Found(2.0, 1.0, 2.0, math.inf, "camps", "mean -1 mean", published=3.0, proved=4.0)


def setting(**changes: Any) -> redteam.Setting:
    return redteam.Setting(**{"n": 9, "d": 5, "budget": 50 * len(HONEST), **changes})  # type: ignore[arg-type]


def test_all_rules_are_in_the_table() -> None:
    parts = [type(part) for text in redteam.RULES for part in parse_rule(text).rules]
    assert set(parts) == set(CATALOG.values())
    mixings = {text.split(" | ")[0] for text in redteam.COMPOSITIONS}
    assert mixings == {name for name, cls in CATALOG.items() if issubclass(cls, Mixing)}


def test_the_document_has_all_rules() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "redteam.md").read_text().splitlines()
    assert "| " + " | ".join(redteam.HEADER) + " |" in lines
    cells = {line.replace("\\|", "!").split(" | ")[0].strip("| ") for line in lines}
    assert {text.replace("|", "!") for text in redteam.RULES} <= cells


def test_a_rule_has_a_line_for_each_kind_of_honest_updates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["redteam", "trimmed_mean", *SMALL]) == 0
    first, _, header, *lines = capsys.readouterr().out.splitlines()
    assert "9 clients, 1 malicious (eps 0.2), 5 parameters" in first
    assert header.split()[0] == "rule"
    assert len(lines) == len(HONEST)
    assert all(kind in line for kind, line in zip(HONEST, lines, strict=True))


def test_json_repeats_with_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (3, 3, 4):
        assert main(["redteam", "median", *SMALL, "--json", "--seed", str(seed)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    figures = json.loads(texts[0])
    assert figures["rule"] == "median"
    assert [found["honest"] for found in figures["found"]] == list(HONEST)
    assert figures["found"][0]["bound"] is None  # no weights, no certificate
    assert figures["found"][0]["error"] <= figures["found"][0]["proved"]


def test_more_seeds_are_no_better_for_the_rule() -> None:
    one, other, both = (
        redteam.assess("krum", setting(**changes))
        for changes in ({"seed": 0}, {"seed": 1}, {"seed": 0, "seeds": 2})
    )
    assert both.worst == max(one.worst, other.worst, key=lambda found: found.error_over_spread)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": "a"}, "n must be a whole number, got 'a'"),
        ({"n": 5.5}, r"n must be a whole number, got 5\.5"),
        ({"n": True}, "n must be a whole number, got True"),
        ({"d": 2.5}, r"d must be a whole number, got 2\.5"),
        ({"seeds": None}, "seeds must be a whole number, got None"),
        ({"eps": "x"}, r"eps must be a number in \(0, 0\.5\), got 'x'"),
    ],
)
def test_a_setting_of_the_wrong_type_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        setting(**changes)


def test_a_rule_that_refuses_says_why() -> None:
    told: list[str] = []
    assessments = redteam.assess_all(setting(n=8, eps=0.25), ["bulyan", "median"], told.append)
    assert told == ["bulyan", "median"]
    assert assessments[0].found == ()
    text = redteam.markdown(assessments)
    assert "- bulyan: needs at least 4 f + 3 = 11 clients" in text
    assert "| median |" in text


def test_what_is_above_a_bound_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    above = redteam.Assessment("median", (FOUND, Found(5.0, 1.0, 2.0, math.inf, "", "", published=3.0)))
    assert not FOUND.exceeds
    monkeypatch.setattr(redteam, "assess", lambda *_: above)
    assert main(["redteam", "median", *SMALL]) == 1
    assert capsys.readouterr().err == "fedrobust: found above a bound: median\n"


def test_lines() -> None:
    assert redteam.cells("median", FOUND)[:5] == ("median", "2.00", "3.00", "4.00", "-")
    line = redteam.markdown([redteam.Assessment("a | b", (FOUND,))]).splitlines()[2]
    assert line.startswith("| a \\| b | 2.00 |")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 0.5}, "eps must be in"),
        ({"eps": 0.05}, "0 malicious of 9"),
        ({"d": 0}, "0 parameters"),
        ({"budget": 49}, "budget must be at least"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"seed": -1}, "seeds must be at least 1"),
    ],
)
def test_nonsense(changes: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        setting(**changes)
