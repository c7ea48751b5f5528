from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from qpipe_methods.granularity.channel import PerChannel
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.transform.equalize import ChannelClip, Equalize, find_pairs, inputs_range, outputs_range
from torch import Tensor, nn

import qpipe
from qpipe import QuantSpec, Recipe, Slot, Target, Task
from qpipe.graph import record


class Chain(nn.Module):
    """Expand, depthwise, project, with a shortcut: an inverted residual."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.expand = nn.Conv2d(4, 8, 1)
        self.act1 = activation()
        self.pad = nn.ZeroPad2d(1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.act2 = activation()
        self.project = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.act2(self.depthwise(self.pad(self.act1(self.expand(x))))))


def chain(activation: type[nn.Module] = nn.ReLU6) -> Chain:
    torch.manual_seed(0)
    net = Chain(activation).eval()
    with torch.no_grad():  # ranges far apart, activations beyond 6
        net.expand.weight.mul_(torch.logspace(-2, 1, 8)[:, None, None, None] * 5)
        net.depthwise.weight.mul_(torch.logspace(1, -1, 8)[:, None, None, None])
    return net


def batches() -> list[Tensor]:
    return [torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(i)) * 3 for i in range(3)]


def recipe(granularity: qpipe.Granularity) -> Recipe:
    from qpipe_methods.calibrator.minmax import MinMaxCalibrator
    from qpipe_methods.quantizer.uniform import UniformQuantizer

    from qpipe import Role

    def slot(spec: QuantSpec, shape: qpipe.Granularity) -> Slot:
        return Slot(UniformQuantizer(), MinMaxCalibrator(), shape, spec)

    weight = slot(QuantSpec(8, restricted=True, role=Role.WEIGHT), granularity)
    activation = slot(QuantSpec(8, symmetric=False, signed=False), PerLayer())
    return Recipe(weight, activation, Target("generic", ("conv2d",)))


def apply(
    net: nn.Module, objective: str, steps: int = 30, granularity: qpipe.Granularity | None = None
) -> None:
    Equalize(objective, steps).apply(net, batches(), Task(), recipe(granularity or PerLayer()))


@pytest.mark.parametrize("objective", ["ranges", "noise"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Hardtanh])
def test_keeps_the_function(objective: str, activation: type[nn.Module]) -> None:
    net, x = chain(activation), batches()[0]
    expected = net(x)
    before = net.expand.weight.detach().clone()
    apply(net, objective)
    assert not torch.allclose(net.expand.weight, before, rtol=0.1)
    assert torch.allclose(net(x), expected, atol=1e-4, rtol=1e-4)


def test_ranges_meet_at_their_geometric_mean() -> None:
    net = chain()
    first, second = outputs_range(net.depthwise), inputs_range(net.project)
    net.expand.requires_grad_(False)
    pair = list(find_pairs(net, record(net, (batches()[0],), {})))[1]
    from qpipe_methods.transform.equalize import equalize_ranges

    equalize_ranges(net, [pair], 1)
    expected = (first * second).sqrt()  # METHODS.md D
    assert torch.allclose(outputs_range(net.depthwise), expected)
    assert torch.allclose(inputs_range(net.project), expected)


def test_finds_both_sides_of_a_depthwise_layer() -> None:
    net = chain()
    pairs = list(find_pairs(net, record(net, (batches()[0],), {})))
    assert [(p.first, p.second, p.activation) for p in pairs] == [
        ("expand", "depthwise", "act1"),
        ("depthwise", "project", "act2"),
    ]


def test_the_clip_is_carried_along() -> None:
    net = chain()
    apply(net, "ranges")
    assert isinstance(net.act1, ChannelClip)
    assert net.act1.high.shape == (8, 1, 1)
    assert net.act1.high.max() / net.act1.high.min() > 2
    assert not net.act1.low.any()


def test_a_channel_without_weights_keeps_its_scale() -> None:
    net, x = chain(), batches()[0]
    with torch.no_grad():
        net.depthwise.weight[3] = 0
    expected, row = net(x), net.expand.weight[3].detach().clone()
    apply(net, "ranges")
    assert torch.equal(net.expand.weight[3], row)
    assert torch.isfinite(net.depthwise.weight).all()
    assert torch.allclose(net(x), expected, atol=1e-4)


@pytest.mark.parametrize("objective", ["ranges", "noise"])
def test_per_tensor_weights_lose_less(objective: str) -> None:
    net, x = chain(), torch.cat(batches())
    expected = net(x)

    def error(transform: list[object]) -> float:
        model = qpipe.quantize(
            net, batches(), granularity="layer", transform=transform, evaluator=[], target="generic"
        )[0]
        return (model(x) - expected).square().mean().item()

    assert error([{"name": "equalize", "objective": objective, "steps": 60}]) < 0.5 * error([])


def test_noise_leaves_depthwise_rows_free_per_channel() -> None:
    """Per channel the output scales of a layer cost nothing: its range may differ from the next layer's."""
    net = chain()
    apply(net, "noise", 100, PerChannel())
    spread = outputs_range(net.depthwise)
    assert spread.max() / spread.min() > 3


