from __future__ import annotations

import numpy as np
import torch
from torch import nn

from qpipe.sharing import is_shared, shared, shared_copy


def test_a_copy_takes_memory_once_it_is_written_to() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    twin = shared_copy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        twin(torch.randn(2, 4))
        assert all(is_shared(p) for p in twin.parameters())
        twin[0].weight.mul_(2)
        model[1].weight.zero_()
    assert [is_shared(p) for p in twin.parameters()] == [False, True, True, True]
    torch.testing.assert_close(twin[0].weight, 2 * before["0.weight"])
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(twin[1].weight, before["1.weight"])


def test_parameters_that_are_to_be_the_same_are() -> None:
    model = nn.Linear(4, 4)
    twin = shared_copy(model, same=[model.weight])
    assert twin.weight is model.weight
    assert twin.bias is not model.bias


def test_a_step_of_an_optimizer_leaves_the_original_alone() -> None:
    model = nn.Linear(3, 2)
    twin, before = shared_copy(model), model.weight.detach().clone()
    twin(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(twin.parameters(), lr=1.0).step()
    assert model.weight.grad is None
    assert torch.equal(model.weight, before)
    torch.testing.assert_close(twin.weight, before - 1)


def test_tied_and_frozen_parameters_stay_so() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight.requires_grad_(False)
    twin = shared_copy(model)
    assert twin[0].weight is twin[1].weight is not model[0].weight
    assert not twin[0].weight.requires_grad


def test_memory_of_others_is_copied() -> None:
    numbers = np.zeros(4, dtype=np.float32)
    twin = shared(torch.from_numpy(numbers))
    numbers += 1
    assert twin.sum() == 0
