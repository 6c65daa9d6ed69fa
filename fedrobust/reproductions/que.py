"""Quantum-entropy scores beside other outlier detectors (Dong, Hopkins, Li, NeurIPS 2019).

arXiv 1906.11366, its experiments. A fifth of the points are outliers, in k directions; a detector is
judged by the area under its ROC curve: the probability that an outlier scores above an inlier. The
paper prints figures, no numbers, so `published/que_auc.csv` holds a recomputation, made apart from this
module, by the set-up and the parameters of the authors' code (github twistedcubic/que-outlier-detection,
commit dd84549).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.sparse.linalg import svds
from sklearn.covariance import EllipticEnvelope
from sklearn.decomposition import TruncatedSVD
from sklearn.ensemble import IsolationForest
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from sklearn.svm import OneClassSVM

from fedrobust.data.cifar10 import SIZES, load_cifar10
from fedrobust.data.files import need_files
from fedrobust.errors import InputError
from fedrobust.kernels import Matrix, Vector
from fedrobust.reproductions.experiment import Experiment, published
from fedrobust.statistics import QUEDetector, whitening
from fedrobust.trials import Setting, Summary, Trial, grouped, summary, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Words = list[str]
Score = Callable[[Matrix], Vector]
"""(n, d) points -> (n,) the higher, the farther out."""

OUTLIERS = 0.2
"""The part of the points that are outliers, everywhere."""
BLOCK = 520
"""Synthetic outliers in the first direction."""
SVM_POINTS = 2000
"""A one-class SVM takes time that is quadratic in its points, so it is fitted on this many at most."""
NEIGHBOUR_POINTS = 10_000
"""Beyond this many points kNN and LOF, which compare all pairs, are left out."""
ENVELOPE_FEATURES = 100
"""Beyond this many features the elliptic envelope is left out: of 8605 points with 128 it takes 45 s."""
PYOD = ("COPOD", "ECOD", "HBOS", "INNE")
"""Its detectors that are thought the best without labels, beside those that scikit-learn has as well."""
NEEDS_PYOD = "PyOD is not installed, so its detectors are left out: pip install pyod"


@dataclass(frozen=True, eq=False)
class Sample:
    """Points to be told apart.

    Attributes:
        points: (n, d), whitened where the data have variances of their own.
        outlier: (n,) bool.
    """

    points: Matrix
    outlier: npt.NDArray[np.bool_]


def synthetic(k: int, features: int, block: int, rng: np.random.Generator) -> Sample:
    """Outliers in k directions, each tighter than the inliers, which are N(0, I).

    Direction i has floor(block 1.1^i) outliers: 0.1 N(0, I) plus sqrt(k / 0.2) on coordinate
    i floor((d - 1) / k), half of them negated.
    """
    blocks = []
    for i in range(k):
        points = 0.1 * rng.normal(size=(int(block * 1.1**i), features))
        points[:, i * ((features - 1) // k)] += np.sqrt(k / OUTLIERS)
        points[len(points) // 2 :] *= -1
        blocks.append(points)
    outliers = np.concatenate(blocks)
    return _joined(outliers, rng.normal(size=(4 * len(outliers), features)))


def _joined(outliers: Matrix, inliers: Matrix) -> Sample:
    return Sample(
        np.concatenate([outliers, inliers]), np.arange(len(outliers) + len(inliers)) < len(outliers)
    )


def hot_pixels(k: int, images: int, data_dir: Path | None, rng: np.random.Generator) -> Sample:
    """The red channel of CIFAR-10, in a fifth of the images one of k pixels stuck at a value.

    Group i of the corrupted images is of a size that goes with 1.3^i; its pixel and its value in
    0 .. 255 are random. Whitened by as many other images, both drawn with replacement.
    """
    drawn = rng.integers(sum(SIZES.values()), size=2 * images)
    red = _red(drawn, data_dir).astype(np.float64)
    reference, points = red[:images], red[images:]
    count = int(OUTLIERS * images)
    shares = 1.3 ** np.arange(k)
    ends = np.round(count * shares.cumsum() / shares.sum()).astype(int)
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        points[begin:end, rng.integers(points.shape[1])] = rng.integers(256)
    return Sample(points @ whitening(reference), np.arange(images) < count)


def _red(rows: npt.NDArray[np.int64], data_dir: Path | None) -> npt.NDArray[np.uint8]:
    """(len(rows), 1024): images of the training part, then of the test part."""
    red = np.empty((len(rows), 32 * 32), np.uint8)
    for part, mine in (("train", rows < SIZES["train"]), ("test", rows >= SIZES["train"])):
        images, _ = load_cifar10(part, data_dir, rows[mine] % SIZES["train"])
        red[mine] = images[..., 0].reshape(len(images), -1)
    return red


def words(k: int, data_dir: Path | None, rng: np.random.Generator) -> Sample:
    """Sentences of "Sherlock Holmes", and a fifth of k Wikipedia articles.

    Article j gives a random stretch of floor(4300 / 1.2^j) characters; a random stretch of the novel
    gives four times as many sentences. A sentence is the mean of its words' vectors, whitened by
    sentences of the novel.
    """
    novel, for_whitening, *articles = texts(data_dir)
    vectors = word_vectors(data_dir)
    pieces = [_stretch(text, int(4300 / 1.2**j), rng) for j, text in enumerate(articles[:k])]
    outliers = _embedded([sentence for piece in pieces for sentence in sentences(piece)], vectors)
    inliers = _embedded(sentences(novel), vectors)
    first = rng.integers(len(inliers) - 4 * len(outliers))
    sample = _joined(outliers, inliers[first : first + 4 * len(outliers)])
    return Sample(
        sample.points @ whitening(_embedded(sentences(for_whitening), vectors)), sample.outlier
    )


def texts(data_dir: Path | None) -> list[str]:
    """The novel, the part of it for whitening, and 15 articles.

    Raises:
        InputError: a file is missing or not UTF-8.
    """
    names = ["sherlock.txt", "sherlock_whiten.txt", *(f"wiki_noise{j}.txt" for j in range(15))]
    paths = need_files(names, "que", "the word experiment", data_dir)
    try:
        return [path.read_text(encoding="utf-8") for path in paths]
    except UnicodeDecodeError as error:
        raise InputError(f"a text in {paths[0].parent} is not UTF-8 ({error})") from None


def sentences(text: str) -> list[Words]:
    """Each sentence's words without stop words; those of fewer than 4 words are dropped."""
    split = re.split(r"[.!?]\W*\s", text)
    found = [[w for w in re.findall(r"[a-z]+", s.lower()) if w not in ENGLISH_STOP_WORDS] for s in split]
    return [sentence for sentence in found if len(sentence) >= 4]


