"""The estimators of `fedrobust.statistics` in pipelines and searches of scikit-learn."""

import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import RobustScaler

from fedrobust.statistics import SeverRegressor

rng = np.random.default_rng(0)
X, X_test, y, y_test = train_test_split(*load_diabetes(return_X_y=True), random_state=0)
bad = rng.choice(len(X), len(X) // 10, replace=False)
X[bad], y[bad] = 5 * X[bad], -2000.0  # a tenth of the sample is poisoned

plain = make_pipeline(RobustScaler(), Ridge()).fit(X, y)
steps = make_pipeline(RobustScaler(), SeverRegressor(Ridge()))
choices = {"severregressor__eps": [0.0, 0.05, 0.1, 0.2]}
search = GridSearchCV(steps, choices, scoring="neg_median_absolute_error").fit(X, y)
print(f"plain {r2_score(y_test, plain.predict(X_test)):6.2f}")
print(f"sever {r2_score(y_test, search.predict(X_test)):6.2f}  by {search.best_params_}")
