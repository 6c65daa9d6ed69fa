"""What a site runs: local training on its part of the digits; some sites lie."""

import argparse

import nvflare.client as flare
import torch
from model import Digits
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

parser = argparse.ArgumentParser()
parser.add_argument("--sites", type=int, default=8)
parser.add_argument("--malicious", type=int, default=2)
given = parser.parse_args()

flare.init()
site = int(flare.get_site_name().removeprefix("site-")) - 1
digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
x, y = x[site : 1500 : given.sites], y[site : 1500 : given.sites]  # the rest is for the test
model = Digits()
optimiser = torch.optim.SGD(model.parameters(), lr=0.2)

while flare.is_running():
    before = flare.receive().params
    model.load_state_dict(before)
    for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(site)).split(32):
        optimiser.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()
        optimiser.step()
    params, steps = {key: value.clone() for key, value in model.state_dict().items()}, len(x)
    if site < given.malicious:  # pushes the model back, and says that it has a million examples
        params = {key: before[key] - 5 * (value - before[key]) for key, value in params.items()}
        steps = 1_000_000
    if site == 0 < given.malicious:  # and one breaks whatever averages
        params["out.bias"][:] = float("nan")
    flare.send(flare.FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": steps}))
