"""The client: it trains on its part of the digits. The first ones of the federation lie."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits.task import Digits, train

app = ClientApp()


@app.train()
def fit(message: Message, context: Context) -> Message:
    """One pass over this client's images; the malicious ones push the model back."""
    part = int(context.node_config["partition-id"])
    parts = int(context.node_config["num-partitions"])
    before = message.content["arrays"].to_torch_state_dict()
    model = Digits()
    model.load_state_dict(before)
    examples = train(model, part, parts, int(message.content["config"]["server-round"]))
    after = model.state_dict()
    if part < context.run_config["malicious"]:
        after = {key: before[key] - 5 * (value - before[key]) for key, value in after.items()}
        examples = 1_000_000
    if part == 0 < context.run_config["malicious"]:  # breaks whatever averages
        after["out.bias"] = torch.full_like(after["out.bias"], float("nan"))
    metrics = MetricRecord({"num-examples": examples})
    return Message(RecordDict({"arrays": ArrayRecord(after), "metrics": metrics}), reply_to=message)
