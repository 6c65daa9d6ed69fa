"""What malicious clients send: each attack maps what they can see of a round to their updates."""

from fedrobust.attacks.adaptive import Adaptive
from fedrobust.attacks.alie import ALIE, OptimalALIE
from fedrobust.attacks.attack import Attack, Targeted, success_rate
from fedrobust.attacks.backdoor import Backdoor, Trigger
from fedrobust.attacks.chain import Chain
from fedrobust.attacks.edge_case import EdgeCase, RareAsTarget
from fedrobust.attacks.fang import Fang, FangKrum
from fedrobust.attacks.gaussian import Gaussian
from fedrobust.attacks.inf import Inf
from fedrobust.attacks.ipm import IPM, OptimalIPM
from fedrobust.attacks.label_flip import FlippedLabels, LabelFlip, Relabelled
from fedrobust.attacks.mimic import Mimic
from fedrobust.attacks.min_max import MinMax, MinSum
from fedrobust.attacks.nan import NaN
from fedrobust.attacks.replay import Replay
from fedrobust.attacks.search import Found, worst_error
from fedrobust.attacks.sign_flip import SignFlip
from fedrobust.attacks.sign_shuffle import SignShuffle
from fedrobust.attacks.slow import Slow
from fedrobust.attacks.tail import Tail
from fedrobust.attacks.view import View
from fedrobust.attacks.zero import Zero
from fedrobust.text import parse

CATALOG: dict[str, type[Attack]] = {
    "sign_flip": SignFlip,
    "gaussian": Gaussian,
    "ipm": IPM,
    "alie": ALIE,
    "mimic": Mimic,
    "label_flip": LabelFlip,
    "nan": NaN,
    "inf": Inf,
    "zero": Zero,
    "replay": Replay,
    "slow": Slow,
    "min_max": MinMax,
    "min_sum": MinSum,
    "fang": Fang,
    "fang_krum": FangKrum,
    "sign_shuffle": SignShuffle,
    "chain": Chain,
    "tail": Tail,
    "optimal_ipm": OptimalIPM,
    "optimal_alie": OptimalALIE,
    "adaptive": Adaptive,
    "backdoor": Backdoor,
    "edge_case": EdgeCase,
}


def parse_attack(text: str) -> Attack:
    """Read `alie`, `ipm(0.5)` or `gaussian(scale=100)`.

    >>> parse_attack("ipm(0.5)")
    ipm(scale=0.5)

    Raises:
        InputError: the text names no attack of the `CATALOG`, or an argument is wrong.
    """
    return parse(text, CATALOG, "attack")


__all__ = [
    "ALIE",
    "CATALOG",
    "IPM",
    "Adaptive",
    "Attack",
    "Backdoor",
    "Chain",
    "EdgeCase",
    "Fang",
    "FangKrum",
    "FlippedLabels",
    "Found",
    "Gaussian",
    "Inf",
    "LabelFlip",
    "Mimic",
    "MinMax",
    "MinSum",
    "NaN",
    "OptimalALIE",
    "OptimalIPM",
    "RareAsTarget",
    "Relabelled",
    "Replay",
    "SignFlip",
    "SignShuffle",
    "Slow",
    "Tail",
    "Targeted",
    "Trigger",
    "View",
    "Zero",
    "parse_attack",
    "success_rate",
    "worst_error",
]
