"""Robust statistics as estimators with scikit-learn's interface."""

from fedrobust.statistics.spectral_signatures import SpectralSignatures

__all__ = ["SpectralSignatures"]
