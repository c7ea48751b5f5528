from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningDataModule
from qpipe_methods.finetune.bias_correction import BiasCorrection
from qpipe_methods.normal import clipped_normal
from torch import Tensor, nn

import qpipe


class Net(nn.Module):
    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.clip = clip
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.clip(self.norm(self.first(x)))
        return self.fc(self.depthwise(x).mean((2, 3)))


class Sum(Net):
    """Two independent branches: each reads half of the inputs."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU())
        self.second, self.norm2 = nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.clip(self.norm(self.first(x)) + self.norm2(self.second(x)))
        return self.fc(self.depthwise(x).mean((2, 3)))


class Data(LightningDataModule):
    def calibration_dataloader(self) -> list[Tensor]:
        return [normal_inputs(2)]

    test_dataloader = calibration_dataloader


def normal_inputs(count: int) -> Tensor:
    return torch.randn(count, 4, 12, 12, generator=torch.Generator().manual_seed(1))


def net(clip: nn.Module) -> Net:
    """Return a network whose batch norm tells the truth about normal inputs."""
    torch.manual_seed(0)
    model = Net(clip)
    make_true(model.norm, model.first)
    return model.eval()


@torch.no_grad()
def make_true(norm: nn.BatchNorm2d, conv: nn.Conv2d, bias: float = 3.0) -> None:
    norm.running_var.copy_(conv.weight.square().sum((1, 2, 3)))
    norm.weight.uniform_(0.5, 2)
    norm.bias.uniform_(-1, bias)


def quantized(model: nn.Module, **choices: Any) -> nn.Module:  # noqa: ANN401
    plain = {"activation": None, "target": "generic", "evaluator": [], "weight": {"num_bits": 3}}
    return qpipe.quantize(model, Data(), transform=["fold_bn"], **plain, **choices)[0]


def mean_gaps(model: Net, other: nn.Module) -> Tensor:
    """Return the difference of the depthwise outputs' means on many normal inputs."""
    means = []
    for m in (model, other):
        found: list[Tensor] = []
        handle = m.depthwise.register_forward_hook(lambda _, __, y, into=found: into.append(y))
        with torch.no_grad():
            m(normal_inputs(400))
        handle.remove()
        means.append(found[0].mean((0, 2, 3)))
    return (means[0] - means[1]).abs()


class TestAnalytic:
    def test_mean_behind_relu(self) -> None:
        inf, zero = torch.tensor([math.inf]), torch.zeros(1)
        mean, std = clipped_normal(torch.tensor([0.4]), torch.tensor([1.3]), zero, inf)
        assert mean.item() == pytest.approx(0.74298, abs=1e-5)  # METHODS.md D
        sample = (0.4 + 1.3 * torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))).relu()
        assert std.item() == pytest.approx(sample.std().item(), rel=3e-3)
        mean, std = clipped_normal(torch.tensor([0.4]), torch.tensor([1.3]), -inf, inf)
        assert (mean.item(), std.item()) == pytest.approx((0.4, 1.3))

    def test_mean_and_deviation_behind_relu6(self) -> None:
        generator = torch.Generator().manual_seed(0)
        mean, std = torch.tensor([5.0, 3.0]), torch.tensor([2.0, 6.0])
        sample = (mean + std * torch.randn(1_000_000, 2, generator=generator)).clamp(0, 6)
        found = clipped_normal(mean, std, torch.zeros(2), torch.full((2,), 6.0))
        assert torch.allclose(found[0].float(), sample.mean(0), atol=5e-3)
        assert torch.allclose(found[1].float(), sample.std(0), atol=5e-3)

    @pytest.mark.parametrize("clip", [nn.ReLU(), nn.ReLU6()], ids=["relu", "relu6"])
    def test_corrects_means_without_data(self, clip: nn.Module) -> None:
        model = net(clip)
        without = [{"match": "first", "weight": None}]  # its own rounding would move the means
        before = mean_gaps(model, quantized(model, layers=without))
        after = mean_gaps(
            model,
            quantized(model, layers=without, finetune=[{"name": "bias_correction", "source": "batch_norm"}]),
        )
        assert before.max() > 0.05
        assert after.max() < 0.1 * before.max()

    def test_variances_of_independent_terms_add_up(self) -> None:
        torch.manual_seed(0)
        model, without = Sum().eval(), [{"match": name, "weight": None} for name in ("first", "second")]
        with torch.no_grad():
            model.first.weight[:, 2:], model.second.weight[:, :2] = 0, 0
        make_true(
            model.norm, model.first, -0.5
        )  # where the mean behind the ReLU is mostly the deviation's doing
        make_true(model.norm2, model.second, -0.5)
        strategy = {"name": "bias_correction", "source": "batch_norm"}
        before = mean_gaps(model, quantized(model, layers=without))
        after = mean_gaps(model, quantized(model, layers=without, finetune=[strategy]))
        assert before.max() > 0.05
        assert after.max() < 0.1 * before.max()

    def test_follows_equalization(self) -> None:
        model = net(nn.ReLU6())
        corrected = {"name": "bias_correction", "source": "batch_norm"}
        plain = {"activation": None, "target": "generic", "evaluator": [], "weight": {"num_bits": 3}}
        without = [{"match": "first", "weight": None}]
        found = qpipe.quantize(
            model, Data(), transform=["fold_bn", "equalize"], finetune=[corrected], layers=without, **plain
        )[0]
        assert mean_gaps(model, found).max() < 0.02

    def test_names_the_layers_it_leaves(self, caplog: pytest.LogCaptureFixture) -> None:
        quantized(net(nn.ReLU()), finetune=[{"name": "bias_correction", "source": "batch_norm"}])
        assert "what reaches first" in caplog.text.replace("fc, first", "first")

    def test_refuses_another_source(self) -> None:
        with pytest.raises(ValueError, match="data or batch_norm"):
            BiasCorrection(source="x")
