"""Central training in a folder, from which it goes on after a crash, and what can be certified."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from fedrobust_server.config import RunConfig, read_config
from fedrobust_server.runs import read_checkpoint, save_tensors
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedrobust import InputError
from fedrobust.data import Dataset, load
from fedrobust.devices import accelerator
from fedrobust.text import choose
from fedrobust.training import (
    Course,
    Evaluation,
    Progress,
    Task,
    evaluate,
    labelled,
    load_vector,
    manifest,
    split_vector,
    to_vector,
    train,
)

_CONFIG, _STATE = "config.toml", "state.safetensors"
_ORIGINS = ("initial", "teacher", "initial_sha256", "teacher_sha256")
"""What a configuration says beside its course."""


def train_in(
    folder: Path,
    course: Course,
    data_dir: Path | None = None,
    initial: Path | None = None,
    teacher: Path | None = None,
    watch: Callable[[Progress], None] = lambda _progress: None,
) -> tuple[Path, Evaluation]:
    """Train a model; one whose training was cut short goes on after its last epoch, to the same model.

    Args:
        folder: keeps `config.toml`, what going on needs, and in the end a checkpoint.
        course: what is trained, and how.
        data_dir: where datasets are; None reads FEDROBUST_DATA.
        initial: a checkpoint to start from; None draws the parameters.
        teacher: the folder of a training or run, whose model labels the images whose labels are not
            used; None leaves them out.
        watch: is told of every epoch.

    Returns:
        The checkpoint, and how its model does on the test images, without noise.

    Raises:
        InputError: the folder holds something else, or what is left of it; the data is not there, a
            teacher has nothing to label, or as `Trained.find` and `read_checkpoint`.
    """
    dataset = load(course.dataset, data_dir)
    if teacher is not None and course.labelled == 1:
        raise InputError(f"all labels are used, so {teacher} has none to give: set --labelled below 1")
    guide = None if teacher is None else Trained.find(teacher).module(dataset)
    dataset = labelled(course, dataset, guide)
    module = course.build_model(dataset)
    at = Progress.from_model(module)
    if initial is not None:
        at = dataclasses.replace(at, model=read_checkpoint(initial, module))
    about = {**dataclasses.asdict(course), "initial": str(initial or ""), "teacher": str(teacher or "")}
    if initial is not None:
        about["initial_sha256"] = fingerprint(at.model)
    if guide is not None:
        about["teacher_sha256"] = fingerprint(to_vector(guide))
    _refuse_remains(folder)
    claim(folder / _CONFIG, about, f"{folder} holds another training or run", "the whole folder")
    if (folder / _STATE).exists():
        at = _read(folder / _STATE)
    module.to(accelerator())
    for at in train(course, dataset, module, at):  # noqa: B020 (it goes on from where it is)
        _write(folder / _STATE, at)
        watch(at)
    module.to("cpu")
    checkpoint = folder / "checkpoints" / _name(course)
    checkpoint.parent.mkdir(exist_ok=True)
    save_tensors(checkpoint, split_vector(at.model.cpu(), manifest(module)), {})
    return checkpoint, evaluate(module, dataset.test_x, dataset.test_y)


def fingerprint(*tensors: Tensor) -> str:
    """The SHA-256, in hexadecimal, of what tensors in this machine's memory hold, in their order."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def claim(path: Path, about: Mapping[str, Any], otherwise: str, remove: str) -> None:
    """Write down what is worked on, where nothing is yet; what is there must be the same.

    Args:
        path: of a TOML file; it is whole or absent, whatever happens.
        about: plain values.
        otherwise: what the error says is wrong.
        remove: what it says to remove, to begin anew.

    Raises:
        InputError: the file says something else.
    """
    text = tomlkit.dumps(about)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.partial")
        fresh.write_text(text)
        fresh.replace(path)
    elif path.read_text() != text:
        raise InputError(f"{otherwise}, see {path}; choose another place with --to, or remove {remove}")


def _refuse_remains(folder: Path) -> None:
    """Raise `InputError` where nothing says any more of what training a state or a checkpoint is."""
    left = [path for path in (folder / _STATE, *folder.glob("checkpoints/*")) if path.exists()]
    if left and not (folder / _CONFIG).exists():
        raise InputError(
            f"{left[0]} is of a training whose {_CONFIG} is gone; choose another place with --to, or "
            "remove the whole folder"
        )


def _name(course: Course) -> str:
    """Of the checkpoint that a training ends with."""
    return f"epoch-{course.epochs:06d}.safetensors"


def _write(path: Path, progress: Progress) -> None:
    tensors = {"model": progress.model.cpu(), "velocity": progress.velocity.cpu()}
    save_tensors(path, tensors, {"epochs": str(progress.epochs), "loss": repr(progress.loss)})


def _read(path: Path) -> Progress:
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, str] = file.metadata() or {}
            model: Tensor = file.get_tensor("model")
            velocity: Tensor = file.get_tensor("velocity")
        return Progress(int(about["epochs"]), model, velocity, float(about.get("loss", math.nan)))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"cannot go on with {path}: {error}; remove it to begin anew") from None


@dataclass(frozen=True)
class Trained:
    """A model that was trained, by a federation or centrally.

    Attributes:
        source: what was trained, and on what.
        checkpoint: the file that holds its parameters.
    """

    source: Task | Course
    checkpoint: Path

    @classmethod
    def find(cls, folder: Path, checkpoint: Path | None = None) -> Trained:
        """What a folder of a run or of a training holds.

        Args:
            folder: with `config.toml` and `checkpoints/`.
            checkpoint: another one than a run's last, or than the one that a training ended with.

        Raises:
            InputError: there is no such folder, or no checkpoint in it yet.
        """
        values = read_config(folder / _CONFIG)
        if "task" in values:
            source: Task | Course = RunConfig.from_dict(values).task
        else:
            for key in _ORIGINS:
                values.pop(key, None)
            for key in values:
                choose(key, [field.name for field in dataclasses.fields(Course)], "configuration key")
            source = Course(**values)
        pattern = "*.safetensors" if isinstance(source, Task) else _name(source)
        found = sorted((folder / "checkpoints").glob(pattern))
        if checkpoint is None and not found:
            raise InputError(
                f"there is no checkpoint {pattern} in {folder / 'checkpoints'}: was it cut short?"
            )
        return cls(source, checkpoint or found[-1])

    def module(self, dataset: Dataset) -> nn.Module:
        """The model, with its parameters. Raises as `read_checkpoint`."""
        module = self.source.build_model(dataset)
        load_vector(module, read_checkpoint(self.checkpoint, module))
        return module
