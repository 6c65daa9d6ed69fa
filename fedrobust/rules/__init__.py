"""Every rule under its name, and the text form of their compositions."""

from __future__ import annotations

from fedrobust.rules.auto_gm import AutoGM
from fedrobust.rules.bulyan import Bulyan
from fedrobust.rules.caf import CAF
from fedrobust.rules.centered_clipping import CenteredClipping
from fedrobust.rules.clustering import ClippedClustering, Clustering
from fedrobust.rules.coordinate_wise import Meamed, Median, SignMajority, TrimmedMean
from fedrobust.rules.dnc import DnC
from fedrobust.rules.filter import EntropyFilter, Filter
from fedrobust.rules.flame import FLAME
from fedrobust.rules.fltrust import FLTrust
from fedrobust.rules.foolsgold import FoolsGold
from fedrobust.rules.fraction import DEFAULT_EPS
from fedrobust.rules.geometric_median import GeometricMedian
from fedrobust.rules.krum import Krum, MultiKrum
from fedrobust.rules.last import Last
from fedrobust.rules.mda import MDA
from fedrobust.rules.mean import Mean
from fedrobust.rules.medoid import Medoid
from fedrobust.rules.mixings import ARC, NNM, Bucketing, Clip
from fedrobust.rules.monna import MoNNA
from fedrobust.rules.no_regret import NoRegret
from fedrobust.rules.rule import (
    Aggregator,
    Composite,
    CoordinateWise,
    Decision,
    Lens,
    Mixed,
    Mixing,
    Rule,
    Weighting,
)
from fedrobust.rules.signguard import SignGuard
from fedrobust.rules.smea import SMEA
from fedrobust.text import parse_chain

CATALOG: dict[str, type[Rule]] = {
    "arc": ARC,
    "auto_gm": AutoGM,
    "bucketing": Bucketing,
    "bulyan": Bulyan,
    "caf": CAF,
    "centered_clipping": CenteredClipping,
    "clip": Clip,
    "clipped_clustering": ClippedClustering,
    "clustering": Clustering,
    "dnc": DnC,
    "entropy_filter": EntropyFilter,
    "filter": Filter,
    "flame": FLAME,
    "fltrust": FLTrust,
    "foolsgold": FoolsGold,
    "geometric_median": GeometricMedian,
    "krum": Krum,
    "mda": MDA,
    "meamed": Meamed,
    "mean": Mean,
    "median": Median,
    "medoid": Medoid,
    "monna": MoNNA,
    "multi_krum": MultiKrum,
    "nnm": NNM,
    "no_regret": NoRegret,
    "sign_majority": SignMajority,
    "signguard": SignGuard,
    "smea": SMEA,
    "trimmed_mean": TrimmedMean,
}

LENSES: dict[str, type[Lens]] = {"last": Last}
"""What may stand before rules, and combines nothing itself."""


def parse_rule(text: str) -> Aggregator:
    """Read a composition such as `nnm | filter(eps=0.2)`.

    Raises:
        InputError: an unknown name or argument (the known ones are listed), or parts in a wrong order.

    >>> parse_rule("bucketing(2) | filter(eps=0.1)")
    bucketing | filter(eps=0.1)
    """
    return Aggregator(tuple(parse_chain(text, CATALOG | LENSES, "rule")))


__all__ = [
    "ARC",
    "CAF",
    "CATALOG",
    "DEFAULT_EPS",
    "FLAME",
    "LENSES",
    "MDA",
    "NNM",
    "SMEA",
    "Aggregator",
    "AutoGM",
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "Clip",
    "ClippedClustering",
    "Clustering",
    "Composite",
    "CoordinateWise",
    "Decision",
    "DnC",
    "EntropyFilter",
    "FLTrust",
    "Filter",
    "FoolsGold",
    "GeometricMedian",
    "Krum",
    "Last",
    "Lens",
    "Meamed",
    "Mean",
    "Median",
    "Medoid",
    "Mixed",
    "Mixing",
    "MoNNA",
    "MultiKrum",
    "NoRegret",
    "Rule",
    "SignGuard",
    "SignMajority",
    "TrimmedMean",
    "Weighting",
    "parse_rule",
]