@lru_cache(maxsize=1)
def word_vectors(data_dir: Path | None) -> Mapping[str, Vector]:
    """A unit vector of 100 numbers for each word, by latent semantic analysis of all the texts.

    It stands in for GloVe, which is not to be had without a download: words that occur in the same
    sentences (tf-idf) are near each other in the leading 100 singular directions.
    """
    corpus = [sentence for text in texts(data_dir) for sentence in sentences(text)]
    counts = TfidfVectorizer(analyzer=list)
    matrix = counts.fit_transform(corpus)
    found = TruncatedSVD(100, random_state=0).fit(matrix).components_.T
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return dict(zip(counts.get_feature_names_out(), found, strict=True))


def _embedded(found: list[Words], vectors: Mapping[str, Vector]) -> Matrix:
    return np.array([np.mean([vectors[w] for w in s if w in vectors], axis=0) for s in found])


def _stretch(text: str, length: int, rng: np.random.Generator) -> str:
    first = int(rng.integers(max(len(text) - length, 0) + 1))
    return text[first : first + length]


def detectors(alphas: Sequence[float], seed: int, shape: tuple[int, ...]) -> dict[str, Score]:
    """All that is compared, by name; none is told which points are outliers, only how many.

    Args:
        alphas: of QUE.
        seed: of what is random in a detector.
        shape: (n, d); what takes minutes is left out (`NEIGHBOUR_POINTS`, `ENVELOPE_FEATURES`).
    """
    points, features = shape
    found: dict[str, Score] = {f"que({a:g})": _que(QUEDetector(a, method="exact")) for a in alphas}
    found["que(4) sketched"] = _que(QUEDetector(4.0, method="sketched", random_state=seed))
    found["spectral"] = spectral
    found["l2"] = l2
    if points <= NEIGHBOUR_POINTS:
        found["kNN"] = neighbours
        found["LOF"] = lambda x: -LocalOutlierFactor(10).fit(x).negative_outlier_factor_
    found["isolation forest"] = lambda x: -IsolationForest(random_state=seed).fit(x).score_samples(x)
    found["one-class SVM"] = _one_class(seed)
    if features <= ENVELOPE_FEATURES:
        envelope = EllipticEnvelope(contamination=OUTLIERS, random_state=seed)
        found["elliptic envelope"] = lambda x: -envelope.fit(x).score_samples(x)
    return found | pyod_detectors(seed)


def pyod_detectors(seed: int) -> dict[str, Score]:
    """Those of PyOD, where it is installed."""
    if find_spec("pyod") is None:
        return {}
    return {f"PyOD {name}": _pyod(name, seed) for name in PYOD}


def spectral(points: Matrix) -> Vector:
    """The squared projection on the top singular direction of the centred points."""
    centred = points - points.mean(axis=0)
    _, _, (top,) = svds(centred, k=1, rng=0)
    scores: Vector = (centred @ top) ** 2
    return scores


