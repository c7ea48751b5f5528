"""Peak memory of a weight-only run over the float model's, on a random Llama; each row in a fresh process.

    python scripts/bench/memory.py

What the same run takes on a model of one narrow block, torch and the plugins above all, is not counted. Two
blocks of the model are 2 / (layers) of it: the bar is 1 + 2 / layers. Memory is what only this process can
hold (RssAnon, sampled); pages of files, which the system drops and reads again as it likes, stand beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

LAYERS = 24
ROWS: dict[str, list[Any]] = {
    "round to nearest": [],
    "gptq": [{"name": "gptq", "num_samples": 4}],
}


def memory_bytes(field: str) -> int:
    """Return RssAnon, VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


class Peak:
    """The most of a field of this process's status while the block runs, sampled every 2 ms."""

    def __init__(self, field: str) -> None:
        self.field = field
        self.bytes = 0
        self.done = threading.Event()

    def __enter__(self) -> Peak:
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self) -> None:
        while not self.done.wait(0.002):
            self.bytes = max(self.bytes, memory_bytes(self.field))

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def llama(layers: int, hidden: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 192,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.eval()


def quantize(model: nn.Module, batches: list[Any], row: str) -> None:
    import qpipe

    qpipe.quantize(
        model,
        batches,
        target="generic",
        weight={"num_bits": 4, "granularity": {"name": "subchannel", "group_size": 64}},
        activation=None,
        finetune=ROWS[row],
        evaluator=["sqnr"],
    )


def measure(row: str) -> dict[str, float]:
    import torch

    batches = [{"input_ids": torch.randint(0, 512, (1, 64))} for _ in range(4)]
    quantize(llama(1, 192), batches, row)
    anonymous, resident = memory_bytes("RssAnon"), memory_bytes("VmRSS")
    model = llama(LAYERS, 576)
    size = sum(p.nbytes for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.process_time()
    with Peak("RssAnon") as peak:
        quantize(model, batches, row)
    return {
        "model_mb": size / 1e6,
        "peak": (peak.bytes - anonymous) / size,
        "resident": (memory_bytes("VmHWM") - resident) / size,
        "cpu_s": time.process_time() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", choices=[*ROWS])
    if row := parser.parse_args().row:
        print(json.dumps(measure(row)))
        return
    print(f"peak over the float model's size; the bar is {1 + 2 / LAYERS:.2f}")
    for name in ROWS:
        command = [sys.executable, __file__, "--row", name]
        seen = json.loads(subprocess.run(command, capture_output=True, check=True).stdout.splitlines()[-1])
        print(
            f"{name:18} {seen['peak']:.2f} of {seen['model_mb']:.0f} MB, with pages of files "
            f"{seen['resident']:.2f}, {seen['cpu_s']:.0f} CPU s",
            flush=True,
        )


if __name__ == "__main__":
    main()
