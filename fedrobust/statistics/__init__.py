"""Robust statistics as estimators with scikit-learn's interface."""

from fedrobust.statistics.robust_mean import RobustMean
from fedrobust.statistics.spectral_signatures import SpectralSignatures

__all__ = [
    "RobustMean",
    "SpectralSignatures",
]
