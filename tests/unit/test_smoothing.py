from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import binom, binomtest
from torch import Tensor, nn

from fedrobust.errors import InputError
from fedrobust.smoothing import ABSTAIN, Certified, Gaussian, RoundedGaussian, SmoothedClassifier, bounds
from fedrobust.smoothing.classifier import _looks
from fedrobust.smoothing.noise import BLOCK


def linear(weights: Tensor, bias: float = 0.0) -> nn.Module:
    """Class 1 where the image's product with the weights is above -bias, else class 0."""
    layer = nn.Linear(weights.numel(), 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([torch.zeros(weights.numel()), weights.flatten()]))
        layer.bias.copy_(torch.tensor([0.0, bias]))
    return nn.Sequential(nn.Flatten(), layer)


@given(
    st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.floats(1e-6, 0.5),
)
def test_the_bound_is_clopper_and_pearsons(counts: tuple[int, int], alpha: float) -> None:
    k, n = counts
    exact = binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
    assert bounds.lower_bound(k, n, alpha) == pytest.approx(exact, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("n", "alpha"), [(10, 0.1), (100, 0.05), (1000, 0.001)])
def test_the_bound_is_above_the_truth_with_probability_alpha_at_most(n: int, alpha: float) -> None:
    k = np.arange(n + 1)
    bound = bounds.lower_bound(k, n, alpha)
    truths = np.concatenate([np.linspace(0.001, 0.999, 997), bound[1:] - 1e-9])
    wrong = [binom.pmf(k, n, p)[bound > p].sum() for p in truths]
    assert max(wrong) <= alpha * (1 + 1e-6)
    assert max(wrong) > 0.9 * alpha  # the bound gives nothing away


@pytest.mark.parametrize("p", [0.5, 0.8, 0.999])
def test_evidence_is_a_supermartingale_where_there_is_nothing_to_find(p: float) -> None:
    """Its mean after n + 1 draws is what it is after n, for probability p; for a smaller one, less."""
    for n in (1, 50, 400):
        k = np.arange(n + 1)
        now = np.exp(bounds.evidence_above(k, n, p))
        later = np.exp(bounds.evidence_above(np.stack([k, k + 1]), n + 1, p))
        known = (now > 0) & (later > 0).all(axis=0)  # the others are too small for float64
        assert (now[k > 0.97 * p * n] > 0).all()
        np.testing.assert_allclose(((1 - p) * later[0] + p * later[1])[known], now[known], rtol=1e-6)
        smaller = 0.9 * p
        assert ((1 - smaller) * later[0] + smaller * later[1] <= now * (1 + 1e-6))[known].all()
    assert bounds.evidence_above(0, 0, p) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_looking_again_and_again_certifies_wrongly_with_probability_alpha_at_most(p: float) -> None:
    alpha, runs = 0.05, 2000
    rng = np.random.default_rng(0)
    k, ever = np.zeros(runs), np.zeros(runs, bool)
    for n in range(10, 3001, 10):
        k += rng.binomial(10, p, runs)
        ever |= bounds.evidence_above(k, n, p) >= -np.log(alpha)
    assert 0 < ever.sum() <= binom.ppf(0.9999, runs, alpha)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 2.0), st.floats(0.3, 2.5))
def test_of_a_linear_classifier_the_radius_is_at_most_its_distance(
    seed: int, sigma: float, distances: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, 2, generator=generator)
    # An image that is so many sigma from the boundary, on the side of class 1.
    image = distances * sigma * weights / weights.norm()
    classifier = SmoothedClassifier(linear(weights), sigma, 2, batch=2000)
    n, alpha = 50_000, 1e-6
    found = classifier.certify(image[None], n=n, alpha=alpha, seed=seed)
    assert found.label[0] == 1
    fewest = np.array([binom.ppf(1e-9, n, ndtr(distances))])
    least = bounds.radius(bounds.lower_bound(fewest, n, alpha), sigma)[0]
    assert least <= found.radius[0] <= distances * sigma
    assert least > (distances - 0.25) * sigma  # or this would say little


