"""Robust statistics as estimators with scikit-learn's interface."""

from fedrobust.statistics.covariance import FilteredPCA, RobustCovariance
from fedrobust.statistics.gradients import linear_gradients, module_gradients
from fedrobust.statistics.modules import ModuleClassifier, ModuleRegressor
from fedrobust.statistics.que import QUEDetector, whitening
from fedrobust.statistics.robust_mean import RobustMean
from fedrobust.statistics.sever_estimators import SeverClassifier, SeverRegressor
from fedrobust.statistics.severing import Severed, sever
from fedrobust.statistics.spectral_signatures import SpectralSignatures

__all__ = [
    "FilteredPCA",
    "ModuleClassifier",
    "ModuleRegressor",
    "QUEDetector",
    "RobustCovariance",
    "RobustMean",
    "SeverClassifier",
    "SeverRegressor",
    "Severed",
    "SpectralSignatures",
    "linear_gradients",
    "module_gradients",
    "sever",
    "whitening",
]
