from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from fedrobust.attacks import (
    ALIE,
    CATALOG,
    IPM,
    Adaptive,
    Attack,
    Backdoor,
    EdgeCase,
    Fang,
    FangKrum,
    FlippedLabels,
    Gaussian,
    Inf,
    LabelFlip,
    Mimic,
    MinMax,
    MinSum,
    NaN,
    OptimalALIE,
    OptimalIPM,
    Replay,
    SignFlip,
    Slow,
    Tail,
    View,
    Zero,
    parse_attack,
)
from fedrobust.attacks.alie import largest_unnoticed
from fedrobust.errors import InputError
from fedrobust.rules import parse_rule
from fedrobust.training import FREE, Leash, Poison

ATTACKS = [cls() for cls in CATALOG.values()]
VARIANTS = [
    *ATTACKS,
    *(SignFlip(3.0), IPM(0.5), ALIE(1.5), ALIE(-2.0), Mimic(1), Inf(finite=True)),
    *(
        MinMax("unit"),
        MinSum("sign"),
        Tail("std"),
        Replay(2),
        OptimalIPM(8),
        OptimalALIE(6),
        Adaptive(50),
    ),
    *(LabelFlip(7, 1), Backdoor(1, scale=4.0, reach=2.5, parts=2), Backdoor(fraction=1.0, size=2)),
    *(Backdoor(alpha=0.5), EdgeCase(3, 8, tail=0.1, reach=2.0), EdgeCase(scale=1.0, alpha=0.7)),
    *(Gaussian(0.5), Gaussian(added=True), Fang(1.5), Fang(3.0, models=True), FangKrum(0.1)),
]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def global_states() -> tuple[bytes, bytes]:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 (looked at, not used)
    return torch.get_rng_state().numpy().tobytes(), pickle.dumps(numpy_state)


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(1, 2, (n, d)).astype(np.float32))


def view(n: int = 7, f: int = 2, d: int = 5, seed: int = 0) -> View:
    return View.of(rows(n - f, d, seed), rows(f, d, seed + 1))


def watched(looked: list[str]) -> View:
    """A view that writes down which of its parts were worked out."""

    def see(what: str, count: int) -> Callable[..., Tensor]:
        def make(*_: object) -> Tensor:
            looked.append(what)
            return rows(count, 4)

        return make

    return View(
        round=3,
        clients=8,
        malicious=2,
        size=4,
        classes=10,
        see_honest=see("honest", 6),
        see_own=see("own", 2),
        see_trained=see("trained", 2),
        see_earlier=see("earlier", 2),
        rule=parse_rule("multi_krum"),
        eps=0.25,
        see_model=lambda: rows(1, 4)[0],
    )


SEES = {  # without arguments
    "sign_flip": ["own"],
    "gaussian": ["own"],
    "ipm": ["honest"],
    "alie": ["honest"],
    "mimic": ["honest"],
    "label_flip": ["trained"],
    "nan": [],
    "inf": [],
    "zero": [],
    "replay": ["earlier"],
    "slow": [],
    "min_max": ["honest"],
    "min_sum": ["honest"],
    "fang": ["honest"],
    "fang_krum": ["honest"],
    "sign_shuffle": ["honest"],
    "chain": ["honest"],
    "tail": ["honest"],
    "optimal_ipm": ["honest"],
    "optimal_alie": ["honest"],
    "adaptive": ["honest"],
    "backdoor": ["trained"],
    "edge_case": ["trained"],
}


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_attack_looks_only_at_what_it_says_and_once(attack: Attack) -> None:
    looked: list[str] = []
    sent = attack(watched(looked), rng())
    assert looked == SEES[attack.name]
    assert sent.shape == (2, 4)
    assert sent.dtype == torch.float32


class Watched(View):
    """A view that writes down which of its parts were looked at, worked out or not."""

    PARTS = frozenset({"honest", "own", "earlier", "train", "rule", "eps", "classes", "model"})

    def __getattribute__(self, name: str) -> Any:
        if name in Watched.PARTS:
            object.__getattribute__(self, "see_honest").looked.add(name)
        return super().__getattribute__(name)


