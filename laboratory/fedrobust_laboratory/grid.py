"""A grid of runs: a run's configuration in which a value may be a list, which is tried item by item.

Where values belong together, such as a rate with each momentum, a grid has several such tables.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedrobust_server.config import RunConfig

from fedrobust import InputError
from fedrobust.text import choose
from fedrobust.training import Task
from fedrobust_laboratory.certification import parse_plan

NO_ATTACK = "none"
"""In the place of an attack: nobody is malicious."""
AXES = ("dataset", "split", "model", "clients", "eps", "momentum", "attack", "rule", "seed")
"""What is usually varied, in the order of the report."""

BEST = "best"
COMPARED = {
    "accuracy": "of the last model",
    "accuracy_last": "the mean over the last five rounds",
    BEST: "the best evaluation of the mean over the seeds",
}
"""What published accuracies may be, and in words."""

_TASK = [key.name for key in fields(Task)]
_ELSEWHERE = {
    *("run", "task", "limits", "start", "deadline", "wire", "compression", "durability"),
    *("shards", "gateways", "checkpoint_every", "outsiders"),
}
"""What makes no difference to a federation that is played, or, outsiders, follows from `insiders`."""
_RUN = [key.name for key in fields(RunConfig) if key.name not in _ELSEWHERE]
KEYS: Mapping[str, type] = {
    **{key: Task for key in _TASK if key not in _ELSEWHERE},
    **dict.fromkeys(_RUN, RunConfig),
}
"""What may be varied, and whose field it is."""


@dataclass(frozen=True)
class Grid:
    """Many runs.

    Attributes:
        title: of the report.
        tables: for every key of a run or of its task that is given, what is tried: every combination
            within a table.
        insiders: whether malicious clients hold a part of the data as the others do; otherwise the
            others divide everything, and malicious ones hold samples of it.
        certify: how the last model of every run is certified, as text, such as
            "plan(sigma=0.5, n=10000, every=20)"; empty: not at all.
        evaluations: how often a run's model is judged on the way, apart from its last five rounds.
        published: accuracies to be shown beside those of runs with the same values, as rows with some
            of the keys and `accuracy`, and perhaps `spread`, in percent. One that names no attack is of
            the worst of them.
        compared: which accuracy those are, of `COMPARED`.
    """

    title: str
    tables: Sequence[Mapping[str, Sequence[Any]]] = ({},)
    insiders: bool = True
    certify: str = ""
    evaluations: int = 10
    published: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    compared: str = "accuracy_last"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Grid:
        """Build from plain values: `run`, a table or several, and the attributes.

        Raises:
            InputError: an unknown key (the known ones are listed), a value of a wrong kind, or an empty
                list.
        """
        known = ("title", "run", "insiders", "certify", "evaluations", "published", "compared")
        for key in values:
            choose(key, known, "key of a grid")
        run = values.get("run", {})
        tables = [_lists(table) for table in (run if isinstance(run, list) else [run])]
        if not tables:
            raise InputError("the grid has no run; leave `run` out, or give at least one table")
        _check(values)
        rest = {key: value for key, value in values.items() if key != "run"}
        return cls(**{"title": "Attacks and rules", **rest}, tables=tables)

    def given(self, values: Mapping[str, Sequence[Any]]) -> Grid:
        """The same grid, but that these keys have other values.

        Published figures are left out where those are not the grid's own in every table: they would
        stand beside runs of another set-up. Other seeds are none, nor are other rules, which they name.
        Those of the worst attack are left out where some attacks are.
        """
        others = any(
            value not in table.get(key, ())
            for key, tried in values.items()
            if key not in ("rule", "seed")
            for value in tried
            for table in self.tables
        )
        fewer = any(
            set(table.get("attack", ())) - set(values.get("attack", table.get("attack", ())))
            for table in self.tables
        )
        tables = [{**table, **values} for table in self.tables]
        published = [e for e in self.published if not others and ("attack" in e or not fewer)]
        return replace(self, tables=tables, published=published)

    def settings(self) -> Iterator[dict[str, Any]]:
        """Every run of the grid, as plain values of all keys of a run and its task.

        Raises:
            InputError: a value is wrong, or there is an attack and nobody to carry it out.
        """
        for table in self.tables:
            names = sorted(table, key=lambda key: AXES.index(key) if key in AXES else -1)
            for chosen in itertools.product(*(table[name] for name in names)):
                yield self._setting(dict(zip(names, chosen, strict=True)))

    def _setting(self, given: Mapping[str, Any]) -> dict[str, Any]:
        attack = given.get("attack", NO_ATTACK)
        plain = configuration({**given, "attack": NO_ATTACK, "malicious": 0})
        # The relative slack is for products like 0.29 x 100, which is 28.999999999999996.
        assumed = int(plain.eps * plain.task.clients * (1 + 1e-9))
        malicious = 0 if attack == NO_ATTACK else given.get("malicious", assumed)
        if attack != NO_ATTACK and malicious == 0:
            raise InputError(_attackless(attack, plain, given))
        outsiders = 0 if self.insiders else malicious
        chosen = {**given, "attack": attack, "malicious": malicious, "outsiders": outsiders}
        config = configuration(chosen)
        setting = {**_plain(config.task, _TASK), **_plain(config, _RUN), "attack": attack}
        setting["evaluations"] = self.evaluations
        return {**setting, "certify": repr(parse_plan(self.certify))} if self.certify else setting


def _attackless(attack: str, plain: RunConfig, given: Mapping[str, Any]) -> str:
    """What is wrong with an attack in a run without malicious clients."""
    if "malicious" in given:
        return f"attack {attack!r} has no attacker: raise malicious, or leave the attack out"
    return (
        f"eps {plain.eps:g} of {plain.task.clients} clients is no attacker: "
        "raise eps or clients, or leave the attack out"
    )


def _check(values: Mapping[str, Any]) -> None:
    kinds = {"title": str, "insiders": bool, "certify": str, "evaluations": int, "published": list}
    for key, kind in kinds.items():
        if not isinstance(values.get(key, kind()), kind):
            raise InputError(f"{key} of a grid must be {kind.__name__}, got {values[key]!r}")
    if parse_plan(values.get("certify") or "plan").attack:
        raise InputError("certify of a grid certifies; an attack on images is for `fedrobust certify`")
    choose(values.get("compared", "accuracy_last"), COMPARED, "figure to compare")
    for entry in values.get("published", ()):
        if not isinstance(entry, dict) or not all(
            isinstance(figure, int | float)
            for figure in (entry.get("accuracy"), entry.get("spread", 0.0))
        ):
            raise InputError(
                "published must hold tables with an accuracy, and perhaps a spread, in percent, "
                f"got {entry!r}"
            )
        for key in entry.keys() - {"accuracy", "spread"}:
            choose(key, KEYS, "key of a published run")


def _lists(table: Any) -> dict[str, Sequence[Any]]:  # noqa: ANN401 (whatever the file has)
    if not isinstance(table, dict):
        raise InputError(f"run of a grid must be a table, or several, got {table!r}")
    for key in table:
        choose(key, KEYS, "key of a run")
    lists: dict[str, Sequence[Any]] = {
        key: value if isinstance(value, list) else [value] for key, value in table.items()
    }
    for key, tried in lists.items():
        if not tried:
            raise InputError(f"the grid tries nothing for {key}; give at least one value")
    return lists


def configuration(setting: Mapping[str, Any]) -> RunConfig:
    """The run of a setting.

    Raises:
        InputError: a value is wrong.
    """
    task = Task(**{key: value for key, value in setting.items() if key in _TASK})
    run = {key: value for key, value in setting.items() if key in _RUN}
    if run.get("attack") == NO_ATTACK:
        del run["attack"]
    return RunConfig(task=task, **run)


def _plain(config: object, keys: Sequence[str]) -> dict[str, Any]:
    return {key: getattr(config, key) for key in keys}


def read_grid(name: str) -> Grid:
    """A preset by its name, or a TOML file by its path.

    Raises:
        InputError: there is neither, or it is no grid.
    """
    path = Path(name)
    if path.suffix != ".toml":
        choose(name, presets(), "preset")
        text = (_PRESETS / f"{name}.toml").read_text()
        return Grid.from_dict(tomllib.loads(text))
    try:
        return Grid.from_dict(tomllib.loads(path.read_text()))
    except OSError as error:
        raise InputError(f"cannot read the grid {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None


_PRESETS = files("fedrobust_laboratory") / "presets"


def presets() -> dict[str, str]:
    """The grids that come along: name to title."""
    found = sorted(_PRESETS.iterdir(), key=lambda file: file.name)
    texts = {file.name.removesuffix(".toml"): file.read_text() for file in found}
    return {name: Grid.from_dict(tomllib.loads(text)).title for name, text in texts.items()}
