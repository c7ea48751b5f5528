from __future__ import annotations

import pytest
import torch
from pytorch_lightning import Trainer
from qpipe_methods.transform.prune_magnitude import PruneMagnitude, largest_of_each, largest_share
from qpipe_zoo.task.classification import Classification
from torch import nn

from qpipe import RecipeError
from qpipe.nn import weight_quantizers
from qpipe.pipeline import quantize


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_the_smallest_share_goes(sparsity: float) -> None:
    weight = torch.randn(10, 20, generator=torch.Generator().manual_seed(0))
    mask = largest_share(weight.abs(), 1 - sparsity).bool()
    assert (~mask).sum() == round(sparsity * 200)
    if sparsity:
        assert weight[~mask].abs().max() <= weight[mask].abs().min()


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3, 3)])
def test_every_group_of_inputs_keeps_exactly_n(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = largest_of_each(weight.abs(), 2, 4)
    flat = weight.abs().transpose(0, 1).reshape(8, -1).T
    kept = mask.transpose(0, 1).reshape(8, -1).T
    for row, chosen in zip(flat, kept, strict=True):
        for i in (0, 4):
            best = sorted(range(i, i + 4), key=lambda j: -float(row[j]))[:2]
            assert [j for j in range(i, i + 4) if chosen[j]] == sorted(best)


def test_the_mask_survives_training_and_quantization() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    data = [(torch.randn(16, 8), torch.arange(16) % 3) for _ in range(4)]
    words = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    tuned, _ = quantize(
        model,
        data,
        task=Classification(),
        trainer=Trainer(accelerator="cpu", max_epochs=2, enable_model_summary=False, **words),
        transform=[{"name": "prune_magnitude", "n": 2, "m": 4}],
        finetune=["lsq"],
        evaluator=[],
        weight={"num_bits": 4},
    )
    first = weight_quantizers(tuned)[0]
    before = largest_of_each(model[0].weight.abs(), 2, 4).bool()
    assert not torch.equal(first.blocks_input()[before], model[0].weight[before])
    assert first.blocks_input()[~before].count_nonzero() == 0
    assert first.fake_quant.codes(first.blocks_input())[~before].count_nonzero() == 0


@pytest.mark.parametrize("arguments", [{"sparsity": 1.5}, {"n": 4, "m": 4}])
def test_meaningless_budgets_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="prune_magnitude"):
        PruneMagnitude(**arguments)  # type: ignore[arg-type]