def test_noise_leaves_channels_alone_that_make_next_to_none() -> None:
    """Scaled to fill what calibration showed of them they would leave the range once they wake."""
    net = chain()
    with torch.no_grad():
        net.depthwise.weight[:3] *= 0.1
        net.project.weight[:, :3] *= 1e-3
        net.depthwise.get_parameter("bias")[:3] = 0
    apply(net, "noise", 200, PerChannel())
    clip = net.act2
    assert isinstance(clip, ChannelClip)
    assert clip.high.flatten()[:3].tolist() == pytest.approx([6.0] * 3, rel=0.1)  # 1.6 to 30 by Adam alone


def test_a_result_read_twice_is_left_alone() -> None:
    class Twice(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act1(self.expand(x))
            return y.sum(1, keepdim=True) + self.project(self.act2(self.depthwise(self.pad(y))))

    torch.manual_seed(0)
    net = Twice().eval()
    assert [p.first for p in find_pairs(net, record(net, (batches()[0],), {}))] == ["depthwise"]


def test_refuses_an_unknown_objective() -> None:
    with pytest.raises(ValueError, match="noise or ranges"):
        Equalize("x")


def test_gains_are_squared_derivatives_of_the_output() -> None:
    from qpipe_methods.transform._noise import _observe

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.randn(20, 3)
    layers = _observe(net, ["0", "2"], [x], Task(), recipe(PerLayer()), 20)
    with torch.no_grad():
        hidden = net[1](net[0](x))
        second = net[2].weight[0]
        slopes = second * (hidden > 0)
    assert torch.allclose(layers["2"].weight_gain[0], hidden.square().mean(0))
    assert torch.allclose(layers["2"].input_gain, second.square())
    by_first = (slopes[:, :, None] * x[:, None]).square().mean(0)
    assert torch.allclose(layers["0"].weight_gain, by_first)
    assert torch.equal(layers["2"].high, hidden.amax(0))


@pytest.mark.parametrize("symmetric", [True, False])
def test_noise_is_the_mean_square_of_what_random_rounding_does(symmetric: bool) -> None:
    """Uniform errors of one step, drawn many times, change the output as the sum of gains says."""
    from qpipe_methods.transform._noise import _observe

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(40, 3)
    with torch.no_grad():
        net[2].weight.add_(0.4)  # an asymmetric range is much narrower
    made = recipe(PerLayer())
    if not symmetric:
        made = replace(made, weight=replace(made.weight, spec=QuantSpec(8, symmetric=False, signed=False)))
    layer = _observe(net, ["2"], [x], Task(), made, 40)["2"]
    weight = net[2].weight.detach()
    step = 2 * weight.abs().max() / 254 if symmetric else (weight.max().relu() + (-weight).max().relu()) / 255
    errors = (torch.rand(20_000, 4) - 0.5) * step
    with torch.no_grad():
        measured = (errors @ net[1](net[0](x)).T).square().mean()
    assert layer.noise([], None).item() == pytest.approx(measured.item(), rel=0.03)
