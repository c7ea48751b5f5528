from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch

from qpipe.cli import main
from qpipe.errors import RecipeError
from qpipe.page.plot import labels, obstacles, stairs, ticks, without_stragglers
from qpipe.page.sweep import front, sweep_page, write_sweep_page

Figures = Callable[[dict[str, Any]], dict[str, Any]]


def sweep(axes: dict[str, list[Any]], figures: Figures, failed: tuple[int, ...] = ()) -> dict[str, Any]:
    jobs = []
    for index, values in enumerate(itertools.product(*axes.values())):
        overrides = dict(zip(axes, values, strict=True))
        job = {
            "index": index,
            "overrides": overrides,
            "words": [],
            "folder": str(index),
            "command": f"again {index}",
        }
        bad = index in failed
        job |= {"status": "failed" if bad else "finished", "seconds": 1.0, "reused": False}
        jobs.append({**job, "metrics": {} if bad else figures(overrides), "reason": "why" if bad else ""})
    head = {"format": "qpipe-sweep", "command": "all again", "status": "finished", "axes": axes}
    return {**head, "jobs": jobs, "aggregated": []}


def by_bits(overrides: dict[str, Any]) -> dict[str, Any]:
    bits, extra = overrides["weight.num_bits"], {"mse": 1.0}.get(overrides["calibrator"], 0.0)
    sizes = {"size_bytes": 1000.0 * bits, "latency_ms": 0.1 * bits}
    return {"fp32": {"top1_percent": 99.0}, "onnx": {"top1_percent": 80.0 + 2 * bits + extra, **sizes}}


AXES: dict[str, list[Any]] = {"calibrator": ["minmax", "mse"], "weight.num_bits": [8, 4, 3]}


def text_of(page: str) -> str:
    text = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.DOTALL).replace("<wbr>", "")
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def test_the_front_is_what_brute_force_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        points = [tuple(p) for p in torch.randint(0, 9, (30, 2), generator=generator).tolist()]
        kept = {points[i] for i in front(points)}
        free = {
            (x, y) for x, y in points if not any((u <= x and v >= y) and (u, v) != (x, y) for u, v in points)
        }
        assert kept == free


def test_it_says_which_setting_to_choose_and_what_matters() -> None:
    text = text_of(sweep_page(sweep(AXES, by_bits)))
    assert "The best top1 (onnx) is 97 %, with calibrator=mse weight.num_bits=8." in text
    assert (
        "Least size (onnx) within 1 point of it: 8 kB with calibrator=mse weight.num_bits=8 (97 %)." in text
    )
    assert "What matters most is weight.num_bits: on average 3 gives 86.5 %, 8 96.5 %." in text
    assert "weight.num_bits 8 96.5" in text  # main effect: (96 + 97) / 2
    assert "calibrator minmax 90" in text  # (96 + 88 + 86) / 3


def test_it_says_what_all_settings_share() -> None:
    command = (
        "python -m qpipe -m model=lite0 'exporter=[]' calibrator=minmax,mse weight.num_bits=8,4,3 out=here"
    )
    text = text_of(sweep_page({**sweep(AXES, by_bits), "command": command}))
    assert "The same in all: model=lite0 'exporter=[]'." in text


def test_failures_come_with_their_command() -> None:
    text = text_of(sweep_page(sweep(AXES, by_bits, failed=(2,))))
    assert "5 settings with figures; 1 failed or missed its gate" in text
    assert "calibrator=minmax weight.num_bits=3 failed: why" in text
    assert "again 2" in text


def test_seeds_are_one_row() -> None:
    both = sweep(
        {"calibrator": ["kl"], "seed": [0, 1]}, lambda o: {"simulated": {"sqnr_db": 20.0 + o["seed"]}}
    )
    spread = {"mean": 20.5, "sd": 0.7071}
    both["aggregated"] = [
        {"overrides": {"calibrator": "kl"}, "jobs": [0, 1], "metrics": {"simulated": {"sqnr_db": spread}}}
    ]
    page = sweep_page(both)
    assert "20.5 ± 0.71" in text_of(page)
    assert page.count("/report.html") == 2
    assert "1 setting with figures" in text_of(page)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", None, 1e-30, -1e30])
