"""`fedrobust train` and `certify` as users run them: killed, gone on with, and fed with nonsense."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedrobust_laboratory.central import Trained, train_in
from fedrobust_laboratory.certification import Asked, Plan, certify
from fedrobust_laboratory.grid import configuration, read_grid
from fedrobust_laboratory.measure import measure
from fedrobust_laboratory.play import play
from fedrobust_server.config import RunConfig, read_config
from fedrobust_server.runs import read_checkpoint
from safetensors.torch import load_file

from fedrobust.cli import main
from fedrobust.data import load
from fedrobust.errors import InputError
from fedrobust.smoothing import read_log
from fedrobust.training import Course, Task, load_vector

from .processes import COMMAND

COURSE = Course("digits", "lenet(4)", "gaussian(0.25)", epochs=8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "digits"
    train_in(folder, COURSE)
    return folder


def test_training_that_was_killed_goes_on_to_the_same_model(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    command = [*COMMAND, "train", "--dataset", "digits", "--model", "lenet(4)", "--objective"]
    command += ["gaussian(0.25)", "--epochs", "8", "--to", str(folder), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["epoch"] == 1
        os.killpg(process.pid, signal.SIGKILL)
    assert not list(folder.glob("checkpoints/*"))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0]["epoch"] > 1
    assert lines[-1]["accuracy"] > 0.8
    twin, ours = (load_file(f / "checkpoints" / "epoch-000008.safetensors") for f in (trained, folder))
    assert twin.keys() == ours.keys()
    assert all(torch.equal(twin[name], ours[name]) for name in twin)


def test_a_model_that_had_few_labels_teaches_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["train", "--dataset", "digits", "--labelled", "0.03", "--batch", "16", "--json"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*few, "--model", "softmax", "--epochs", "30", "--to", str(first)]) == 0
    taught = ["--model", "lenet(4)", "--objective", "trades('pgd(0.1, steps=1)', sigma=0.1)"]
    taught += ["--epochs", "2", "--teacher", str(first), "--to", str(second)]
    assert main([*few, *taught]) == 0
    alone, student = (
        json.loads(line)["accuracy"]
        for line in capsys.readouterr().out.splitlines()
        if "checkpoint" in line
    )
    assert student > alone > 0.5
    assert isinstance(Trained.find(second).source, Course)  # so that it can be certified


def test_what_is_printed_of_training_that_diverged_is_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--dataset", "digits", "--model", "softmax", "--epochs", "1"]
    arguments += ["--lr", "1e9", "--decay", "1e9"]
    assert main([*arguments, "--to", str(tmp_path), "--json"]) == 0
    first, _ = capsys.readouterr().out.splitlines()
    assert json.loads(first, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == {
        "epoch": 1,
        "loss": None,
    }


def test_certifying_that_was_killed_goes_on_to_the_same_log(
    ray_cluster: None, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also: a log is what one process finds by itself."""
    log = tmp_path / "log.tsv"
    arguments = ["certify", str(trained), "--sigma", "0.25", "--n", "5000", "--every", "9"]
    arguments += ["--to", str(log), "--json"]
    command = [*COMMAND, *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") > 2):
            assert process.poll() is None
            assert time.monotonic() < deadline, "no image is certified"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    early = log.read_text()
    with log.open("a") as file:
        file.write("9\t3\t")  # what a crash in the middle of a line leaves
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert log.read_text().startswith(early)

    dataset, plan, model = load("digits"), Plan(sigma=0.25, n=5000, every=9), Trained.find(trained)
    module = COURSE.build_model(dataset)
    load_vector(module, read_checkpoint(model.checkpoint, module))
    classifier = plan.classifier(dataset.normalisation.of_pixels(module), 10)
    expected = plan.ask(classifier, dataset, range(0, 360, 9))
    lines = [line.rpartition("\t")[0] for line in log.read_text().splitlines()[1:]]
    assert lines == [entry.line().rpartition("\t")[0] for entry in expected]
    assert answer["images"] == 40
    assert main([*arguments, "--seed", "1"]) == 2
    assert "is a log of another model or plan, or of other images, see" in capsys.readouterr().err
    assert answer["average_radius"] == read_log(log).average_radius > 0.2


def test_all_that_can_be_asked_is_answered(
    ray_cluster: None, trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = {}
    for name, asked in {
        "rounded": ["--noise", "rounded", "--precision", "bfloat16"],
        "attacked": ["--attack", "pgd(0.25, steps=5)", "--m", "4", "--naive", "--precision", "bfloat16"],
    }.items():
        log = tmp_path / f"{name}.tsv"
        arguments = ["certify", str(trained), "--sigma", "0.25", "--n", "1000", "--every", "9", "--json"]
        assert main([*arguments, *asked, "--to", str(log)]) == 0
        found[name] = read_log(log)
        told = json.loads(capsys.readouterr().out)
        assert told["images"] == 40
    assert told["attack"] == "pgd(0.25, steps=5)"
    assert told["accuracy_under_attack"] == found["attacked"].correct.mean()
    assert not {"certified_accuracy", "average_radius"} & told.keys()
    assert main([*arguments[:-1], *asked, "--to", str(log)]) == 0
    right = f"{100 * found['attacked'].correct.mean():.2f} % right under pgd(0.25, steps=5)"
    assert capsys.readouterr().out.startswith(right)
    plan = Plan(sigma=0.25, n=1000, every=9)
    correct, radius = answers(Asked(Trained.find(trained), plan, None))
    certain = (correct & (radius >= 0.25)).mean()
    early, settled = answers(Asked(Trained.find(trained), replace(plan, radius=0.25), None))
    assert abs((early & (settled == 0.25)).mean() - certain) < 0.1
    assert abs(found["rounded"].average_radius - (correct * radius).mean()) < 0.03
    assert certain <= found["attacked"].correct.mean() <= correct.mean()
    assert set(found["attacked"].radius) == {0.25}
    picture = tmp_path / "radii.png"
    logs = [str(tmp_path / f"{name}.tsv") for name in ("rounded", "attacked")]
    assert main(["certify", "--plot", logs[0], "--attacked", logs[1], "--to", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| rounded |" in capsys.readouterr().out


def test_images_that_are_rounded_after_an_attack_stay_in_its_ball(trained: Path) -> None:
    asked = Asked(
        Trained.find(trained), Plan(noise="rounded", attack="pgd(0.02, steps=3)", m=2, n=50), None
    )
    tried: list[torch.Tensor] = []
    asked.classifier.predict = lambda x, *_, **__: (tried.append(x), np.zeros(len(x), int))[1]  # type: ignore[method-assign]
    asked.plan.ask(asked.classifier, asked.dataset, range(8))
    clean = asked.dataset.normalisation.pixels(asked.dataset.test_x[:8])
    clean = (clean * 255).round() / 255
    assert 0 < (tried[0] - clean).flatten(1).norm(dim=1).max() < 0.02 + 1e-6


def test_the_batch_may_be_fixed_and_is_written_down(
    ray_cluster: None, trained: Path, tmp_path: Path
) -> None:
    classifier = Asked(Trained.find(trained), Plan(batch=120), None).classifier
    assert classifier.batch_size((1, 8, 8)) == 150
    log = tmp_path / "log.tsv"
    arguments = ["certify", str(trained), "--n", "100", "--every", "90", "--to", str(log)]
    assert main([*arguments, "--batch", "120"]) == 0
    assert read_config(tmp_path / "log.tsv.toml")["batch"] == 120
    assert main(arguments) == 2


def test_a_log_is_of_the_images_that_were_asked_about(
    ray_cluster: None, trained: Path, tmp_path: Path
) -> None:
    """Whatever the dataset is called by then."""
    log, asked = tmp_path / "log.tsv", Asked(Trained.find(trained), Plan(n=100, every=90), None)
    certify(asked, log)
    assert read_config(tmp_path / "log.tsv.toml")["network"] == "lenet(4)"
    for change in ({"test_x": asked.dataset.test_x.flip(0)}, {"test_y": asked.dataset.test_y.flip(0)}):
        other = replace(asked)
        other.__dict__["dataset"] = replace(asked.dataset, **change)
        with pytest.raises(InputError, match=r"or of other images, see .*log\.tsv\.toml"):
            certify(other, log)


def answers(asked: Asked) -> tuple[Any, Any]:
    """Who is right, and the radii, found in this process."""
    entries = asked.plan.ask(asked.classifier, asked.dataset, asked.numbers)
    return np.array([e.label == e.predict for e in entries]), np.array([e.radius for e in entries])


def test_a_federation_starts_from_a_checkpoint(trained: Path) -> None:
    dataset, checkpoint = load("digits"), trained / "checkpoints" / "epoch-000008.safetensors"
    task = Task(dataset="digits", model="lenet(4)", clients=4, lr=1e-6)
    config = RunConfig(task=task, rounds=1, initial=str(checkpoint))
    (played,) = play(config, dataset)
    torch.testing.assert_close(played.model, read_checkpoint(checkpoint, task.build_model(dataset)))
    other = RunConfig(task=Task(model="mlp(5)"), rounds=1, initial=str(checkpoint))
    with pytest.raises(InputError, match="is of another model: it holds"):
        next(play(other, dataset))
    nothing = RunConfig(task=task, rounds=1, initial="none.safetensors")
    with pytest.raises(InputError, match=r"cannot read the checkpoint none\.safetensors"):
        next(play(nothing, dataset))


def test_a_run_is_certified_as_it_was_trained(
    ray_cluster: None, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A simulated federation of SmoothAdv clients that starts from a trained model."""
    checkpoint = trained / "checkpoints" / "epoch-000008.safetensors"
    arguments = ["simulate", "--runs-dir", str(tmp_path), "--run", "r", "--model", "lenet(4)", "--json"]
    arguments += ["--objective", "smoothadv(0.25, attack='pgd(0.25, steps=2)')", "--rounds", "3"]
    assert main([*arguments, "--initial", str(checkpoint), "--clients", "4"]) == 0
    capsys.readouterr()
    assert main(["certify", str(tmp_path / "r"), "--n", "500", "--every", "30", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["certified_accuracy"]["0.0"] > 0.7
    assert (tmp_path / "r" / "certified-0.25.tsv").is_file()


def test_grids_certify_their_models(tmp_path: Path) -> None:
    text = (
        'certify = "plan(0.25, n=500, every=30)"\n[run]\nmodel = "lenet(4)"\nrounds = 2\nclients = 4\n'
    )
    (tmp_path / "grid.toml").write_text(text)
    (setting,) = read_grid(str(tmp_path / "grid.toml")).settings()
    assert setting["certify"] == "plan(n=500, every=30)"
    figures = measure(configuration(setting), load("digits"), 1, Plan(n=500, every=30))
    radii, accuracy = np.array(figures["certified"]).T
    assert radii[-1] == 1.0
    assert (np.diff(accuracy) <= 0).all()
    assert 0 <= figures["average_radius"] <= 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["certify"], "say whose model"),
        (["certify", "nowhere"], "cannot read the configuration nowhere/config.toml"),
        (["certify", "{trained}", "--sigma", "0"], "sigma must be above 0, got 0.0"),
        (["certify", "{trained}", "--every", "0"], "every must be at least 1"),
        (["certify", "{trained}", "--batch", "-1"], "batch must be at least 0"),
        (["certify", "{trained}", "--noise", "pink"], "unknown noise 'pink'"),
        (["certify", "{trained}", "--attack", "fgsm"], "unknown attack on images 'fgsm'"),
        (["certify", "{trained}", "--checkpoint", "none"], "cannot read the checkpoint none"),
        (["certify", "{trained}", "--to", "{trained}/config.toml"], "is no log of ours to go on with"),
        (["certify", "{trained}", "--to", "."], "--to must name a file, got the folder ."),
        (["certify", "--plot", "none.tsv", "--to", "."], "--to must name a file, got the folder ."),
        (["certify", "{trained}", "--to", "{trained}"], "--to must name a file, got the folder"),
        (["certify", "--plot", "none.tsv"], "cannot read none.tsv"),
        (
            ["certify", "{trained}", "--plot", "none.tsv"],
            "--plot draws logs as they are: leave out FOLDER",
        ),
        (["certify", "--sigma", "1", "--plot", "none.tsv"], "as they are: leave out --sigma"),
        (["certify", "--n0", "9", "--checkpoint", "x", "--plot", "y"], "leave out --checkpoint, --n0"),
        (["certify", "--data-dir", "x", "--plot", "y"], "leave out --data-dir"),
        (["certify", "--ray-address", "x", "--plot", "y"], "leave out --ray-address"),
        (
            ["certify", "--plot", "none.tsv", "--to", "r.pdf"],
            "r.pdf: the picture is a PNG; name it r.png",
        ),
        (
            ["certify", "{trained}", "--attack", "ddn", "--radius", "1"],
            "leave out radius, or the attack",
        ),
        (
            ["certify", "{trained}", "--naive"],
            "naive and m are of an attack: give one, or leave them out",
        ),
        (
            ["certify", "{trained}", "--m", "4"],
            "naive and m are of an attack: give one, or leave them out",
        ),
        (["train", "--epochs", "0"], "epochs must be at least 1"),
        (["train", "--model", "vit"], "unknown model 'vit'"),
        (["train", "--to", "{trained}"], "holds another training or run"),
        (["train", "--teacher", "{trained}", "--to", "{trained}/x"], "has none to give"),
        (
            ["train", "--labelled", "0.1", "--teacher", "none", "--to", "{trained}/x"],
            "none",
        ),
        (["train", "--from", "none", "--to", "{trained}/x"], "cannot read the checkpoint none"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    trained: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(trained=trained) for argument in arguments]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
