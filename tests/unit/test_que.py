from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.utils.estimator_checks import check_estimator

from fedrobust.data.cifar10 import load_cifar10
from fedrobust.errors import InputError
from fedrobust.reproductions import CATALOG, que
from fedrobust.statistics import QUEDetector, whitening
from fedrobust.statistics.que import growth_polynomial, sketch_size, sketching_pays
from fedrobust.trials import Trial

Matrix = npt.NDArray[np.float64]
SHAPES = [(60, 4), (30, 80), (90, 70)]


def planted(n: int, d: int, seed: int = 0, k: int = 3) -> Matrix:
    """A fifth of the points lie along k coordinates, on either side."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, d))
    outliers = np.arange(n // 5)
    points[outliers, outliers % k] += 5 * rng.choice([-1, 1], size=len(outliers))
    return points + 3.0


def by_the_book(points: Matrix, alpha: float) -> Matrix:
    centred = points - points.mean(axis=0)
    covariance = centred.T @ centred / len(points)
    power = expm(alpha * covariance / np.linalg.norm(covariance, 2))
    return np.einsum("ij,jk,ik->i", centred, power / np.trace(power), centred)


@pytest.mark.parametrize("method", ["exact", "sketched"])
def test_scikit_learns_contract(method: str) -> None:
    checks = check_estimator(QUEDetector(method=method, random_state=0), on_skip=None)
    assert {check["status"] for check in checks} <= {"passed", "skipped"}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 4.0, 30.0])
def test_exact_scores_are_those_of_the_matrix_exponential(shape: tuple[int, int], alpha: float) -> None:
    points = planted(*shape)
    scores = QUEDetector(alpha, method="exact").fit(points).score_samples(points)
    np.testing.assert_allclose(-scores, by_the_book(points, alpha), rtol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.5, 4.0, 30.0])
def test_sketched_scores_are_as_near_as_is_said(shape: tuple[int, int], alpha: float) -> None:
    points = planted(*shape)
    exact = QUEDetector(alpha, method="exact").fit(points)
    lengths = np.exp(-alpha) * ((points - points.mean(axis=0)) ** 2).sum(axis=1)
    true = -exact.score_samples(points) * exact.trace_ - lengths  # what S adds
    found = []
    for seed in range(24):
        sketched = QUEDetector(alpha, method="sketched", accuracy=0.2, random_state=seed).fit(points)
        found.append(-sketched.score_samples(points) * sketched.trace_ - lengths)
    errors = np.array(found) / true - 1
    # The bound holds for every point; 24 sketches show each point's deviation to within a sixth or so.
    assert np.sqrt((errors**2).mean()) < 0.2 * 1.1
    assert np.sqrt((errors**2).mean(axis=0)).max() < 0.2 * 1.6
    assert np.abs(errors.mean(axis=0)).max() < 4 * 0.2 / np.sqrt(24)


def test_a_finer_sketch_is_nearer() -> None:
    points = planted(100, 70)
    true = -QUEDetector(method="exact").fit(points).score_samples(points)

    def error(accuracy: float) -> float:
        detector = QUEDetector(method="sketched", accuracy=accuracy, random_state=0).fit(points)
        return float(np.sqrt(np.mean((-detector.score_samples(points) / true - 1) ** 2)))

    assert error(0.03) < 0.03 < error(0.3) < 0.3


@pytest.mark.parametrize("alpha", [0.0, 0.1, 4.0, 25.0, 80.0, 1e4])
def test_the_polynomial_is_as_near_as_is_said(alpha: float) -> None:
    t = np.linspace(-1, 1, 1001)
    z = np.maximum(alpha * (t + 1) / 2, 1e-12)
    root = np.sqrt(-np.expm1(-z) / z) * np.exp((z - alpha) / 2)
    found = np.polynomial.chebyshev.chebval(t, growth_polynomial(alpha))
    assert np.abs(found - root).max() <= max(1e-3 * np.exp(-alpha / 2), 1e-9) * 1.01


@pytest.mark.parametrize("method", ["exact", "sketched"])
def test_alpha_zero_is_the_distance(method: str) -> None:
    points = planted(100, 70)
    scores = QUEDetector(0.0, method=method).fit(points).score_samples(points)
    np.testing.assert_allclose(-scores * 70, que.l2(points), rtol=1e-12)


@pytest.mark.parametrize("method", ["exact", "sketched"])
@pytest.mark.parametrize("alpha", [2000.0, 1e4])
def test_a_large_alpha_is_the_top_direction(method: str, alpha: float) -> None:
    points = planted(200, 70, k=1)
    scores = -QUEDetector(alpha, method=method, random_state=0).fit(points).score_samples(points)
    assert np.corrcoef(scores, que.spectral(points))[0, 1] > 0.9999


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(2, 40),
    d=st.integers(1, 40),
    alpha=st.floats(0, 40),
    scale=st.floats(1e-3, 1e3),
)
def test_scores_do_not_depend_on_the_frame(
    seed: int, n: int, d: int, alpha: float, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, d)) * rng.uniform(0.1, 3, size=d)
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    shift = rng.normal(size=d)
    order = rng.permutation(n)
    scores = QUEDetector(alpha).fit(points).score_samples(points)
    moved = (scale * points @ rotation + shift)[order]
    again = QUEDetector(alpha).fit(moved).score_samples(moved)
    np.testing.assert_allclose(again, scale**2 * scores[order], rtol=1e-6, atol=1e-9 * scale**2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(2, 60), d=st.integers(1, 30), alpha=st.floats(0, 40))
def test_the_mean_score_is_between_the_mean_and_the_top_variance(
    seed: int, n: int, d: int, alpha: float
) -> None:
    points = np.random.default_rng(seed).normal(size=(n, d))
    scores = -QUEDetector(alpha).fit(points).score_samples(points)
    variances = np.linalg.eigvalsh(np.cov(points.T.reshape(d, n), bias=True).reshape(d, d))
    assert variances.mean() * (1 - 1e-9) <= scores.mean() <= variances.max() * (1 + 1e-9)


def test_outliers_in_several_directions_are_found() -> None:
    points = planted(1000, 50, k=5)
    outlier = np.arange(1000) < 200
    detector = QUEDetector(contamination=0.2).fit(points)
    assert roc_auc_score(outlier, -detector.score_samples(points)) > 0.97
    assert roc_auc_score(outlier, que.spectral(points)) < 0.9
    found = detector.predict(points)
    assert (found == -1).sum() == 200
    assert (found[outlier] == -1).mean() > 0.85
    np.testing.assert_array_equal(found == -1, detector.decision_function(points) < 0)


def test_whitening_makes_the_spread_of_the_good_even() -> None:
    rng = np.random.default_rng(0)
    spread = np.geomspace(1, 1000, 20)
    good = rng.normal(size=(2000, 20)) * spread
    assert np.allclose(np.cov(good @ whitening(good), rowvar=False, bias=True), np.eye(20))
    points = rng.normal(size=(500, 20)) * spread
    points[:100, 0] += 5
    outlier = np.arange(500) < 100
    plain = QUEDetector().fit(points)
    whitened = QUEDetector(whiten=good).fit(points)
    assert roc_auc_score(outlier, -plain.score_samples(points)) < 0.6
    assert roc_auc_score(outlier, -whitened.score_samples(points)) > 0.95
    assert clone(whitened).whiten is not good


def test_whitening_stays_finite_where_the_reference_does_not_vary() -> None:
    reference = np.random.default_rng(0).normal(size=(50, 4))
    reference[:, 2] = 1.0
    assert np.isfinite(whitening(reference)).all()


def test_small_data_are_exact_and_large_data_sketched() -> None:
    size = sketch_size(0.1)
    assert size == 200
    assert not sketching_pays((5000, 100), 4.0, size)
    assert not sketching_pays((100, 100_000), 4.0, size)
    assert sketching_pays((5000, 5000), 4.0, size)
    assert QUEDetector().fit(planted(100, 10)).method_ == "exact"
    wide = planted(700, 700)
    assert QUEDetector(accuracy=0.5).fit(wide).method_ == "sketched"


def test_the_same_seed_gives_the_same_sketch() -> None:
    points = planted(100, 90)
    first, second = (QUEDetector(method="sketched", random_state=3).fit(points) for _ in range(2))
    np.testing.assert_array_equal(first.growth_, second.growth_)


@pytest.mark.parametrize("method", ["exact", "sketched"])
@pytest.mark.parametrize("alpha", [4.0, 5000.0])
def test_points_that_are_all_one_are_all_normal(method: str, alpha: float) -> None:
    points = np.full((100, 90), 0.3)
    detector = QUEDetector(alpha, method=method).fit(points)
    np.testing.assert_allclose(detector.score_samples(points), 0, atol=1e-12)


@pytest.mark.parametrize("method", ["exact", "sketched"])
@pytest.mark.parametrize("alpha", [0.0, 4.0, 1e4])
@pytest.mark.parametrize("whiten", [False, True])
def test_points_too_far_away_to_be_squared_are_outliers(method: str, alpha: float, whiten: bool) -> None:
    points = planted(100, 70)
    detector = QUEDetector(alpha, method=method, whiten=planted(300, 70) if whiten else None).fit(points)
    far = 1e308 * np.random.default_rng(0).integers(0, 2, size=(20, 70)).astype(float)
    assert (detector.score_samples(far) == -np.inf).all()
    assert (detector.predict(far) == -1).all()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": -1.0}, "alpha must be between 0 and 10000, got -1.0"),
        ({"alpha": float("nan")}, "got nan"),
        ({"alpha": "4"}, "got '4'"),
        ({"contamination": 0.6}, "contamination must be between 1e-12 and 0.5, got 0.6"),
        ({"accuracy": 0.0}, "accuracy must be"),
        ({"method": "exacd"}, "did you mean exact"),
        ({"whiten": np.eye(3)}, "whiten has 3 columns, but the data 4"),
        ({"whiten": np.ones((5, 4))}, "all 5 are the same"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QUEDetector(**parameters).fit(planted(20, 4))


def test_bad_data() -> None:
    with pytest.raises(InputError, match=r"1e\+200 from the mean overflow"):
        QUEDetector().fit(np.array([[1e200], [-1e200]]))
    with pytest.raises(ValueError, match="NaN"):
        QUEDetector().fit(np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match="minimum of 2"):
        QUEDetector().fit(np.ones((1, 3)))
    with pytest.raises(NotFittedError):
        QUEDetector().predict(np.ones((2, 3)))
    with pytest.raises(ValueError, match="expecting 4 features"):
        QUEDetector().fit(planted(20, 4)).predict(np.ones((2, 3)))


# The experiment.


def jpegs(count: int, seed: int) -> dict[str, npt.NDArray[Any]]:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(seed)
    packed = []
    for _ in range(count):
        buffer = io.BytesIO()
        pixels = np.kron(rng.integers(256, size=(4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        packed.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, packed)])
    return {
        "jpeg": np.frombuffer(b"".join(packed), np.uint8),
        "offsets": offsets,
        "labels": rng.integers(10, size=count).astype(np.uint8),
    }


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As CIFAR-10 is kept, but 60 and 12 images of coloured squares; and texts."""
    monkeypatch.setattr(que, "SIZES", {"train": 60, "test": 12})
    (tmp_path / "cifar10").mkdir()
    parts = {"train": jpegs(60, 0), "test": jpegs(12, 1)}
    arrays = {f"{part}_{key}": array for part, kept in parts.items() for key, array in kept.items()}
    np.savez(tmp_path / "cifar10" / "cifar10_jpeg.npz", **arrays)
    (tmp_path / "que").mkdir()
    rng = np.random.default_rng(0)
    for name, words, count in [
        ("sherlock", range(200), 600),
        ("sherlock_whiten", range(200), 400),
        *((f"wiki_noise{j}", range(150 + 10 * j, 250 + 10 * j), 40) for j in range(15)),
    ]:
        text = " ".join(
            " ".join(f"word{chr(97 + w // 26)}{chr(97 + w % 26)}" for w in rng.choice(words, 8)) + "."
            for _ in range(count)
        )
        (tmp_path / "que" / f"{name}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def test_the_jpeg_pack_is_read(data_dir: Path) -> None:
    images, labels = load_cifar10("test", data_dir)
    assert images.shape == (12, 32, 32, 3)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    some, few = load_cifar10("test", data_dir, np.array([3, 3, 0]))
    np.testing.assert_array_equal(some, images[[3, 3, 0]])
    np.testing.assert_array_equal(few, labels[[3, 3, 0]])


def test_the_published_batches_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(6, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(6, dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = np.concatenate([labels[:, None], pixels.reshape(6, -1)], axis=1)
    records.tofile(folder / "test_batch.bin")
    images, found = load_cifar10("test", tmp_path, np.array([5, 0]))
    np.testing.assert_array_equal(images, pixels[[5, 0]].transpose(0, 2, 3, 1))
    assert found.tolist() == [5, 0]
    records.ravel()[:-1].tofile(folder / "test_batch.bin")
    with pytest.raises(InputError, match="no multiple of 3073"):
        load_cifar10("test", folder)


def test_missing_and_damaged_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDROBUST_DATA", raising=False)
    with pytest.raises(InputError, match=r"cifar10_jpeg.npz.*no dir.*--data-dir or FEDROBUST_DATA"):
        que.trial(que.settings(quick=True)[0], 0, None)
    with pytest.raises(InputError, match="did you mean train"):
        load_cifar10("trane", tmp_path)
    monkeypatch.setenv("FEDROBUST_DATA", str(tmp_path))
    (tmp_path / "sherlock.txt").write_text("once")
    with pytest.raises(InputError, match=r"needs the file que/sherlock_whiten\.txt"):
        que.texts(None)
    (tmp_path / "cifar10_jpeg.npz").write_bytes(b"PK no more")
    with pytest.raises(InputError, match="cannot be read"):
        load_cifar10("train")


def test_synthetic_outliers_are_as_described() -> None:
    drawn = que.synthetic(3, 30, 100, np.random.default_rng(0))
    assert drawn.outlier.sum() == 100 + 110 + 121
    assert len(drawn.points) == 5 * 331
    outliers = drawn.points[drawn.outlier]
    assert np.abs(np.abs(outliers[100:210, 9]) - np.sqrt(15)).max() < 0.6
    assert abs(outliers[:, 9].mean()) < 0.1


def test_hot_pixels_are_as_described(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(que, "whitening", lambda reference: np.eye(reference.shape[1]))
    hot = que.hot_pixels(2, 50, data_dir, np.random.default_rng(0))
    assert hot.points.shape == (50, 1024)
    assert hot.outlier.tolist() == [True] * 10 + [False] * 40
    # 10 : 1.3 is 4 : 6, and each group has a pixel of one value.
    assert ((hot.points[:4] == hot.points[0]).all(axis=0)).any()
    assert ((hot.points[4:10] == hot.points[4]).all(axis=0)).any()


@pytest.fixture
def small(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Trial]]:
    """Every kind of data once."""
    monkeypatch.setattr(que, "_red", lambda rows, _: _squares(rows))
    monkeypatch.setattr(que, "BLOCK", 150)
    que.word_vectors.cache_clear()
    yield [
        Trial(setting, 0, que.trial(setting, 0, data_dir), 0.0)
        for setting in (
            {"data": "CIFAR-10", "k": 2, "images": 200, "d": 64},
            {"data": "words", "k": 2, "d": 100},
            {"data": "synthetic", "k": 3, "d": 128},
        )
    ]
    que.word_vectors.cache_clear()


def _squares(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(100, 140, size=(len(rows), 64)).astype(np.uint8)


def test_a_small_form(small: list[Trial]) -> None:
    hot, words, synthetic = (t.figures for t in small)
    assert hot["que(4)"] > 0.5
    assert all(0 <= words[name] <= 1 for name in words if f"{name} s" in words)
    assert "elliptic envelope" in words
    assert "elliptic envelope" not in synthetic
    # The longer of two lengths is the inliers', which only the stretched directions set right.
    assert synthetic["que(10)"] > 0.9
    assert 0.8 > synthetic["spectral"] > synthetic["l2"]
    assert abs(synthetic["que(4) sketched"] - synthetic["que(4)"]) < 0.1
    page = CATALOG["que"].tables(small)
    assert "**synthetic, d = 128**" in page
    assert "(0.982)" in page
    assert (que.NEEDS_PYOD in page) == ("PyOD ECOD" not in synthetic)
    assert len(CATALOG["que"].draw(small).axes) == 6


def test_detectors_of_pyod_are_compared_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Peer:
        def fit(self, points: Matrix) -> None:
            self.decision_scores_ = que.l2(points)

        def get_params(self) -> dict[str, Any]:
            return {}

    for name in que.PYOD:
        module = ModuleType(name)
        setattr(module, name, Peer)
        monkeypatch.setitem(sys.modules, f"pyod.models.{name.lower()}", module)
    monkeypatch.setattr(que, "find_spec", lambda _: object())
    found = que.detectors((4,), 0, (50, 5))
    points = planted(50, 5)
    np.testing.assert_array_equal(found["PyOD ECOD"](points), que.l2(points))


def test_both_forms_try_all_data_and_what_is_known_is_found() -> None:
    for quick in (True, False):
        plan = CATALOG["que"].plan(quick=quick)
        assert {trial.setting["data"] for trial in plan} == set(que.ALPHAS)
    assert que.theirs("synthetic", 128, 3)["que(10)"].mean == pytest.approx(0.9823)
    assert que.theirs("words", 100, 3) == {}
