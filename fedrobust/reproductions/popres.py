"""Figures 3 and 4 of "Being Robust (in High Dimensions) Can Be Practical": the map of Europe in genes.

Diakonikolas, Kamath, Kane, Li, Moitra, Stewart, ICML 2017 (arXiv 1703.00893), section 4.2. The
principal components of POPRES are those that Novembre et al. ("Genes mirror geography within Europe",
Nature 2008) published at github.com/NovembreLab/Novembre_etal_2008_misc. The paper prints pictures only;
the numbers in `published/popres.csv` are recomputed: the authors' programs
(github.com/hoonose/robust-filter, commit 69d020b), written anew apart from ours, with 5 seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sklearn.covariance import MinCovDet

from fedrobust.data.files import need_files
from fedrobust.errors import InputError
from fedrobust.kernels import Matrix
from fedrobust.reproductions import covariance_rivals as rivals
from fedrobust.reproductions.experiment import Experiment, published
from fedrobust.statistics import RobustCovariance
from fedrobust.statistics.covariance import Mask
from fedrobust.trials import Setting, Trial, grouped, summary, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPS = 0.1
DIMENSIONS = 20
STEM = "POPRES_08_24_01.EuroThinFinal.LD_0.8.exLD.out0-PCA"
FILES = (f"{STEM}.eigs", f"{STEM}.eval", "POPRESID_Color.txt", "colors.txt")
ORIGIN = "github.com/NovembreLab/Novembre_etal_2008_misc; colors.txt: github.com/hoonose/robust-filter"
ESTIMATORS = {
    "noisy": "plain",
    "filter": "filter",
    "filter_nonoise": "filter, nothing planted",
    "filter_centring": "filter, mean not known",
    "prune": "pruning",
    "ransac_asreleased": "RANSAC as released",
    "ransac_fixed": "RANSAC as intended",
    "lrv": "Lai-Rao-Vempala",
    "mcd": "MinCovDet",
}
"""What is compared, with the names that tables show."""
MEASURES = {
    "subspace": "subspace distance",
    "corr_pc1": "corr. of component 1",
    "corr_pc2": "corr. of component 2",
}
COUNTRIES = {
    "sienna": "Italy",
    "pink": "United Kingdom",
    "blue": "Spain",
    "darkorchid3": "Portugal",
    "violetred1": "Switzerland (French)",
    "violetred3": "Switzerland (German)",
    "orange": "France, Netherlands",
    "gold1": "Germany",
    "red": "Ireland",
    "cadetblue2": "Serbia, Montenegro",
    "orangered1": "Belgium",
    "darkolivegreen2": "Poland",
}
"""Novembre et al.'s colours of the countries with most people, of their ColorTablePCmap.txt."""


@dataclass(frozen=True, eq=False)
class People:
    """The people of POPRES.

    Attributes:
        rows: (1387, 20) float64, principal components times their eigenvalues, as in the paper.
        colours: (1387, 3) float64, each country's, in 0 .. 1.
        legend: colours of the countries with most people, by the countries' names.
    """

    rows: Matrix
    colours: Matrix
    legend: Mapping[str, tuple[float, float, float]]


def read_people(data_dir: Path | None) -> People:
    """Read the published components.

    Args:
        data_dir: holds `FILES`, or a folder "popres" with them; None means the directory that the
            environment variable FEDROBUST_DATA names.

    Raises:
        InputError: a file is missing or holds something else.
    """
    paths = need_files(FILES, "popres", f"POPRES ({ORIGIN})", data_dir)
    folder = paths[0].parent
    try:
        vectors, values, people, colour_table = (path.read_text().splitlines() for path in paths)
        components = np.array([line.split()[2 : 2 + DIMENSIONS] for line in vectors[1:]], float)
        eigenvalues = np.loadtxt(values)[:DIMENSIONS]
        names = [line.split()[1] for line in people]
        palette = {
            name: (int(red) / 255, int(green) / 255, int(blue) / 255)
            for name, red, green, blue in map(str.split, colour_table)
        }
        rows, colours = components * eigenvalues, np.array([palette[name] for name in names])
        legend = {country: palette[name] for name, country in COUNTRIES.items()}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise InputError(
            f"{folder} does not hold POPRES as published ({error!r}); fetch it again"
        ) from None
    if rows.shape != (len(colours), DIMENSIONS):
        raise InputError(f"{folder} has components of {len(rows)} people but colours of {len(colours)}")
    return People(rows, colours, legend)


