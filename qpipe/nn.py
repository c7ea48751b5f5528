"""Fake-quantization inside a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qpipe.errors import QpipeError
from qpipe.recipe import Slot
from qpipe.statistics import Statistics
from qpipe.types import QParams

_EXTRA = "extra_"


class FakeQuant(nn.Module):
    """Quantize and dequantize one tensor; hold its parameters and, while calibrating, its statistics.

    Args:
        slot: how.
        name: of the edge, or 'module.path:parameter' of the weight, for messages.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, slot: Slot, name: str) -> None:
        super().__init__()
        self.slot = slot
        self.name = name
        self.enabled = True
        self.statistics: Statistics | None = None  # set: observe and pass the tensor on unchanged
        self.learner: nn.Module | None = None  # set while training: fake-quantizes in the quantizer's place
        self.register_buffer("scale", torch.empty(0, 1))
        self.register_buffer("zero_point", torch.empty(0, 1))

    @property
    def calibrated(self) -> bool:
        """Whether parameters were fitted, or are taken from each tensor as it passes."""
        return self.slot.spec.dynamic or self.scale.numel() > 0

    def qparams(self) -> QParams:
        """Return the fitted parameters."""
        names = [n for n in (*self._buffers, *self._parameters) if n.startswith(_EXTRA)]
        return QParams(self.scale, self.zero_point, {n.removeprefix(_EXTRA): getattr(self, n) for n in names})

    def set_qparams(self, qparams: QParams) -> None:
        """Keep fitted parameters as buffers, so that they are saved and move with the model."""
        self.register_buffer("scale", qparams.scale.detach().clone())
        self.register_buffer("zero_point", qparams.zero_point.detach().clone())
        for name, value in qparams.extra.items():
            self.register_buffer(_EXTRA + name, value.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Observe x, or return it rounded to its levels; computed in float32 whatever autocast says."""
        if not x.is_floating_point():
            return x
        if self.statistics is not None:
            self.statistics.update(self.slot.granularity.to_blocks(x.detach()))
            return x
        if not self.enabled:
            return x
        if not self.calibrated:
            raise QpipeError(f"'{self.name}' was never calibrated; run calibrate before the quantized model")
        with torch.autocast(x.device.type, enabled=False):
            return self._fake_quantize(x if x.dtype is torch.float64 else x.float()).to(x.dtype)

    def _fake_quantize(self, x: Tensor) -> Tensor:
        if self.learner is not None:
            learned: Tensor = self.learner(x)
            return learned
        quantizer, granularity, spec = self.slot.quantizer, self.slot.granularity, self.slot.spec
        qparams = self.dynamic_qparams(x) if spec.dynamic else self.qparams()
        if qparams.scale.numel() == 1 and quantizer.is_affine(spec):  # broadcast: no view, no copy
            ones = [1] * x.dim()
            flat = QParams(qparams.scale.reshape(ones), qparams.zero_point.reshape(ones))
            return quantizer.fake_quantize(x, flat, spec)
        blocks = quantizer.fake_quantize(granularity.to_blocks(x), qparams, spec)
        return granularity.from_blocks(blocks, x.shape)

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of x as blocks [B, N], integers in a floating dtype."""
        return self.slot.quantizer.quantize(self.slot.granularity.to_blocks(x), self.qparams(), self.slot.spec)

    def dynamic_qparams(self, x: Tensor) -> QParams:
        """Fit parameters to x itself."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        """Take parameters of any shape, so that a calibrated state loads into an uncalibrated model."""
        for key, value in state_dict.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and (name in ("scale", "zero_point") or name.startswith(_EXTRA)):
                if name not in self._parameters:
                    self.register_buffer(name, torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Show the slot."""
        return ", ".join(f"{key}={value}" for key, value in self.slot.describe().items())