def test_of_a_linear_classifier_the_radius_comes_within_two_percent() -> None:
    weights = torch.tensor([[1.0, 2.0]])
    images = torch.stack([d * weights / weights.norm() for d in (0.25, 0.5, 1.0)])
    classifier = SmoothedClassifier(linear(weights), 0.5, 2, batch=5000)
    found = classifier.certify(images, n=2_000_000, seed=0)
    np.testing.assert_array_less(found.radius, [0.25, 0.5, 1.0])
    np.testing.assert_array_less([0.245, 0.49, 0.98], found.radius)


def test_certificates_hold_as_often_as_they_say() -> None:
    """Of 400 runs with alpha = 0.2 about 80 may be wrong, and no more."""
    weights, runs, alpha = torch.tensor([[1.0]]), 400, 0.2
    classifier = SmoothedClassifier(linear(weights), 1.0, 2, batch=400)
    images = torch.full((runs, 1, 1), 0.8)
    exact = classifier.certify(images, n0=10, n=200, alpha=alpha, seed=3)
    assert 0 < (exact.radius > 0.8).sum() <= binom.ppf(0.9999, runs, alpha)
    early = classifier.certify_at(images, 0.8 + 1e-6, n0=10, n=400, alpha=alpha, seed=3)
    assert (early.label == 1).sum() <= binom.ppf(0.9999, runs, alpha)


def conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def images(count: int) -> Tensor:
    return (torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 255).round() / 255


@pytest.mark.parametrize("noise", [Gaussian(0.3), RoundedGaussian(0.3)], ids=repr)
def test_an_image_has_the_same_answer_however_it_is_batched(noise: Gaussian | RoundedGaussian) -> None:
    x, threads = images(7), torch.get_num_threads()

    def certify(batch: int, which: list[int]) -> Certified:
        classifier = SmoothedClassifier(conv(), noise, 3, batch=batch)
        return classifier.certify(x[which], n=1030, seed=5, ids=which)

    torch.set_num_threads(1)
    whole = certify(BLOCK, list(range(7)))
    assert len(set(whole.radius)) > 3
    for batch, which in [(1000, [6, 2]), (350, [0, 1, 2, 3, 4, 5, 6])]:
        part = certify(batch, which)
        np.testing.assert_array_equal(part.radius, whole.radius[which])
        np.testing.assert_array_equal(part.label, whole.label[which])
    torch.set_num_threads(2)
    np.testing.assert_array_equal(certify(200, list(range(7))).radius, whole.radius)
    torch.set_num_threads(threads)


def test_each_image_has_noise_of_its_own_and_other_seeds_give_other_noise() -> None:
    x = images(1).expand(12, 1, 8, 8)
    classifier = SmoothedClassifier(conv(), 0.3, 3)
    same = classifier.certify(x, n=1000, seed=0, ids=[4] * 6 + list(range(6)))
    assert len(set(same.radius[:6])) == 1 < len(set(same.radius[6:]))
    drawn = [classifier.certify(x, n=1000).radius for _ in range(2)]
    assert not np.array_equal(*drawn)


def test_predictions_abstain_where_two_classes_are_as_likely() -> None:
    classifier = SmoothedClassifier(linear(torch.ones(2, 2)), 1.0, 2)
    x = torch.stack([torch.zeros(2, 2), torch.ones(2, 2), -torch.ones(2, 2)])
    assert classifier.predict(x, n=500, seed=0).tolist() == [ABSTAIN, 1, 0]
    found = classifier.certify(x, n=500, seed=0)
    assert found.label.tolist() == [ABSTAIN, 1, 0]
    assert found.radius[0] == 0
    assert found.samples.tolist() == [600] * 3


def test_stopping_early_agrees_and_takes_a_fraction_of_the_copies() -> None:
    weights, n = torch.tensor([[1.0]]), 100_000
    x = torch.linspace(-2, 2, 41)[:, None, None]
    classifier = SmoothedClassifier(linear(weights), 0.5, 2, batch=5000)
    full = classifier.certify(x, n=n, seed=0)
    for radius in (0.25, 0.5, 1.0):
        early = classifier.certify_at(x, radius, n=n, seed=1)
        differ = (early.label != ABSTAIN) != (full.radius >= radius)
        assert (np.abs(np.abs(x.flatten().numpy()[differ]) - radius) < 0.02).all()
        assert (early.label[early.radius > 0] == full.label[early.radius > 0]).all()
        assert set(early.radius) <= {0.0, radius}
        assert early.samples.sum() * 5 < full.samples.sum()
        assert early.samples.max() <= n + 100


