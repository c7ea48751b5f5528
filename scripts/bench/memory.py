"""Peak memory of a weight-only run over the float model's, on a random Llama; each row in a fresh process.

    python scripts/bench/memory.py

What torch, transformers and the plugins take once imported is not counted. Two blocks of the model are
2 / (layers) of it: the bar is 1 + 2 / layers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LAYERS = 24
ROWS: dict[str, list[Any]] = {
    "round to nearest": [],
    "gptq": [{"name": "gptq", "num_samples": 4}],
}


def memory_bytes(field: str) -> int:
    """Return VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def measure(row: str) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import qpipe
    from qpipe.registry import PluginRegistry

    PluginRegistry.load_installed()
    qpipe.quantize(torch.nn.Linear(8, 8), torch.randn(4, 8), evaluator=["sqnr"])  # imports what a run needs
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        use_cache=False,
    )
    before = memory_bytes("VmRSS")
    model = LlamaForCausalLM(config).eval()
    size = sum(p.nbytes for p in model.parameters())
    batches = [{"input_ids": torch.randint(0, 512, (1, 64))} for _ in range(4)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    qpipe.quantize(
        model,
        batches,
        target="generic",
        weight={"num_bits": 4, "granularity": {"name": "subchannel", "group_size": 64}},
        activation=None,
        finetune=ROWS[row],
        evaluator=["sqnr"],
    )
    return {"model_mb": size / 1e6, "peak": (memory_bytes("VmHWM") - before) / size}


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
        print(f"{name:18} {seen['peak']:.2f} of {seen['model_mb']:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