def l2(points: Matrix) -> Vector:
    """The squared distance from the mean."""
    scores: Vector = ((points - points.mean(axis=0)) ** 2).sum(axis=1)
    return scores


def neighbours(points: Matrix) -> Vector:
    """The mean distance to the 10 nearest other points."""
    distances, _ = NearestNeighbors(n_neighbors=10).fit(points).kneighbors()
    scores: Vector = distances.mean(axis=1)
    return scores


def _que(detector: QUEDetector) -> Score:
    return lambda points: -detector.fit(points).score_samples(points)


def _one_class(seed: int) -> Score:
    def score(points: Matrix) -> Vector:
        some = np.random.default_rng(seed).permutation(len(points))[:SVM_POINTS]
        scores: Vector = -OneClassSVM(nu=OUTLIERS).fit(points[some]).score_samples(points)
        return scores

    return score


def _pyod(name: str, seed: int) -> Score:
    def score(points: Matrix) -> Vector:
        detector = getattr(import_module(f"pyod.models.{name.lower()}"), name)()
        if "random_state" in detector.get_params():
            detector.set_params(random_state=seed)
        detector.fit(points)
        return np.asarray(detector.decision_scores_, np.float64)

    return score


def settings(quick: bool) -> list[Setting]:
    """The grid; what needs data comes first, so that it is missed at once."""
    return [
        *(
            {"data": "CIFAR-10", "k": k, "images": 5000, "d": 1024}
            for k in ((7,) if quick else (1, 3, 7, 10))
        ),
        *({"data": "words", "k": k, "d": 100} for k in ((6,) if quick else (3, 6, 10))),
        *({"data": "synthetic", "k": k, "d": d} for k, d in (SYNTHETIC[:1] if quick else SYNTHETIC)),
    ]


SYNTHETIC = ((3, 128), (10, 128), (1, 512), (7, 512), (10, 512))
"""k and d."""

ALPHAS: Mapping[str, Sequence[float]] = {
    "CIFAR-10": (3, 4, 6, 12, 21),
    "words": (2, 4, 8, 12, 16, 20),
    "synthetic": (4, 5, 8, 10, 12, 15, 20, 30),
}
"""Of QUE, besides 0 and infinity, which are l2 and spectral; those of the reference."""


def sample(setting: Setting, seed: int, data_dir: Path | None) -> Sample:
    """The points of a setting. Raises `InputError` where data are missing."""
    rng = np.random.default_rng(seed)
    if setting["data"] == "CIFAR-10":
        return hot_pixels(setting["k"], setting["images"], data_dir, rng)
    if setting["data"] == "words":
        return words(setting["k"], data_dir, rng)
    return synthetic(setting["k"], setting["d"], BLOCK, rng)


def trial(setting: Setting, seed: int, data_dir: Path | None) -> dict[str, float]:
    """The area under the ROC curve of every detector, and its seconds (as "NAME s")."""
    given = sample(setting, seed, data_dir)
    figures: dict[str, float] = {"points": len(given.points)}
    for name, score in detectors(ALPHAS[setting["data"]], seed, given.points.shape).items():
        began = time.perf_counter()
        scores = score(given.points)
        figures[f"{name} s"] = time.perf_counter() - began
        figures[name] = float(roc_auc_score(given.outlier, scores))
    return figures


def theirs(data: str, d: int, k: int) -> dict[str, Summary]:
    """The reference for a setting, by our detectors' names."""
    source = {"CIFAR-10": ("cifar_jpeg_red", "exact"), "synthetic": ("synthetic", "none")}.get(data)
    names = {"spectral": "spectral", "l2": "l2", "iforest": "isolation forest"}
    return {
        names.get(row["score"], f"que({row['alpha']})"): Summary(
            float(row["auc_mean"]), float(row["auc_std"]), int(row["repeats"])
        )
        for row in published("que_auc")
        if (row["data"], row["whitening"], int(row["d"]), int(row["n_dir"]))
        == (*(source or ("", "")), d, k)
    }


def _groups(trials: Sequence[Trial]) -> dict[tuple[str, int], list[int]]:
    """The numbers of directions tried, by data and d."""
    found: dict[tuple[str, int], dict[int, None]] = {}
    for t in trials:
        found.setdefault((t.setting["data"], t.setting["d"]), {})[t.setting["k"]] = None
    return {group: list(ks) for group, ks in found.items()}


def _names(trials: Sequence[Trial]) -> list[str]:
    """The detectors of these trials, in the order of the first."""
    return list(dict.fromkeys(n for t in trials for n in t.figures if f"{n} s" in t.figures))


