"""Every strategy that trains does so in the one loop and ends with plain parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from qpipe_zoo.task.classification import Classification
from torch import nn

from qpipe.pipeline import quantize
from qpipe.training import fake_quants

CASES: list[tuple[str, dict[str, Any]]] = [
    ("qat", {}),
    ("lsq", {}),
    ("lsq_plus", {}),
    ("pact", {}),
    ("quant_noise", {}),
    ("ewgs", {}),
    ("dsq", {}),
    ("distill", {}),
    ("prune", {}),
    ("learned_levels", {"quantizer": "codebook"}),
    ("learned_levels", {"quantizer": {"name": "vector", "dim": 3}, "granularity": "layer"}),
    ("ttq", {"quantizer": "ternary", "num_bits": 2}),
    ("qat", {"quantizer": "dorefa"}),
    ("qat", {"quantizer": "binary", "num_bits": 1}),
    ("qat", {"quantizer": "apot"}),
]


@pytest.mark.parametrize(("name", "words"), CASES)
def test_training_moves_weights_and_leaves_no_learner(name: str, words: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    data = [(torch.randn(16, 6), torch.arange(16) % 3) for _ in range(4)]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    slots = {"weight": {"num_bits": 3, **words}, "activation": {"num_bits": 4}}
    tuned, _ = quantize(
        model, data, task=Classification(), trainer=trainer, finetune=[name], evaluator=[], **slots
    )
    assert not torch.equal(tuned.state_dict()["0.weight"], model[0].weight)
    assert all(f.learner is None and not list(f.parameters()) for f in fake_quants(tuned))
    assert torch.isfinite(tuned(data[0][0])).all()
