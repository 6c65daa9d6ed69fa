"""Robust statistics as estimators with scikit-learn's interface."""

from fedrobust.statistics.covariance import FilteredPCA, RobustCovariance
from fedrobust.statistics.que import QUEDetector, whitening
from fedrobust.statistics.robust_mean import RobustMean
from fedrobust.statistics.spectral_signatures import SpectralSignatures

__all__ = [
    "FilteredPCA",
    "QUEDetector",
    "RobustCovariance",
    "RobustMean",
    "SpectralSignatures",
    "whitening",
]
