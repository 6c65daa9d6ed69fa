"""A federation of NVFlare's simulator on the digits, some of its sites malicious.

    python job.py                       # NVFlare's own weighted mean
    python job.py --rule "filter(eps=0.3)"

Needs: pip install 'fedrobust[nvflare]'
"""

import argparse
from pathlib import Path

import torch
from model import Digits
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe.sim_env import SimEnv
from sklearn.datasets import load_digits

from fedrobust.integrations.nvflare import RobustAggregator

parser = argparse.ArgumentParser()
parser.add_argument("--rule", help="fedrobust's; NVFlare's weighted mean if not given")
parser.add_argument("--sites", type=int, default=8)
parser.add_argument("--malicious", type=int, default=2)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--workspace", type=Path, default=Path("workspace"))
given = parser.parse_args()

if __name__ == "__main__":
    recipe = FedAvgRecipe(
        name="digits",
        model=Digits(),
        min_clients=given.sites,
        num_rounds=given.rounds,
        train_script=str(Path(__file__).with_name("client.py")),
        train_args=f"--sites {given.sites} --malicious {given.malicious}",
        aggregator=RobustAggregator(rule=given.rule) if given.rule else None,
    )
    env = SimEnv(num_clients=given.sites, workspace_root=str(given.workspace.resolve()))
    recipe.execute(env)

    run = given.workspace / "digits" / "server" / "simulate_job"
    saved = torch.load(run / "app_server" / "FL_global_model.pt", weights_only=True)
    model = Digits().eval()
    model.load_state_dict(saved["model"])
    digits = load_digits()
    x, y = torch.tensor(digits.data[1500:], dtype=torch.float32) / 16, torch.tensor(digits.target[1500:])
    accuracy = float((model(x).argmax(dim=1) == y).float().mean())
    print(f"test accuracy {accuracy:.3f} by {given.rule or 'the weighted mean'}")
