from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, nll_loss, one_hot

from fedrobust.data import Normalisation
from fedrobust.errors import InputError
from fedrobust.smoothing.attacks import DDN, PGD, Adversary, parse_adversary, plain, smoothed
from fedrobust.training import (
    AdversarialTraining,
    Consistency,
    GaussianAugmentation,
    Objective,
    SmoothAdv,
    Trades,
    parse_objective,
)
from fedrobust.training.objectives import Step

ADVERSARIES = [PGD(0.5, steps=5), PGD(0.1, steps=3, norm="linf"), DDN(0.5, steps=8)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def examples(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 3


def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nll_loss(log_softmax(module(x), dim=1), y, reduction="none")


@pytest.mark.parametrize("adversary", ADVERSARIES, ids=repr)
@pytest.mark.parametrize("limits", [None, (0.0, 1.0)])
def test_attacks_stay_near_and_do_harm(adversary: Adversary, limits: tuple[float, float] | None) -> None:
    module, (x, y) = network(), examples()
    found = adversary(plain(module), x, y, limits=limits)
    order = math.inf if getattr(adversary, "norm", "l2") == "linf" else 2
    assert (torch.linalg.vector_norm((found - x).flatten(1), order, dim=1) <= adversary.eps + 1e-5).all()
    moved = (found != x).flatten(1).any(dim=1)
    assert (loss(module, found, y) > loss(module, x, y))[moved].all()
    assert moved.any() if isinstance(adversary, DDN) else moved.all()
    assert not found.requires_grad
    if limits:
        assert found.min() >= 0
        assert found.max() <= 1


def test_on_a_linear_classifier_attacks_find_the_worst_image() -> None:
    layer = nn.Linear(4, 2, bias=False)
    module, x, y = nn.Sequential(nn.Flatten(), layer), torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1])
    away = (layer.weight[1] - layer.weight[0]).detach()
    sign = torch.tensor([1.0, -1.0, -1.0])[:, None]
    worst = x.flatten(1) + 0.5 * sign * away / away.norm()
    found = PGD(0.5)(plain(module), x, y)
    torch.testing.assert_close(found.flatten(1), worst, rtol=0, atol=1e-5)
    linf = PGD(0.5, norm="linf")(plain(module), x, y)
    torch.testing.assert_close(linf.flatten(1), x.flatten(1) + 0.5 * sign * away.sign())


def test_an_attack_on_an_image_at_the_limits_goes_all_the_way_beside_them() -> None:
    """A step of PGD is clipped before it is shortened, so that what is clipped is not lost of eps."""

    def log_probabilities(x: Tensor) -> Tensor:  # climbs along both pixels, of which one is white
        return log_softmax(torch.stack([-x.flatten(1).sum(dim=1), torch.zeros(len(x))], dim=1), dim=1)

    found = PGD(0.2, steps=2)(
        log_probabilities, torch.tensor([[[[1.0, 0.5]]]]), torch.tensor([0]), limits=(0.0, 1.0)
    )
    torch.testing.assert_close(found, torch.tensor([[[[1.0, 0.7]]]]))


def test_a_step_is_as_long_where_a_model_is_so_sure_that_its_gradient_is_tiny() -> None:
    def sure(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return torch.stack([1e-20 * flat[:, 0], 1e-20 * flat[:, 1]], dim=1)

    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])
    moved = PGD(0.5)(sure, x, y) - x
    torch.testing.assert_close(torch.linalg.vector_norm(moved.flatten(1), dim=1), torch.full((2,), 0.5))
    moved = DDN(0.5, steps=2)(sure, x, y) - x  # of two equal scores the first one counts: y[1] is wrong
    lengths = torch.linalg.vector_norm(moved.flatten(1), dim=1)
    torch.testing.assert_close(lengths, torch.tensor([0.5, 0.0]))


@pytest.mark.parametrize("adversary", ADVERSARIES, ids=repr)
def test_to_lead_away_from_a_sure_answer_is_to_lead_away_from_its_label(adversary: Adversary) -> None:
    module, (x, y) = network(), examples()
    found = adversary(plain(module), x, one_hot(y, 3).float())
    torch.testing.assert_close(found, adversary(plain(module), x, y))


def test_where_there_is_no_gradient_no_image_moves() -> None:
    x, y = examples()
    for adversary in ADVERSARIES:
        assert torch.equal(adversary(lambda x: 0 * x.flatten(1), x, y), x)


def test_ddn_finds_the_smallest_change_and_shortens_it_to_eps() -> None:
    """Of images that the boundary is far from, nearby, behind, and out of reach."""
    away = torch.full((1, 2, 2), 0.5)
    distances = torch.tensor([0.9, 0.3, -0.2, 9.0])

    def log_probabilities(x: Tensor) -> Tensor:  # class 1 beyond the plane at length 1 along `away`
        beyond = (x * away).flatten(1).sum(dim=1) - 1
        return log_softmax(torch.stack([torch.zeros(len(x)), beyond], dim=1), dim=1)

    x = (1 - distances).view(4, 1, 1, 1) * away
    found = DDN(0.5, steps=40)(log_probabilities, x, torch.zeros(4, dtype=torch.int64))
    moved = ((found - x) * away).flatten(1).sum(dim=1)
    torch.testing.assert_close(found, x + moved.view(4, 1, 1, 1) * away)
    assert moved[0] == pytest.approx(0.5)
    assert 0.3 <= moved[1] < 1.06 * 0.3
    assert torch.equal(found[2:], x[2:])


