"""Datasets, and how they are split over clients."""

from fedrobust.data.dataset import Dataset, Normalisation
from fedrobust.data.datasets import load, read_idx
from fedrobust.data.splits import (
    IID,
    Dirichlet,
    Quantity,
    Rare,
    Shards,
    Similarity,
    Split,
    parse_split,
)

__all__ = [
    "IID",
    "Dataset",
    "Dirichlet",
    "Normalisation",
    "Quantity",
    "Rare",
    "Shards",
    "Similarity",
    "Split",
    "load",
    "parse_split",
    "read_idx",
]
