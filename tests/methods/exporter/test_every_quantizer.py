"""Every registered quantizer round-trips through safetensors, packed to its true bits."""

from __future__ import annotations

from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qpipe import QuantSpec, RecipeError, Role, load
from qpipe.nn import weight_quantizers
from qpipe.packing import packed_bytes
from qpipe.pipeline import quantize
from qpipe.registry import PluginRegistry

REGISTRY = PluginRegistry.load_installed()
BLOCKS = {"name": "subchannel", "group_size": 16, "pad": True}


class Net(nn.Module):
    """A convolution whose blocks have a ragged end, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2)
        self.linear = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(torch.relu(self.conv(x)).mean(3).flatten(1))
        return y


def slots(name: str) -> list[dict[str, Any]]:
    """Return slots of the least and the largest width, of some, that the quantizer takes."""
    taken = []
    for num_bits, symmetric in product((1, 2, 3, 4, 8, 12), (True, False)):
        slot: dict[str, Any] = {"num_bits": num_bits, "symmetric": symmetric, "signed": symmetric}
        with suppress(RecipeError):
            REGISTRY.create("quantizer", name).check(QuantSpec(role=Role.WEIGHT, **slot))
            taken.append(slot)
    return [taken[0], taken[-1]]


CASES = [
    (name, slot, granularity)
    for name in REGISTRY.names("quantizer")
    if Role.WEIGHT in REGISTRY.get("quantizer", name).roles
    for slot, granularity in zip(slots(name), (BLOCKS, "channel"), strict=True)
]


@pytest.mark.parametrize(("name", "slot", "granularity"), CASES)
def test_bytes_are_those_counted_and_loading_gives_the_simulation(
    name: str,
    slot: dict[str, Any],
    granularity: Any,  # noqa: ANN401
    tmp_path: Path,
) -> None:
    """The payload is what evaluator=size says, its codes take num_bits each; the figures say simulated."""
    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(4, 3, 5, 5)
    simulation, report = quantize(
        model,
        [x],
        weight={**slot, "restricted": False, "quantizer": name, "granularity": granularity},
        activation=None,
        transform=[],
        evaluator=["size"],
        exporter=["safetensors"],
        out=tmp_path / "run",
    )
    tensors = load_file(tmp_path / "run" / "safetensors" / "model.safetensors")
    assert sum(t.nbytes for t in tensors.values()) == report.metrics["simulated"]["size_bytes"]
    for weight in weight_quantizers(simulation):
        quantizer, spec = weight.fake_quant.slot.quantizer, weight.fake_quant.slot.spec
        codes = weight.fake_quant.codes(weight.blocks_input()) - quantizer.code_min(spec)
        assert 0 <= codes.min() <= codes.max() < 2 ** slot["num_bits"]
        stored = tensors[f"{weight.name.replace(':', '.')}.codes"]
        assert stored.nbytes == packed_bytes(codes.numel(), slot["num_bits"])
        said = any(
            f"computes on codes of quantizer '{name}': files store" in notice for notice in report.notices
        )
        assert said is not quantizer.is_affine(spec)
    assert [artifact.engine for artifact in report.artifacts] == ["simulated"]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "run", model=Net())(x), simulation(x))
