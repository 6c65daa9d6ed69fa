"""The map of Europe: what is read, what is refused, and what the filter saves."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from fedrobust import InputError
from fedrobust.cli import main
from fedrobust.reproductions.experiment import published
from fedrobust.reproductions.popres import COUNTRIES, EXPERIMENT, FILES, measured, planted, read_people


def real() -> Path:
    try:
        read_people(None)
    except InputError:
        pytest.skip("POPRES is not there: name its directory in FEDROBUST_DATA")
    return Path(os.environ["FEDROBUST_DATA"])


def small(folder: Path, people: int = 40) -> Path:
    """Files of the published form with made-up people."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{i} {i} " + " ".join(f"{x:.4f}" for x in rng.standard_normal(20)) for i in range(people)]
    eigenvalues, palette = range(30, 0, -1), [f"{name}\t255\t0\t51" for name in COUNTRIES]
    texts = [
        "\n".join(["#eigvals", *(f"{line} Control" for line in lines)]),
        "\n".join(map(str, eigenvalues)),
        "\n".join(f"{i} sienna" for i in range(people)),
        "\n".join(palette),
    ]
    for name, text in zip(FILES, texts, strict=True):
        (folder / name).write_text(text + "\n")
    return folder


@pytest.mark.parametrize("below", ["", "popres"])
def test_reading(tmp_path: Path, below: str) -> None:
    small(tmp_path / below)
    people = read_people(tmp_path)
    components = np.loadtxt(tmp_path / below / FILES[0], skiprows=1, usecols=range(2, 22))
    np.testing.assert_allclose(people.rows, components * np.arange(30, 10, -1))
    np.testing.assert_allclose(people.colours, [[1, 0, 0.2]] * 40)
    assert people.legend["Italy"] == (1, 0, 0.2)


def test_the_directory_may_be_named_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDROBUST_DATA", str(small(tmp_path)))
    assert read_people(None).rows.shape == (40, 20)
    monkeypatch.delenv("FEDROBUST_DATA")
    with pytest.raises(InputError, match=r"no directory was given.*--data-dir or FEDROBUST_DATA"):
        read_people(None)


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small(tmp_path / "popres") / FILES[1]).unlink()
    told = f"needs the file popres/{FILES[1]}; looked in: {tmp_path}/popres, {tmp_path};"
    with pytest.raises(InputError, match=re.escape(told)):
        read_people(tmp_path)
    command = ["reproduce", "popres", "--data-dir", str(tmp_path), "--to", str(tmp_path / "to")]
    assert main(command) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (FILES[0], "#\n1 1 0.5 Control\n"),
        (FILES[1], "one\n"),
        (FILES[2], "1 nocolour\n"),
        (FILES[3], "sienna 1 2\n"),
    ],
)
def test_other_files_under_these_names_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (small(tmp_path) / name).write_text(text)
    with pytest.raises(InputError, match="does not hold POPRES as published"):
        read_people(tmp_path)


def test_people_and_colours_must_be_as_many(tmp_path: Path) -> None:
    (small(tmp_path) / FILES[2]).write_text("1 sienna\n")
    with pytest.raises(InputError, match="components of 40 people but colours of 1"):
        read_people(tmp_path)


def test_outliers_are_a_tenth() -> None:
    noise = planted(1387, np.random.default_rng(0))
    assert noise.shape == (154, 20)
    assert set(np.unique(noise[:, :10] * 24).round()) == {0, 1, 2}
    assert set(np.unique(noise[:, 10:] * 24).round()) == {2, 3}


def test_the_own_axes_are_at_no_distance() -> None:
    rows = np.random.default_rng(0).standard_normal((100, 20)) * np.arange(20, 0, -1)
    figures = measured(rows, np.cov(rows.T))
    assert figures["subspace"] == pytest.approx(0, abs=1e-6)
    assert figures["corr_pc1"] == pytest.approx(1)
    swapped = np.diag([0.0] * 18 + [2.0, 1.0])
    assert measured(rows, swapped)["subspace"] == pytest.approx(np.sqrt(2), abs=0.2)


def test_the_filter_saves_the_map(tmp_path: Path) -> None:
    folder = real()
    (trial,) = EXPERIMENT.run(EXPERIMENT.plan(quick=True), tmp_path, folder)
    figures, theirs = trial.figures, published("popres")[0]
    assert figures["filter_removed_bad"] == 154
    assert figures["filter_removed_good"] < 100
    assert figures["filter_nonoise_removed"] == float(theirs["filter_nonoise_removed"])
    assert figures["corr_pc2_filter"] > 0.97
    assert figures["corr_pc2_noisy"] < 0.1
    for name in ("subspace_noisy", "subspace_prune", "subspace_filter_nonoise"):
        assert figures[name] == pytest.approx(float(theirs[name]), abs=1e-3)
    assert (tmp_path / "figure.png").stat().st_size > 100_000
    assert "| outliers, of 154 | 154 (154 ± 0) |" in (tmp_path / "README.md").read_text()
