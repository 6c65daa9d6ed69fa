from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from fedrobust_laboratory.radii import radii_figure
from fedrobust_server import drawing

from fedrobust.cli import main
from fedrobust.data.files import ENVIRONMENT_VARIABLE
from fedrobust.errors import InputError
from fedrobust.smoothing import Entry, Log, certified_accuracy, common, envelope, read_log
from fedrobust.smoothing.logs import begun

PUBLISHED = Path(__file__).parents[1] / "data" / "certified_accuracy.csv"
"""Certified accuracy of the logs that Cohen et al. 2019 and Salman et al. 2019 published, to 4 digits.

Of the scripts that came with them: `analyze.py` of both.
"""
ENTRIES = [
    Entry(0, 3, 3, 0.51234, 1.5),
    Entry(20, 1, 2, 0.9, 0.25),
    Entry(40, 4, -1, 0.0, 2.0),
    Entry(60, 5, 5, 1.0, 3661.0),
]


def published() -> list[dict[str, str]]:
    with PUBLISHED.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", published(), ids=lambda row: row["log"])
def test_published_logs_give_the_published_certified_accuracy(row: dict[str, str]) -> None:
    folder = os.environ.get(ENVIRONMENT_VARIABLE)
    if not folder or not (path := Path(folder, "certify", row["log"])).exists():
        pytest.skip(f"{ENVIRONMENT_VARIABLE} names no folder with certify/{row['log']}")
    log = read_log(path)
    radii = {radius: float(value) for radius, value in row.items() if radius[0].isdigit() and value}
    assert len(radii) >= 5
    found = certified_accuracy(log, [float(radius) for radius in radii])
    np.testing.assert_array_equal(found.round(4), list(radii.values()))
    if row["abstain"]:
        assert round(log.abstained, 4) == float(row["abstain"])


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.tsv"
    assert begun(path) == set()
    with path.open("a") as file:
        file.writelines(f"{entry.line()}\n" for entry in ENTRIES)
    assert path.read_text().splitlines()[:2] == [
        "idx\tlabel\tpredict\tradius\tcorrect\ttime",
        "0\t3\t3\t0.512\t1\t0:00:01.500000",
    ]
    log = read_log(path)
    assert log.idx.tolist() == [0, 20, 40, 60]
    assert log.predict.tolist() == [3, 2, -1, 5]
    assert log.radius.tolist() == [0.512, 0.9, 0.0, 1.0]
    assert log.correct.tolist() == [True, False, False, True]
    assert begun(path) == {0, 20, 40, 60}


def test_radii_are_rounded_down() -> None:
    for radius in np.random.default_rng(0).uniform(1e-4, 4, 1000):
        shown = float(Entry(0, 0, 0, radius, 0.0).line().split("\t")[3])
        assert shown <= radius < shown * 1.011


@pytest.mark.parametrize("radius", [2.01, 1.13, 4.35, 0.25, 1e-5, 0.000123, 12.3, 3.81])
def test_a_radius_of_three_digits_stays_as_it_is(radius: float) -> None:
    assert float(Entry(0, 0, 0, radius, 0.0).line().split("\t")[3]) == radius


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for content in (b"a note", b"a note\nof two lines, the last one open", b"\x89PNG\r\n\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is no log of ours"):
            begun(path)
        assert path.read_bytes() == content


def test_a_line_that_a_crash_cut_off_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    begun(path)
    lines = "".join(f"{entry.line()}\n" for entry in ENTRIES[:2])
    with path.open("a") as file:
        file.write(lines + ENTRIES[2].line()[:5])
    assert begun(path) == {0, 20}
    assert path.read_text().endswith(lines)
    for cut in (0, 3):
        path.write_text(path.read_text()[:cut])
        assert begun(path) == set()
        assert path.read_text().startswith("idx\t")


