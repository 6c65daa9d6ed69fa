"""Updates are taken one by one as they arrive; the result is nearly ready when the last one is there."""

from collections.abc import Iterator

import torch

import fedrobust as fr

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
running = fr.RunningAggregate(capacity=10, reference=model.state_dict())


def arriving() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Stands for your web handler, queue or socket."""
    for client in "abcdefgh":
        state = {key: value + torch.ones_like(value) for key, value in model.state_dict().items()}
        state["0.weight"] += torch.randn(4, 1, 3, 3) / 10
        yield client, state
    yield "a", state  # for a second time
    yield "i", {"0.weight": torch.zeros(4, 1, 3, 3)}  # another model
    yield "j", {key: value * 0 - 9 for key, value in state.items()}


for client, state in arriving():
    try:
        running.add(state, client=client)
    except fr.InputError as error:
        print(client, "is refused:", error)

result = running.result("filter", eps=0.2)
model.load_state_dict(result.value)
print({client: round(float(w), 2) for client, w in zip(running.clients, result.weights, strict=True)})
