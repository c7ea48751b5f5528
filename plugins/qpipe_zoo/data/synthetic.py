"""Samples made up from what batch normalization remembers of the training data."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from qpipe import DataError

log = logging.getLogger("qpipe")


def statistics_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Return how far x's statistics are from the running ones, in their stds, summed over batch norms.

    Equation: mean over channels of ((mean - running mean)^2 + (std - running std)^2) / running std^2
    Source: Cai et al. (ZeroQ), 2020, arXiv 2001.00281, eq. 2, without the division: there the layers of the
        largest outputs decide.
    """
    with _normalized(model) as seen:
        model(x)
    losses = []
    for norm, inputs in seen:
        var, mean = torch.var_mean(inputs.transpose(0, 1).flatten(1), 1, correction=0)
        running_mean, running_var = norm.get_buffer("running_mean"), norm.get_buffer("running_var") + norm.eps
        stds = (var + norm.eps).sqrt() - running_var.sqrt()
        losses.append((((mean - running_mean).square() + stds.square()) / running_var).mean())
    return torch.stack(losses).sum()


@contextmanager
def _normalized(model: nn.Module) -> Iterator[list[tuple[_BatchNorm, Tensor]]]:
    """Collect what reaches each batch norm that has running statistics."""
    seen: list[tuple[_BatchNorm, Tensor]] = []
    with ExitStack() as stack:
        for norm in batch_norms(model):
            hook = norm.register_forward_pre_hook(lambda module, args: seen.append((module, args[0])))
            stack.callback(hook.remove)
        yield seen


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms that have running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]


def distilled(model: nn.Module, x: Tensor, iterations: int, lr: float) -> tuple[Tensor, float, float]:
    """Change x until its statistics at every batch norm are the running ones.

    Args:
        model: in eval mode; its parameters stay.
        x: [B, ...], noise.
        iterations: Adam steps; the step falls to 0 along a cosine.

    Returns:
        the samples, and the loss before and after.
    """
    with torch.inference_mode(False), torch.enable_grad():  # it may be a prediction loop that asks
        x = x.clone().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(iterations, 1))
        before = statistics_loss(model, x)
        for _ in range(iterations):
            loss = statistics_loss(model, x)
            (x.grad,) = torch.autograd.grad(loss, x)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return x.detach(), before.item(), statistics_loss(model, x).item()


class Distilled(Dataset[Tensor]):
    """Hold samples that are distilled, a batch at a time, when they are first asked for."""

    def __init__(
        self,
        model: nn.Module,
        shape: Sequence[int],
        count: int,
        batch_size: int,
        iterations: int,
        lr: float,
        seed: int,
    ) -> None:
        self.model = model
        self.shape = tuple(shape)
        self.count = count
        self.batch_size = batch_size
        self.iterations = iterations
        self.lr = lr
        self.seed = seed
        self.batches: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        number, place = divmod(index, self.batch_size)
        if number not in self.batches:
            self.batches[number] = self._distil(number)
        return self.batches[number][place]

    def _distil(self, number: int) -> Tensor:
        size = min(self.batch_size, self.count - number * self.batch_size)
        noise = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        x = torch.randn(size, *self.shape, generator=noise)
        if not self.iterations:
            return x
        start = time.perf_counter()
        x, before, after = distilled(self.model, x, self.iterations, self.lr)
        spent, total = time.perf_counter() - start, -(-self.count // self.batch_size)
        text = "synthetic: batch %d of %d, loss %.3g to %.3g, %.0f s, about %.0f s a batch left to make"
        log.info(text, number + 1, total, before, after, spent, spent)
        return x


class Synthetic(LightningDataModule):
    """Calibrate on samples distilled from a model's batch-norm statistics; no real data is read for it.

    Args:
        model: whose statistics; the one that is quantized. Weights loaded by model.weights are not seen here.
        shape: of a sample.
        count: samples to calibrate on.
        batch_size: samples whose joint statistics are matched.
        iterations: Adam steps a batch; 0: plain noise, the control.
        lr: of Adam.
        evaluation: a data module whose test set is evaluated on; None: other synthetic samples.
        seed: of the noise.

    Source: Cai et al. (ZeroQ), 2020, arXiv 2001.00281, algorithm 1.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: Sequence[int],
        count: int = 64,
        batch_size: int = 16,
        iterations: int = 100,
        lr: float = 0.1,
        evaluation: LightningDataModule | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not batch_norms(model):
            raise DataError(
                f"{type(model).__name__} has no batch normalization to distil data from; "
                "give real data, or data.iterations=0 on a model that has one"
            )
        self.evaluation = evaluation
        self.parts = [
            Distilled(model.eval(), shape, count, batch_size, iterations, lr, s) for s in (seed, seed + 1)
        ]

    def fingerprint(self) -> str:
        """Name the data: it follows from the model and the numbers given."""
        part = self.parts[0]
        means = [norm.get_buffer("running_mean").numpy().tobytes() for norm in batch_norms(part.model)]
        numbers = (part.shape, part.count, part.batch_size, part.iterations, part.lr, part.seed)
        return f"synthetic-{numbers}-{hashlib.sha256(b''.join(means)).hexdigest()}"

    def setup(self, stage: str | None = None) -> None:
        """Set the evaluation data up."""
        if self.evaluation is not None:
            self.evaluation.prepare_data()
            self.evaluation.setup(stage or "test")

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return the distilled samples."""
        return DataLoader(self.parts[0], self.parts[0].batch_size)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Return the evaluation data's, or other distilled samples."""
        if self.evaluation is not None:
            loader: DataLoader[Tensor] = self.evaluation.test_dataloader()
            return loader
        return DataLoader(self.parts[1], self.parts[1].batch_size)