def test_what_a_log_shows() -> None:
    log = Log.of(ENTRIES)
    assert len(log) == 4
    np.testing.assert_array_equal(
        certified_accuracy(log, [0.0, 0.51234, 0.6, 1.0, 1.1]), [0.5, 0.5, 0.25, 0.25, 0]
    )
    assert certified_accuracy(log, 0.0).shape == ()
    assert log.average_radius == pytest.approx(1.51234 / 4)
    assert log.abstained == 0.25
    other = Log.of([Entry(0, 1, 1, 0.3, 0.0)])
    np.testing.assert_array_equal(envelope([log, other], [0.0, 0.3, 0.4]), [1.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks the column idx"),
        ("a\tb\n1\t2\n", "lacks the column idx"),
        ("idx\tlabel\tpredict\tradius\tcorrect\ttime\n", "holds no image yet"),
        ("idx\tlabel\tpredict\tradius\tcorrect\ttime\n1\t2\tx\t0\t0\t0\n", "a line that is none"),
        ("idx\tlabel\tpredict\tradius\tcorrect\ttime\n1\t2\n", "a line that is none"),
        ("idx\tlabel\tpredict\tradius\tcorrect\ttime\n1\t2\t2\t0.5\t7\t0\n", "a line that is none"),
        ("idx\tlabel\tpredict\tradius\tcorrect\ttime\n1\t2\t2\tnan\t1\t0\n", "has the radius nan"),
        ("idx\tlabel\tpredict\tradius\tcorrect\ttime\n1\t2\t2\t-3\t1\t0\n", "has the radius -3"),
        (
            "idx\tlabel\tpredict\tradius\tcorrect\ttime\n" + 2 * "9\t2\t2\t0.5\t1\t0\n",
            "has image 9 more than once",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "log.tsv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_log(path)
    with pytest.raises(InputError, match="cannot read"):
        read_log(tmp_path / "none.tsv")


def test_logs_are_compared_on_the_images_that_all_have() -> None:
    logs = [Log.of(ENTRIES), Log.of(ENTRIES[:0:-1]), Log.of([*ENTRIES[1:3], Entry(80, 1, 1, 9.0, 1.0)])]
    found = common(logs)
    assert [log.idx.tolist() for log in found] == [[20, 40], [40, 20], [20, 40]]
    assert found[0].radius.tolist() == [0.9, 0.0]
    with pytest.raises(InputError, match="no image in common"):
        common([Log.of(ENTRIES[:2]), Log.of(ENTRIES[2:])])


def test_logs_are_named_by_their_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A published log is no `.tsv`, and what follows the dot in its name is not one."""
    names = ["noise_0.50", "noise_0.25.tsv", "other/noise_0.25"]
    for name in names:
        (path := tmp_path / name).parent.mkdir(exist_ok=True)
        begun(path)
        with path.open("a") as file:
            file.writelines(f"{entry.line()}\n" for entry in ENTRIES)
    logs = [str(tmp_path / name) for name in names]
    for count, expected in ((2, ["noise_0.50", "noise_0.25"]), (3, [f"{tmp_path.name}/noise_0.50"])):
        picture = str(tmp_path / "radii.png")
        assert main(["certify", "--json", "--plot", *logs[:count], "--to", picture]) == 0
        told = [json.loads(line)["log"] for line in capsys.readouterr().out.splitlines()]
        assert told[: len(expected)] == expected
    with Path(logs[0]).open("a") as file:
        file.write(f"{Entry(80, 1, 1, 9.0, 1.0).line()}\n")
    for options, images in ((), [5, 4]), (("--common",), [4, 4]):
        assert main(["certify", "--json", "--plot", *logs[:2], "--to", picture, *options]) == 0
        told = [json.loads(line).get("images") for line in capsys.readouterr().out.splitlines()]
        assert told == [*images, None]  # the last one is the best of both
    assert main(["certify", str(tmp_path), "--common"]) == 2
    assert "go with --plot" in capsys.readouterr().err


def test_an_empty_log_is_left_out_and_radii_are_as_fine_as_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some published logs have no line, others their first one alone."""
    (tmp_path / "nothing").touch()
    begun(tmp_path / "begun")
    begun(full := tmp_path / "full")
    with full.open("a") as file:
        file.writelines(f"{entry.line()}\n" for entry in ENTRIES)
    (tmp_path / "other").write_text("no log")
    plot = ["certify", "--json", "--to", str(tmp_path / "radii.png"), "--plot"]
    logs = [str(tmp_path / name) for name in ("nothing", "full", "begun")]
    assert main([*plot, *logs, "--step", "0.125"]) == 0
    out, err = capsys.readouterr()
    assert err == "left out nothing, which holds no image\nleft out begun, which holds no image\n"
    (line,) = map(json.loads, out.splitlines())
    radii = list(map(float, line["certified_accuracy"]))
    assert radii[:3] == [0.0, 0.125, 0.25]
    for arguments, said in (
        ([logs[0]], "lacks the column idx"),
        ([logs[2]], "holds no image yet"),
        ([logs[1], str(tmp_path / "other")], "lacks the column idx"),
        ([logs[1], "--step", "0"], "--step must be 0.01 or more, got 0.0"),
    ):
        assert main([*plot, *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(("names", "lines"), [(37, 37), (8, 8)])
@pytest.mark.filterwarnings("error")
def test_the_figure_of_many_logs_has_room_for_them(names: int, lines: int) -> None:
    logs = {f"cifar10/cohen/resnet110/noise_{i:02d}": Log.of(ENTRIES) for i in range(names)}
    figure = radii_figure(logs)
    drawing.to_png(figure)
    (axes,) = figure.axes
    legend = figure.legends[0].get_window_extent()
    assert axes.get_window_extent().y0 > legend.y1
    assert legend.x1 <= figure.bbox.x1
    drawn = axes.get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) >= min(lines, 24)


def test_a_log_of_an_attack_is_no_log_of_certificates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a log is of stands beside it; nothing stands beside a published one, which is taken."""
    attacks = {"certified": "", "l2": "pgd(0.5)", "ddn": "ddn(0.5)", "linf": "pgd(0.1, norm='linf')"}
    for name, attack in {**attacks, "published": None}.items():
        begun(path := tmp_path / f"{name}.tsv")
        with path.open("a") as file:
            file.writelines(f"{entry.line()}\n" for entry in ENTRIES)
        if attack is not None:
            path.with_name(f"{path.name}.toml").write_text(f'sigma = 0.5\nattack = "{attack}"\n')

    def plot(certified: str, *attacked: str) -> tuple[int, str]:
        logs = [str(tmp_path / f"{name}.tsv") for name in (certified, *attacked)]
        options = ["--attacked", *logs[1:]] if attacked else []
        code = main(["certify", "--plot", logs[0], *options, "--to", str(tmp_path / "radii.png")])
        return code, capsys.readouterr().err

    assert plot("certified", "l2", "ddn", "published") == (0, "")
    assert plot("published") == (0, "")
    other = tmp_path / "other.tsv"
    other.write_bytes((tmp_path / "l2.tsv").read_bytes())
    other.with_name("other.tsv.toml").write_text('sigma = 0.25\nattack = "pgd(0.5)"\n')
    begun(fewer := tmp_path / "fewer.tsv")
    with fewer.open("a") as file:
        file.writelines(f"{entry.line()}\n" for entry in ENTRIES[1:])
    fewer.with_name("fewer.tsv.toml").write_bytes((tmp_path / "l2.tsv.toml").read_bytes())
    for logs, said in (
        (("certified", "other"), "other.tsv is no log of an attack on what"),
        (("certified", "l2", "other"), "its sigma is 0.25, not 0.5; leave it out"),
        (
            ("l2",),
            "l2.tsv is a log of the attack pgd(0.5), which certifies nothing: give it to --attacked",
        ),
        (("certified", "certified"), "certified.tsv is a log of certificates: give it to --plot"),
        (("certified", "fewer"), "fewer.tsv is of other images than"),
        (("certified", "linf"), "linf.tsv is a log of pgd(0.1, norm='linf'), whose eps is no l2 radius"),
    ):
        code, told = plot(*logs)
        assert code == 2
        assert said in told
