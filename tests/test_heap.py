from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from qpipe.heap import _glibc, frugal, reusing

SMALL, LARGE = "nn.Linear(1, 1)", "nn.Linear(1, 2**27, device='meta')"
PAGES = """
    import resource
    from contextlib import nullcontext
    import torch
    from torch import nn
    from qpipe.heap import frugal, reusing

    def touched(size):
        torch.ones(size * 5 // 4, dtype=torch.uint8)  # aligned memory asks for a little more than there was
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(size, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


def pages(code: str) -> int:
    """Return what code prints, in a process whose heap is fresh."""
    program = textwrap.dedent(PAGES) + code
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(_glibc() is None, reason="needs glibc, its thresholds untouched")
@pytest.mark.parametrize(
    ("context", "size", "reused"),
    [
        (f"reusing({SMALL})", 2**27, True),
        (f"reusing({LARGE})", 2**27, False),
        (f"frugal({SMALL})", 2**27, False),
        (f"frugal({LARGE})", 2**22, False),
        ("nullcontext()", 2**27, False),
    ],
)
def test_freed_memory_is_kept_or_given_back(context: str, size: int, reused: bool) -> None:
    again = pages(f"with {context}: print(touched({size}))")
    assert again < 20 if reused else again >= size / 2**21  # pages of 4 KiB, or of 2 MiB


@pytest.mark.skipif(_glibc() is None, reason="needs glibc, its thresholds untouched")
def test_afterwards_it_is_as_before() -> None:
    assert pages(f"with reusing({SMALL}): touched(2**27)\nprint(touched(2**28))") >= 2**7


@pytest.mark.skipif(_glibc() is None, reason="needs glibc, its thresholds untouched")
@pytest.mark.parametrize(("model", "least"), [(SMALL, 0), (LARGE, 40)])
def test_small_blocks_that_were_freed_are_released_for_a_large_model(model: str, least: int) -> None:
    program = f"""
    from pathlib import Path
    from qpipe.heap import release

    def kept():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    blocks = [torch.ones(2**14) for _ in range(1000)]
    blocks = blocks[::100]  # the rest lies between them
    before = kept()
    release({model})
    print((before - kept()) // 1024)
    """
    released = pages(textwrap.dedent(program))
    assert released >= least if least else released < 5


def test_thresholds_the_user_chose_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    _glibc.cache_clear()
    try:
        assert _glibc() is None
        with frugal(nn.Linear(1, 1)), reusing(nn.Linear(1, 1)):
            torch.zeros(1)
    finally:
        _glibc.cache_clear()
