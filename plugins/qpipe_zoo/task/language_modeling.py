"""Predicting the next token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from qpipe import Task

_TIE = 1.04  # ratios of perplexities closer than this are ties


class NextToken(Metric):
    """Average what the true next token costs, in nats.

    Args:
        task: finds the logits in an output.
        label: of the blocks that count: 0 the text itself, 1 the other one; blocks without a label are 0.
        exponential: give the perplexity instead.
    """

    nats: Tensor
    total: Tensor

    def __init__(self, task: Task, label: int, exponential: bool) -> None:
        super().__init__()
        self.task, self.label, self.exponential = task, label, exponential
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: Any, batch: Any) -> None:  # noqa: ANN401  # a user's output and batch
        """Take in one batch."""
        tokens, logits = batch["input_ids"], self.task.compared(output)
        counts = batch.get("label", torch.zeros(len(tokens))) == self.label
        if counts.any():
            self.nats += costs(logits[counts], tokens[counts]).double().sum()
            self.total += tokens[counts][:, 1:].numel()

    def compute(self) -> Tensor:
        """Return the mean, or its exponential."""
        mean = self.nats.cpu() / self.total.cpu()
        return mean.exp() if self.exponential else mean


def costs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return -log p of each token [B, T] but the first given those before it, [B, T - 1], nats."""
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(len(tokens), -1)


class LanguageModeling(Task):
    """Predict each next token: loss_nats and perplexity of the text, other_perplexity of another beside it.

    A batch is a dict of input_ids [B, T] and, if there are two texts, label [B].

    Args:
        other: whether, or where, there is another text.
    """

    def __init__(self, other: str | bool | None = None) -> None:
        super().__init__()
        self.other = bool(other)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
        """Return the tokens alone."""
        return (), {"input_ids": batch["input_ids"]}

    def loss(self, output: Any, batch: Any) -> Tensor:  # noqa: ANN401
        """Return the mean cost of the next token, nats."""
        return costs(self.compared(output), batch["input_ids"]).mean()

    def metrics(self) -> Mapping[str, Metric]:
        """Return perplexity and loss_nats, and other_perplexity where there is another text."""
        metrics = {
            "perplexity": NextToken(self, 0, exponential=True),
            "loss_nats": NextToken(self, 0, exponential=False),
        }
        return metrics | ({"other_perplexity": NextToken(self, 1, exponential=True)} if self.other else {})

    def notices(self, figures: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
        """Warn where the other text suffers more than the one whose kind was calibrated on."""
        for variant, metrics in figures.items():
            if "other_perplexity" not in metrics:
                continue
            own, other = (
                metrics[name] / figures["fp32"][name] for name in ("perplexity", "other_perplexity")
            )
            if max(own, other) > _TIE * min(own, other):
                yield (
                    f"{variant}: perplexity is {own:.3g} times the float model's on data.path and "
                    f"{other:.3g} times on data.other; the calibration fits one kind of text better, so "
                    "calibrate on what the model will read"
                )
