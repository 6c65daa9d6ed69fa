"""Whole simulated rounds beside each other: the floor, ours, Flower's simulation engine, ByzFL's loop.

    python -m benchmarks.simulations --data-dir data

Each contestant runs in a process of its own, in turns. The floor is one batched pass, forward and
backward, over as many examples as a round's clients train on. Ours are a federation that is played in
one process, as `fedrobust compare` does, and one on Ray, as `fedrobust simulate` does with two workers,
which also keeps a ledger and judges every model. Starting is not counted, nor is the first round.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from fedrobust_server.config import RunConfig

from benchmarks import contestants
from benchmarks.contestants import Contestant, Times, alone
from benchmarks.peers import NEEDS, installed
from fedrobust.data import load
from fedrobust.training import Task

_MB = 1e6


@dataclass(frozen=True)
class Setting:
    """A federation, and who runs it.

    Attributes:
        title: what it is.
        config: of the run.
        targets: how many times the floor's time ours may take, and how many times faster than each peer
            they are to be; 0 where nothing is asked.
        watched: whether memory is looked at.
    """

    title: str
    config: RunConfig
    targets: Mapping[str, float]
    watched: bool = False


_OURS: dict[str, Contestant] = {"play": contestants.play, "simulate": contestants.simulated}
CONTESTANTS: dict[str, Contestant] = {
    "floor": contestants.floor,
    **_OURS,
    "Flower": contestants.flower,
    "ByzFL": contestants.byzfl,
}
_QUICK = "dense", "byzfl"
_PACKAGES = {"Flower": "flwr", "ByzFL": "byzfl"}


def settings(rounds: int, quick: bool) -> dict[str, Setting]:
    """What is run, by a short name."""
    dataset = "benchmarks.contestants:wide_digits" if quick else "mnist"
    share = 10 if quick else 1
    task = Task(dataset=dataset, model="mlp(32)", clients=200 // share, steps=5, batch=32)
    dense = RunConfig(task=task, rule="trimmed_mean", eps=0.2, rounds=rounds)
    cnn = replace(dense, task=replace(task, model="cnn(16)", clients=50 // share))
    published = replace(
        task,
        model="fedrobust.training.published:byzfl_cnn",
        clients=50 // share,
        steps=1,
        batch=25,
        momentum=0.9,
    )
    many = replace(dense, task=replace(task, clients=1000 // share))
    return {
        "dense": Setting("a dense network 784-32-10", dense, {"floor": 3.0, "Flower": 20.0}),
        "cnn": Setting("cnn(16)", cnn, {"floor": 1.3, "Flower": 4.0}),
        "byzfl": Setting(
            "ByzFL's network for MNIST, a fifth more malicious clients",
            contestants.byzfl_run(published, rounds),
            {"ByzFL": 4.0},
        ),
        "many": Setting("many clients of the dense network", many, {"floor": 0.0}, watched=True),
    }


def run(
    setting: Setting, names: Sequence[str], data_dir: Path | None, threads: int, turns: int
) -> dict[str, Times]:
    """Those of the contestants, in turns, that the setting asks for and that are installed."""
    asked = [name for name in names if name in (*_OURS, *setting.targets)]
    names = [n for n in asked if n not in _PACKAGES or installed(_PACKAGES[n]) is not None]
    found: dict[str, Times] = {}
    for _ in range(turns):
        for name in names:
            times = alone(CONTESTANTS[name], setting.config, data_dir, threads, setting.watched)
            if name in found:
                times.seconds += found[name].seconds
                times.peak = max(times.peak, found[name].peak)
            found[name] = times
    return found


def report(setting: Setting, found: Mapping[str, Times]) -> str:
    """Each contestant's round, and ours as multiples."""
    config, task = setting.config, setting.config.task
    medians = {name: statistics.median(times.seconds) for name, times in found.items()}
    who = f"{task.clients} clients, {config.malicious} of them malicious"
    work = f"{task.steps} x {task.batch} examples each; {config.rule}, eps {config.eps:.3g}"
    lines = [f"{setting.title}: {who}, {work}"]
    for name, times in found.items():
        low, high = min(times.seconds), max(times.seconds)
        line = f"  {name:<9}{_ms(medians[name])} ms a round ({_ms(low)} to {_ms(high)})"
        if times.parts:
            line += "; " + ", ".join(f"{what} {_ms(part)}" for what, part in times.parts.items())
        lines.append(line + (f"; {times.peak / _MB:.0f} MB at the peak" if times.peak else ""))
    for name, target in setting.targets.items():
        if name in found:
            lines += ["  " + _ratio(own, name, medians, target) for own in _OURS if own in found]
        elif name in _PACKAGES and installed(_PACKAGES[name]) is None:
            lines.append(f"  {name} is not installed; {NEEDS}")
    models = [times.model for times in found.values() if times.model is not None]
    if len(models) == 2:
        gap = float((models[0] - models[1]).abs().max())
        lines.append(f"  the models of play and of Flower differ by at most {gap:.1e}")
    return "\n".join(lines)


def _ratio(own: str, other: str, medians: Mapping[str, float], target: float) -> str:
    if other == "floor":
        ratio, said, good = medians[own] / medians[other], "times the floor", "at most"
        met = ratio <= target
    else:
        ratio, said, good = medians[other] / medians[own], f"times as fast as {other}", "at least"
        met = ratio >= target
    asked = f", {good} {target:g} are asked: {'met' if met else 'not met'}" if target else ""
    return f"{own} is {ratio:.2f} {said}{asked}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all of it, and print what comes of it as it comes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulations", description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="where MNIST is [$FEDROBUST_DATA]")
    names = list(settings(1, quick=True))
    parser.add_argument("--quick", action="store_true", help="two settings, few clients, digits")
    parser.add_argument("--only", nargs="+", choices=names, help="these settings [all]")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, help="of each in each turn, the first one included [12]")
    parser.add_argument("--turns", type=int, help="[2]")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args(arguments)
    rounds, turns = given.rounds or (3 if given.quick else 12), given.turns or (1 if given.quick else 2)
    chosen = settings(rounds, given.quick)
    load(chosen["dense"].config.task.dataset, given.data_dir)  # what all would fail on, told at once
    print(f"{turns} x {rounds - 1} rounds, {given.threads} threads, torch {torch.__version__}", end="")
    print("".join(f", {name} {installed(package)}" for name, package in _PACKAGES.items()))
    for name in given.only or (_QUICK if given.quick else chosen):
        found = run(chosen[name], given.contestants, given.data_dir, given.threads, turns)
        print(report(chosen[name], found), flush=True)


if __name__ == "__main__":
    main()
