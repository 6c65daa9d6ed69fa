"""Spectral signatures against a planted backdoor: train, detect, drop, train again.

Tran, Li, Madry, NeurIPS 2018 (arXiv 1811.00636), section 4 and table 1; the authors' code stamps images
of one class, gives them another's label, and puts them in the place of the clean ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedrobust.attacks import Trigger
from fedrobust.data import Dataset, load
from fedrobust.reproductions.experiment import Experiment
from fedrobust.statistics.spectral_signatures import SpectralSignatures
from fedrobust.trials import Setting, Trial, grouped, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = {"one direction": None, "filter": "filter", "QUE": "entropy_filter"}
"""What examples are dropped by: the paper's score, and two of this library's."""
_PAIRS = {"mnist": (7, 1), "cifar10": (9, 4), "digits": (3, 0)}  # as in the code: truck to deer


@dataclass(frozen=True)
class Planted:
    """A training set with a backdoor.

    Attributes:
        x: images.
        y: labels.
        poisoned: (n,) bool, which images were stamped.
    """

    x: Tensor
    y: Tensor
    poisoned: Tensor


def plant(data: Dataset, source: int, trigger: Trigger, fraction: float, seed: int) -> Planted:
    """Stamp images of the source class and call them the target's.

    Args:
        data: the clean set.
        source: the class that images are taken from.
        trigger: the stamp, and the label that it is to mean.
        fraction: of the target's examples, how many are stamped.
        seed: chooses them.
    """
    count = round(fraction * int((data.train_y == trigger.target).sum()))
    members = torch.nonzero(data.train_y == source).flatten()
    chosen = members[torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))[:count]]
    x, y = data.train_x.clone(), data.train_y.clone()
    x[chosen], y[chosen] = trigger.stamp(data.train_x[chosen]), trigger.target
    poisoned = torch.zeros(len(y), dtype=torch.bool)
    poisoned[chosen] = True
    return Planted(x, y, poisoned)


def network(shape: tuple[int, int, int], classes: int, seed: int) -> nn.Sequential:
    """A small convolutional network; what enters its last layer is the representation, (128,)."""
    channels, height, width = shape
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * (height // 4) * (width // 4), 128), nn.ReLU()),
            nn.Linear(128, classes),
        )


def train(x: Tensor, y: Tensor, classes: int, epochs: int, seed: int) -> nn.Sequential:
    """SGD with momentum 0.9 and weight decay 2e-4, batches of 128, a rate that falls from 0.05 to 0."""
    module = network((x.shape[1], x.shape[2], x.shape[3]), classes, seed)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=2e-4)
    steps = epochs * -(-len(y) // 128)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(y), generator=generator), 128):
            optimiser.zero_grad()
            torch.autograd.backward(cross_entropy(module(x[batch]), y[batch]))
            optimiser.step()
            schedule.step()
    return module


@torch.no_grad()
def outputs(module: nn.Module, x: Tensor) -> Tensor:
    """What a module makes of images, a thousand at a time."""
    return torch.cat([module(part) for part in torch.split(x, 1000)])


def judge(module: nn.Module, data: Dataset, source: int, trigger: Trigger) -> tuple[float, float]:
    """Accuracy on the test set, and the part of the source's images that the stamp turns."""
    natural = (outputs(module, data.test_x).argmax(1) == data.test_y).double().mean()
    stamped = trigger.stamp(data.test_x[data.test_y == source])
    turned = (outputs(module, stamped).argmax(1) == trigger.target).double().mean()
    return 100 * float(natural), 100 * float(turned)


@lru_cache(maxsize=1)
def _data(name: str, examples: int, data_dir: Path | None) -> Dataset:
    """The first examples of a set; they come in no order."""
    data = load(name, data_dir)
    x, y = data.train_x[:examples], data.train_y[:examples]
    return replace(data, train_x=x, train_y=y)


