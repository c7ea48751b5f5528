from __future__ import annotations

import tempfile

import pytest
import torch
from qpipe_methods.memory import to_disk
from torch import nn

from qpipe import is_shared, shared


def test_a_rewritten_weight_moves_and_stays_what_it_is() -> None:
    weight = nn.Parameter(torch.randn(512, 1024))
    before, address = weight.detach().clone(), weight.data_ptr()
    to_disk(weight)
    assert weight.data_ptr() != address
    assert torch.equal(weight, before)
    with torch.no_grad():
        weight[3] = 7.0  # and can be written to
    assert weight[3].eq(7.0).all()
    assert torch.equal(weight[:3], before[:3])


def test_what_is_shared_with_the_float_model_or_small_stays() -> None:
    weight, small = torch.randn(512, 1024), torch.randn(8)
    twin = shared(weight)
    assert is_shared(twin)
    addresses = weight.data_ptr(), small.data_ptr()
    to_disk(twin)
    to_disk(small)
    assert is_shared(twin)
    assert (weight.data_ptr(), small.data_ptr()) == addresses


def test_without_room_on_disk_weights_stay_in_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full() -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    weight = torch.randn(512, 1024)
    address = weight.data_ptr()
    to_disk(weight)
    assert weight.data_ptr() == address
    assert "weights that are rewritten stay in memory: No space left" in caplog.text