def planted(people: int, rng: np.random.Generator) -> Matrix:
    """(m, 20) float64: the paper's outliers, a part eps of all rows."""
    m, half = round(EPS * people / (1 - EPS)), DIMENSIONS // 2
    return np.hstack([rng.integers(0, 3, (m, half)), rng.integers(2, 4, (m, half))]) / 24


def estimators(rows: Matrix, noise: Matrix, seed: int) -> dict[str, Callable[[], Matrix]]:
    """What gives second moments, (20, 20) float64, by the names of `ESTIMATORS`.

    Args:
        rows: (n, 20) float64, of people.
        noise: (m, 20) float64, planted.
        seed: of RANSAC and MinCovDet.
    """
    both, rng = np.vstack([rows, noise]), np.random.default_rng(seed)
    mcd = MinCovDet(assume_centered=True, random_state=seed)
    return {
        "noisy": lambda: np.cov(both.T),
        "filter": lambda: filtered(both).covariance_,
        "filter_nonoise": lambda: filtered(rows).covariance_,
        "filter_centring": lambda: RobustCovariance(eps=EPS).fit(both).covariance_,
        "prune": lambda: rivals.pruned(both),
        "ransac_asreleased": lambda: rivals.ransac(both, EPS, rng, as_released=True),
        "ransac_fixed": lambda: rivals.ransac(both, EPS, rng),
        "lrv": lambda: rivals.lai_rao_vempala(both, EPS),
        "mcd": lambda: mcd.fit(both).covariance_,
    }


def filtered(rows: Matrix) -> RobustCovariance:
    """The filter as in the paper: the mean is known."""
    return RobustCovariance(eps=EPS, assume_centered=True).fit(rows)


def drawn_up(people: People, seed: int) -> tuple[Matrix, Matrix]:
    """People and outliers, turned by one random rotation as in the paper: (1387, 20), (154, 20)."""
    rng = np.random.default_rng(seed)
    noise = planted(len(people.rows), rng)
    turn = np.linalg.qr(rng.standard_normal((DIMENSIONS, DIMENSIONS)))[0]
    return people.rows @ turn, noise @ turn


def leading(covariance: Matrix) -> Matrix:
    """(20, 2) float64, the two top eigenvectors."""
    return np.asarray(np.linalg.eigh(covariance)[1][:, :-3:-1])


def measured(rows: Matrix, covariance: Matrix) -> dict[str, float]:
    """How well the two top eigenvectors of a covariance show what the rows' own show.

    The subspace distance is |P - Q|_F / sqrt 2 of the projectors: 0 the same, 1 one direction lost. The
    correlations are of the rows' scores, whatever the sign.
    """
    ours, own = leading(covariance), leading(np.cov(rows.T))
    distance = np.linalg.norm(ours @ ours.T - own @ own.T) / np.sqrt(2)
    one, two = (abs(np.corrcoef(rows @ ours[:, k], rows @ own[:, k])[0, 1]) for k in (0, 1))
    return {"subspace": float(distance), "corr_pc1": float(one), "corr_pc2": float(two)}


def settings(_quick: bool) -> list[Setting]:
    """There is one; the quick form takes fewer seeds."""
    return [{"eps": EPS}]


def trial(_setting: Setting, seed: int, data_dir: Path | None) -> dict[str, float]:
    """The measures of all estimators, named as in the published table, and what the filter dropped."""
    rows, noise = drawn_up(read_people(data_dir), seed)
    figures = {
        f"{measure}_{name}": value
        for name, estimate in estimators(rows, noise, seed).items()
        for measure, value in measured(rows, estimate()).items()
    }
    lost = ~filtered(np.vstack([rows, noise])).support_
    return figures | {
        "filter_removed_good": int(lost[: len(rows)].sum()),
        "filter_removed_bad": int(lost[len(rows) :].sum()),
        "filter_nonoise_removed": int((~filtered(rows).support_).sum()),
    }


