"""What is done on a GPU, on a device that is pretended: see `pretended.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch

from fedrobust.data import load
from fedrobust.devices import accelerator, chosen
from fedrobust.errors import InputError

RUNS: dict[str, dict[str, Any]] = {
    "dense, momentum": {"momentum": 0.9, "attack": "optimal_ipm(6)"},
    "dense, decay": {"decay": 0.01, "proximal": 0.1, "split": "quantity(1.0)", "attack": "mimic"},
    "a row of the server's": {"rule": "fltrust", "root": 50, "attack": "label_flip"},
    "on a leash": {"attack": "backdoor(alpha=0.7)"},
    "convolutions": {"model": "cnn(2)", "attack": "backdoor(parts=2)"},
    "edge case": {"model": "softmax", "attack": "edge_case(1, 7)"},
    "noise": {"model": "lenet(2)", "objective": "gaussian(0.5)"},
    "smoothadv": {"objective": "smoothadv(0.5, m=2, attack='pgd(1.0, steps=2)')"},
    "white-box": {"attack": "adaptive", "rule": "trimmed_mean"},
}
PLANS = {
    "certify": "",
    "one radius": "radius=0.1",
    "rounded": "noise='rounded'",
    "attack": "attack='pgd(0.3, steps=2)', m=4",
    "attack in levels": "attack='ddn(0.3, steps=2)', m=4, noise='rounded'",
}


def played(values: dict[str, Any], device: torch.device) -> dict[str, Any]:
    from fedrobust_laboratory.grid import configuration  # noqa: PLC0415
    from fedrobust_laboratory.measure import measure  # noqa: PLC0415

    task = {"dataset": "digits", "model": "mlp(8)", "clients": 6, "rounds": 3, "steps": 2, "batch": 8}
    given = {**task, "rule": "filter", "malicious": 2, "eps": 0.34, **values}
    return measure(configuration(given), load("digits").to(device), evaluations=2)


def certified(plan: str, device: torch.device) -> list[tuple[Any, ...]]:
    from fedrobust_laboratory.certification import parse_plan  # noqa: PLC0415

    from fedrobust.training import Course, Progress, train  # noqa: PLC0415

    course = Course("digits", "lenet(2)", epochs=1, objective="gaussian(0.25)")
    dataset = load("digits")
    module = course.build_model(dataset).to(device)
    list(train(course, dataset, module, Progress.from_model(module)))
    asked = parse_plan(f"plan(sigma=0.25, n=200, n0=20, batch=50{', ' * bool(plan)}{plan})")
    classifier = asked.classifier(dataset.normalisation.of_pixels(module), dataset.classes)
    entries = asked.ask(classifier, dataset, range(0, 30, 3))
    return [(e.idx, e.label, e.predict, e.radius) for e in entries]


def mixed(device: torch.device) -> float:
    return float((torch.ones(2).to(device) + torch.ones(2)).sum())


WORK = {
    **{name: partial(played, values) for name, values in RUNS.items()},
    **{name: partial(certified, plan) for name, plan in PLANS.items()},
}


@pytest.fixture(scope="module")
def differences() -> dict[str, str]:
    """Of all work, in a process of its own, since torch cannot forget a device."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", WORK)
def test_a_device_comes_to_what_the_processor_comes_to(differences: dict[str, str], name: str) -> None:
    assert not differences[name], differences[name]


def test_the_pretended_device_refuses_what_a_gpu_refuses(differences: dict[str, str]) -> None:
    assert "on two devices" in differences["mixed"]


def test_without_a_gpu_it_is_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert accelerator() == chosen(gpu=False) == torch.device("cpu")
    with pytest.raises(InputError, match="torch sees no GPU"):
        chosen(gpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert accelerator() == chosen(gpu=True) == torch.device("cuda")
    assert chosen(gpu=False) == torch.device("cpu")


def _all() -> None:
    import pretended  # noqa: PLC0415

    torch.set_num_threads(1)
    pretended.set_up()
    tried = {**WORK, "mixed": mixed}
    found = {name: pretended.difference(work) for name, work in tried.items()}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _all()
