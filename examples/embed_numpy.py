"""Arrays in, one robust mean out: gradients, sensor readings, parameters of any model."""

import numpy as np

import fedrobust as fr

rng = np.random.default_rng(0)
truth = {"weight": rng.normal(size=(20, 5)), "bias": rng.normal(size=5)}
updates = [{key: rng.normal(value, 0.5) for key, value in truth.items()} for _ in range(20)]
for update in updates[:3]:
    update["weight"] = -10 * truth["weight"]  # three of twenty attack together
updates[7]["bias"][0] = np.inf  # and one is broken

for rule in ("mean", "median", "nnm | filter"):
    result = fr.aggregate(updates, rule, eps=0.2)
    error = np.sqrt(sum(np.sum((result.value[key] - truth[key]) ** 2) for key in truth))
    print(f"{rule:<12}  error {error:5.2f}  {result.verdict.value:<18}  refused {dict(result.refused)}")

print(f"the honest mean is within {result.certificate.bound():.2f} of the last, whatever the three sent")
