"""A residual network for 8 x 8 digits."""

from __future__ import annotations

from collections import OrderedDict
from importlib.resources import as_file, files

from safetensors.torch import load_file
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Add two 3 x 3 convolutions to their input; one ReLU module is called twice."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut = (
            nn.Sequential() if inputs == outputs and stride == 1 else projection(inputs, outputs, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        result: Tensor = self.relu(y + self.shortcut(x))
        return result


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return the 1 x 1 convolution of a shortcut that changes shape."""
    conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs)))


class ResNetDigits(nn.Module):
    """Classify grey 8 x 8 images with values from 0 to 1 into ten digits; 56 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.stem = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(16), relu=nn.ReLU()))
        self.layer1 = BasicBlock(16, 16)
        self.maxpool = nn.MaxPool2d(2)
        self.layer2 = BasicBlock(16, 32)
        self.layer3 = BasicBlock(32, 48, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 1, 8, 8] to logits [B, 10]."""
        x = self.maxpool(self.layer1(self.stem(x)))
        x = self.avgpool(self.layer3(self.layer2(x)))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def resnet_digits(pretrained: bool = True) -> ResNetDigits:
    """Return the network, trained by scripts/train_resnet_digits.py unless pretrained is False."""
    model = ResNetDigits()
    if pretrained:
        with as_file(files("qpipe_zoo") / "weights" / "resnet_digits.safetensors") as path:
            model.load_state_dict(load_file(path))
    return model.eval()
