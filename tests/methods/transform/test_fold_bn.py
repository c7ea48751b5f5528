from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from qpipe_methods.transform.fold_bn import FoldBatchNorm
from torch import Tensor, nn

from qpipe import DataError, Task


def randomize(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and an affine map of their own."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 2)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def folded(make_recipe: Callable[..., Any], model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        before = model(x)
        FoldBatchNorm().apply(model, [x], Task(), make_recipe())
        return before, model(x)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), (2, 4, 9)),
        (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), (2, 4, 9, 9)),
        (nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (2, 4, 9, 9)),
        (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
    ],
)
def test_keeps_the_function(
    make_recipe: Callable[..., Any], layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]
) -> None:
    model = randomize(nn.Sequential(layer, norm, nn.ReLU()))
    before, after = folded(make_recipe, model, torch.randn(shape))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert isinstance(model[1], nn.Identity)


class TestStays:
    def test_where_others_read_the_convolution(self, make_recipe: Callable[..., Any]) -> None:
        class Forked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, x: Tensor) -> Tensor:
                y = self.conv(x)
                return y + self.bn(y)

        model = randomize(Forked())
        before, after = folded(make_recipe, model, torch.randn(2, 3, 4, 4))
        assert torch.equal(before, after)
        assert norms(model) == 1

    def test_where_no_layer_precedes_or_it_is_called_twice(self, make_recipe: Callable[..., Any]) -> None:
        shared = nn.Conv2d(3, 3, 1)
        first = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
        model = randomize(nn.Sequential(first, shared, nn.BatchNorm2d(3), shared, nn.BatchNorm2d(3)))
        before, after = folded(make_recipe, model, torch.randn(2, 3, 4, 4))
        assert torch.equal(before, after)
        assert norms(model) == 3

    def test_where_it_has_no_running_statistics(self, make_recipe: Callable[..., Any]) -> None:
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
        folded(make_recipe, model, torch.randn(2, 3, 4, 4))
        assert norms(model) == 1

    def test_where_the_norm_also_activates(self, make_recipe: Callable[..., Any]) -> None:
        class NormAct(nn.BatchNorm2d):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).relu()

        model = randomize(nn.Sequential(nn.Conv2d(3, 3, 1), NormAct(3)))
        before, after = folded(make_recipe, model, torch.randn(2, 3, 4, 4))
        assert torch.equal(before, after)
        assert norms(model) == 1

    def test_where_a_linear_layer_s_channels_are_not_the_norm_s(
        self, make_recipe: Callable[..., Any]
    ) -> None:
        model = randomize(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        before, after = folded(make_recipe, model, torch.randn(2, 4, 4))
        assert torch.equal(before, after)
        assert norms(model) == 1

    def test_where_the_convolution_reads_another_weight(self, make_recipe: Callable[..., Any]) -> None:
        class Standardized(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

        model = randomize(nn.Sequential(Standardized(3, 3, 1), nn.BatchNorm2d(3)))
        before, after = folded(make_recipe, model, torch.randn(2, 3, 4, 4))
        assert torch.equal(before, after)
        assert norms(model) == 1


def test_refuses_an_empty_calibration_set(make_recipe: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="empty"):
        FoldBatchNorm().apply(nn.Linear(1, 1), [], Task(), make_recipe())
