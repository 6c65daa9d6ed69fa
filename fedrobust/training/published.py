"""The networks of published experiments, to be named by import path.

>>> from fedrobust.training import Task
>>> Task(dataset="mnist", model="fedrobust.training.published:byzfl_cnn").model
'fedrobust.training.published:byzfl_cnn'

Each takes the shape of an image and the number of classes. At (1, 28, 28) and 10 it is the published
network; other images change its first convolution and its first dense layer.
"""

from __future__ import annotations

from torch import nn

from fedrobust.errors import InputError
from fedrobust.training.models import Shape


def bucketing_cnn(shape: Shape, classes: int) -> nn.Sequential:
    """Two 3 x 3 convolutions, one pooling, dropout; 1 199 882 parameters on MNIST.

    Source: Karimireddy, He, Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing",
    ICLR 2022 (arXiv 2006.09365), table of the experiments' network.

    Raises:
        InputError: the images are too small.
    """
    height, width = ((side - 4) // 2 for side in shape[1:])
    return nn.Sequential(
        *(nn.Conv2d(shape[0], 32, 3), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
        *(nn.Flatten(), nn.Linear(_inputs(64, height, width, shape), 128), nn.ReLU(), nn.Dropout(0.5)),
        nn.Linear(128, classes),
    )


def byzfl_cnn(shape: Shape, classes: int) -> nn.Sequential:
    """Two blocks of 5 x 5 convolution, ReLU and pooling; 431 080 parameters on MNIST.

    Source: `cnn_mnist` of ByzFL (González, Guerraoui, Pinot, Rizk, Stephan, Taïani 2025, arXiv
    2505.24802). Deviation: no log-softmax at the end, since the cross-entropy does that itself. The
    LeNet of Jeong, Shin, NeurIPS 2020 (arXiv 2006.04062), is the same.

    Raises:
        InputError: the images are too small.
    """
    height, width = (((side - 4) // 2 - 4) // 2 for side in shape[1:])
    return nn.Sequential(
        *(nn.Conv2d(shape[0], 20, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(_inputs(50, height, width, shape), 500), nn.ReLU()),
        nn.Linear(500, classes),
    )


def f2ed_cnn(shape: Shape, classes: int) -> nn.Sequential:
    """Two blocks of padded 5 x 5 convolution, ReLU and pooling, 30 filters; 319 520 parameters on MNIST.

    Source: Zhu, Wang, Pang, Wang, Jiao, Song, Jordan, "Byzantine-Robust Federated Learning with Optimal
    Statistical Rates", AISTATS 2023 (arXiv 2205.11765).

    Raises:
        InputError: the images are too small.
    """
    height, width = (side // 4 for side in shape[1:])
    return nn.Sequential(
        *(nn.Conv2d(shape[0], 30, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(30, 30, 5, padding="same"), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(_inputs(30, height, width, shape), 200), nn.ReLU()),
        nn.Linear(200, classes),
    )


def _inputs(channels: int, height: int, width: int, shape: Shape) -> int:
    """How many numbers reach the first dense layer."""
    if min(height, width) < 1:
        raise InputError(
            f"nothing is left of images of {shape[1]} x {shape[2]} pixels before the dense layers; "
            "use a smaller network, such as mlp"
        )
    return channels * height * width
