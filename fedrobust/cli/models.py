"""`fedrobust train` and `certify`: a model trained in one place, and how robust any model is."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrobust.cli.parsing import attribute_docs, command, progress
from fedrobust.errors import InputError

if TYPE_CHECKING:
    from fedrobust.smoothing import Log
    from fedrobust.text import Textual

_TRAIN = """\
examples, the second one goes on with the model of a run:
  fedrobust train --dataset mnist --model "lenet(32)" --objective "gaussian(0.5)" --to trained/noisy
  fedrobust train --from runs/first/checkpoints/round-000030.safetensors --objective "smoothadv(0.5)"
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

        _fields(train, Course, "the course")
    train.add_argument(
        "--from", dest="initial", type=Path, metavar="FILE", help="a checkpoint to start from"
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

        _fields(certify, Plan, "what is asked")
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
    certify.add_argument("--ray-address", help="join this Ray cluster instead of starting one")
    certify.add_argument("--data-dir", type=Path, help="where datasets are [$FEDROBUST_DATA]")


def _fields(parser: argparse.ArgumentParser, cls: type[Textual], title: str) -> None:
    """A flag for every field, described by the class's own docstring."""
    group = parser.add_argument_group(title)
    hints, texts = typing.get_type_hints(cls), attribute_docs(cls)
    for field in dataclasses.fields(cls):
        flag: dict[str, Any] = {"type": hints[field.name], "metavar": field.name.upper()}
        if hints[field.name] is bool:
            flag = {"action": "store_const", "const": True}
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=f"field:{field.name}",
            help=f"{texts[field.name]} [{field.default}]".replace("%", "%%"),
            **flag,
        )


def _given(options: argparse.Namespace) -> dict[str, Any]:
    return {
        key.removeprefix("field:"): value
        for key, value in vars(options).items()
        if key.startswith("field:") and value is not None
    }


def _train(options: argparse.Namespace) -> int:
    from fedrobust_laboratory.central import train_in

    from fedrobust.training import Course, Progress

    course = Course(**_given(options))
    folder = options.to or Path("trained", course.dataset)
    with progress(course.epochs) as watch:
        watch("epoch 1")

        def ended(done: Progress) -> None:
            watch(f"epoch {done.epochs + 1}, loss {done.loss:.3f}")
            if options.json:
                print(json.dumps({"epoch": done.epochs, "loss": done.loss}), flush=True)  # noqa: T201

        checkpoint = train_in(folder, course, options.data_dir, options.initial, ended)
    accuracy = _accuracy(course, checkpoint, options.data_dir)
    if options.json:
        print(json.dumps({"checkpoint": str(checkpoint), "accuracy": accuracy}))  # noqa: T201
    else:
        print(f"{100 * accuracy:.2f} % of the test images without noise; {checkpoint}")  # noqa: T201
    return 0


def _accuracy(course: Any, checkpoint: Path, data_dir: Path | None) -> float:  # noqa: ANN401
    from fedrobust_server.runs import read_checkpoint

    from fedrobust.data import load
    from fedrobust.training import evaluate, load_vector

    dataset = load(course.dataset, data_dir)
    module = course.build_model(dataset)
    load_vector(module, read_checkpoint(checkpoint, module))
    return evaluate(module, dataset.test_x, dataset.test_y).accuracy


def _certify(options: argparse.Namespace) -> int:
    from fedrobust_laboratory.central import Trained
    from fedrobust_laboratory.certification import Plan, certify

    from fedrobust.data import load
    from fedrobust.smoothing import Entry, read_log

    if options.plot:
        return _plot(options)
    if options.model is None:
        raise InputError("say whose model, by the folder of a run or of a training; or --plot LOG")
    plan = Plan(**_given(options))
    trained = Trained.find(options.model, options.checkpoint)
    what = "attacked" if plan.attack else "certified"
    log = options.to or options.model / f"{what}-{plan.sigma:g}.tsv"
    total = -(-len(load(trained.dataset, options.data_dir).test_y) // plan.every)
    with progress(total) as watch:
        watch("")  # counts what has ended, and not what begins

        def ended(entry: Entry) -> None:
            watch(f"image {entry.idx}")

        certify(trained, plan, log, options.data_dir, options.ray_address, ended)
    _show({log.stem: read_log(log)}, log, as_json=options.json)
    return 0


def _plot(options: argparse.Namespace) -> int:
    from fedrobust_laboratory.radii import radii_figure
    from fedrobust_server import drawing

    from fedrobust.smoothing import read_log

    logs = {name: read_log(path) for name, path in _named(options.plot).items()}
    attacked = [read_log(path) for path in options.attacked or ()]
    if attacked and len(logs) > 1:
        raise InputError("--attacked is drawn beside one log, give --plot just that of the same model")
    picture = options.to or Path("radii.png")
    figure = radii_figure(logs, dict.fromkeys(logs, attacked) if attacked else None)
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(drawing.to_png(figure))
    _show(logs, picture, as_json=options.json)
    return 0


def _named(paths: list[Path]) -> dict[str, Path]:
    """Logs by the shortest names that tell them apart."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.with_suffix("").parts[-parts:]) for path in paths]
        if len(set(names)) == len(paths):
            return dict(zip(names, paths, strict=True))
    raise InputError("the same log is given twice")


def _show(logs: dict[str, Log], written: Path, *, as_json: bool) -> None:
    from fedrobust_laboratory.radii import STEP, radii_table

    from fedrobust.smoothing import certified_accuracy

    if not as_json:
        print(f"{radii_table(logs)}\n\n{written}")  # noqa: T201
        return
    for name, log in logs.items():
        radii = [STEP * i for i in range(int(log.radius.max() / STEP) + 1)]
        line = {
            "log": name,
            "images": len(log),
            "average_radius": log.average_radius,
            "abstained": log.abstained,
            "certified_accuracy": dict(
                zip(map(str, radii), certified_accuracy(log, radii).tolist(), strict=True)
            ),
        }
        print(json.dumps(line))  # noqa: T201
