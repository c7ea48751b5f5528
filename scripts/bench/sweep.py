"""What a sweep costs, against its evaluations and against single commands; CPU time throughout.

python scripts/bench/sweep.py lite0 --num-samples 32      # 48 points, EfficientNet-Lite0, in this process
python scripts/bench/sweep.py digits                      # 12 points of the default job, as commands
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALIBRATORS = "calibrator=minmax,percentile,kl,mse"
GRANULARITIES = "granularity=layer,group,channel,{name:subchannel,group_size:32,pad:true}"


def lite0(num_samples: int, axes: list[str]) -> None:
    """Compare 48 points with 48 evaluations and two single runs; nothing is exported."""
    import qpipe.pipeline
    import qpipe.stages.calibrate
    import qpipe.stages.evaluate
    from qpipe.__main__ import main

    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)

    def timed(module: Any, name: str, label: Callable[..., str]) -> None:  # noqa: ANN401
        inner = getattr(module, name)

        def outer(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            start = time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                seconds[label(*args)] += time.process_time() - start
                calls[label(*args)] += 1

        setattr(module, name, outer)

    timed(qpipe.stages.evaluate, "forward_pass", lambda *given: given[4])
    timed(qpipe.stages.calibrate, "forward_pass", lambda *_: "calibration passes")
    timed(qpipe.stages.calibrate, "calibrate_weights", lambda *_: "ranges of weights")
    timed(qpipe.stages.calibrate, "fit_together", lambda *_: "ranges of activations")
    timed(qpipe.pipeline, "prepare", lambda *_: "prepare")
    timed(qpipe.pipeline, "run", lambda *_: "run, all of it")
    words = [
        *("model=efficientnet_lite0", "data=photos", "exporter=[]", "evaluator=[sqnr,size]"),
        *(f"data.calibration.num_samples={num_samples}", f"data.num_evaluation={num_samples}"),
    ]

    def spent(*more: str) -> float:
        start = time.process_time()
        if code := main([*words, *more]):
            sys.exit(code)
        return time.process_time() - start

    spent("out=warm", "data.calibration.num_samples=4", "data.num_evaluation=4", "cache=false")
    single = spent("out=single", "calibrator=kl", "cache=false")
    seconds.clear()
    calls.clear()
    sweep = spent("-m", *axes, "out=sweep")
    evaluations = seconds["evaluate simulated"]
    print(f"{num_samples} samples each; CPU seconds")
    for name, value in seconds.items():
        print(f"  {name:<24}{value:8.2f} in {calls[name]}")
    print(f"single run {single:.1f}; sweep of {calls['evaluate simulated']} points {sweep:.1f}")
    bar = evaluations + 2 * single
    print(f"its evaluations {evaluations:.1f} + two single runs {2 * single:.1f} = {bar:.1f}")
    print(f"ratio {sweep / bar:.2f} (at most 1)")


def digits() -> None:
    """Compare one sweep command of 12 points of the default job with twelve commands."""
    point = ["calibrator=kl", "weight.num_bits=4"]
    single = min(command(*point, f"out=single{i}", "cache=false") for i in range(2))
    sweep = command("-m", CALIBRATORS, "weight.num_bits=8,4,3", "out=sweep")
    print(f"single command {single:.1f} s of CPU, sweep of 12 points {sweep:.1f} s")
    print(f"ratio {sweep / (12 * single):.2f} of twelve commands (at most 0.3)")


def command(*words: str) -> float:
    """Return the CPU seconds of one command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with Path("log.txt").open("a") as log:
        subprocess.run([sys.executable, "-m", "qpipe", *words], check=True, stdout=log, stderr=log)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("lite0", "digits"))
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--axes", nargs="+", default=[CALIBRATORS, GRANULARITIES, "weight.num_bits=8,4,3"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QPIPE_CACHE"] = str(Path(folder, "cache"))
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.chdir(folder)
        lite0(arguments.num_samples, arguments.axes) if arguments.what == "lite0" else digits()