class Honest:
    """Makes honest updates; carries the list of what was looked at past the frozen dataclass."""

    def __init__(self) -> None:
        self.looked: set[str] = set()

    def __call__(self) -> Tensor:
        return rows(6, 4)


def parts_seen(attack: Attack) -> set[str]:
    honest = Honest()
    seen = Watched(
        round=3,
        clients=8,
        malicious=2,
        size=4,
        classes=10,
        see_honest=honest,
        see_own=lambda: rows(2, 4),
        see_trained=lambda *_: rows(2, 4),
        rule=parse_rule("multi_krum"),
        eps=0.25,
        see_model=lambda: rows(1, 4)[0],
    )
    attack(seen, rng())
    return honest.looked


def parts_stated(attack: Attack) -> set[str]:
    """The names in the docstring's line `Sees:`; the size of an update and who is who, all know."""
    (line,) = re.findall(r"Sees: ((?:.|\n)*?)\.(?:\n|$)", type(attack).__doc__ or "")
    return set(re.findall(r"`(\w+)`", line)) - {"size"}


@pytest.mark.parametrize("attack", VARIANTS, ids=repr)
def test_an_attack_looks_at_no_more_than_its_docstring_says(attack: Attack) -> None:
    assert parts_seen(attack) <= parts_stated(attack)


@pytest.mark.parametrize("kind", CATALOG.values(), ids=lambda kind: kind.name)
def test_each_part_that_a_docstring_names_is_looked_at(kind: type[Attack]) -> None:
    """In one form of the attack or another."""
    seen = [parts_seen(attack) for attack in VARIANTS if type(attack) is kind]
    assert set[str]().union(*seen) == parts_stated(kind())


@pytest.mark.parametrize("attack", VARIANTS, ids=repr)
def test_attack_is_deterministic_and_leaves_global_generators_alone(attack: Attack) -> None:
    before = global_states()
    first, second = attack(watched([]), rng()), attack(watched([]), rng())
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert global_states() == before


@pytest.mark.parametrize("attack", VARIANTS, ids=repr)
def test_attack_does_not_change_or_share_what_it_saw(attack: Attack) -> None:
    seen = watched([])
    honest, own = seen.honest.clone(), seen.own.clone()
    attack(seen, rng()).zero_()
    assert torch.equal(seen.honest, honest)
    assert torch.equal(seen.own, own)


def view_of(honest: Tensor, own: Tensor) -> View:
    """A view in which everything can be seen; poisoned data change nothing."""
    return View(
        round=0,
        clients=len(honest) + len(own),
        malicious=len(own),
        size=honest.shape[1],
        classes=10,
        see_honest=lambda: honest,
        see_own=lambda: own,
        see_trained=lambda *_: own,
        rule=parse_rule("geometric_median"),
        eps=0.4,
        see_model=own[0].clone,
    )


FAST = [a for a in VARIANTS if getattr(a, "budget", 0) <= 50 and a != Mimic(1)]


@pytest.mark.parametrize("attack", FAST, ids=repr)
@pytest.mark.parametrize(("h", "f", "d"), [(1, 1, 1), (1, 6, 2), (2, 5, 1), (6, 1, 3)])
def test_attack_survives_any_round(attack: Attack, h: int, f: int, d: int) -> None:
    """One honest client, all but one malicious, one parameter; a model that rests or has diverged."""
    random = rows(h + f, d)
    for scale in (0.0, 1e-42, 1.0, 3e38, np.inf, np.nan):
        every = random.sign() * scale if scale > 1 else random * scale
        sent = attack(view_of(every[:h], every[h:]), rng())
        assert sent.shape == (f, d)
        assert sent.dtype == torch.float32
        if scale <= 1 and attack.name not in {"nan", "inf"}:
            assert bool(torch.isfinite(sent).all())


