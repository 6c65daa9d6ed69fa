"""`fedrobust redteam`, `compare`, `reproduce` and `data`: what is tried out, and on what."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import shlex
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrobust.cli.parsing import attribute_docs, command, complain, progress
from fedrobust.errors import InputError
from fedrobust.text import finite

if TYPE_CHECKING:
    from fedrobust.trials import Trial

_REDTEAM = """\
examples, the second one the table of docs/redteam.md:
  fedrobust redteam "nnm | filter" --clients 20 --eps 0.2
  fedrobust redteam --all --markdown
"""


_COMPARE = """\
examples, the first one lists what comes along:
  fedrobust compare
  fedrobust compare digits
  fedrobust compare --rule mean filter "nnm | trimmed_mean" --attack none alie ipm --eps 0.1 0.2
  fedrobust compare mnist --split iid --eps 0.2 --seed 0 1 2 --to comparisons/iid
"""


_REPRODUCE = """\
examples:
  fedrobust reproduce
  fedrobust reproduce robust-mean --quick
  fedrobust reproduce sever-regression --data-dir data
"""


_DATA = """\
examples:
  fedrobust data
  fedrobust data mnist --to data
  FEDROBUST_DATA=data fedrobust simulate --dataset mnist
"""


def add(commands: Any, chosen: str) -> None:  # noqa: ANN401 (argparse keeps this type to itself)
    """Add the commands; the many options of a grid only where that was chosen."""
    redteam = command(
        commands, "redteam", "the largest error that a search finds for a rule", _REDTEAM, _redteam
    )
    redteam.add_argument("rule", nargs="?", help='such as "nnm | filter"; none: all rules')
    redteam.add_argument("--all", action="store_true", help="a table of all rules")
    for name, kind, what in (
        ("clients", int, "how many clients, malicious ones included [20]"),
        ("eps", float, "the malicious fraction [0.2]"),
        ("parameters", int, "how many parameters an update has [100]"),
        ("budget", int, "how often a rule is tried for each seed [3000]"),
        ("seed", int, "the first seed; the same seed gives the same figures [0]"),
        ("seeds", int, "how many seeds; the worst counts [1]"),
    ):
        redteam.add_argument(f"--{name}", type=kind, help=what)
    redteam.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    compare = command(commands, "compare", "many attacks on many rules", _COMPARE, _compare)
    if chosen == "compare":
        _compare_options(compare)
    _reproduce_options(
        command(commands, "reproduce", "a published experiment, run again", _REPRODUCE, _reproduce)
    )
    data = command(
        commands, "data", "which datasets there are, and whether their files are in place", _DATA, _data
    )
    data.add_argument("name", nargs="?", help="of the dataset to fetch; none: list all")
    data.add_argument(
        *("--to", "--data-dir"),
        dest="data_dir",
        type=Path,
        metavar="DIR",
        help="where datasets are, or are to be, each in a folder of its own [$FEDROBUST_DATA]",
    )


def _compare_options(compare: argparse.ArgumentParser) -> None:
    """A flag for every key of a grid, each of which takes several values."""
    from fedrobust_laboratory.grid import KEYS

    compare.add_argument("grid", nargs="?", help="a preset, or a TOML file; flags override it")
    compare.add_argument("--data-dir", type=Path, help="where datasets are [$FEDROBUST_DATA]")
    compare.add_argument("--ray-address", help="join this Ray cluster instead of starting one")
    compare.add_argument(
        "--gpu-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of a GPU for each run, which trains on it: 0.25 has four runs at a time on one [0: none]",
    )
    compare.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="where runs, tables and pictures go; begun again, it goes on [comparisons/GRID]",
    )
    group = compare.add_argument_group("what is tried, one value or several")
    docs = {cls: (typing.get_type_hints(cls), attribute_docs(cls)) for cls in set(KEYS.values())}
    for key, cls in KEYS.items():
        hints, texts = docs[cls]
        group.add_argument(
            f"--{key.replace('_', '-')}",
            dest=f"grid:{key}",
            nargs="+",
            type=hints[key],
            metavar=key.upper(),
            help=texts[key].replace("%", "%%"),
        )


def _reproduce_options(reproduce: argparse.ArgumentParser) -> None:
    reproduce.add_argument("name", nargs="?", help="of the experiment; none: list them")
    reproduce.add_argument("--quick", action="store_true", help="a smaller form, of two minutes at most")
    reproduce.add_argument("--seeds", type=int, help="how many for each setting [the form's own number]")
    reproduce.add_argument("--data-dir", type=Path, help="where datasets are [$FEDROBUST_DATA]")
    reproduce.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="where trials, tables and figure go; begun again, it goes on [reproductions/NAME]",
    )


def _redteam(options: argparse.Namespace) -> int:
    import torch

    from fedrobust import redteam
    from fedrobust.attacks.search import HONEST

    if options.rule and options.all:
        raise InputError("name a rule or give --all, not both")
    fields = {"n": "clients", "d": "parameters", **{k: k for k in ("eps", "budget", "seed", "seeds")}}
    given = {field: getattr(options, flag) for field, flag in fields.items()}
    setting = redteam.Setting(**{k: v for k, v in given.items() if v is not None})
    torch.set_num_threads(1)  # small problems: threads only get in each other's way
    if options.rule:
        with progress(len(HONEST) * setting.seeds) as watch:
            assessments = [redteam.assess(options.rule, setting, watch)]
        lines = [redteam.cells(assessments[0].rule, found) for found in assessments[0].found]
    else:
        with progress(len(redteam.RULES)) as watch:
            assessments = redteam.assess_all(setting, watch=watch)
        lines = redteam.table(assessments)
    if options.json:
        for assessment in assessments:
            print(json.dumps(redteam.figures(assessment)))  # noqa: T201
    elif options.markdown:
        print(redteam.markdown(assessments))  # noqa: T201
    else:
        print(f"{setting}; lengths in units of sqrt(lambda_S)\n")  # noqa: T201
        print(redteam.aligned([redteam.HEADER, *lines]))  # noqa: T201
        for assessment in assessments:
            if assessment.refused:
                print(f"no answer: {assessment.refused}")  # noqa: T201
    above = [a.rule for a in assessments if a.exceeding]
    return complain(f"found above a bound: {', '.join(above)}", 1) if above else 0


def _compare(options: argparse.Namespace) -> int:
    from fedrobust_laboratory import page
    from fedrobust_laboratory.grid import Grid, presets, read_grid
    from fedrobust_laboratory.runner import compare

    given = {
        key.removeprefix("grid:"): value
        for key, value in vars(options).items()
        if key.startswith("grid:") and value is not None
    }
    if options.grid is None and not given:
        for name, title in presets().items():
            print(f"{name:<20} {title}")  # noqa: T201
        return 0
    grid = read_grid(options.grid) if options.grid else Grid("Attacks and rules")
    grid = grid.given(given)
    folder = options.to or Path("comparisons", Path(options.grid or "grid").stem)
    total = sum(1 for _ in grid.settings())
    with progress(total) as watch:
        watch("")  # counts what has ended, and not what begins

        def ended(trial: Trial) -> None:
            watch(f"{trial.setting['rule']}, {trial.setting['attack']}")

        trials = compare(grid, folder, options.data_dir, options.ray_address, ended, options.gpu_share)
    written = page.write(trials, grid, folder, shlex.join(["fedrobust", *options.arguments]))
    if options.json:
        for trial in trials:
            print(json.dumps(finite(trial.__dict__)))  # noqa: T201
    else:
        print(page.tables(trials, grid)[0])  # noqa: T201
        print(f"\n{written}, {folder / 'tables.md'}, {folder / 'runs.csv'}")  # noqa: T201
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from fedrobust.reproductions import CATALOG
    from fedrobust.text import choose

    if options.name is None:
        for name, experiment in CATALOG.items():
            print(f"{name:<20} {experiment.title}")  # noqa: T201
        return 0
    experiment = CATALOG[choose(options.name, CATALOG, "experiment")]
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("figures are drawn by matplotlib: pip install 'fedrobust[reproduce]'")
    if options.seeds is not None and options.seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {options.seeds}")
    folder = options.to or Path("reproductions", options.name + ("-quick" if options.quick else ""))
    plan = experiment.plan(quick=options.quick, seeds=options.seeds)
    with progress(len(plan)) as watch:
        trials = experiment.run(plan, folder, options.data_dir, watch)
    if options.json:
        for trial in trials:
            print(json.dumps(finite(trial.__dict__)))  # noqa: T201
    else:
        print(experiment.tables(trials))  # noqa: T201
        print(f"\n{folder / 'README.md'}, {folder / 'figure.png'}")  # noqa: T201
    return 0


def _data(options: argparse.Namespace) -> int:
    from fedrobust.data import sources
    from fedrobust.data.files import data_directory
    from fedrobust.text import choose

    data_dir = data_directory(options.data_dir)
    if options.name is None:
        states = [sources.look(source, data_dir) for source in sources.SOURCES.values()]
        states.insert(0, sources.State("digits", sources.IN_PLACE, "(comes with scikit-learn)"))
        for state in states:
            text = f"{state.state}: {state.damaged}" if state.damaged else state.state
            line = f"{state.name:<15} {text:<35} {state.folder}".rstrip()
            print(json.dumps(dataclasses.asdict(state)) if options.json else line)  # noqa: T201
        return int(any(state.damaged for state in states))
    source = sources.SOURCES[choose(options.name, sources.SOURCES, "dataset to fetch")]
    if data_dir is None:
        raise InputError("say where datasets are to be, with --to or FEDROBUST_DATA")
    with progress(len(source.downloads)) as watch:
        written = sources.fetch(source, data_dir, watch=watch)
    state = sources.look(source, data_dir)
    if options.json:
        print(json.dumps({**dataclasses.asdict(state), "written": list(map(str, written))}))  # noqa: T201
    else:
        for path in written:
            print(f"wrote {path}")  # noqa: T201
        print(f"{state.name} is {state.state}: {state.folder}")  # noqa: T201
    return 0
