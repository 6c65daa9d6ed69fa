"""Small image classifiers without batch statistics: all they learn is in their parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedrobust.errors import InputError
from fedrobust.imports import check_import_path, import_callable, is_import_path, told
from fedrobust.seeding import seeded
from fedrobust.text import Textual, parse

Shape = tuple[int, int, int]


@dataclass(frozen=True, repr=False)
class Model(Textual, ABC):
    """An architecture; calling it gives a freshly initialised module."""

    def __call__(self, shape: Shape, classes: int, seed: int) -> nn.Module:
        """Build the module that maps images (n, *shape), float32, to logits (n, classes).

        Args:
            shape: (channels, height, width) of an image.
            classes: how many classes there are.
            seed: the same seed gives the same parameters; torch's global generator is left as it
                was.

        Raises:
            InputError: the images are too small for this architecture.
        """
        with seeded(seed):
            module = self.build(shape, classes)
        if is_plain(module):  # others' own layers may ask for views that there are not in this format
            # Takes 8 to 36 % off training on a CPU; microseconds an example, batches of 32, one thread:
            # cnn(16) on MNIST 214 -> 143, on CIFAR-10 306 -> 196, resnet(20) there 3358 -> 2932; of the
            # published ones byzfl_cnn 362 -> 243, f2ed_cnn 507 -> 368, bucketing_cnn 1132 -> 1046.
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    @abstractmethod
    def build(self, shape: Shape, classes: int) -> nn.Module:
        """As `__call__`, initialised from torch's global generator."""


def is_plain(module: nn.Module) -> bool:
    """Whether all layers are torch's or ours, without hooks: they can be copied, and do as they say."""
    known = "torch.nn.", "fedrobust."
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return all(
        type(part).__module__.startswith(known) and not any(getattr(part, hook) for hook in hooks)
        for part in module.modules()
    )


@dataclass(frozen=True, repr=False)
class Softmax(Model):
    """Multinomial logistic regression: one linear layer, a convex problem."""

    name = "softmax"

    def build(self, shape: Shape, classes: int) -> nn.Module:
        """Flatten, then one linear layer."""
        channels, height, width = shape
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes))


@dataclass(frozen=True, repr=False)
class MLP(Model):
    """One hidden layer of rectified linear units.

    Attributes:
        hidden: units in the hidden layer.
    """

    name = "mlp"

    hidden: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.hidden >= 1, "hidden must be at least 1")

    def build(self, shape: Shape, classes: int) -> nn.Module:
        """Flatten, linear, ReLU, linear."""
        channels, height, width = shape
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * height * width, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, classes),
        )


