from __future__ import annotations

import pytest
import torch
from qpipe_zoo.data.synthetic import Distilled, Synthetic, distilled, statistics_loss
from qpipe_zoo.model.resnet_digits import resnet_digits
from torch import nn

from qpipe import DataError


def test_loss_is_zero_where_the_statistics_are_the_batchs_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)).eval()
    assert statistics_loss(model, x) > 0.1
    var, mean = torch.var_mean(model[0](x).detach(), (0, 2, 3), correction=0)
    model[1].running_mean.copy_(mean)
    model[1].running_var.copy_(var)
    assert statistics_loss(model, x).item() == pytest.approx(0, abs=1e-8)
    model[1].running_mean[1] += 0.3
    model[1].running_var[2] = ((var[2] + 1e-5).sqrt() + 0.4) ** 2 - 1e-5
    means = (0.3**2 / (var[1] + 1e-5)).item()
    stds = (0.4**2 / ((var[2] + 1e-5).sqrt() + 0.4) ** 2).item()
    assert statistics_loss(model, x).item() == pytest.approx((means + stds) / 4, rel=1e-4)


def test_loss_does_not_know_the_scale_of_a_layer() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.0)).eval()
    loss = statistics_loss(model, x).item()
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(100)
        model[1].running_mean.mul_(100)
        model[1].running_var.mul_(100**2)
    assert statistics_loss(model, x).item() == pytest.approx(loss, rel=1e-4)


def test_distilled_samples_leave_noise_far_behind() -> None:
    model = resnet_digits()
    noise = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    x, before, after = distilled(model, noise, 100, 0.1)
    assert after < 0.1 * before
    assert before == pytest.approx(statistics_loss(model, noise).item())
    assert after == pytest.approx(statistics_loss(model, x).item())
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_samples_are_made_when_asked_for_and_always_the_same() -> None:
    data = Synthetic(resnet_digits(), (1, 8, 8), count=20, batch_size=8, iterations=2)
    assert data.parts[0].batches == {}
    assert [len(batch) for batch in data.train_dataloader()] == [8, 8, 4]
    again = Synthetic(resnet_digits(), (1, 8, 8), count=20, batch_size=8, iterations=2)
    assert torch.equal(again.parts[0][11], data.parts[0][11])
    assert [*again.parts[0].batches] == [1]
    assert again.fingerprint() == data.fingerprint()
    assert not torch.equal(next(iter(data.test_dataloader())), next(iter(data.train_dataloader())))


def test_samples_are_made_inside_a_prediction_loop_too() -> None:
    model = resnet_digits()
    data = Synthetic(model, (1, 8, 8), count=4, batch_size=4, iterations=2)
    again = Synthetic(model, (1, 8, 8), count=4, batch_size=4, iterations=2)
    with torch.inference_mode():
        x = data.parts[0][1]
    assert torch.equal(x, again.parts[0][1])


def test_no_iterations_is_noise() -> None:
    part = Distilled(resnet_digits(), (1, 8, 8), 512, 512, 0, 0.1, 0)
    x = torch.stack([*part])
    assert (x.mean().item(), x.std().item()) == pytest.approx((0, 1), abs=0.02)


def test_a_model_without_batch_norm() -> None:
    with pytest.raises(DataError, match="Linear has no batch normalization"):
        Synthetic(nn.Linear(2, 2), (2,))