def trial(setting: Setting, seed: int, data_dir: Path | None) -> Mapping[str, float]:
    """Train on the poisoned set, on the clean one, and on what each score leaves of the poisoned one."""
    name, fraction, epochs = setting["dataset"], setting["fraction"], setting["epochs"]
    data = _data(name, setting["examples"], data_dir)
    source, target = _PAIRS[name]
    trigger = Trigger(target, size=setting["pixels"])
    planted = plant(data, source, trigger, fraction, seed)

    def after(kept: Tensor) -> tuple[nn.Sequential, tuple[float, float]]:
        module = train(planted.x[kept], planted.y[kept], data.classes, epochs, seed)
        return module, judge(module, data, source, trigger)

    module, (natural, turned) = after(torch.ones(len(planted.y), dtype=torch.bool))
    clean = train(data.train_x, data.train_y, data.classes, epochs, seed)
    figures = {"poisons": float(planted.poisoned.sum()), "natural": natural, "turned": turned}
    figures["natural clean"], figures["turned clean"] = judge(clean, data, source, trigger)
    members = torch.nonzero(planted.y == target).flatten()
    seen = outputs(module[:-1], planted.x[members]).numpy()
    part = float(planted.poisoned[members].double().mean())
    for score, rule in SCORES.items():
        kept = torch.ones(len(planted.y), dtype=torch.bool)
        kept[members] = torch.from_numpy(SpectralSignatures(part, rule=rule).fit(seen).support_)
        figures[f"left {score}"] = float((planted.poisoned & kept).sum())
        _, (figures[f"natural {score}"], figures[f"turned {score}"]) = after(kept)
    return figures


def settings(quick: bool) -> list[Setting]:
    """MNIST and CIFAR-10, 5 % and 10 % of the target's images stamped; quick: MNIST alone, less of it.

    Of either a part: five networks a trial, three seeds, are to train in some two hours on one core.
    """
    if quick:
        small = {"dataset": "mnist", "fraction": 0.1, "pixels": 2, "examples": 10_000, "epochs": 2}
        return [small]
    forms = {"mnist": (20_000, 2, 2), "cifar10": (15_000, 6, 3)}
    return [
        {"dataset": name, "fraction": f, "pixels": pixels, "examples": examples, "epochs": epochs}
        for name, (examples, epochs, pixels) in forms.items()
        for f in (0.05, 0.1)
    ]


def _group(setting: Setting) -> tuple[str, float]:
    return setting["dataset"], setting["fraction"]


def _row(trials: Sequence[Trial], group: tuple[str, float], figures: Sequence[str]) -> list[str]:
    return [str(grouped(trials, _group, figure)[group]) for figure in figures]


def tables(trials: Sequence[Trial]) -> str:
    """Accuracy, and the success of the backdoor, before and after."""
    pages = []
    for group in dict.fromkeys(_group(t.setting) for t in trials):
        rows = [
            ["clean data", "", *_row(trials, group, ["natural clean", "turned clean"])],
            ["poisoned", *_row(trials, group, ["poisons", "natural", "turned"])],
            *(
                [f"dropped by {s}", *_row(trials, group, [f"left {s}", f"natural {s}", f"turned {s}"])]
                for s in SCORES
            ),
        ]
        header = ["trained on", "poisons in it", "accuracy, %", "stamped images turned, %"]
        name, fraction = group
        pages.append(f"{name}, {100 * fraction:g} % of the target's images\n\n{table(header, rows)}")
    return "\n\n".join(pages)


def draw(trials: Sequence[Trial], _data: Path | None = None) -> Figure:
    """How often the stamp turns an image: with the backdoor, after each way to drop, on clean data."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (only figures need it)

    groups = list(dict.fromkeys(_group(t.setting) for t in trials))
    bars = {"poisoned": "turned", **{s: f"turned {s}" for s in SCORES}, "clean data": "turned clean"}
    figure = Figure(figsize=(1.5 + 2.2 * len(groups), 3.6), layout="constrained")
    axes = figure.subplots()
    for i, (label, name) in enumerate(bars.items()):
        found = grouped(trials, _group, name)
        at = np.arange(len(groups)) + (i - 2) * 0.16
        heights, spreads = ([getattr(found[g], what) for g in groups] for what in ("mean", "spread"))
        axes.bar(at, heights, 0.15, yerr=spreads, label=label, capsize=2)
    axes.set_xticks(range(len(groups)), [f"{name}, {100 * f:g} %" for name, f in groups])
    axes.set_ylabel("stamped images turned, %")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


EXPERIMENT = Experiment(
    "Spectral signatures against a backdoor (Tran, Li, Madry, NeurIPS 2018, table 1)",
    settings,
    trial,
    tables,
    draw,
    seeds=(3, 1),
)
