from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qpipe import QpipeError, Recipe, Task
from qpipe.nn import channels_first, disabled, edge_quantizers, weight_quantizers
from qpipe.stages.prepare import prepare

MakeRecipe = Callable[..., Recipe]
Calibrate = Callable[..., None]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        y += x
        result: Tensor = self.relu(y)
        return result


class Net(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.stem, self.block = nn.Conv2d(3, 4, 3), Block()
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        result: Tensor = self.head(self.up(x).mean((2, 3)))
        return result


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(4, 3, 8, 8)


@pytest.fixture
def quantized(make_recipe: MakeRecipe, calibrate_on: Calibrate) -> Callable[..., nn.Module]:
    def build(model: nn.Module, *args: Tensor, target: str = "x86", calibrated: bool = True) -> nn.Module:
        prepare(model.eval(), [args[0]], Task(), make_recipe(target))
        if calibrated:
            calibrate_on(model, *args)
        return model

    return build


Quantized = Callable[..., nn.Module]


class TestSwappedModule:
    def test_is_still_of_its_class_and_keeps_its_keys(self, quantized: Quantized, batch: Tensor) -> None:
        model = Net()
        keys, parameters = set(model.state_dict()), list(model.parameters())
        quantized(model, batch)
        assert isinstance(model.stem, nn.Conv2d)
        assert type(model.stem).__name__ == "QuantizedConv2d"
        assert keys <= set(model.state_dict())
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))

    def test_shows_its_weight_rounded_to_256_levels_a_channel(
        self, quantized: Quantized, batch: Tensor
    ) -> None:
        model = quantized(Net(), batch)
        seen, stored = model.get_submodule("stem").weight, model.get_submodule("stem")._parameters["weight"]
        amax = stored.detach().flatten(1).abs().amax(1)[:, None]
        steps = seen.detach().flatten(1) / amax * 127
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
        torch.testing.assert_close(seen, stored, rtol=0, atol=float(amax.max()) / 254 * 1.001)

    def test_of_a_grouped_transposed_convolution_has_a_scale_for_each_output(
        self, quantized: Quantized, batch: Tensor
    ) -> None:
        model = quantized(Net(), batch)
        up = model.get_submodule("up")
        assert up.weight_quantizer.scale.shape == (6, 1)
        weight = up._parameters["weight"].detach()  # [in 4, out / groups 3, 2, 2]
        for channel in range(6):
            group, index = divmod(channel, 3)
            amax = weight[2 * group : 2 * group + 2, index].abs().max()
            assert up.weight_quantizer.scale[channel].item() == pytest.approx(amax.item() / 127, rel=1e-5)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_survives_copying(
        self, quantized: Quantized, batch: Tensor, copied: Callable[[nn.Module], nn.Module]
    ) -> None:
        model = quantized(Net(), batch)
        other = copied(model)
        assert torch.equal(other(batch), model(batch))
        weight = other.get_submodule("stem")._parameters["weight"]
        assert weight is not None
        weight.data.zero_()
        assert not torch.equal(other(batch), model(batch))
        assert [edge.name for edge in edge_quantizers(other)] == [
            edge.name for edge in edge_quantizers(model)
        ]

    def test_state_loads_into_a_prepared_model_that_was_not_calibrated(
        self, quantized: Quantized, batch: Tensor
    ) -> None:
        model, other = quantized(Net(), batch), quantized(Net(), batch, calibrated=False)
        with pytest.raises(QpipeError, match="'input' was never calibrated"):
            other(batch)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(batch), model(batch))

    def test_computes_the_float_function_when_disabled(self, quantized: Quantized, batch: Tensor) -> None:
        model = Net().eval()
        expected = model(batch)
        quantized(model, batch)
        with disabled(model):
            torch.testing.assert_close(model(batch), expected)
        assert not torch.allclose(model(batch), expected)

    def test_sends_gradients_to_its_parameters(self, quantized: Quantized, batch: Tensor) -> None:
        model = quantized(Net(), batch).train()
        model(batch).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    def test_a_failing_quantizer_is_no_way_to_the_float_weight(
        self, quantized: Quantized, batch: Tensor
    ) -> None:
        model = quantized(Net(), batch)
        del model.get_submodule("stem.weight_quantizer").slot
        with pytest.raises(RuntimeError, match="quantizing parameter 'weight' failed"):
            _ = model.get_submodule("stem").weight

    def test_runs_in_several_threads(self, quantized: Quantized, batch: Tensor) -> None:
        model = quantized(Net(), batch)
        expected = model(batch)
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(result, expected) for result in pool.map(model, [batch] * 16))


def test_a_symmetric_quantizer_keeps_one_zero_point(quantized: Quantized, batch: Tensor) -> None:
    fake_quant = weight_quantizers(quantized(Net(), batch))[0].fake_quant
    assert fake_quant.slot.spec.symmetric
    assert fake_quant.scale.numel() > 1
    assert fake_quant.zero_point.shape == (1, 1)
    assert torch.equal(fake_quant.qparams().zero_point, torch.zeros_like(fake_quant.scale))


