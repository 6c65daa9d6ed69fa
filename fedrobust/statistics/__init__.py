"""Robust statistics as estimators with scikit-learn's interface."""
