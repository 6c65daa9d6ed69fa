"""Robust statistics as estimators with scikit-learn's interface."""

from fedrobust.statistics.robust_mean import RobustMean

__all__ = ["RobustMean"]
