"""Robust statistics as estimators with scikit-learn's interface."""

from fedrobust.statistics.gradients import linear_gradients, module_gradients
from fedrobust.statistics.modules import ModuleClassifier, ModuleRegressor
from fedrobust.statistics.sever_estimators import SeverClassifier, SeverRegressor
from fedrobust.statistics.severing import Severed, sever

__all__ = [
    "ModuleClassifier",
    "ModuleRegressor",
    "SeverClassifier",
    "SeverRegressor",
    "Severed",
    "linear_gradients",
    "module_gradients",
    "sever",
]
