"""Robust statistics as estimators with scikit-learn's interface."""

from fedrobust.statistics.que import QUEDetector, whitening

__all__ = ["QUEDetector", "whitening"]
