from __future__ import annotations

from pathlib import Path

import torch
from measure import Quantized, eager

REQUIRES = ["brevitas"]


def load() -> str:
    import brevitas
    import brevitas.graph.quantize

    return str(brevitas.__version__)


def quantized(model: torch.nn.Module, crops: torch.Tensor, folder: Path) -> Quantized:
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from brevitas.graph.quantize import preprocess_for_quantize, quantize
    from brevitas.proxy import ActQuantProxyFromInjector

    result = quantize(preprocess_for_quantize(model, equalize_iters=20, equalize_merge_bias=True))
    with torch.no_grad():
        for mode in (calibration_mode, bias_correction_mode):
            with mode(result):
                for batch in crops.split(16):
                    result(batch)
    proxies = [m for m in result.modules() if isinstance(m, ActQuantProxyFromInjector)]
    return Quantized(eager(result.eval()), sum(proxy.is_quant_enabled for proxy in proxies))


VARIANTS = {"equalization, bias correction": quantized}
