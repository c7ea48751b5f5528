from __future__ import annotations

import pytest
import torch
from qpipe_methods.granularity.token import PerToken

from qpipe import QuantSpec, RecipeError
from qpipe.testing import AffineQuantizer, GranularityContract, fit


class TestToken(GranularityContract):
    granularity = PerToken()
    shapes = ((8, 6), (2, 7, 16), (2, 3, 4, 5))

    def test_a_block_is_the_features_of_one_token(self) -> None:
        x = torch.randn(2, 7, 16)
        assert torch.equal(self.granularity.to_blocks(x)[9], x[1, 2])
        assert self.granularity.to_blocks(x).shape == (14, 16)

    def test_scaling_a_row_scales_its_output_row_exactly(self) -> None:
        """METHODS.md A: per-token scales commute with the matmul."""
        torch.manual_seed(0)
        x, weight = torch.randn(4, 8), torch.randn(8, 3)
        factors = torch.tensor([[1.0], [2.0], [0.25], [8.0]])
        torch.testing.assert_close(_rounded(x * factors) @ weight, (_rounded(x) @ weight) * factors)

    def test_needs_rows(self) -> None:
        with pytest.raises(RecipeError, match=r"'pooler' has shape \[8\], but needs rows of features"):
            self.granularity.check(torch.Size([8]), "pooler")


def _rounded(x: torch.Tensor) -> torch.Tensor:
    blocks, spec = PerToken().to_blocks(x), QuantSpec(restricted=True)
    return AffineQuantizer().fake_quantize(blocks, fit(AffineQuantizer(), blocks, spec), spec)
