"""Published experiments, run again: `fedrobust reproduce NAME`.

One experiment a module, each with an `EXPERIMENT`; `CATALOG` names them. The numbers that they are held
against are in `published/`, one CSV file each, with its source in the module that reads it.
"""

from __future__ import annotations

from fedrobust.reproductions import (
    backdoor,
    popres,
    que,
    robust_covariance,
    robust_mean,
    sever_regression,
    sever_svm,
)
from fedrobust.reproductions.experiment import Experiment

CATALOG: dict[str, Experiment] = {
    "robust-mean": robust_mean.EXPERIMENT,
    "robust-covariance": robust_covariance.EXPERIMENT,
    "popres": popres.EXPERIMENT,
    "que": que.EXPERIMENT,
    "sever-regression": sever_regression.EXPERIMENT,
    "sever-svm": sever_svm.EXPERIMENT,
    "backdoor": backdoor.EXPERIMENT,
}
"""The experiments, by the names that the command line knows."""

__all__ = ["CATALOG", "Experiment"]