class TestCalls:
    def test_a_block_run_alone_sees_its_addition(self, quantized: Quantized, batch: Tensor) -> None:
        model = quantized(Net(), batch)
        block = model.get_submodule("block")
        inside = {edge.name: edge for edge in edge_quantizers(block)}
        assert set(inside) == {"block.relu", "block.relu:1"}
        result = block(model.get_submodule("stem")(batch))
        last = inside["block.relu:1"]
        codes = result.detach() / last.scale + last.zero_point
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)

    def test_gradient_checkpointing_changes_nothing(self, quantized: Quantized, batch: Tensor) -> None:
        model, other = quantized(Net(), batch), quantized(Net(checkpointed=True), batch)
        other.load_state_dict(model.state_dict())
        for each in (model, other):
            each.train()(batch).sum().backward()
        for first, second in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(first.grad, second.grad)

    def test_results_in_place_are_written_back(self, quantized: Quantized) -> None:
        class InPlace(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                y = self.first(x).sigmoid()
                y.add_(self.first(x))
                F.relu_(y)
                result: Tensor = self.second(y)
                return result

        x = torch.randn(64, 4)
        model = quantized(InPlace(), x)
        names = [edge.name for edge in edge_quantizers(model)]
        assert names == ["input", "first", "sigmoid", "first:1", "relu"]
        seen = []
        handle = model.get_submodule("second").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(x).sum().backward()
        handle.remove()
        last = edge_quantizers(model)[-1]
        codes = seen[0].detach() / last.scale + last.zero_point
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)

    def test_nested_owners_count_only_their_own(self, quantized: Quantized, batch: Tensor) -> None:
        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.last = Block(), nn.Conv2d(4, 2, 1)

            def forward(self, x: Tensor) -> Tensor:
                y = (self.inner(x) + x).relu() + x
                result: Tensor = self.last(y)
                return result

        x = torch.randn(2, 4, 6, 6)
        model = quantized(Outer(), x)
        names = [edge.name for edge in edge_quantizers(model)]
        assert names == ["input", "inner.relu", "inner.relu:1", "relu", "add"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_read_quantized_weights(
    quantized: Quantized, kind: type[nn.RNNBase], make_recipe: MakeRecipe
) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = kind(4, 6, num_layers=2, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.layer(x)[0][:, -1])
            return result

    x = torch.randn(8, 5, 4)
    model = quantized(Recurrent(), x)
    assert [edge.name for edge in edge_quantizers(model)] == ["input", "layer"]
    float_layer = kind(4, 6, num_layers=2, batch_first=True)
    layer = model.get_submodule("layer")
    rounded = {w.parameter_name: w.fake_quant(w.blocks_input()) for w in weight_quantizers(layer)}
    float_layer.load_state_dict({**layer.state_dict(), **rounded}, strict=False)
    edges = {edge.name: edge for edge in edge_quantizers(model)}
    expected = edges["layer"](float_layer(edges["input"](x))[0])
    torch.testing.assert_close(layer(edges["input"](x))[0], expected)
    moved = copy.deepcopy(model).to(torch.float64).float()
    torch.testing.assert_close(moved(x), model(x))


def test_cross_attention_with_its_own_key_size(quantized: Quantized, make_recipe: MakeRecipe) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.MultiheadAttention(8, 2, batch_first=True)
            self.sized = nn.MultiheadAttention(8, 2, kdim=5, vdim=5, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            y, _ = self.plain(x, memory.mean(-1, keepdim=True) + x, x + 1)
            result: Tensor = self.sized(y, memory, memory)[0]
            return result

    class Both(Task):
        def inputs(self, batch: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
            return batch, {}

    model = Cross().eval()
    preparation = prepare(model, [(torch.randn(2, 3, 8), torch.randn(2, 3, 5))], Both(), make_recipe())
    assert {name for name, _, _ in preparation.weights} == {
        "plain:in_proj_weight",
        "plain.out_proj:weight",
        "sized:q_proj_weight",
        "sized:k_proj_weight",
        "sized:v_proj_weight",
        "sized.out_proj:weight",
    }
    assert not preparation.skipped


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_channels_first_is_its_own_inverse(groups: int) -> None:
    weight = torch.arange(6 * 4 * 2.0).reshape(6, 4, 2)
    first = channels_first(weight, groups)
    assert first.shape == (4 * groups, 6 // groups, 2)
    assert torch.equal(channels_first(first, groups), weight)


class TestCompilers:
    def test_export_holds_the_quantizers(self, quantized: Quantized, batch: Tensor) -> None:
        model = quantized(Net(), batch)
        with torch.no_grad():
            program = torch.export.export(model, (batch,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            torch.testing.assert_close(program.module()(batch[:2]), model(batch[:2]))

    # dynamo makes an instance of the autograd function it traces, of which torch itself warns
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compile_without_a_graph_break(self, quantized: Quantized, batch: Tensor) -> None:
        model = quantized(Net(), batch)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(batch), model(batch))
        with torch.no_grad():
            torch.testing.assert_close(compiled(batch), model(batch))
