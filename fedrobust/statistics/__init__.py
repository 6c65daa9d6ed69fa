"""Robust statistics as estimators with scikit-learn's interface."""

from fedrobust.statistics.que import QUEDetector
from fedrobust.statistics.robust_mean import RobustMean
from fedrobust.statistics.spectral_signatures import SpectralSignatures

__all__ = [
    "QUEDetector",
    "RobustMean",
    "SpectralSignatures",
]
