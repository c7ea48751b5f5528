"""A search goes on where it stopped, keeps its constraints and finds what is there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="the extra optuna is not installed")

from qpipe_optuna.sweeper.optuna import Bound, OptunaSweeper

from qpipe import RecipeError
from qpipe.kinds.sweeper import Choice, Interval
from qpipe.overrides import search_space

Run = Callable[..., int]
SEARCH = ("-m", "hydra/sweeper=optuna", "evaluator=[size,sqnr]", "out=sweep")
SPACE = {"x": Interval(-5.0, 5.0), "bits": Interval(2, 8), "mode": Choice(("a", "b"))}


def stored() -> dict[str, Any]:
    sweep: dict[str, Any] = json.loads(Path("sweep/sweep.json").read_text())
    return sweep


def search(folder: Path, count: int, stop_after: int = -1, constraints: Sequence[str] = ()) -> OptunaSweeper:
    """Minimize x^2 + bits, +1 for mode b, for so many points, or stop before."""
    folder.mkdir(exist_ok=True)
    sweeper = OptunaSweeper("m.loss", "minimize", n_trials=count, constraints=constraints)
    trials = sweeper.open(SPACE, folder, "study") or sweeper.ask()
    while trials:
        for trial in trials:
            if trial.number == stop_after:
                return sweeper
            x, bits = float(trial.values["x"]), int(trial.values["bits"])
            loss = x * x + bits + (trial.values["mode"] == "b")
            sweeper.tell(trial.number, {"m.loss": loss, "m.bits": bits})
        trials = sweeper.ask()
    return sweeper


def points(sweeper: OptunaSweeper) -> list[dict[str, Any]]:
    return [trial.params for trial in sweeper.study.get_trials()]


def test_words_are_read_as_hydra_writes_them() -> None:
    words = ["seed=3", "a=x,y", "b=choice(1,2)", "c=range(2,9,3)", "d=interval(1,8)", "e=interval(0,1.5)"]
    more = ["+f=tag(log,interval(1e-4,1e-1))", "weight.calibrator=mse,kl", "g=range(0,1,0.25)"]
    fixed, space = search_space([*words, *more])
    assert fixed == ["seed=3"]
    assert space == {
        "a": Choice(("x", "y")),
        "b": Choice(("1", "2")),
        "c": Interval(2, 8, 3),
        "d": Interval(1, 8),
        "e": Interval(0, 1.5),
        "+f": Interval(1e-4, 1e-1, log=True),
        "weight.calibrator": Choice(("mse", "kl")),
        "g": Interval(0.0, 0.75, 0.25),
    }


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("a=glob(*)", "cannot be searched"),
        ("a=range(3,3)", "offers nothing"),
        ("a=interval(3,1)", "begins above its end"),
        ("a=tag(lg,interval(1,2))", "tag 'lg' has no meaning"),
        ("a=tag(log,interval(0,2))", "begins above 0"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(word: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        search_space([word])


def test_a_search_finds_the_bottom_of_a_bowl(tmp_path: Path) -> None:
    best = search(tmp_path, 60).study.best_trial
    assert best.params["mode"] == "a"
    assert best.params["bits"] == 2
    assert abs(best.params["x"]) < 0.7  # 60 random points come within 1.2 of it on average


def test_an_interrupted_search_asks_for_the_points_it_would_have_asked_for(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", 16)
    search(tmp_path / "parts", 16, stop_after=3)
    search(tmp_path / "parts", 12)  # its total, below what is asked for later
    parts = search(tmp_path / "parts", 16)
    assert points(parts) == points(whole)
    assert [trial.number for trial in parts.study.get_trials()] == list(range(16))
    assert len({point["x"] for point in points(parts)}) == 16


def test_a_constraint_is_kept_by_the_best(tmp_path: Path) -> None:
    sweeper = search(tmp_path, 30, constraints=["m.bits >= 5"])
    assert sweeper.study.best_trial.params["bits"] == 5
    assert sweeper.findings()[0].startswith(
        "Of 30 points, of those with m.bits >= 5, the least m.loss has job "
    )
    kept = [point["bits"] for point in points(sweeper)[10:]]
    assert sum(bits >= 5 for bits in kept) > 13  # of 20; a sampler that knew nothing of it draws 11
    assert search(tmp_path / "none", 4, constraints=["m.bits >= 50"]).findings() == [
        "None of 4 points keeps m.bits >= 50."
    ]


def test_several_metrics_end_in_a_front(tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    sweeper = OptunaSweeper(["m.sqnr_db", "m.size_bytes"], n_trials=24)
    assert sweeper.directions == ["maximize", "minimize"]
    assert sweeper.sampler == "nsgaii"
    trials = sweeper.open({"bits": Interval(2, 8), "waste": Interval(0, 3)}, tmp_path, "s") or sweeper.ask()
    seen = {}
    while trials:
        (trial,) = trials
        bits, waste = int(trial.values["bits"]), int(trial.values["waste"])
        seen[trial.number] = (6.0 * bits, 1000.0 * bits + waste)
        sweeper.tell(trial.number, {"m.sqnr_db": 6.0 * bits, "m.size_bytes": 1000.0 * bits + waste})
        trials = sweeper.ask()
    front = [
        number
        for number, (db, size) in seen.items()
        if not any(d >= db and s <= size and (d, s) != (db, size) for d, s in seen.values())
    ]
    assert {trial.number for trial in sweeper.study.best_trials} == {*front}
    assert len(sweeper.findings()) == len({str(trial.params) for trial in sweeper.study.best_trials})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": "m.margin"}, "is more or less of m.margin better"),
        ({"metric": "m.x_db", "direction": "up"}, "must be maximize or minimize"),
        ({"metric": ["m.x_db", "m.y_db"], "direction": "maximize"}, "one for each of m.x_db, m.y_db"),
        ({"metric": "m.x_db", "constraints": ["size < 3"]}, "'size < 3' is not of the form"),
        ({"metric": "m.x_db", "sampler": "tpee"}, "sampler=tpee is none of tpe, nsgaii"),
        ({"metric": "m.x_db", "n_trials": 0}, "n_trials=0 is no number of points"),
        ({"metric": "m.x_db", "n_jobs": "two"}, "n_jobs=two is no number of points"),
    ],
)
def test_a_wrong_option_is_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        OptunaSweeper(**options)


def test_a_storage_that_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"hydra\.sweeper\.storage=sqlite:////nowhere/at/all\.db cannot be opened"
    ):
        OptunaSweeper("m.x_db", storage="sqlite:////nowhere/at/all.db").open(SPACE, tmp_path, "study")


def test_a_bound_is_broken_by_as_much_as_it_is_missed() -> None:
    assert Bound.parse("m.size_bytes<=5e3").violation({"m.size_bytes": 5100.0}) == 100
    assert Bound.parse(" m.db >= 30 ").violation({"m.db": 32.0}) == -2


def test_a_sweep_is_a_total_that_repeating_reaches(toyrun: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        *SEARCH,
        "hydra.sweeper.metric=simulated.sqnr_db",
        "weight.num_bits=range(2,9)",
        "calibrator=minmax,mse",
    )
    assert toyrun(*words, "hydra.sweeper.n_trials=3") == 0
    first = stored()
    assert toyrun(*words, "hydra.sweeper.n_trials=6") == 0
    sweep = stored()
    assert [job["index"] for job in sweep["jobs"]] == list(range(6))
    assert [job["overrides"] for job in sweep["jobs"][:3]] == [job["overrides"] for job in first["jobs"]]
    assert [job["reused"] for job in sweep["jobs"][:3]] == [True] * 3
    assert [job["seconds"] for job in sweep["jobs"][:3]] == [job["seconds"] for job in first["jobs"]]
    assert {*sweep["axes"]} == {"weight.num_bits", "calibrator"}
    best = max(sweep["jobs"], key=lambda job: job["metrics"]["simulated"]["sqnr_db"])
    (found,) = sweep["findings"]
    assert found in capsys.readouterr().out
    assert f"has job {best['index']} " in found
    for job in sweep["jobs"]:
        report = json.loads(Path("sweep", job["folder"], "report.json").read_text())
        assert report["metrics"] == job["metrics"]
    assert "the most simulated.sqnr_db" in Path("sweep/sweep.html").read_text()
    assert toyrun(*words, "hydra.sweeper.n_trials=6", "hydra.sweeper.seed=1") == 2
    assert "holds a sweep of other jobs" in capsys.readouterr().err


def test_failed_points_are_listed_and_teach_nothing(toyrun: Run) -> None:
    words = (*SEARCH, "hydra.sweeper.metric=simulated.sqnr_db", "hydra.sweeper.n_trials=4")
    assert toyrun(*words, "granularity@weight.granularity=token,channel") == 4
    jobs = stored()["jobs"]
    assert {job["status"] for job in jobs} == {"finished", "failed"}
    assert toyrun(*words, "granularity@weight.granularity=token,channel", "fail_fast=true", "out=fast") == 4
    fast = json.loads(Path("fast/sweep.json").read_text())["jobs"]
    assert [job["status"] for job in fast].count("failed") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["hydra.sweeper.metric=simulated.snr_db"],
            r"simulated\.snr_db is not measured; did you mean 'simulated\.sqnr_db'\?",
        ),
        (["hydra.sweeper.metric=onnx.sqnr_db"], r"onnx\.sqnr_db is not measured"),
        (["hydra.sweeper.metrc=simulated.sqnr_db"], "did you mean 'metric'"),
        ([], "needs a value for 'metric'"),
        (["hydra.sweeper.metric=simulated.sqnr_db", "weight.num_bits=4"], "no word offers several values"),
        (["hydra.sweeper.metric=simulated.sqnr_db", "calibrator=mse,mes"], "no calibrator named 'mes'"),
    ],
)
def test_a_wrong_word_is_one_sentence_before_anything_is_done(
    words: list[str], said: str, toyrun: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    space = [] if any("num_bits" in word or "mes" in word for word in words) else ["weight.num_bits=2,8"]
    assert toyrun(*SEARCH, *words, *space) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not Path("sweep").exists()
