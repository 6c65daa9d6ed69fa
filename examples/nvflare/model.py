"""The network that the sites train: 64 pixels, 32 hidden units, ten digits."""

import torch


class Digits(torch.nn.Module):
    """A small network with a batch norm, whose counter is an integer."""

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
