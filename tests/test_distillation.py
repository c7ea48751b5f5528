from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qpipe import RecipeError, Task
from qpipe.distillation import Distillation, feature_loss, soft_target_loss


class Labelled(Task):
    def loss(self, output: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(output, batch[1])


def test_soft_targets_of_two_classes_match_the_closed_form() -> None:
    output, target = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 3.0]])
    p, q = 1 / (1 + math.exp(-3 / 2)), 1 / (1 + math.exp(-1 / 2))  # at temperature 2
    expected = 4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert soft_target_loss(output, target, 2.0, -1).item() == pytest.approx(expected, rel=1e-5)


def test_soft_targets_vanish_where_student_and_teacher_agree() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert soft_target_loss(logits, logits + 3, 4.0, -1).item() == pytest.approx(0, abs=1e-6)


def test_hot_soft_targets_become_the_centred_squared_error() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    difference = student - teacher
    centred = difference - difference.mean(1, keepdim=True)
    expected = centred.square().sum(1).mean() / (2 * 5)  # METHODS.md C: ||dz - mean(dz)||^2 / (2 K)
    assert soft_target_loss(student, teacher, 1e3, -1).item() == pytest.approx(expected.item(), rel=1e-2)


def test_outputs_without_classes_are_compared_by_squares() -> None:
    assert soft_target_loss(torch.tensor([1.0]), torch.tensor([3.0]), 4.0, None).item() == 4


def test_features_are_compared_relative_to_the_float_models() -> None:
    """||(1, 2) - (3, 2)||² / ||(3, 2)||² = 4 / 13 and (1 / 2)²: their mean."""
    ours = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0]), "only ours": torch.ones(1)}
    theirs = {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([2.0])}
    assert feature_loss(ours, theirs).item() == pytest.approx((4 / 13 + 1 / 4) / 2)


def test_loss_mixes_labels_soft_targets_and_features() -> None:
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(2))
    batch = torch.randn(8, 4), torch.randint(0, 3, (8,))
    task = Labelled()
    soft = soft_target_loss(student(batch[0]), teacher(batch[0]), 4.0, -1)
    inner = feature_loss({"1": student[:2](batch[0])}, {"1": teacher[:2](batch[0])})
    expected = 0.3 * task.loss(student(batch[0]), batch) + 0.7 * soft + 0.5 * inner
    mixed = Distillation(0.7, features=0.5, match="1").loss(student, student, teacher, task, batch)
    assert mixed.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not teacher[0]._forward_hooks


def test_full_weight_reads_no_label() -> None:
    net = nn.Linear(4, 3)
    loss = Distillation(1.0).loss(net, net, nn.Linear(4, 3), Task(), torch.randn(2, 4))
    assert loss.requires_grad


def test_features_that_match_nothing_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(RecipeError, match="names no module"):
        Distillation(1.0, features=1.0, match="stem.*").loss(net, net, net, Task(), torch.randn(2, 4))


@pytest.mark.parametrize("arguments", [{"weight": 1.5}, {"temperature": 0.0}])
def test_meaningless_arguments_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="distill"):
        Distillation(**arguments)
