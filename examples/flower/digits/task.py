"""What clients train: a small network on 64 pixels, and their part of the digits."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

TRAIN = 1500
"""So many of the 1797 images are the clients', the rest is for the test."""


class Digits(torch.nn.Module):
    """64 pixels, 32 hidden units, ten digits, and a batch norm, whose counter is an integer."""

    def __init__(self) -> None:
        """With weights that are the same everywhere."""
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.nn.Linear(64, 32)
        self.norm = torch.nn.BatchNorm1d(32)
        self.out = torch.nn.Linear(32, 10)
        for weight in self.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.1, generator=generator)
            elif weight is not self.norm.weight:
                torch.nn.init.zeros_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of the ten digits for images (n, 64)."""
        return self.out(torch.relu(self.norm(self.hidden(x))))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """All images (1797, 64) and labels (1797,)."""
    digits = load_digits()
    return torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)


def train(model: Digits, part: int, parts: int, number: int) -> int:
    """A pass over one client's part; returns how many images it has."""
    x, y = (values[part:TRAIN:parts] for values in data())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2)
    model.train()
    seed = torch.Generator().manual_seed(1000 * number + part)
    for batch in torch.randperm(len(x), generator=seed).split(32):
        optimiser.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()
        optimiser.step()
    return len(x)


def accuracy(model: Digits) -> float:
    """On the images that no client has."""
    x, y = (values[TRAIN:] for values in data())
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == y).float().mean())
