"""Robust statistics as estimators with scikit-learn's interface."""

from __future__ import annotations

from fedrobust.statistics.covariance import FilteredPCA, RobustCovariance

__all__ = ["FilteredPCA", "RobustCovariance"]