def test_ddn_shrinks_where_it_has_won_and_grows_where_not() -> None:
    """And moves neither at last: the one is wrong as it is, and with the other nothing succeeds."""
    seen: list[Tensor] = []
    always = torch.tensor([0.0, 5.0, 5.0])  # the bias: class 0 is never found, class 1 always

    def log_probabilities(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        flat = x.flatten(1)
        return log_softmax(always + torch.stack([flat[:, 0], flat[:, 1], flat[:, 1] - 9], dim=1), dim=1)

    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])
    found = DDN(0.5, steps=4, gamma=0.1)(log_probabilities, x, y)
    lengths = torch.stack([torch.linalg.vector_norm(step.flatten(1), dim=1) for step in seen])
    steps = torch.arange(4.0)
    torch.testing.assert_close(lengths[1:, 0], 0.5 * 0.9 ** steps[1:])
    torch.testing.assert_close(lengths[1:, 1], 0.5 * 1.1 ** steps[1:])
    assert torch.equal(found, x)


def test_the_smoothed_loss_has_the_logarithm_outside() -> None:
    module, (x, y) = network(), examples()
    noise = 0.5 * torch.randn(6, 16, 1, 8, 8)
    each = torch.stack([torch.softmax(module(x + noise[:, j]), dim=1) for j in range(16)])
    torch.testing.assert_close(smoothed(module, noise)(x), each.mean(dim=0).log())
    torch.testing.assert_close(smoothed(module, noise, naive=True)(x), each.log().mean(dim=0))
    assert (smoothed(module, noise)(x) >= smoothed(module, noise, naive=True)(x) - 1e-6).all()
    for adversary in ADVERSARIES:
        found = adversary(smoothed(module, noise), x, y)
        better = nll_loss(smoothed(module, noise)(found), y) > nll_loss(smoothed(module, noise)(x), y)
        assert better


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pgd(0)", "eps must be above 0"),
        ("pgd(steps=0)", "steps must be at least 1"),
        ("pgd(norm='l1')", "unknown norm 'l1'; choose from l2, linf"),
        ("ddn(gamma=1.0)", "gamma must be in"),
        ("ddn(steps=1)", "steps must be at least 2"),
        ("fgsm", "unknown attack on images 'fgsm'; choose from ddn, pgd"),
    ],
)
def test_bad_attacks(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_adversary(text)


SCALE = Normalisation((0.3,), (0.5,), (0.0, 1.0))
OBJECTIVES = [
    GaussianAugmentation(0.5, m=2),
    AdversarialTraining("pgd(0.5, steps=2)"),
    Trades("pgd(0.5, steps=2)"),
    Trades("ddn(0.5, steps=2)", beta=2.0, sigma=0.5, m=3),
    SmoothAdv(0.5, m=3, attack="pgd(1.0, steps=2)"),
    SmoothAdv(0.5, attack="ddn(1.0, steps=2)"),
    Consistency(0.5),
]


def step(module: nn.Module, time: int = 0, seed: int = 0) -> Step:
    return Step(module, SCALE, torch.Generator().manual_seed(seed), time)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_objectives_read_as_they_are_written_and_repeat(objective: Objective) -> None:
    assert parse_objective(repr(objective)) == objective
    module, (x, y) = network(), examples()
    losses = [objective(step(module), x, y) for _ in range(2)]
    assert losses[0] == losses[1]
    gradients = torch.autograd.grad(losses[0], list(module.parameters()))
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in gradients)
    if not isinstance(objective, AdversarialTraining):
        assert objective(step(module, seed=1), x, y) != losses[0]


class Whole(nn.Module):
    """Float32, whatever comes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_probabilities_are_float32_where_layers_compute_in_bfloat16() -> None:
    """A CPU's autocast leaves log_softmax, logsumexp, exp and log in what they are given."""
    half, (x, y) = network(), examples()
    whole, noise = nn.Sequential(half, Whole()), 0.5 * torch.randn(6, 4, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert half(x).dtype == torch.bfloat16
        assert torch.equal(plain(half)(x), plain(whole)(x))
        for naive in (False, True):
            ours, expected = (smoothed(m, noise, naive=naive)(x) for m in (half, whole))
            assert torch.equal(ours, expected)
        for objective in OBJECTIVES:
            assert torch.equal(objective(step(half), x, y), objective(step(whole), x, y))


def test_noise_is_measured_in_pixels() -> None:
    """So a module that undoes the normalisation sees pixels with noise of sigma."""
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x * 0.5 + 0.3)
            return self.scores.expand(len(x), 3)

    pixels = torch.full((50, 1, 20, 20), 0.25)
    GaussianAugmentation(0.7, m=2)(step(Spy()), (pixels - 0.3) / 0.5, torch.zeros(50, dtype=torch.long))
    (noisy,) = seen
    assert noisy.shape == (100, 1, 20, 20)
    assert float(noisy.mean()) == pytest.approx(0.25, abs=0.02)
    assert float(noisy.std()) == pytest.approx(0.7, abs=0.02)


