from __future__ import annotations

from pathlib import Path

import torch
from measure import Quantized, eager

REQUIRES = ["torchao"]


def load() -> str:
    import torchao
    from torchao.quantization.pt2e import quantize_pt2e  # noqa: F401

    return str(torchao.__version__)


def converted(model: torch.nn.Module, crops: torch.Tensor) -> tuple[torch.nn.Module, int]:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (crops[:2],), dynamic_shapes=({0: batch},)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program, quantizer)
    with torch.no_grad():
        for batch_ in crops.split(16):
            prepared(batch_)
    result = convert_pt2e(prepared)
    edges = sum(
        "quantize_per_tensor" in str(n.target) and "de" not in str(n.target).split(".")[1]
        for n in result.graph.nodes
    )
    return result, edges


def simulated(model: torch.nn.Module, crops: torch.Tensor, folder: Path) -> Quantized:
    result, edges = converted(model, crops)
    return Quantized(eager(result), edges)


def compiled(model: torch.nn.Module, crops: torch.Tensor, folder: Path) -> Quantized:
    result, edges = converted(model, crops)
    torch._inductor.config.freezing = True
    fast = torch.compile(result)
    return Quantized(eager(fast), edges, "inductor")


VARIANTS = {"x86 compiled": compiled, "x86 eager": simulated}