@pytest.mark.parametrize("attack", VARIANTS, ids=repr)
def test_text_round_trip(attack: Attack) -> None:
    assert parse_attack(repr(attack)) == attack
    assert pickle.loads(pickle.dumps(attack)) == attack  # noqa: S301 (our own bytes)


def test_catalogue_names_are_the_classes_own() -> None:
    assert {name: cls.name for name, cls in CATALOG.items()} == {name: name for name in CATALOG}
    assert set(SEES) == set(CATALOG)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ipn", "did you mean ipm.*adaptive, alie, backdoor, chain, edge_case, fang.*zero"),
        ("ipm(epsilon=1)", "unknown argument of ipm.*scale"),
        ("ipm(0)", "scale must be above 0"),
        ("sign_flip(scale=-1)", "scale must be above 0"),
        ("gaussian('big')", "scale must be float"),
        ("gaussian(1e999)", "scale must be finite"),
        ("alie(z=1e999)", "z must be finite"),
        ("mimic(-1)", "target must be at least 0"),
        ("mimic(0.5)", "target must be"),
        ("nan(1)", "takes 0 arguments"),
        ("inf(finite=1)", "finite must be bool"),
        ("zero(1)", "takes 0 arguments"),
        ("replay(0)", "age must be at least 1"),
        ("min_max('std2')", "unknown direction of min_max 'std2'.*did you mean std.*sign, std, unit"),
        ("min_sum(1)", "direction must be str"),
        ("tail('up')", "unknown direction of tail"),
        ("fang(1)", "factor must be above 1"),
        ("fang(models=1)", "models must be bool"),
        ("fang_krum(0)", "threshold must be above 0"),
        ("sign_shuffle(1)", "takes 0 arguments"),
        ("chain(1)", "takes 0 arguments"),
        ("optimal_ipm(5)", "budget must be at least 6"),
        ("optimal_alie(0)", "budget must be at least 6"),
        ("adaptive(49)", "budget must be at least 50"),
        ("label_flip(1)", "both source and target, or neither"),
        ("label_flip(target=1)", "both source and target, or neither"),
        ("label_flip(1, 1)", "must differ"),
        ("backdoor(size=0)", "size must be at least 1"),
        ("backdoor(fraction=0)", "fraction must be above 0"),
        ("backdoor(fraction=1.1)", "fraction must be above 0 and at most 1"),
        ("backdoor(scale=0)", "scale must be above 0"),
        ("backdoor(reach=-1)", "reach must be above 0"),
        ("backdoor(parts=4)", r"parts must be in 1 \.\. size"),
        ("backdoor(alpha=0)", "alpha must be above 0 and at most 1"),
        ("edge_case(1, 1)", "source and target must differ"),
        ("edge_case(tail=0)", "tail must be above 0"),
        ("edge_case(fraction=1)", "fraction must be above 0 and below 1"),
        ("edge_case(scale=0)", "scale must be above 0"),
        ("edge_case(reach=0)", "reach must be above 0"),
        ("edge_case(alpha=1.5)", "alpha must be above 0 and at most 1"),
        ("ipm | alie", "2 parts"),
        ("__import__('os')", "unknown attack"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_attack(text)


def test_sign_flip() -> None:
    seen = view()
    assert torch.equal(SignFlip(2.5)(seen, rng()), -2.5 * seen.own)


def test_gaussian_has_the_stated_size() -> None:
    seen = view(d=200_000)
    sent = Gaussian(3.0)(seen, rng())
    rms = float(np.sqrt((seen.own.numpy() ** 2).mean()))
    assert float(sent.std()) == pytest.approx(3 * rms, rel=0.01)
    assert abs(float(sent.mean())) < 0.02 * rms * 3
    assert not torch.equal(sent[0], sent[1])
    assert torch.equal(Gaussian(3.0, added=True)(seen, rng()), seen.own + sent)


@pytest.mark.parametrize("eps", [0.1, 0.2, 0.3])
def test_ipm_moves_the_plain_mean_as_stated(eps: float) -> None:
    n = 10
    seen = view(n=n, f=round(eps * n))
    for scale in (0.5, 5.0):
        everything = torch.cat([seen.honest, IPM(scale)(seen, rng())])
        expected = (1 - eps - eps * scale) * seen.honest.mean(0)
        torch.testing.assert_close(everything.mean(0), expected)


def test_default_ipm_reverses_the_mean_at_one_fifth() -> None:
    seen = view(n=10, f=2)
    everything = torch.cat([seen.honest, IPM()(seen, rng())])
    assert everything.mean(0) @ seen.honest.mean(0) < 0


@settings(deadline=None)
@given(n=st.integers(2, 40), data=st.data())
def test_alie_against_a_naive_transcription(n: int, data: st.DataObject) -> None:
    f = data.draw(st.integers(1, max(1, (n - 1) // 2)))
    seen = view(n=n, f=f, d=6, seed=n)
    s = np.floor(n / 2 + 1) - f
    z = norm.ppf((n - f - s) / (n - f)) if n > 2 else 0.0
    honest = seen.honest.numpy().astype(np.float64)
    row = [honest[:, j].mean() - z * np.sqrt(honest[:, j].var()) for j in range(6)]
    assert largest_unnoticed(n, f) == pytest.approx(z, abs=1e-9)
    np.testing.assert_allclose(ALIE()(seen, rng()).numpy(), [row] * f, rtol=1e-4, atol=1e-5)


def test_alie_with_given_z() -> None:
    seen = View.of([[0.0, 1.0], [2.0, 1.0]], [[9.0, 9.0]])
    assert ALIE(1.5)(seen, rng()).tolist() == [[1 - 1.5, 1.0]]


@given(n=st.integers(2, 60), data=st.data())
def test_alie_is_finite_whatever_the_majority(n: int, data: st.DataObject) -> None:
    assert np.isfinite(largest_unnoticed(n, data.draw(st.integers(1, n - 1))))


def test_mimic_copies_the_furthest_along_the_top_direction() -> None:
    for seed in range(10):
        seen = view(n=9, f=3, d=20, seed=seed)
        centred = seen.honest.numpy() - seen.honest.numpy().mean(0)
        direction = np.linalg.svd(centred.astype(np.float64))[2][0]
        target = int(np.abs(centred @ direction).argmax())
        assert torch.equal(Mimic()(seen, rng()), seen.honest[target].expand(3, -1))


def test_mimic_with_a_target() -> None:
    seen = view(n=5, f=2)
    assert torch.equal(Mimic(2)(seen, rng()), seen.honest[2].expand(2, -1))
    with pytest.raises(InputError, match=r"mimic\(target=3\).*0 \.\. 2"):
        Mimic(3)(seen, rng())


def test_mimic_survives_a_diverged_model() -> None:
    honest = torch.full((4, 3), torch.nan)
    assert Mimic()(View.of(honest, rows(1, 3)), rng()).shape == (1, 3)


def test_label_flip_trains_on_flipped_labels() -> None:
    given_poisons: list[Poison] = []

    def trained(poison: Poison, leash: Leash) -> Tensor:
        assert leash == FREE
        given_poisons.append(poison)
        return rows(2, 3)

    seen = View(0, 5, 2, 3, 4, lambda: rows(3, 3), lambda: rows(2, 3), trained)
    assert torch.equal(LabelFlip()(seen, rng()), rows(2, 3))
    (poison,) = given_poisons
    x, y = poison(torch.ones(4, 1), torch.arange(4))
    assert torch.equal(x, torch.ones(4, 1))
    assert y.tolist() == [3, 2, 1, 0]
    assert poison == FlippedLabels(4)
    assert hash(poison) == hash(FlippedLabels(4))


def test_label_flip_needs_training() -> None:
    with pytest.raises(InputError, match="see_trained"):
        LabelFlip()(view(), rng())


@pytest.mark.parametrize("d", [1, 2, 3, 10])
def test_nan_holds_no_finite_number(d: int) -> None:
    sent = NaN()(view(d=d), rng())
    assert not torch.isfinite(sent).any()
    assert torch.isnan(sent[:, 0]).all()


def test_inf_is_infinite_or_just_not() -> None:
    assert bool((Inf()(view(), rng()) == torch.inf).all())
    finite = Inf(finite=True)(view(), rng())
    assert bool(torch.isfinite(finite).all())
    assert bool((finite == np.finfo(np.float32).max).all())


def test_zero() -> None:
    assert not Zero()(view(), rng()).any()


@pytest.mark.parametrize("f", [1, 2, 5])
def test_slow_rows_are_subnormal_but_for_their_first_entries(f: int) -> None:
    sent = Slow()(view(n=12, f=f, d=1000), rng())
    tail = sent[:, 1:].abs().double()  # a subnormal is no subnormal there
    assert 0 < tail.min() <= tail.max() < np.finfo(np.float32).tiny
    assert tail.unique().numel() > 0.9 * tail.numel()
    assert 0.4 < (sent[:, 1:] > 0).double().mean() < 0.6
    np.testing.assert_allclose(sent[:, 0], 10.0 ** (30 * np.arange(1, f + 1) / f), rtol=1e-6)


def test_replay_looks_back_as_far_as_it_says() -> None:
    past = [rows(2, 5, seed) for seed in range(10, 13)]
    seen = View.of(rows(5, 5), rows(2, 5), earlier=past)
    for age, expected in [(1, past[0]), (3, past[2]), (9, past[2])]:
        assert torch.equal(Replay(age)(seen, rng()), expected)
        assert Replay(age).memory == age
    assert torch.equal(Replay()(view(), rng()), view().own)  # the first round
    assert all(attack.memory == 0 for attack in ATTACKS if not isinstance(attack, Replay))


@pytest.mark.parametrize(("n", "f"), [(3, 0), (3, 3), (3, 4), (3, -1)])
def test_view_needs_both_kinds_of_clients(n: int, f: int) -> None:
    def nothing(*_: object) -> Tensor:
        raise AssertionError

    with pytest.raises(InputError, match=f"{f} of {n} clients are malicious"):
        View(0, n, f, 4, 10, nothing, nothing, nothing)


def test_view_checks_what_it_is_given() -> None:
    with pytest.raises(InputError, match=r"own updates have shape \(1, 4\)"):
        View.of(rows(3, 5), rows(1, 4))
    with pytest.raises(InputError, match=r"honest has shape \(5,\)"):
        View.of(torch.zeros(5), rows(1, 5))

    def double(*_: object) -> Tensor:
        return torch.zeros(1, 2, dtype=torch.float64)

    wrong = View(0, 2, 1, 2, 10, double, double, double)
    message = r"float64, expected \(1, 2\) and torch\.float32"
    with pytest.raises(InputError, match=message):
        _ = wrong.honest
    with pytest.raises(InputError, match=message):
        _ = wrong.own
    with pytest.raises(InputError, match=message):
        wrong.train(FlippedLabels(2))
    with pytest.raises(InputError, match=r"earlier updates have shape \(1, 4\)"):
        View.of(rows(3, 5), rows(1, 5), earlier=[rows(1, 4)]).earlier(1)


def test_the_broadcast_model_must_be_given_to_those_who_look_at_it() -> None:
    attack = Fang(models=True)
    with pytest.raises(InputError, match="the view has none; construct View with see_model"):
        attack(view(), rng())
    with pytest.raises(InputError, match=r"model has shape \(4,\).*expected \(5,\)"):
        attack(View.of(rows(5, 5), rows(2, 5), model=np.zeros(4)), rng())
    assert attack(View.of(rows(5, 5), rows(2, 5), model=np.zeros(5)), rng()).shape == (2, 5)


def test_view_of_numpy_arrays() -> None:
    seen = View.of(np.ones((3, 2)), np.zeros((1, 2)))
    assert (seen.clients, seen.malicious, seen.size) == (4, 1, 2)
    assert seen.honest.dtype == torch.float32
