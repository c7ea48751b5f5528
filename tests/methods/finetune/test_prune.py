from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from qpipe_methods.finetune.prune import Prune, SparseStraightThrough
from qpipe_zoo.task.classification import Classification
from torch import nn

from qpipe import RecipeError
from qpipe.nn import QuantizedWeight, weight_quantizers
from qpipe.pipeline import quantize


def train(weight: dict[str, Any] | None, epochs: int = 3, **arguments: object) -> list[QuantizedWeight]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3))
    data = [(torch.randn(16, 8), torch.arange(16) % 3) for _ in range(4)]
    words = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    tuned, _ = quantize(
        model,
        data,
        task=Classification(),
        trainer=Trainer(accelerator="cpu", max_epochs=epochs, enable_model_summary=False, **words),
        finetune=[{"name": "prune", **arguments}],
        evaluator=[],
        weight=weight,
    )
    assert all(not w.fake_quant._forward_pre_hooks for w in weight_quantizers(tuned))
    return weight_quantizers(tuned)


def test_the_schedule_is_cubic() -> None:
    prune = Prune(sparsity=0.9, until=1.0)
    shares = [prune.share(t) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert shares == pytest.approx([0, 0.5203, 0.7875, 0.8859, 0.9], abs=5e-5)
    late = Prune(sparsity=0.9, start=0.5, until=0.5)
    assert [late.share(t) for t in (0, 0.25, 0.5, 1)] == pytest.approx([0.5, 0.85, 0.9, 0.9])


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [({"sparsity": 0.5, "until": 1.0}, [[1, 0, 1, 0]]), ({"n": 1, "m": 2}, [[1, 0, 1, 0]])],
)
def test_the_largest_magnitudes_stay_whatever_their_sign(
    arguments: dict[str, Any], kept: list[list[int]]
) -> None:
    assert Prune(**arguments).mask(torch.tensor([[-4.0, 1.0, -3.0, 0.5]]), 1.0).tolist() == kept


def test_masks_follow_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three epochs of four steps, new masks at every second, the last at the end."""
    seen: list[float] = []
    original = Prune.mask

    def noted(self: Prune, weight: torch.Tensor, progress: float) -> torch.Tensor:
        seen.append(progress)
        return original(self, weight, progress)

    monkeypatch.setattr(Prune, "mask", noted)
    train({"num_bits": 4}, every=2)
    assert seen[::2] == pytest.approx([0, 2 / 12, 4 / 12, 6 / 12, 8 / 12, 10 / 12, 1])  # of two layers


def test_masked_weights_keep_learning_and_decay() -> None:
    """SR-STE: a step of SGD on (m w - 1)² is w - lr (2 (m w - 1) + λ (1 - m) w)."""
    w, m = torch.tensor([[3.0, -0.5]], requires_grad=True), torch.tensor([[1.0, 0.0]])
    masked = SparseStraightThrough.apply(w, m, 0.1)
    assert masked.tolist() == [[3.0, 0.0]]
    (masked - 1).square().sum().backward()
    assert w.grad is not None
    assert w.grad.flatten().tolist() == pytest.approx([4.0, -2.0 + 0.1 * -0.5])


def test_masked_weights_rest_under_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without momentum a masked weight stays where it was, and kept ones move."""
    seen: list[torch.Tensor] = []
    original = Prune.mask

    def noted(self: Prune, weight: torch.Tensor, progress: float) -> torch.Tensor:
        if len(weight) == 20:
            seen.append(weight.clone())
        return original(self, weight, progress)

    monkeypatch.setattr(Prune, "mask", noted)
    train({"num_bits": 4}, optimizer="SGD", lr=1e-4, start=0.5, sparsity=0.5, every=100)
    first, last = seen[0], seen[-1]
    masked = original(Prune(start=0.5, sparsity=0.5), first, 0.0) == 0
    assert masked.sum() == 80
    assert torch.equal(first[masked], last[masked])
    assert (first[~masked] != last[~masked]).any()


@pytest.mark.parametrize(
    ("weight", "arguments"),
    [
        ({"num_bits": 4}, {}),
        ({"num_bits": 2, "granularity": "layer"}, {"distill": {"weight": 0.5}}),
        ({"num_bits": 4}, {"init": None}),
        ({"num_bits": 2, "quantizer": "ternary"}, {"init": None}),
    ],
)
def test_zeros_of_the_schedule_survive_quantization(
    weight: dict[str, Any], arguments: dict[str, Any]
) -> None:
    for layer in train(weight, sparsity=0.8, **arguments):
        x = layer.blocks_input()
        assert (x == 0).sum() == round(0.8 * x.numel())
        assert layer.fake_quant(x)[x == 0].count_nonzero() == 0


def test_every_group_keeps_n_of_m_after_quantization() -> None:
    for layer in train({"num_bits": 4}, n=2, m=4):
        x = layer.blocks_input()
        assert ((x != 0).view(x.shape[0], -1, 4).sum(-1) == 2).all()
        assert layer.fake_quant(x)[x == 0].count_nonzero() == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"sparsity": 1.0},
        {"start": 0.95},
        {"until": 0.0},
        {"every": 0},
        {"decay": -1.0},
        {"n": 4, "m": 4},
    ],
)
def test_meaningless_schedules_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"finetune\.prune"):
        Prune(**arguments)


def test_levels_without_zero_are_refused() -> None:
    with pytest.raises(RecipeError, match="needs zero among the levels"):
        train({"num_bits": 1, "quantizer": "binary"}, init=None)


def test_an_m_that_divides_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="m=7 divides the inputs of no layer"):
        train({"num_bits": 4}, n=2, m=7)


def test_training_without_end_is_refused() -> None:
    with pytest.raises(RecipeError, match="no end"):
        train({"num_bits": 4}, epochs=-1)
