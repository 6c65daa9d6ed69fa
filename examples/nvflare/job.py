"""A federation of NVFlare's simulator on the digits, some of its sites malicious.

    python job.py                       # NVFlare's own weighted mean
    python job.py --rule "filter(eps=0.3)"

Needs: pip install 'fedrobust[nvflare]'
"""

import argparse
from pathlib import Path

import torch
from model import Digits
from nvflare.app_common.aggregators import InTimeAccumulateWeightedAggregator
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import (
    FullModelShareableGenerator,
)
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
from nvflare.app_opt.pt.job_config.model import PTModel
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner
from nvflare.recipe.sim_env import SimEnv
from sklearn.datasets import load_digits

from fedrobust.integrations.nvflare import RobustAggregator

parser = argparse.ArgumentParser()
parser.add_argument("--rule", help="fedrobust's; NVFlare's weighted mean if not given")
parser.add_argument("--workflow", choices=["fedavg", "classic"], default="fedavg")
parser.add_argument("--sites", type=int, default=8)
parser.add_argument("--malicious", type=int, default=2)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--workspace", type=Path, default=Path("workspace"))
given = parser.parse_args()
script = str(Path(__file__).with_name("client.py"))
arguments = f"--sites {given.sites} --malicious {given.malicious}"


def fedavg() -> None:
    """By a recipe, as most federations are made; the sites send whole models."""
    recipe = FedAvgRecipe(
        name="digits",
        model=Digits(),
        min_clients=given.sites,
        num_rounds=given.rounds,
        train_script=script,
        train_args=arguments,
        aggregator=RobustAggregator(given.rule) if given.rule else None,
    )
    recipe.execute(SimEnv(num_clients=given.sites, workspace_root=str(given.workspace.resolve())))


def classic() -> None:
    """By the classic workflow, component by component; the sites send differences."""
    job = FedJob(name="digits", min_clients=given.sites)
    job.to_server(PTModel(Digits()), id="persistor")
    job.to_server(FullModelShareableGenerator(), id="shareable_generator")
    theirs = InTimeAccumulateWeightedAggregator()
    job.to_server(RobustAggregator(given.rule) if given.rule else theirs, id="aggregator")
    workflow = ScatterAndGather(
        min_clients=given.sites, num_rounds=given.rounds, persistor_id="persistor"
    )
    job.to_server(workflow)
    job.to_clients(ScriptRunner(script, script_args=arguments, params_transfer_type="DIFF"))
    job.simulator_run(str(given.workspace.resolve() / "digits"), n_clients=given.sites)


if __name__ == "__main__":
    {"fedavg": fedavg, "classic": classic}[given.workflow]()
    run = given.workspace / "digits" / "server" / "simulate_job"
    saved = torch.load(run / "app_server" / "FL_global_model.pt", weights_only=True)
    model = Digits().eval()
    model.load_state_dict(saved["model"])
    digits = load_digits()
    x, y = torch.tensor(digits.data[1500:], dtype=torch.float32) / 16, torch.tensor(digits.target[1500:])
    accuracy = float((model(x).argmax(dim=1) == y).float().mean())
    print(f"test accuracy {accuracy:.3f} by {given.rule or 'the weighted mean'}")
