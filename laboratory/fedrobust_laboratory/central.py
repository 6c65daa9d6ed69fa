"""Central training in a folder, from which it goes on after a crash, and what can be certified."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tomlkit
import torch
from fedrobust_server.config import RunConfig, read_config
from fedrobust_server.runs import read_checkpoint, save_tensors
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedrobust import InputError
from fedrobust.data import load
from fedrobust.text import choose
from fedrobust.training import Course, Progress, Task, manifest, split_vector, train

_CONFIG, _STATE = "config.toml", "state.safetensors"


def train_in(
    folder: Path,
    course: Course,
    data_dir: Path | None = None,
    initial: Path | None = None,
    watch: Callable[[Progress], None] = lambda _progress: None,
) -> Path:
    """Train a model; one whose training was cut short goes on after its last epoch, to the same model.

    Args:
        folder: keeps `config.toml`, what going on needs, and in the end a checkpoint.
        course: what is trained, and how.
        data_dir: where datasets are; None reads FEDROBUST_DATA.
        initial: a checkpoint to start from; None draws the parameters.
        watch: is told of every epoch.

    Returns:
        The checkpoint.

    Raises:
        InputError: the folder holds something else, the data is not there, or as `read_checkpoint`.
    """
    dataset = load(course.dataset, data_dir)
    module = course.build_model(dataset)
    begun = Progress.from_model(module)
    if initial is not None:
        begun = dataclasses.replace(begun, model=read_checkpoint(initial, module))
    text = tomlkit.dumps({**dataclasses.asdict(course), "initial": str(initial or "")})
    path = folder / _CONFIG
    if path.exists():
        if path.read_text() != text:
            raise InputError(
                f"{folder} holds another training or run; choose another --to, or remove it"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if (folder / _STATE).exists():
        begun = _read(folder / _STATE)
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    at = begun
    for at in train(course, dataset, module, begun):
        _write(folder / _STATE, at)
        watch(at)
    checkpoint = folder / "checkpoints" / f"epoch-{course.epochs:06d}.safetensors"
    checkpoint.parent.mkdir(exist_ok=True)
    save_tensors(checkpoint, split_vector(at.model.cpu(), manifest(module)), {})
    return checkpoint


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
        dataset: the name of what it was trained on.
        model: its architecture, as text.
        seed: that its parameters were first drawn by.
        checkpoint: the file that holds its parameters.
    """

    dataset: str
    model: str
    seed: int
    checkpoint: Path

    @classmethod
    def find(cls, folder: Path, checkpoint: Path | None = None) -> Trained:
        """What a folder of a run or of a training holds.

        Args:
            folder: with `config.toml` and `checkpoints/`.
            checkpoint: another one than the last.

        Raises:
            InputError: there is no such folder, or no checkpoint in it yet.
        """
        values = read_config(folder / _CONFIG)
        if "task" in values:
            source: Task | Course = RunConfig.from_dict(values).task
        else:
            values.pop("initial", None)
            for key in values:
                choose(key, [field.name for field in dataclasses.fields(Course)], "configuration key")
            source = Course(**values)
        found = sorted((folder / "checkpoints").glob("*.safetensors"))
        if checkpoint is None and not found:
            raise InputError(f"there is no checkpoint in {folder / 'checkpoints'}: was it cut short?")
        return cls(source.dataset, source.model, source.seed, checkpoint or found[-1])
