"""`fedrobust train` and `certify`: a model trained in one place, and how robust any model is."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrobust.cli.parsing import add_fields, command, given_fields, progress
from fedrobust.errors import InputError
from fedrobust.text import finite

if TYPE_CHECKING:
    from fedrobust.smoothing import Log

_TRAIN = """\
examples; the second one goes on with the model of a run, the last one learns from a few labels:
  fedrobust train --dataset mnist --model "lenet(32)" --objective "gaussian(0.5)" --to trained/noisy
  fedrobust train --from runs/first/checkpoints/round-000030.safetensors --objective "smoothadv(0.5)"
  fedrobust train --dataset mnist --labelled 0.01 --teacher trained/first --to trained/second
"""

_CERTIFY = """\
examples; the third one draws logs, of ours or of others, and lists them:
  fedrobust certify trained/noisy --sigma 0.5 --every 20
  fedrobust certify runs/first --sigma 0.5 --radius 0.5 --every 20
  fedrobust certify --plot trained/*/certified*.tsv --to radii.png
  fedrobust certify trained/noisy --sigma 0.5 --attack "pgd(0.5, steps=20)" --n 1000 --every 20
"""


def add(commands: Any, chosen: str) -> None:  # noqa: ANN401 (argparse keeps this type to itself)
    """Add the commands; their many options only to the one that was chosen."""
    train = command(commands, "train", "train a model on all the data in one place", _TRAIN, _train)
    if chosen == "train":
        from fedrobust.training import Course

        add_fields(train, Course, "the course")
    train.add_argument(
        "--from", dest="initial", type=Path, metavar="FILE", help="a checkpoint to start from"
    )
    train.add_argument(
        "--teacher",
        type=Path,
        metavar="FOLDER",
        help="of a training or run, whose model labels the images that --labelled leaves without",
    )
    train.add_argument(
        "--to", type=Path, metavar="FOLDER", help="begun again, it goes on [trained/DATASET]"
    )
    train.add_argument("--data-dir", type=Path, help="where datasets are [$FEDROBUST_DATA]")
    certify = command(
        commands,
        "certify",
        "how far from each test image a smoothed model keeps its answer",
        _CERTIFY,
        _certify,
    )
    certify.add_argument(
        "model", nargs="?", type=Path, metavar="FOLDER", help="of a run, or of a training"
    )
    if chosen == "certify":
        from fedrobust_laboratory.certification import Plan

        add_fields(certify, Plan, "what is asked")
    certify.add_argument("--checkpoint", type=Path, metavar="FILE", help="another one than the last")
    certify.add_argument(
        "--to",
        type=Path,
        metavar="FILE",
        help="the log, begun again, it goes on; with --plot, the picture [in FOLDER; radii.png]",
    )
    certify.add_argument("--plot", type=Path, nargs="+", metavar="LOG", help="list and draw these logs")
    certify.add_argument(
        "--attacked",
        type=Path,
        nargs="+",
        metavar="LOG",
        help="with --plot: logs of attacks, drawn too",
    )
    certify.add_argument(
        "--common", action="store_true", help="with --plot: of the images that all logs have only"
    )
    certify.add_argument(
        "--step", type=float, help="with --plot: between the radii of the table, above 0 [0.25]"
    )
    certify.add_argument("--ray-address", help="join this Ray cluster instead of starting one")
    certify.add_argument("--data-dir", type=Path, help="where datasets are [$FEDROBUST_DATA]")


def _train(options: argparse.Namespace) -> int:
    from fedrobust_laboratory.central import train_in

    from fedrobust.training import Course, Progress

    course = Course(**given_fields(options, Course))
    folder = options.to or Path("trained", course.dataset)
    with progress(course.epochs) as watch:
        watch("epoch 1")

        def ended(done: Progress) -> None:
            watch(f"epoch {done.epochs + 1}, loss {done.loss:.3f}")
            if options.json:
                line = {"epoch": done.epochs, "loss": done.loss}
                print(json.dumps(finite(line)), flush=True)  # noqa: T201

        starts = options.initial, options.teacher
        checkpoint, judged = train_in(folder, course, options.data_dir, *starts, ended)
    if options.json:
        print(json.dumps({"checkpoint": str(checkpoint), "accuracy": judged.accuracy}))  # noqa: T201
    else:
        print(f"{100 * judged.accuracy:.2f} % of the test images without noise; {checkpoint}")  # noqa: T201
    return 0


def _certify(options: argparse.Namespace) -> int:
    from fedrobust_laboratory.central import Trained
    from fedrobust_laboratory.certification import Asked, Plan, certify

    from fedrobust.smoothing import read_log

    if options.to is not None and options.to.is_dir():
        raise InputError(f"--to must name a file, got the folder {options.to}")
    if options.plot:
        return _plot(options)
    if options.attacked or options.common or options.step is not None:
        raise InputError("--attacked, --common and --step go with --plot LOG")
    if options.model is None:
        raise InputError("say whose model, by the folder of a run or of a training; or --plot LOG")
    plan = Plan(**given_fields(options, Plan))
    asked = Asked(Trained.find(options.model, options.checkpoint), plan, options.data_dir)
    what = "attacked" if plan.attack else "certified"
    log = options.to or options.model / f"{what}-{plan.sigma:g}.tsv"
    with progress(len(asked.numbers)) as watch:
        watch("")  # counts what has ended, and not what begins
        certify(asked, log, options.ray_address, lambda number: watch(f"image {number}"))
    name, found = log.name.removesuffix(".tsv"), read_log(log)
    if not plan.attack:
        _show({name: found}, log, as_json=options.json)
        return 0
    right = float(found.correct.mean())
    if options.json:
        line = {"log": name, "images": len(found), "attack": plan.attack, "abstained": found.abstained}
        print(json.dumps({**line, "accuracy_under_attack": right}))  # noqa: T201
    else:
        abstained = f"{100 * found.abstained:.1f} % abstained"
        print(  # noqa: T201
            f"{100 * right:.2f} % right under {plan.attack}, {abstained}, of {len(found)} images; {log}"
        )
    return 0


def _plot(options: argparse.Namespace) -> int:
    from fedrobust_laboratory.certification import (
        Plan,
        read_attacked,
        read_certified,
        require_alike,
    )
    from fedrobust_laboratory.radii import radii_figure
    from fedrobust_server import drawing

    from fedrobust.smoothing import common

    picture = options.to or Path("radii.png")
    places = {
        "FOLDER": options.model,
        "--checkpoint": options.checkpoint,
        "--data-dir": options.data_dir,
        "--ray-address": options.ray_address,
    }
    idle = [name for name, value in places.items() if value is not None]
    idle += [f"--{name}" for name in given_fields(options, Plan)]
    if idle:
        raise InputError(f"--plot draws logs as they are: leave out {', '.join(idle)}")
    if picture.suffix != ".png":
        raise InputError(f"--to {picture}: the picture is a PNG; name it {picture.with_suffix('.png')}")
    if options.step is not None and not 0.01 <= options.step < math.inf:
        raise InputError(f"--step must be 0.01 or more, got {options.step}")
    named = _named(options.plot)
    empty = [name for name, path in named.items() if _is_empty(path)]
    for name in empty if len(empty) < len(named) else []:  # none at all is an error
        print(f"left out {name}, which holds no image", file=sys.stderr)  # noqa: T201
        del named[name]
    logs = {name: read_certified(path) for name, path in named.items()}
    attacked = [read_attacked(path) for path in options.attacked or ()]
    if attacked and len(logs) > 1:
        raise InputError("--attacked is drawn beside one log, give --plot just that of the same model")
    for path, log in zip(options.attacked or (), attacked, strict=True):
        require_alike(next(iter(named.values())), path)
        if not options.common and set(log.idx) != set(next(iter(logs.values())).idx):
            raise InputError(f"{path} is of other images than {options.plot[0]}: add --common")
    if options.common:
        found = common([*logs.values(), *attacked])
        logs, attacked = dict(zip(logs, found, strict=False)), found[len(logs) :]
    figure = radii_figure(logs, attacked)
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(drawing.to_png(figure))
    _show(logs, picture, as_json=options.json, step=options.step)
    return 0


def _is_empty(path: Path) -> bool:
    """Whether a log has no lines, or its first one alone, as some published ones."""
    first, _, rest = path.read_bytes().partition(b"\n") if path.is_file() else (b"?", b"", b"")
    return not rest.strip() and (not first or first.startswith(b"idx"))


def _named(paths: list[Path]) -> dict[str, Path]:
    """Logs by the shortest names that tell them apart."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]).removesuffix(".tsv") for path in paths]
        if len(set(names)) == len(paths):
            return dict(zip(names, paths, strict=True))
    raise InputError("the same log is given twice")


def _show(logs: dict[str, Log], written: Path, *, as_json: bool, step: float | None = None) -> None:
    from fedrobust_laboratory.radii import BEST, STEP, radii_of, radii_table

    from fedrobust.smoothing import envelope

    step = step or STEP
    if not as_json:
        print(f"{radii_table(logs, step)}\n\n{written}")  # noqa: T201
        return

    def accuracy(some: list[Log]) -> dict[str, float]:
        radii = radii_of(some, step)
        return dict(zip(map(str, radii.tolist()), envelope(some, radii).tolist(), strict=True))

    for name, log in logs.items():
        figures = {
            "images": len(log),
            "average_radius": log.average_radius,
            "abstained": log.abstained,
        }
        print(json.dumps({"log": name, **figures, "certified_accuracy": accuracy([log])}))  # noqa: T201
    if len(logs) > 1:
        print(json.dumps({"log": BEST, "certified_accuracy": accuracy(list(logs.values()))}))  # noqa: T201
