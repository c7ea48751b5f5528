from __future__ import annotations

import torch
from qpipe_methods.granularity.channel import PerChannel

from qpipe import Role
from qpipe.testing import GranularityContract


class TestChannel(GranularityContract):
    granularity = PerChannel()
    shapes = ((8, 6), (5,), (8, 1, 3, 3))

    def test_a_block_is_an_output_channel(self) -> None:
        x = torch.randn(4, 2, 3, 3)
        assert torch.equal(self.granularity.to_blocks(x)[2], x[2].flatten())

    def test_activations_have_no_channel_scales(self) -> None:
        assert self.granularity.stand_in[Role.ACTIVATION] == "layer"
        assert "sum" in self.granularity.why_not[Role.ACTIVATION]

    def test_finer_blocks_never_have_a_larger_magnitude(self) -> None:
        x = torch.randn(16, 32)
        assert (self.granularity.to_blocks(x).abs().amax(1) <= x.abs().max()).all()
