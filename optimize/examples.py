"""A small network for recipes that begin without a trained model, and to copy: a factory as `model.module` names it."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def convnet(classes: int, channels: int = 3, width: int = 16) -> nn.Module:
    """A convolutional network for images from 8 x 8 pixels on: [batch, channels, height, width] to [batch, classes].

    Three stages of two 3 x 3 convolutions with `width`, 2 and 4 times `width` channels, each stage half as high and
    wide; then the mean over the image, and a linear layer. After Springenberg et al., "Striving for simplicity"
    (https://arxiv.org/abs/1412.6806), with batch normalisation.
    """
    from torch import nn

    def step(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    wide, wider = 2 * width, 4 * width
    layers = [*step(channels, width, 1), *step(width, width, 1)]
    layers += [*step(width, wide, 2), *step(wide, wide, 1), *step(wide, wider, 2), *step(wider, wider, 1)]
    parts = {
        "features": nn.Sequential(*layers),
        "pool": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "head": nn.Linear(wider, classes),
    }
    return nn.Sequential(OrderedDict(parts))
