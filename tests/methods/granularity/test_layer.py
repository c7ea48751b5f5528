from __future__ import annotations

import torch
from qpipe_methods.granularity.layer import PerLayer

from qpipe.testing import GranularityContract


class TestLayer(GranularityContract):
    granularity = PerLayer()
    shapes = ((8, 6), (5,), (2, 3, 4, 5))

    def test_is_one_block_without_a_copy(self) -> None:
        x = torch.randn(4, 5)
        blocks = self.granularity.to_blocks(x)
        assert blocks.shape == (1, 20)
        assert blocks.data_ptr() == x.data_ptr()
