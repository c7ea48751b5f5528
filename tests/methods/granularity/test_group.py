from __future__ import annotations

import pytest
import torch
from qpipe_methods.granularity.group import PerGroup

from qpipe import RecipeError
from qpipe.testing import GranularityContract


class TestGroup(GranularityContract):
    granularity = PerGroup(num_groups=4)

    def test_neighbouring_channels_share_a_block(self) -> None:
        x = torch.arange(8.0).reshape(8, 1).expand(8, 3).contiguous()
        assert self.granularity.to_blocks(x)[1].tolist() == [2, 2, 2, 3, 3, 3]

    def test_groups_must_divide_the_channels(self) -> None:
        message = "granularity 'group': num_groups 4 does not divide 6, the output channels of 'stem.conv'"
        with pytest.raises(RecipeError, match=message):
            self.granularity.check(torch.Size([6, 4]), "stem.conv")

    def test_describes_its_groups(self) -> None:
        assert self.granularity.describe(torch.Size([64, 3])) == "4 groups of 16 channels"

    def test_refuses_no_groups(self) -> None:
        with pytest.raises(RecipeError, match="num_groups must be at least 1, not 0"):
            PerGroup(num_groups=0)