@dataclass(frozen=True, repr=False)
class CNN(Model):
    """Two blocks of 3 x 3 convolution, ReLU and 2 x 2 max-pooling, then one linear layer.

    Attributes:
        width: channels of the first block; the second has twice as many.
    """

    name = "cnn"

    width: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.width >= 1, "width must be at least 1")

    def build(self, shape: Shape, classes: int) -> nn.Module:
        """Each block halves the image, so that a quarter of each side reaches the linear layer."""
        channels, height, width = shape
        if min(height, width) < 4:
            raise InputError(
                f"{self!r} needs images of at least 4 x 4 pixels, got {height} x {width}; "
                "use mlp or softmax"
            )
        first, second = self.width, 2 * self.width
        return nn.Sequential(
            nn.Conv2d(channels, first, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(second * (height // 4) * (width // 4), classes),
        )


@dataclass(frozen=True, repr=False)
class LeNet(Model):
    """Two 5 x 5 convolutions of stride 2, each with ReLU, then two dense layers.

    LeNet-5 (LeCun, Bottou, Bengio, Haffner 1998) in today's terms: strides in the place of subsampling,
    rectified units. Made for many evaluations, as by randomised smoothing: twice as fast as `cnn`.

    Attributes:
        width: channels of the first convolution; the second has twice, the dense layer eight times as
            many.
    """

    name = "lenet"

    width: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.width >= 1, "width must be at least 1")

    def build(self, shape: Shape, classes: int) -> nn.Module:
        """Each convolution halves the image, rounding up."""
        channels, height, width = shape
        first, second, dense = self.width, 2 * self.width, 8 * self.width
        return nn.Sequential(
            *(nn.Conv2d(channels, first, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(first, second, 5, stride=2, padding=2), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(second * -(-height // 4) * -(-width // 4), dense), nn.ReLU()),
            nn.Linear(dense, classes),
        )


class Residual(nn.Module):
    """x -> ReLU(shortcut(x) + f(x)), f two 3 x 3 convolutions with group norm."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        """Of so many channels in and out; a shortcut of another shape is a 1 x 1 convolution."""
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False), _norm(outside), nn.ReLU()),
            *(nn.Conv2d(outside, outside, 3, padding=1, bias=False), _norm(outside)),
        )
        same = inside == outside and stride == 1
        reshaped = nn.Conv2d(inside, outside, 1, stride, bias=False), _norm(outside)
        self.shortcut = nn.Identity() if same else nn.Sequential(*reshaped)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inside, h, w) -> (n, outside, h / stride, w / stride)."""
        return torch.relu(self.shortcut(x) + self.body(x))


def _norm(channels: int) -> nn.GroupNorm:
    # Groups of 16 channels, Wu and He's second choice; narrow layers are one group.
    return nn.GroupNorm(max(channels // 16, 1), channels)


@dataclass(frozen=True, repr=False)
class ResNet(Model):
    """Residual network for small images, with group norm in the place of batch norm.

    Depth 6 k + 2 (20, 32, 44, 56, 110): three stages of k blocks, 16, 32 and 64 channels. Depth 18: four
    stages of two blocks, 64 to 512 channels. Each stage but the first halves the image.

    Sources: He, Zhang, Ren, Sun 2016 (arXiv 1512.03385), section 4.2 and, for 18, table 1 with the stem
    of a 3 x 3 convolution that is usual for small images. Deviations: group norm (Wu, He 2018, arXiv
    1803.08494), since statistics of batches do not average over clients; shortcuts of another shape are
    convolutions.

    Attributes:
        depth: 18, or 6 k + 2 from 8 to 110.
    """

    name = "resnet"

    depth: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        small = 8 <= self.depth <= 110 and self.depth % 6 == 2
        self.require(small or self.depth == 18, "depth must be 18, or 6 k + 2 from 8 to 110")

    def build(self, shape: Shape, classes: int) -> nn.Module:
        """A convolution, the stages, the mean over places, and one linear layer."""
        widths = (64, 128, 256, 512) if self.depth == 18 else (16, 32, 64)
        blocks = 2 if self.depth == 18 else (self.depth - 2) // 6
        first = nn.Conv2d(shape[0], widths[0], 3, padding=1, bias=False)
        layers: list[nn.Module] = [first, _norm(widths[0]), nn.ReLU()]
        inside = widths[0]
        for width in widths:
            for index in range(blocks):
                halve = index == 0 and width != widths[0]
                layers.append(Residual(inside, width, 2 if halve else 1))
                inside = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))


@dataclass(frozen=True, repr=False)
class Imported(Model):
    """Somebody else's architecture: a callable (shape, classes) -> nn.Module, named by import path.

    Attributes:
        path: "package.module:attribute", imported when the model is built and not before.
    """

    name = "imported"

    path: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_import_path(self.path)

    def __repr__(self) -> str:
        return self.path

    def __call__(self, shape: Shape, classes: int, seed: int) -> nn.Module:
        """As `Model`, where the module is tried on two images before it is handed out.

        Raises:
            InputError: there is nothing to call at the path, the call raises, or what it returns is no
                module that maps such images to logits and can be trained.
        """
        import_callable(self.path)  # first, so that nothing drawn on import is missing the next time
        return super().__call__(shape, classes, seed)

    def build(self, shape: Shape, classes: int) -> nn.Module:
        """Call it, and try what it returns: lazy layers get their shapes by that as well."""
        try:
            module = import_callable(self.path)(shape, classes)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self.path!r}, called with {shape}, {classes}: {told(error)}") from error
        if not isinstance(module, nn.Module):
            raise InputError(f"{self.path!r} returned {type(module).__name__}, expected an nn.Module")
        try:
            logits = module(torch.zeros(2, *shape))
            torch.autograd.grad(logits.sum(), list(module.parameters()))
        except Exception as error:
            raise InputError(
                f"{self.path!r} cannot be trained on images of shape {shape}: {told(error)}"
            ) from error
        if logits.shape != (2, classes):
            raise InputError(
                f"{self.path!r} maps 2 images to {tuple(logits.shape)}, expected logits (2, {classes})"
            )
        return module


CATALOG: dict[str, type[Model]] = {
    "softmax": Softmax,
    "mlp": MLP,
    "cnn": CNN,
    "lenet": LeNet,
    "resnet": ResNet,
}


def parse_model(text: str) -> Model:
    """Read `softmax`, `mlp(hidden=128)`, `cnn(32)`, `resnet(20)` or an import path; imports nothing.

    >>> parse_model("mlp(128)")
    mlp(hidden=128)
    >>> parse_model("hospital.models:unet")
    hospital.models:unet

    Raises:
        InputError: the text names no model of the `CATALOG`, an argument is wrong, or the path is
            malformed.
    """
    return Imported(text) if is_import_path(text) else parse(text, CATALOG, "model")
