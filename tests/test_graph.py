from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpipe.graph import record


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        y += x
        return self.relu(y)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x)[0]
        return result


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.detach().numpy())


class Hidden(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Doubling.apply(x)
        return result


class Rotated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(tensors=(x, torch.cat((-x, x), dim=-1)), dim=-1)


class TestRecord:
    def test_keeps_what_is_no_tensor_of_a_calls_arguments(self) -> None:
        inner, outer = record(Rotated(), (torch.randn(1, 4),), {}).calls[1:]
        assert (inner.args, inner.kwargs) == (((None, None),), {"dim": -1})
        assert (outer.args, outer.kwargs) == ((), {"tensors": (None, None), "dim": -1})

    def test_lists_calls_in_order_with_who_made_them(self) -> None:
        recording = record(Residual(), (torch.randn(1, 3, 4, 4),), {})
        made = [(call.invocation.path, call.op) for call in recording.calls]
        assert made == [
            ("conv", "conv2d"),
            ("bn", "batch_norm"),
            ("relu", "relu"),
            ("", "add"),
            ("relu", "relu"),
        ]
        assert [call.name for call in recording.calls] == ["conv", "bn", "relu", "add", "relu"]

    def test_follows_a_tensor_through_an_operation_in_place(self) -> None:
        recording = record(Residual(), (torch.randn(1, 3, 4, 4),), {})
        first_relu, add, second_relu = recording.calls[2:]
        assert first_relu.outputs[0].consumers == [add]
        assert add.outputs[0].consumers == [second_relu]
        assert second_relu.outputs[0].is_output
        assert recording.inputs[0].consumers == [recording.calls[0], add]

    def test_leaves_buffers_modes_and_random_state_as_they_were(self) -> None:
        model = nn.Sequential(Residual(), nn.Dropout()).train()
        model[1].eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = torch.get_rng_state()
        record(
            model, (torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)),), {}, training=True
        )
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model[0].training
        assert not model[1].training
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_sees_into_multi_head_attention(self) -> None:
        recording = record(Attention().eval(), (torch.randn(2, 3, 8),), {})
        ops = [call.op for call in recording.calls]
        assert ops.count("linear") == 2
        assert "multi_head_attention_forward" not in ops
        assert {"matmul", "softmax"} <= set(ops) or "scaled_dot_product_attention" in ops

    def test_tells_activations_from_masks_and_positions(self) -> None:
        class Masked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.words, self.positions = nn.Embedding(9, 4), nn.Embedding(9, 4)

            def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
                x = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
                return F.softmax(x @ x.mT + (1.0 - mask.float()) * -1e9, -1)

        recording = record(Masked(), (torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 1, 3)), {})
        active = [call.name for call in recording.calls if call.outputs[0].activation]
        assert active == ["words", "add", "transpose", "matmul", "add", "softmax"]

    def test_notes_results_whose_making_cannot_be_seen(self) -> None:
        recording = record(nn.Sequential(Hidden(), nn.Linear(3, 3)), (torch.randn(2, 3),), {})
        assert [(call.op, call.hidden) for call in recording.calls[-2:]] == [
            ("hidden", True),
            ("linear", False),
        ]


@pytest.mark.parametrize("shape", [(2, 3), (3,)])
def test_names_nested_inputs(shape: tuple[int, ...]) -> None:
    class Nested(nn.Module):
        def forward(self, images: list[Tensor], options: dict[str, Tensor]) -> Tensor:
            return images[0] + images[1] + options["bias"]

    x = torch.randn(shape)
    recording = record(Nested(), ([x, x + 1],), {"options": {"bias": x + 2}})
    assert [value.path for value in recording.inputs] == [(0, 0, 0), (0, 0, 1), (1, "options", "bias")]
