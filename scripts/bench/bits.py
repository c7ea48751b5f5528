"""Mixed widths beside uniform ones that spend the same: one row a budget and sensitivity.

    python scripts/bench/bits.py                                       # every row, 256 evaluation crops
    python scripts/bench/bits.py --rows efficientnet --evaluation 64   # rows whose name holds a word
    python scripts/bench/bits.py --rows latency

A sensitivity is measured once and serves every budget; each row is then `qpipe.quantize` with the rules that
bits=auto prints, which give the identical model. EfficientNet-Lite0: 8-bit activations, weights by channel,
SQNR of the logits and agreement with float. MiniLM: weights alone, 64 inputs a scale, mean cosine. All
figures are simulated; one thread; CPU seconds are those of the sensitivity. Rows of a latency are measured:
what was predicted, and the CPU time of the written file, the least of 30 calls with one sample.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from qpipe_methods.allocation import front
from qpipe_methods.sensitivity import candidates, in_words, measure
from qpipe_zoo.data.photos import Photos
from qpipe_zoo.data.sentences import Sentences
from qpipe_zoo.model.efficientnet_lite0 import efficientnet_lite0
from qpipe_zoo.model.minilm import minilm
from torch import nn

from qpipe import Task, calibration_batches, quantize
from qpipe.calls import some_samples

GPTQ = {"name": "gptq", "shrinkage": 0.2}
EVERY = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Row:
    """Uniform width, or a budget of average bits or of latency for widths to choose from."""

    uniform: int | None = None
    average: float | None = None
    latency: float | None = None
    bits: tuple[int, ...] = EVERY
    choices: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        if self.uniform:
            return f"uniform {self.uniform}"
        budget = f"latency {self.latency}" if self.latency else f"average {self.average}"
        return f"{budget} of {[*self.bits]}"


def rules(found: Sequence[Any], picks: Sequence[int]) -> list[dict[str, Any]]:
    pairs = zip(found, picks, strict=True)
    return [{"match": e.path, "weight": {"num_bits": e.choices[pick].num_bits}} for e, pick in pairs]


class Bench:
    def __init__(
        self,
        name: str,
        model: nn.Module,
        data: LightningDataModule,
        task: Task,
        common: dict[str, Any],
        samples: int,
    ) -> None:
        self.name, self.model, self.data, self.task, self.common = name, model, data, task, common
        self.samples = samples
        self.prepared: nn.Module | None = None
        self.losses: dict[str, Any] = {}

    def sensitivity(self, by: str) -> tuple[list[Any], list[list[float]], float]:
        if self.prepared is None:
            self.prepared, _ = quantize(
                self.model, self.data, task=self.task, evaluator=[], num_samples=64, **self.common
            )
        if by not in self.losses:
            start = time.process_time()
            found = candidates(self.prepared, EVERY, lambda _: False)
            batches = calibration_batches(self.data, self.samples)
            self.losses[by] = (
                found,
                measure(by, found, self.prepared, batches, self.task),
                time.process_time() - start,
            )
        return self.losses[by]

    def row(self, row: Row, by: str) -> None:
        layers, spent, expected = [], 0.0, ""
        if row.average:
            found, losses, spent = self.sensitivity(by)
            allowed = [[i for i, c in enumerate(e.choices) if c.num_bits in row.bits] for e in found]
            costs = [
                [e.numel * e.choices[i].num_bits for i in keep]
                for e, keep in zip(found, allowed, strict=True)
            ]
            own = [[of[i] for i in keep] for of, keep in zip(losses, allowed, strict=True)]
            points = front(costs, own)
            best = points.best(int(row.average * sum(e.numel for e in found)))
            assert best is not None
            picks = [keep[i] for keep, i in zip(allowed, points.picks[:, best].tolist(), strict=True)]
            layers, expected = rules(found, picks), in_words(by, points.losses[best])
        words = {**self.common, **row.choices}
        weight = {**words.pop("weight", {}), **({"num_bits": row.uniform} if row.uniform else {})}
        _, report = quantize(
            self.model,
            self.data,
            task=self.task,
            evaluator=["sqnr", "size"],
            num_samples=64,
            **{**words, "weight": weight, "layers": layers},
        )
        figures = report.metrics["simulated"]
        text = "  ".join(
            f"{key} {figures[key]:9.3f}"
            for key in ("sqnr_db", "agreement_percent", "mean_cosine")
            if key in figures
        )
        more = "+".join(str(f["name"]) if isinstance(f, dict) else f for f in row.choices.get("finetune", []))
        print(
            f"{self.name:12s} {row.name:38s} {by if row.average else '':8s} {more:8s} {text}  "
            f"{figures['size_bytes']:11,.0f} bytes  {spent:5.0f} CPU s  {expected}",
            flush=True,
        )

    def timed(self, row: Row) -> None:
        """Print what was predicted, and what the file takes."""
        budget = {"latency": row.latency}
        strategy = {"name": "allocate", "budget": budget, "bits": row.bits, "num_samples": self.samples}
        start = time.process_time()
        _, report = quantize(
            self.model,
            self.data,
            task=self.task,
            evaluator=["sqnr"],
            num_samples=64,
            finetune=[strategy],
            **{**self.common, **row.choices},
        )
        spent = time.process_time() - start
        args, kwargs = some_samples(self.task.inputs(next(iter(calibration_batches(self.data, 1)))), 1)
        (file,) = report.artifacts
        assert file.module is not None
        times = []
        for _ in range(30):
            start = time.process_time()
            file.module(*args, **kwargs)
            times.append(1e3 * (time.process_time() - start))
        table = report.tables["simulated.allocate"]
        widths = Counter(layer["bits"] for layer in table["layers"])
        print(
            f"{self.name:12s} {row.name:38s} layers by width {dict(widths)}  "
            f"sqnr_db {report.metrics['simulated']['sqnr_db']:.2f}  file {min(times):.2f} CPU ms  "
            f"{spent:.0f} CPU s in all\n    {table['finding']}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", default=[""])
    parser.add_argument("--samples", type=int, default=16, help="that sensitivities are measured on")
    parser.add_argument("--evaluation", type=int, default=256)
    parser.add_argument("--by", nargs="*", default=["sqnr", "kl", "hessian"])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    photos = [
        Row(uniform=4),
        Row(average=4),
        Row(uniform=6),
        Row(average=6, bits=(4, 8)),
        Row(average=6),
        Row(average=4.5, bits=(4, 8)),
        Row(latency=0.9, bits=(4, 8), choices={"exporter": ["onnx"]}),
    ]
    photos += [Row(uniform=4, choices={"finetune": [GPTQ]}), Row(average=4, choices={"finetune": [GPTQ]})]
    g64 = {
        "target": "generic",
        "activation": None,
        "granularity": {"name": "subchannel", "group_size": 64},
        "transform": [],
    }
    rounded = {"exporter": [{"name": "onnx", "accuracy_level": 4}]}
    benches = [
        (
            Bench(
                "efficientnet",
                efficientnet_lite0(),
                Photos(num_calibration=64, num_evaluation=args.evaluation),
                Task(),
                {},
                args.samples,
            ),
            photos,
        ),
        (
            Bench("minilm", minilm(), Sentences(num_calibration=64), Task(None), g64, args.samples),
            [
                *[Row(uniform=3), Row(average=3.5), Row(uniform=4), Row(average=4)],
                Row(latency=1, bits=(4, 8, 32), choices={"exporter": ["onnx"]}),
                *[Row(latency=share, bits=(4, 8, 32), choices=rounded) for share in (0.8, 0.9)],
            ],
        ),
    ]
    for bench, rows in benches:
        for row in rows:
            if not any(word in f"{bench.name} {row.name}" for word in args.rows):
                continue
            if row.latency:
                bench.timed(row)
                continue
            for by in args.by if row.average else [""]:
                if by != "kl" or bench.task.class_dim is not None:
                    bench.row(row, by)


if __name__ == "__main__":
    main()
