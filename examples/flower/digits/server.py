"""The server: Flower's FedAvg, or the same with a robust mean in place of the average."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from digits.task import Digits, accuracy
from fedrobust.integrations.flower import RobustStrategy

app = ServerApp()


def judge(_: int, arrays: ArrayRecord) -> MetricRecord:
    """How good a model is."""
    model = Digits()
    model.load_state_dict(arrays.to_torch_state_dict())
    return MetricRecord({"accuracy": accuracy(model)})


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation, and print how good the last model is."""
    rule, rounds = str(context.run_config["rule"]), int(context.run_config["rounds"])
    strategy = FedAvg(fraction_evaluate=0.0)
    if rule:
        strategy = RobustStrategy(rule, strategy)
    start = ArrayRecord(Digits().state_dict())
    result = strategy.start(grid, start, num_rounds=rounds, evaluate_fn=judge)
    last = result.evaluate_metrics_serverapp[rounds]["accuracy"]
    print(f"test accuracy {last:.3f} by {rule or 'the weighted mean'}", flush=True)
