"""A plain PyTorch loop in which `fedrobust.aggregate` takes the place of the mean."""

import copy

import torch
from sklearn.datasets import load_digits

import fedrobust as fr

torch.manual_seed(0)
images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images, parts = images.float() / 16, torch.randperm(1500).chunk(10)
layers = torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
model = torch.nn.Sequential(*layers)


def train(model: torch.nn.Module, part: torch.Tensor) -> dict[str, torch.Tensor]:
    """What one client does with the model that it was sent."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2)
    for batch in part.split(30):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimiser.step()
    return model.state_dict()


for number in range(30):
    states = [train(copy.deepcopy(model), part) for part in parts]
    states[:2] = [{key: -5 * value for key, value in state.items()} for state in states[:2]]  # attack
    result = fr.aggregate(states, "filter", eps=0.2, reference=model.state_dict(), seed=number)
    model.load_state_dict(result.value)

accuracy = (model.eval()(images[1500:]).argmax(dim=1) == labels[1500:]).float().mean()
print(f"test accuracy {accuracy:.2f}, malicious weight {result.weights[:2].sum():.2f}")