def tables(trials: Sequence[Trial]) -> str:
    """The measures and the counts, the published ones in brackets."""
    theirs = published("popres")

    def beside(figure: str) -> str:
        ours = next(iter(grouped(trials, lambda s: s["eps"], figure).values()))
        numbers = [float(row[figure]) for row in theirs if figure in row]
        return f"{ours}" + (f" ({summary(numbers)})" if numbers else "")

    rows = [[name, *(beside(f"{m}_{key}") for m in MEASURES)] for key, name in ESTIMATORS.items()]
    counts = [
        ["outliers, of 154", beside("filter_removed_bad")],
        ["people, of 1387", beside("filter_removed_good")],
        ["people where nothing was planted", beside("filter_nonoise_removed")],
    ]
    note = "Mean ± standard deviation over seeds (in brackets: the authors' programs, recomputed)."
    measures = table(["estimate", *MEASURES.values()], rows)
    return "\n\n".join([measures, table(["the filter drops", "rows"], counts), note])


def draw(trials: Sequence[Trial], data_dir: Path | None = None) -> Figure:
    """As figures 3 and 4, for the first seed: people by country, outliers black, the paper's axes."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)
    from matplotlib.lines import Line2D  # noqa: PLC0415 (an extra)

    people, seed = read_people(data_dir), trials[0].seed
    rows, noise = drawn_up(people, seed)
    estimates = estimators(rows, noise, seed)
    both = np.vstack([rows, noise])
    colours = np.vstack([people.colours, np.zeros((len(noise), 3))])
    own = leading(np.cov(rows.T))
    own *= np.sign(((rows @ own) ** 3).sum(axis=0))  # the paper's axes are longer on the positive side
    everyone, real = np.ones(len(both), bool), np.arange(len(both)) < len(rows)
    panels: list[tuple[str, str, Mask]] = [
        ("original data", "", everyone),
        ("plain, spoiled", "noisy", everyone),
        ("pruning", "prune", everyone),
        ("RANSAC", "ransac_fixed", everyone),
        ("filter", "filter", everyone),
        ("filter: the rows kept", "filter", filtered(both).support_),
        ("filter, nothing planted", "filter_nonoise", real),
        ("Lai-Rao-Vempala", "lrv", everyone),
    ]
    figure = Figure(figsize=(16, 8), layout="constrained")
    for axis, (title, name, shown) in zip(figure.subplots(2, 4).ravel(), panels, strict=True):
        axes = leading(estimates[name]()) if name else own
        _panel(axis, both @ _turned(axes, own, rows), colours, shown)
        axis.set_title(title)
    marks = [*people.legend.items(), ("planted", (0.0, 0.0, 0.0))]
    handles = [
        Line2D([], [], marker="o", mfc="none", ls="", color=colour, label=name) for name, colour in marks
    ]
    figure.legend(
        handles=handles, ncols=len(handles), loc="outside lower center", frameon=False, fontsize=8
    )
    return figure


def _turned(axes: Matrix, own: Matrix, rows: Matrix) -> Matrix:
    """The axes with the signs under which people lie as in the original."""
    signs = np.sign(((rows @ axes) * (rows @ own)).sum(axis=0))
    return np.asarray(axes * np.where(signs == 0, 1, signs))


def _panel(axis: Any, scores: Matrix, colours: npt.NDArray[Any], shown: Mask) -> None:  # noqa: ANN401
    axis.scatter(*scores[shown].T, s=14, facecolors="none", edgecolors=colours[shown], linewidths=0.7)
    axis.set(xlim=(-0.25, 0.35), ylim=(-0.15, 0.2))
    axis.tick_params(labelsize=7)


EXPERIMENT = Experiment(
    "POPRES: the map of Europe, figures 3 and 4 of Diakonikolas et al., ICML 2017",
    settings,
    trial,
    tables,
    draw,
    seeds=(5, 1),
)
