from __future__ import annotations

import pytest
import torch
from qpipe_methods.granularity.subchannel import PerSubchannel

from qpipe import RecipeError
from qpipe.testing import GranularityContract


class TestSubchannel(GranularityContract):
    granularity = PerSubchannel(group_size=12)
    shapes = ((8, 24), (8, 4, 3, 3), (8, 1, 3, 3), (5, 12))

    def test_a_block_is_a_run_of_inputs(self) -> None:
        x = torch.randn(3, 24)
        blocks = self.granularity.to_blocks(x)
        assert torch.equal(blocks[3], x[1, 12:])
        assert blocks.data_ptr() == x.data_ptr()

    def test_a_short_channel_is_one_block_and_says_so(self) -> None:
        depthwise = torch.Size([32, 1, 3, 3])
        assert self.granularity.to_blocks(torch.zeros(depthwise)).shape == (32, 9)
        assert self.granularity.describe(depthwise) == "32 channels of 9 (fewer than group_size 12)"

    def test_group_size_must_divide_the_inputs(self) -> None:
        message = (
            "granularity 'subchannel': group_size 48 does not divide 512, the input size of 'layer1.0.conv1'"
        )
        with pytest.raises(RecipeError, match=message):
            PerSubchannel(group_size=48).check(torch.Size([64, 512]), "layer1.0.conv1")

    def test_counts_its_blocks(self) -> None:
        assert self.granularity.describe(torch.Size([8, 4, 3, 3])) == "24 blocks of 12"


class TestPaddedSubchannel(GranularityContract):
    granularity = PerSubchannel(group_size=16, pad=True)
    shapes = ((8, 24), (8, 4, 3, 3), (5, 17))

    def test_fills_the_last_block_with_zeros(self) -> None:
        blocks = self.granularity.to_blocks(torch.ones(5, 17))
        assert blocks.shape == (10, 16)
        assert blocks.sum(1).tolist() == [16, 1] * 5
