"""Which tensor's rounding makes the noise of the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qpipe import Evaluator, Subject, hookimpl
from qpipe.nn import FakeQuant, disabled


class SharesEvaluator(Evaluator):
    """List weights and activations by their share of the output's quantization noise, largest first.

    To first order the rounding error n of a tensor moves the output by J n; with random signs v the mean of
    (v J n)^2 is the energy of that movement (Hutchinson, 1990), and one backward pass gives v J of every
    tensor. Sparing the first row helps most. A share is known to about a factor sqrt(2 / num_samples).

    Args:
        num_samples: of the evaluation set, each one forward and one backward pass.
    """

    name = "shares"

    def __init__(self, num_samples: int = 32) -> None:
        self.num_samples = num_samples

    def tables(self, subject: Subject) -> Mapping[str, Any]:
        """Return {'shares': [{'tensor': name, 'share_percent': …, 'sqnr_db': …}, …]} for the simulation.

        sqnr_db is that of the output if this tensor alone were quantized.
        """
        if subject.variant != "simulated":
            return {}
        noise, signal = _energies(subject, self.num_samples)
        total = sum(noise.values())
        rows = [
            {
                "tensor": name,
                "share_percent": 100 * energy / total if total else 0.0,
                "sqnr_db": _decibels(signal, energy),
            }
            for name, energy in sorted(noise.items(), key=lambda item: -item[1])
        ]
        return {
            "title": "Which tensor to spare",
            "about": "Each tensor's share of the noise at the output, to first order, from "
            f"{self.num_samples} samples; sqnr: the output's if this tensor alone were quantized.",
            **({"finding": _finding(rows)} if total else {}),
            "shares": rows,
        }


def _finding(rows: Sequence[Mapping[str, Any]]) -> str:
    name, share = rows[0]["tensor"], rows[0]["share_percent"]
    return f"The tensor to spare first is '{name}': {share:.0f} % of the output's noise."


def _decibels(signal: float, noise: float) -> float:
    return float(10 * torch.log10(torch.tensor(signal / noise))) if noise and signal else float("inf")


def _energies(subject: Subject, num_samples: int) -> tuple[dict[str, float], float]:
    """Return the energy that each tensor's rounding has at the output, and that of the output itself."""
    energies: dict[str, float] = {}
    signal = 0.0
    signs = torch.Generator().manual_seed(0)
    with disabled(subject.model), _listening(subject.model) as seen, torch.enable_grad():
        for args, kwargs in islice(_samples(subject), num_samples):
            seen.clear()
            output = subject.task.compared(subject.model(*args, **kwargs))
            signal += float(output.detach().double().square().sum())
            sign = torch.randint(0, 2, output.shape, generator=signs) * 2.0 - 1
            inputs = [x for _, x, _ in seen]
            slopes = torch.autograd.grad((output * sign.to(output)).sum(), inputs, allow_unused=True)
            moved: dict[str, float] = {}
            for (name, _, error), slope in zip(seen, slopes, strict=True):
                by = 0.0 if slope is None else float((slope.double() * error).sum())
                moved[name] = moved.get(name, 0.0) + by
            for name, by in moved.items():
                energies[name] = energies.get(name, 0.0) + by * by
    return energies, signal


@contextmanager
def _listening(model: nn.Module) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Note each quantized tensor of a forward pass: name, the tensor, the error its quantizer would make."""
    seen: list[tuple[str, Tensor, Tensor]] = []

    def note(quantizer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401
        if not isinstance(quantizer, FakeQuant) or not output.is_floating_point():
            return output
        x = output if output.requires_grad else output.detach().requires_grad_()
        x = x.clone()  # what follows may change its own copy in place
        seen.append((quantizer.name, x, _error(quantizer, output)))
        return x.clone()

    active = [m for m in model.modules() if isinstance(m, FakeQuant) and m.calibrated]
    handles = [m.register_forward_hook(note) for m in active]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _error(quantizer: FakeQuant, x: Tensor) -> Tensor:
    """Return what quantizing x adds to it."""
    quantizer.enabled = True
    try:
        return quantizer.forward(x).double() - x.double()
    finally:
        quantizer.enabled = False


def _samples(subject: Subject) -> Iterator[tuple[Any, Any]]:
    """Yield the model's arguments sample by sample."""
    for batch in subject.batches:
        call = subject.task.inputs(batch)
        tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim()]
        size = max(len(tensor) for tensor in tensors)
        for i in range(size):

            def one(leaf: Any, i: int = i, size: int = size) -> Any:  # noqa: ANN401
                whole = not (isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size)
                return leaf if whole else leaf[i : i + 1]

            yield pytree.tree_map(one, call)


@hookimpl
def qpipe_register_evaluator() -> list[type[Evaluator]]:
    """Offer the shares of the noise."""
    return [SharesEvaluator]
