"""SEVER's published data in the form that `fedrobust reproduce sever-regression` and `sever-svm` read.

    git clone https://github.com/hoonose/sever
    python examples/sever_data.py sever data        # makes data/sever
    fedrobust reproduce sever-svm --data-dir data

What the files hold is in docs/reproductions.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat
from scipy.sparse import csr_matrix, vstack

SUITES = {
    "grad": "eps-{}_wd-9_exact_L2_grad_rep-2_all_attacks",
    "plain": "eps-{}_wd-9_exact_L2_rep-2_all_attacks",
}


def sparse(prefix: str, X: Any) -> dict[str, Any]:  # noqa: ANN401 (whatever MATLAB had)
    """The arrays of a matrix by rows."""
    rows = csr_matrix(X)
    rows.sort_indices()
    parts = {"data": rows.data, "indices": rows.indices, "indptr": rows.indptr, "shape": rows.shape}
    return {prefix + name: np.asarray(part) for name, part in parts.items()}


def suite(folder: Path) -> dict[str, Any]:
    """All attacks of a suite, one below the other."""
    paths = sorted(folder.glob("[0-9]*.mat"), key=lambda path: int(path.stem))
    attacks = [loadmat(path) for path in paths]
    labels = np.array([attack["y_attack"].ravel() for attack in attacks], np.int8)
    return {
        **sparse("X_", vstack([csr_matrix(attack["X_attack"]) for attack in attacks])),
        "y": labels,
        "attack_id": np.array([int(path.stem) for path in paths]),
        "rows_per_attack": labels.shape[1],
    }


def convert(source: Path, to: Path) -> None:
    """Read a clone of the authors' repository, and write the folder `sever`."""
    (to / "enron_attacks").mkdir(parents=True, exist_ok=True)
    qsar, enron = loadmat(source / "linreg/data/qsar.mat"), loadmat(source / "svm/data/enron_data.mat")
    labels = ("y_train", "y_test")
    np.savez_compressed(
        to / "qsar.npz",
        **{name: qsar[name] for name in ("X_train", "X_test")},
        **{name: qsar[name].ravel() for name in labels},
    )
    np.savez_compressed(
        to / "enron.npz",
        **sparse("X_train_", enron["X_train"]),
        **sparse("X_test_", enron["X_test"]),
        **{name: enron[name].ravel() for name in labels},
    )
    for (name, folder), eps in ((named, eps) for named in SUITES.items() for eps in (5, 10, 20, 30)):
        found = suite(source / "svm/diaries/enron" / folder.format(eps))
        np.savez_compressed(to / "enron_attacks" / f"eps{eps:02d}_{name}.npz", **found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path, help="the clone")
    parser.add_argument("to", type=Path, help="the data directory")
    options = parser.parse_args()
    convert(options.source, options.to / "sever")
