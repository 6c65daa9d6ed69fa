"""Federated-learning aggregation that malicious clients cannot steer, with a certificate.

>>> import numpy as np
>>> import fedrobust as fr
>>> updates = np.random.default_rng(1).normal(size=(10, 1000)).astype(np.float32)
>>> fr.aggregate(updates, fr.NNM() | fr.Filter(eps=0.2)).value.shape
(1000,)
"""

from __future__ import annotations

from fedrobust.aggregate import Aggregated, LocalRows, Rows, aggregate, aggregate_rows
from fedrobust.certificate import Certificate
from fedrobust.errors import InputError
from fedrobust.rules import (
    ARC,
    CAF,
    CATALOG,
    FLAME,
    MDA,
    NNM,
    SMEA,
    Aggregator,
    AutoGM,
    Bucketing,
    Bulyan,
    CenteredClipping,
    Clip,
    ClippedClustering,
    Clustering,
    DnC,
    EntropyFilter,
    Filter,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    Meamed,
    Mean,
    Median,
    Medoid,
    MoNNA,
    MultiKrum,
    NoRegret,
    SignGuard,
    SignMajority,
    TrimmedMean,
    parse_rule,
)
from fedrobust.running import RunningAggregate
from fedrobust.verdict import Verdict

__version__ = "0.1.0"

__all__ = [
    "ARC",
    "CAF",
    "CATALOG",
    "FLAME",
    "MDA",
    "NNM",
    "SMEA",
    "Aggregated",
    "Aggregator",
    "AutoGM",
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "Certificate",
    "Clip",
    "ClippedClustering",
    "Clustering",
    "DnC",
    "EntropyFilter",
    "FLTrust",
    "Filter",
    "FoolsGold",
    "GeometricMedian",
    "InputError",
    "Krum",
    "LocalRows",
    "Meamed",
    "Mean",
    "Median",
    "Medoid",
    "MoNNA",
    "MultiKrum",
    "NoRegret",
    "Rows",
    "RunningAggregate",
    "SignGuard",
    "SignMajority",
    "TrimmedMean",
    "Verdict",
    "aggregate",
    "aggregate_rows",
    "parse_rule",
]