def test_a_radius_beyond_all_doubt_is_refused_at_once() -> None:
    classifier = SmoothedClassifier(conv(), 0.25, 3)
    found = classifier.certify_at(images(2), 10.0, seed=0)
    assert found.label.tolist() == [ABSTAIN, ABSTAIN]
    assert found.samples.tolist() == [100, 100]


def test_no_image_has_no_answer() -> None:
    classifier = SmoothedClassifier(conv(), 0.25, 3)
    assert classifier.predict(images(0), n=100).shape == (0,)
    assert classifier.certify(images(0), n=100).radius.shape == (0,)


def test_what_is_trained_later_does_not_change_the_classifier() -> None:
    model = conv().train()
    classifier = SmoothedClassifier(model, 0.25, 3)
    before = classifier.certify(images(2), n=500, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert model.training
    np.testing.assert_array_equal(classifier.certify(images(2), n=500, seed=0).radius, before.radius)


def test_the_converted_network_is_the_one_that_is_certified() -> None:
    class Width(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype is self.weight.dtype is torch.bfloat16
            return torch.stack([x.flatten(1).sum(dim=1), torch.zeros(len(x), dtype=x.dtype)], dim=1)

    model = Width()
    classifier = SmoothedClassifier(model, 0.25, 2, dtype=torch.bfloat16)
    assert model.weight.dtype is torch.float32
    assert classifier.certify(torch.ones(1, 1, 8, 8), n=500, seed=0).label.tolist() == [0]
    assert classifier.predict(torch.ones(1, 1, 8, 8), n=500, seed=0).tolist() == [0]


def test_rounded_noise_is_the_gaussians() -> None:
    sigma, levels = 0.02, 255
    noise = RoundedGaussian(sigma, levels)
    out = torch.empty(BLOCK, 1, 100, 100)
    source = noise.source(torch.zeros(1, 100, 100), np.random.SeedSequence(0))
    source.fill(out)
    steps = (out * levels).round().long().flatten().numpy()
    assert torch.equal((out * levels).round() / levels, out)
    k = np.arange(-25, 26)
    expected = np.diff(ndtr((np.arange(-25, 27) - 0.5) / (sigma * levels))) * steps.size
    counted = np.array([(steps == i).sum() for i in k])
    assert counted.sum() >= steps.size - 5
    likely = expected > 20
    square = ((counted - expected) ** 2 / expected)[likely].sum()
    assert square < likely.sum() + 5 * np.sqrt(2 * likely.sum())
    assert 0 < noise.error(784) < 1e-9


def test_rounded_noise_wants_whole_levels() -> None:
    classifier = SmoothedClassifier(conv(), RoundedGaussian(0.25), 3)
    classifier.certify(images(1), n=100, seed=0)
    with pytest.raises(InputError, match=r"multiples of 1/255; one is 0\.5 of a level off"):
        classifier.certify(images(1) + 0.5 / 255, n=100, seed=0)
    with pytest.raises(InputError, match="scaled to 0"):
        classifier.certify(images(1).round() * 1000, n=100, seed=0)
    with pytest.raises(InputError, match="too wide"):
        SmoothedClassifier(conv(), RoundedGaussian(10.0), 3).certify(images(1), n=100)


def test_few_copies_under_rounded_noise_have_no_radius_that_is_no_number() -> None:
    """A bound that is below what the rounding takes off it."""
    found = SmoothedClassifier(conv(), RoundedGaussian(2.0), 3).certify(images(40), n0=2, n=2, seed=0)
    assert (found.label == ABSTAIN).all()
    assert (found.radius == 0).all()
    assert (bounds.radius(np.array([-1e-6, 0.0, 0.2, 0.5]), 1.0) == 0).all()


def test_certificates_under_rounded_noise_hold_as_often_as_they_say() -> None:
    """Of an image of whole levels, whose smoothed class is known exactly; 80 of 400 may be wrong."""
    sigma, levels, runs, alpha = 0.5, 4, 400, 0.2
    classifier = SmoothedClassifier(linear(torch.ones(1), -0.6), RoundedGaussian(sigma, levels), 2)
    images = torch.full((runs, 1, 1), 1.0)
    p = ndtr((1.0 - 0.625) / sigma)  # the noise leaves it at three quarters or more
    found = classifier.certify(images, n0=10, n=200, alpha=alpha, seed=0)
    assert 0 < (found.radius > sigma * ndtri(p)).sum() <= binom.ppf(0.9999, runs, alpha)


def test_what_copies_are_drawn_wrongly_is_taken_off_the_error_of_a_prediction() -> None:
    noise, image, n = RoundedGaussian(2.0), images(1), 40
    constant = SmoothedClassifier(linear(torch.zeros(image.numel()), 1.0), noise, 2)
    lost = n * noise.error(image.numel())
    for left, said in ((4 * 2.0**-n, 1), (2.0**-n, ABSTAIN)):  # a tie leaves 40 alike in 2 of 2^40 cases
        assert constant.predict(image, n=n, alpha=lost + left, seed=0).tolist() == [said]
    with pytest.raises(InputError, match=rf"n = {n} .* leave nothing of alpha = .*: take less than 20"):
        constant.predict(image, n=n, alpha=lost / 2, seed=0)


def test_sigma_may_be_a_number_of_numpys() -> None:
    assert SmoothedClassifier(conv(), np.float32(0.5), 3).noise == Gaussian(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": 0.0}, "sigma must be above 0 and finite, got 0.0"),
        ({"sigma": float("nan")}, "sigma must be above 0"),
        ({"classes": 1}, "classes must be at least 2, got 1"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
    ],
)
def test_bad_classifiers_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SmoothedClassifier(**{"model": conv(), "sigma": 0.25, "classes": 3, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (images(1), {"n": 0}, "n must be at least 1, got 0"),
        (images(1), {"n0": 0}, "n0 must be at least 1, got 0"),
        (images(1), {"alpha": 1.0}, r"alpha must be in \(0, 1\), got 1.0"),
        (images(1), {"seed": -1}, "seed must be at least 0, got -1"),
        (images(2), {"ids": [1]}, "ids must be numbers from 0, one for each of 2 images"),
        (images(1), {"ids": [-1]}, "ids must be numbers from 0"),
        (images(1)[0, 0, 0], {}, "a single one goes in as"),
        (images(1).long(), {}, "must be floating point"),
        (images(1) * float("nan"), {}, "images must be finite"),
        (torch.rand(1, 1, 9, 9), {}, "shapes cannot be multiplied"),
    ],
)
def test_bad_images_and_arguments_are_refused(
    x: Tensor, arguments: dict[str, int], message: str
) -> None:
    classifier = SmoothedClassifier(conv(), 0.25, 3)
    with pytest.raises((InputError, RuntimeError), match=message):
        classifier.certify(x, **{"n": 100, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("noise", [Gaussian(0.25), RoundedGaussian(0.25)], ids=repr)
def test_a_number_is_no_image(noise: Gaussian | RoundedGaussian) -> None:
    classifier, number = SmoothedClassifier(conv(), noise, 3), torch.tensor(1.0)
    for ask in (classifier.predict, classifier.certify, lambda x: classifier.certify_at(x, 0.1)):
        with pytest.raises(InputError, match="images must be floating point"):
            ask(number)


def test_a_model_of_other_classes_is_refused() -> None:
    with pytest.raises(InputError, match=r"maps 50 images to \(50, 3\), expected scores \(50, 10\)"):
        SmoothedClassifier(conv(), 0.25, 10).certify(images(1), n=100)
    with pytest.raises(InputError, match="radius must be at least 0 and finite, got -1"):
        SmoothedClassifier(conv(), 0.25, 3).certify_at(images(1), -1.0)


def test_an_untried_batch_is_found_and_kept() -> None:
    classifier = SmoothedClassifier(conv(), 0.25, 3)
    size = classifier.batch_size((1, 8, 8))
    assert size % BLOCK == 0
    assert classifier.batch_size((1, 8, 8)) == size
    assert SmoothedClassifier(conv(), 0.25, 3, batch=120).batch_size((1, 8, 8)) == 150


def test_looks_are_frequent_and_end_at_n() -> None:
    for n in (1, 49, 50, 51, 12_345, 100_000):
        looks = list(_looks(n))
        assert looks[0] == 0
        assert looks[-1] == n
        assert all(b > a for a, b in itertools.pairwise(looks))
        assert len(looks) < 60
