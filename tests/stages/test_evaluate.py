from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from qpipe_methods.evaluator.accuracy import AccuracyEvaluator
from qpipe_methods.evaluator.sqnr import SQNREvaluator
from qpipe_zoo.task.classification import Classification
from torch import Tensor, nn

from qpipe import Artifact, Evaluator, Recipe, Reference, Subject, Target
from qpipe.pipeline import _quiet_trainer
from qpipe.stages import evaluate as stage
from qpipe.stages.evaluate import evaluate

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(n, 4, generator=GENERATOR), torch.randint(0, 3, (n,), generator=GENERATOR))
    for n in (8, 8, 5)
]


class Off(nn.Module):
    """The reference, a constant away."""

    def __init__(self, model: nn.Module, error: float) -> None:
        super().__init__()
        self.model, self.error = model, error

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + self.error


class Seen(Evaluator):
    name = "seen"

    def measure(self, subject: Subject) -> Mapping[str, float]:
        return {"num_samples": float(sum(len(batch[0]) for batch in subject.batches))}

    def tables(self, subject: Subject) -> Mapping[str, Any]:
        return {"variant": subject.variant} if subject.artifact else {}


def run(model: nn.Module, *evaluators: Evaluator, executed: nn.Module | None = None) -> Any:  # noqa: ANN401
    recipe = Recipe(None, None, Target("any", ()), evaluators=evaluators)
    reference = Reference(model)
    artifacts = [
        Artifact("file", "engine", Path("f"), "", 3, module=executed),
        Artifact("data", "", Path(), "", 1),
    ]
    trainer = _quiet_trainer()
    figures, tables, _ = evaluate(
        Off(model, 0.1), reference, artifacts, BATCHES, Classification(), recipe, trainer
    )
    return figures, tables


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(4, 3).eval()


def test_every_variant_is_measured_as_by_hand(model: nn.Module) -> None:
    executed = Off(model, 1.0)
    figures, tables = run(model, AccuracyEvaluator(), SQNREvaluator(), Seen(), executed=executed)
    x, y = torch.cat([b[0] for b in BATCHES]), torch.cat([b[1] for b in BATCHES])
    with torch.no_grad():
        logits = model(x)
    top1 = 100 * (logits.argmax(1) == y).double().mean().item()
    energy = logits.square().sum().item()
    assert list(figures) == ["fp32", "simulated", "file"]
    for variant, error in (("simulated", 0.1), ("file", 1.0)):
        sqnr = 10 * torch.tensor(energy / (error**2 * logits.numel())).log10().item()
        assert figures[variant]["sqnr_db"] == pytest.approx(sqnr, abs=1e-4)
        assert figures[variant]["agreement_percent"] == 100
        assert figures[variant]["top1_percent"] == pytest.approx(top1)
        assert figures[variant]["num_samples"] == 21
    assert figures["fp32"] == {"top1_percent": pytest.approx(top1), "num_samples": 21}
    assert tables == {"file.seen": {"variant": "file"}}


def test_reference_outputs_that_are_not_kept_are_computed_again(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = run(model, SQNREvaluator())
    monkeypatch.setattr(stage, "CACHE_BYTES", 100)  # one batch of 8 x 3 floats is 96
    assert run(model, SQNREvaluator())[0] == kept


class Lightning(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("mean_logit", self(batch[0]).mean(), batch_size=len(batch[0]))


def test_a_lightning_module_measures_itself_for_every_variant() -> None:
    torch.manual_seed(1)
    model = Lightning().eval()
    figures, _ = run(model, SQNREvaluator(), executed=Off(model.net, 1.0))
    with torch.no_grad():
        mean = model(torch.cat([b[0] for b in BATCHES])).mean().item()
    assert figures["fp32"]["mean_logit"] == pytest.approx(mean, abs=1e-5)
    assert figures["simulated"]["mean_logit"] == pytest.approx(mean + 0.1, abs=1e-5)
    assert figures["file"]["mean_logit"] == pytest.approx(mean + 1, abs=1e-5)
    assert figures["file"]["sqnr_db"] < figures["simulated"]["sqnr_db"]
