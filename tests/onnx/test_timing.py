"""Operations that ONNX Runtime executes, and the layers they belong to."""

from __future__ import annotations

from collections import defaultdict

import torch
from qpipe_onnx.exporter.onnx import OnnxExporter
from torch import Tensor, nn

import qpipe
from qpipe.nn import disabled


class Net(nn.Module):
    """Layers that ONNX Runtime fuses with what follows them, in both of its layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2)
        self.relu6 = nn.ReLU6()
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu6(self.stem(x))
        x = x + self.project(self.relu6(self.depthwise(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


LAYERS = ["stem", "depthwise", "project", "fc"]


def executed(model: nn.Module, x: Tensor) -> dict[str, list[str]]:
    by_layer = defaultdict(list)
    for operation in OnnxExporter().operations(model, ((x,), {}), LAYERS):
        assert operation.microseconds >= 0
        by_layer[operation.layer].append(operation.kernel.split()[0])
    return by_layer


def test_an_operation_belongs_to_its_layer_or_to_the_one_it_follows() -> None:
    x = torch.randn(8, 3, 17, 17, generator=torch.Generator().manual_seed(0))
    model, _ = qpipe.quantize(Net(), x)
    codes = executed(model, x)
    assert all("QLinearConv" in codes[name] for name in ("stem", "depthwise", "project"))
    assert "QLinearAdd" in codes["stem"]  # its output is what the sum reads first
    assert "QGemm" in codes["fc"]
    with disabled(model):
        floats = executed(model, x)
    assert all("Conv" in floats[name] for name in ("stem", "depthwise", "project"))
    assert "Gemm" in floats["fc"]
    assert not {"Conv", "Gemm"} & {*floats[""]}


def test_kernels_differ_by_stored_type_and_shape_only() -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32))

    def kernels(num_bits: int) -> list[str]:
        words = {"activation": None, "target": "generic", "weight": {"num_bits": num_bits}}
        model, _ = qpipe.quantize(net, x, **words)
        found = OnnxExporter().operations(model, ((x,), {}), ["0", "1", "2"])
        return [operation.kernel for operation in found if operation.kernel.startswith("MatMulNBits")]

    three, four, eight = map(kernels, (3, 4, 8))
    assert three == four
    assert four[1] == four[2] != four[0]
    assert not {*four} & {*eight}
