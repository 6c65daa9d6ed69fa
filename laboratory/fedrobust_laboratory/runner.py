"""Runs a grid on Ray: each run in one process, as many at a time as there are cores."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import torch
from fedrobust_clients.simulated import gpus
from fedrobust_server import lifeline
from fedrobust_server.launch import start_ray

from fedrobust import InputError, __version__, devices
from fedrobust.data import Dataset, load
from fedrobust.trials import Setting, Trial, begun
from fedrobust_laboratory.certification import parse_plan
from fedrobust_laboratory.findings import REFUSED
from fedrobust_laboratory.grid import AXES, Grid, configuration
from fedrobust_laboratory.measure import measure

TRIALS = "trials.jsonl"
CURVES = ("curve", "certified")
"""Figures that are not one number."""
_LEAST = 1e-4
"""The least share of a GPU that Ray hands out."""


def compare(
    grid: Grid,
    folder: Path,
    data_dir: Path | None = None,
    ray_address: str | None = None,
    watch: Callable[[Trial], None] = lambda _trial: None,
    gpu_share: float = 0.0,
) -> list[Trial]:
    """Run all of a grid but what the folder has already; one that was cut short goes on.

    A run that cannot be (such as krum with too few clients) is kept with the reason, `refused`, in the
    place of figures. It is tried again when the grid goes on: the reason may have been a missing file.

    Args:
        grid: what to run.
        folder: keeps `trials.jsonl`, a line a run as it ends, and `runs.csv`, a row a run.
        data_dir: where datasets are; None reads FEDROBUST_DATA.
        ray_address: a Ray cluster to join; None starts one on this machine.
        watch: is told of every run as it has ended, those of an earlier time first.
        gpu_share: of a GPU, that a run takes, 0.25 for four at a time on each; 0: none.

    Returns:
        The runs in the grid's order.

    Raises:
        InputError: a value is wrong, the data is not there, no run of the grid can be, Ray knows of no
            GPU, or `trials.jsonl` holds something else or trials that another version of fedrobust ran.
    """
    if gpu_share != 0 and not _LEAST <= gpu_share <= 1:
        raise InputError(f"gpu_share must be 0 or {_LEAST} .. 1, got {gpu_share}")
    version = _version(gpu_share > 0)
    plan = list({trial.key: trial for trial in map(_trial, grid.settings())}.values())
    for name in {planned.setting["dataset"] for planned in plan}:
        load(name, data_dir)  # what every run would fail on, told at once
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TRIALS
    kept = {k: trial for k, trial in begun(path, version).items() if REFUSED not in trial.figures}
    missing = [planned for planned in plan if planned.key not in kept]
    for planned in plan:
        if planned.key in kept:
            watch(kept[planned.key])
    if missing:
        with path.open("a") as file, start_ray(ray_address):
            for trial in _in_parallel(missing, data_dir, gpu_share):
                file.write(json.dumps(trial.__dict__) + "\n")
                file.flush()
                kept[trial.key] = trial
                watch(trial)
    done = [kept[planned.key] for planned in plan]
    write_csv(done, folder / "runs.csv")
    reasons = [trial.figures[REFUSED] for trial in done if REFUSED in trial.figures]
    if reasons and len(reasons) == len(done):
        raise InputError(f"no run of the grid can be; the first: {reasons[0]}")
    return done


def _trial(setting: Setting) -> Trial:
    rest = {key: value for key, value in setting.items() if key != "seed"}
    return Trial(rest, setting["seed"], {}, 0.0)


def _in_parallel(planned: Sequence[Trial], data_dir: Path | None, gpu_share: float) -> Iterator[Trial]:
    """The trials as they end, in whatever order."""
    # A process is for many runs, as without a GPU: to begin takes it longer than a run.
    remote: Any = ray.remote(num_cpus=1, num_gpus=gpu_share, max_calls=0, max_retries=3)(_run)
    data = None if data_dir is None else data_dir.resolve()
    if gpu_share:
        gpus()  # or Ray would wait for one
    # All at once would keep the driver busy.
    ahead = 2 * int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    left, waiting = iter(planned), list[Any]()
    while True:
        waiting += [remote.remote(t, data, gpu_share > 0) for t in islice(left, ahead - len(waiting))]
        if not waiting:
            return
        ended, waiting = ray.wait(waiting, timeout=lifeline.PAUSE)
        if not ended:
            lifeline.check()
        for run in ended:
            with lifeline.told("a run"):
                trial = ray.get(run)
            yield trial


def _version(on_gpu: bool) -> str:
    """What made a run's figures: a GPU draws and rounds otherwise, and is not to be mixed in."""
    return f"{__version__} on a GPU" if on_gpu else __version__


@cache
def _load(name: str, data_dir: Path | None, device: torch.device) -> Dataset:
    return load(name, data_dir).to(device)


def _run(planned: Trial, data_dir: Path | None, on_gpu: bool) -> Trial:
    torch.set_flush_denormal(True)  # as the server's shards do
    torch.set_num_threads(1)
    began = time.perf_counter()
    device = devices.chosen(gpu=on_gpu)
    try:
        config = configuration({**planned.setting, "seed": planned.seed})
        plan = parse_plan(planned.setting["certify"]) if "certify" in planned.setting else None
        dataset = _load(config.task.dataset, data_dir, device)
        figures = measure(config, dataset, planned.setting["evaluations"], plan)
    except InputError as error:
        figures = {REFUSED: str(error)}
    return Trial(planned.setting, planned.seed, figures, time.perf_counter() - began, _version(on_gpu))


def write_csv(trials: Sequence[Trial], path: Path) -> None:
    """A row a run: its values, those usually varied first, then its figures."""
    settings = [{**trial.setting, "seed": trial.seed} for trial in trials]
    figures = [{k: v for k, v in trial.figures.items() if k not in CURVES} for trial in trials]
    keys = dict.fromkeys([*AXES, *(key for setting in settings for key in setting)])
    names = dict.fromkeys(key for row in figures for key in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*keys, *names, "seconds"])
        writer.writeheader()
        for setting, row, trial in zip(settings, figures, trials, strict=True):
            writer.writerow({**setting, **row, "seconds": round(trial.seconds, 3)})
