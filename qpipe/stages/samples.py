"""Figures of single samples, in the order of the data however many processes read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from qpipe.stages.data import process

if TYPE_CHECKING:
    from qpipe.recipe import Recipe
    from qpipe.task import Task


class PerSample:
    """Keep what evaluators say of each sample of a pass."""

    def __init__(self, recipe: Recipe, task: Task) -> None:
        self.recipe = recipe
        self.task = task
        self.batches: list[dict[str, Tensor]] = []

    def take(self, output: Any, reference_output: Any, batch: Any) -> None:  # noqa: ANN401
        """Take in one batch."""
        found: dict[str, Tensor] = {}
        for evaluator in self.recipe.evaluators:
            found |= evaluator.samples(self.task, output, reference_output, batch)
        self.batches.append({name: values.detach().float().cpu() for name, values in found.items()})

    def gathered(self) -> Mapping[str, Tensor]:
        """Return the values of all samples, [N] or [N, 2]; every process gets them."""
        world = process()[1]
        ranks: list[list[dict[str, Tensor]]] = [self.batches]
        if world > 1:
            ranks = [[] for _ in range(world)]
            distributed.all_gather_object(ranks, self.batches)
        count = sum(len(batches) for batches in ranks)
        ordered = [ranks[i % world][i // world] for i in range(count)]  # as Shard deals them out
        names = ordered[0] if ordered else {}
        return {name: torch.cat([batch[name] for batch in ordered]) for name in names}