def tables(trials: Sequence[Trial]) -> str:
    """Markdown, one table for each kind of data."""
    about = (
        "Area under the ROC curve (a fifth of the points are outliers); in brackets, a reference: the "
        "authors' set-up, recomputed apart. d: features, n: points, k: directions of the outliers."
    )
    parts = [about]
    for (data, d), ks in _groups(trials).items():
        mine = [t for t in trials if (t.setting["data"], t.setting["d"]) == (data, d)]
        points = grouped(mine, lambda s: s["k"], "points")
        header = ["", *(f"k = {k}, n = {points[k].mean:.0f}" for k in ks), "seconds"]
        rows = [[name, *_cells(mine, name, data, d, ks)] for name in _names(mine)]
        parts.append(f"**{data}, d = {d}**\n\n{table(header, rows)}")
    if not any("PyOD" in name for name in _names(trials)):
        parts.append(f"{NEEDS_PYOD}.")
    return "\n\n".join(parts)


def _cells(trials: Sequence[Trial], name: str, data: str, d: int, ks: Sequence[int]) -> list[str]:
    ours = grouped(trials, lambda s: s["k"], name)
    known = [theirs(data, d, k).get(name) for k in ks]
    cells = [
        _cell(ours.get(k)) + (f" ({other.mean:.3f})" if other else "")
        for k, other in zip(ks, known, strict=True)
    ]
    seconds = summary(t.figures[f"{name} s"] for t in trials if f"{name} s" in t.figures)
    return [*cells, f"{seconds.mean:.2g}"]


def _cell(found: Summary | None) -> str:
    if found is None:  # a peer that was not there for all trials
        return ""
    return f"{found.mean:.3f}" + (f" ± {found.spread:.3f}" if found.count > 1 else "") + found.share


def draw(trials: Sequence[Trial], _data: Path | None = None) -> Figure:
    """For each kind of data, AUC against alpha, and below it of each detector."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (only for figures)

    groups = _groups(trials)
    figure = Figure(figsize=(4.2 * len(groups), 8), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False, sharey=True)
    for (upper, lower), ((data, d), ks) in zip(axes.T, groups.items(), strict=True):
        mine = [t for t in trials if (t.setting["data"], t.setting["d"]) == (data, d)]
        _draw_alphas(upper, mine, data, d, ks)
        _draw_detectors(lower, mine, ks)
        upper.set_title(f"{data}, d = {d}")
    for row in axes:
        row[0].set_ylabel("area under the ROC curve")
    return figure


def _draw_alphas(axes: Axes, trials: Sequence[Trial], data: str, d: int, ks: Sequence[int]) -> None:
    """QUE, from l2 (alpha = 0) on, beside the reference."""
    for i, k in enumerate(ks):
        curve = _curve(_found(trials, k))
        axes.errorbar(*curve, color=f"C{i}", marker="o", markersize=4, label=f"k = {k}")
        x, y, error = _curve(theirs(data, d, k))
        axes.errorbar(x, y, error, color=f"C{i}", marker="x", linestyle=":", alpha=0.6)
    if any(theirs(data, d, k) for k in ks):
        axes.plot([], [], "kx:", label="reference")
    axes.set(xlabel="alpha (0: l2)", ylim=(-0.03, 1.03))
    axes.legend(fontsize="small")


def _found(trials: Sequence[Trial], k: int) -> dict[str, Summary]:
    """What each detector reached in the trials of k directions."""
    mine = [t for t in trials if t.setting["k"] == k]
    return {name: summary(t.figures[name] for t in mine if name in t.figures) for name in _names(mine)}


def _curve(found: Mapping[str, Summary]) -> tuple[list[float], list[float], list[float]]:
    """Alphas, means and spreads."""
    alphas = {"l2": 0.0} | {n: float(n[4:-1]) for n in found if re.fullmatch(r"que\([\d.]+\)", n)}
    known = sorted((alpha, found[name]) for name, alpha in alphas.items() if name in found)
    return [a for a, _ in known], [s.mean for _, s in known], [s.spread for _, s in known]


def _draw_detectors(axes: Axes, trials: Sequence[Trial], ks: Sequence[int]) -> None:
    names = [n for n in _names(trials) if not n.startswith("que") or n in ("que(4)", "que(12)")]
    width = 0.8 / len(ks)
    for i, k in enumerate(ks):
        found = [_found(trials, k).get(name, summary([])) for name in names]
        places = np.arange(len(names)) + (i - (len(ks) - 1) / 2) * width
        axes.bar(
            places, [s.mean for s in found], width, yerr=[s.spread for s in found], label=f"k = {k}"
        )
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize="small")


EXPERIMENT = Experiment(
    "Quantum-entropy scores beside other outlier detectors (Dong, Hopkins, Li, NeurIPS 2019)",
    settings,
    trial,
    tables,
    draw,
    seeds=(3, 1),
)