def test_any_figure_can_be_shown(value: Any) -> None:  # noqa: ANN401
    values = iter([value, 3.0, value, 4.0, value, 5.0])
    page = sweep_page(sweep(AXES, lambda _: {"simulated": {"sqnr_db": next(values), "size_bytes": value}}))
    assert "5 dB" in text_of(page)
    assert not re.search(r'(width|c?[xy]\d?)[=:]"?(nan|inf|-inf)', page)


@pytest.mark.parametrize("failed", [(), (0,)])
def test_one_job_is_a_sweep_too(failed: tuple[int, ...]) -> None:
    assert "One job" in sweep_page(sweep({}, lambda _: {"simulated": {"sqnr_db": 3.0}}, failed))


def test_whatever_a_word_holds_stays_text_and_one_script_may_run() -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    axes: dict[str, list[Any]] = {hostile: [hostile, "b"], "weight.num_bits": [8, 4]}
    page = sweep_page(sweep(axes, lambda o: by_bits({**o, "calibrator": ""}), failed=(0,)))
    assert page.count("<script>") == 1
    assert "<img" not in page
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (91.3, 99.4), (-3e-7, 4e-7), (2.0, 2.0), (0.0, 7e9)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 7
    assert all(low - 1e-12 <= tick <= high * (1 + 1e-12) + 1e-12 for tick in found)
    if len(found) > 1:
        step = found[1] - found[0]
        assert f"{step:.2e}"[:4] in ("1.00", "2.00", "5.00")


def test_names_cover_neither_each_other_nor_marks_nor_the_line() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        places = (torch.rand(12, 2, generator=generator) * torch.tensor([560.0, 270.0]) + 63).tolist()
        marks = [{"cx": x, "cy": y, "short": "kl, channel, 8"} for x, y in sorted(places)]
        path = list(stairs([(m["cx"], m["cy"]) for m in marks]))
        taken = obstacles(marks, path)
        fixed = len(taken)
        shown = list(labels(marks, taken))
        assert shown
        boxes = taken[fixed:]
        for i, a in enumerate(boxes):
            for b in [*taken[:fixed], *boxes[:i]]:
                assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


def test_stragglers_do_not_flatten_the_rest() -> None:
    assert without_stragglers([99.0, 98.0, 97.0, 10.0]) == [99.0, 98.0, 97.0]
    assert without_stragglers([99.0, 99.0, 10.0]) == [99.0, 99.0, 10.0]


def test_what_is_no_sweep_is_refused(tmp_path: Path) -> None:
    for text in ('{"format": "mine"}', '{"format": "qpipe-sweep"}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(RecipeError, match=r"sweep\.json is"):
            write_sweep_page(tmp_path)


def test_a_sweep_leaves_its_page_with_links_that_lead_somewhere(toyrun: Callable[..., int]) -> None:
    assert toyrun("-m", "weight.num_bits=8,4", "calibrator=minmax,mse", "evaluator=[sqnr]", "out=sweep") == 0
    page = Path("sweep/sweep.html").read_text()
    links = re.findall(r'href="([^"]+)"', page)
    assert len(links) == 4
    assert all((Path("sweep") / unquote(link)).is_file() for link in links)
    jobs = json.loads(Path("sweep/sweep.json").read_text())["jobs"]
    best = max(job["metrics"]["simulated"]["sqnr_db"] for job in jobs)
    assert f"{best:.2f}" in page
    Path("sweep/sweep.html").unlink()
    assert main(["page", "sweep"]) == 0
    assert Path("sweep/sweep.html").read_text() == page