def test_training_under_attack_loses_more_than_under_noise_and_less_while_it_warms_up() -> None:
    module, (x, y) = network(), examples(60)
    noise = GaussianAugmentation(0.5, m=2)(step(module), x, y).item()
    adversary = SmoothAdv(0.5, m=2, attack="pgd(2.0, steps=4)", warmup=10)
    early, late = (adversary(step(module, time), x, y).item() for time in (0, 9))
    assert noise < early < late
    assert late == SmoothAdv(0.5, m=2, attack="pgd(2.0, steps=4)")(step(module), x, y).item()


def test_trades_is_the_cross_entropy_and_the_divergence_at_the_worst_image() -> None:
    layer = nn.Linear(64, 2, bias=False)
    module, (x, _) = nn.Sequential(nn.Flatten(), layer), examples()
    y, away = torch.arange(6) % 2, (layer.weight[0] - layer.weight[1]).detach()
    away = (away / away.norm()).view(1, 8, 8)
    x *= 0.2  # far from the limits of pixels, so that the worst image is known: along the weights
    plane = (0.5 + 0.1 * (x - 0.1) - 0.3) / 0.5
    log_p = log_softmax(module(plane), dim=1)
    either = [log_softmax(module(plane + sign * 0.2 * away / 0.5), dim=1) for sign in (1, -1)]
    worst = torch.stack([(log_p.exp() * (log_p - q)).sum(dim=1) for q in either]).amax(dim=0).mean()
    clean = cross_entropy(module(plane), y)
    found = Trades("pgd(0.2, steps=10)", beta=3.0)(step(module), plane, y)
    assert found.item() == pytest.approx((clean + 3 * worst).item(), rel=1e-2)
    assert Trades(beta=0.0)(step(module), plane, y).item() == pytest.approx(clean.item(), rel=1e-6)


def test_under_noise_trades_compares_the_smoothed_answers() -> None:
    module, (x, y) = network(), examples()
    noise = step(module).noise(x, 4, 0.5)
    scores = module(((SCALE.pixels(x)[:, None] + noise - 0.3) / 0.5).flatten(0, 1))
    clean = cross_entropy(scores, y.repeat_interleave(4)).item()
    losses = [
        Trades("pgd(1.0, steps=4)", beta=beta, sigma=0.5, m=4)(step(module), x, y).item()
        for beta in (0.0, 1.0, 2.0)
    ]
    assert losses[0] == pytest.approx(clean, rel=1e-5)
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    assert losses[1] > losses[0] + 1e-3


def test_a_consistent_model_pays_for_no_divergence() -> None:
    module, (x, y) = network(), examples()
    with torch.no_grad():
        for parameter in module[-1].parameters():  # type: ignore[union-attr]
            parameter.zero_()
    free = Consistency(0.5, lbd=1000.0, eta=0.0)(step(module), x, y)
    assert free.item() == pytest.approx(math.log(3), rel=1e-5)
    unsure = Consistency(0.5, lbd=0.0, eta=0.5)(step(module), x, y)
    assert unsure.item() == pytest.approx(1.5 * math.log(3), rel=1e-5)


def test_a_class_of_probability_zero_leaves_gradients_finite() -> None:
    module, (x, y) = network(), examples()
    with torch.no_grad():
        module[-1].bias.copy_(torch.tensor([0.0, 0.0, -200.0]))  # type: ignore[union-attr, operator]
    loss = Consistency(0.5)(step(module), x, torch.zeros_like(y))
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_attacks_are_found_in_evaluation_mode_and_the_mode_comes_back() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)).train()
    x, y = examples()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    AdversarialTraining("pgd(0.5, steps=3)")(step(module), x, y)
    assert module.training
    torch.set_rng_state(before)
    nn.functional.dropout(torch.zeros(6, 64), 0.5)  # drawn once: for the step, never for the attack
    after = torch.rand(1)
    torch.set_rng_state(before)
    AdversarialTraining("pgd(0.5, steps=3)")(step(module), x, y)
    assert torch.rand(1) == after


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gaussian(0)", "sigma must be above 0"),
        ("gaussian(m=0)", "m must be at least 1"),
        ("consistency(m=1)", "m must be at least 2"),
        ("consistency(lbd=-1.0)", "must not be negative"),
        ("smoothadv(attack='fgsm')", "unknown attack on images"),
        ("adversarial(warmup=-1)", "warmup must not be negative"),
        ("trades(beta=-1.0)", "beta must not be negative"),
        ("trades(sigma=-0.1)", "sigma must not be negative"),
        ("trades(m=0)", "m must be at least 1"),
        ("trades(m=2)", "without noise, sigma 0, m must be 1"),
        ("hinge", "unknown objective 'hinge'; choose from adversarial, consistency, cross_entropy"),
    ],
)
def test_bad_objectives(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_objective(text)
