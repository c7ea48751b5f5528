from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from qpipe import cli
from qpipe.__main__ import main
from qpipe.console import while_read
from qpipe.groups import groups
from qpipe.help import help_text

Install = Callable[..., Path]


def heard(tmp_path: Path) -> list[list[object]]:
    return [json.loads(line) for line in (tmp_path / "told.txt").read_text().splitlines()]


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['qpipe', '--help']; import qpipe.__main__ as m; assert m.main() == 0;"
        "heavy = {'torch', 'lightning', 'pytorch_lightning', 'mlflow', 'hydra'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_names_every_group_option_and_five_examples() -> None:
    text = help_text()
    for group, options in groups().items():
        assert f"\n  {group}\n" in text
        for name, option in options.items():
            assert f"    {name} " in text
            assert option.description.split()[0] in text
    assert text.count("    python -m qpipe") == 5


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "qpipe", "--help"],
        ["-m", "qpipe", "--cfg"],
        ["-m", "qpipe.cli", "plugins"],
        ["-m", "qpipe.cli", "completion", "bash"],
    ],
)
def test_a_reader_that_leaves_ends_a_command_quietly(words: list[str]) -> None:
    """Its pipe is closed before anything is printed: 128 + SIGPIPE, as a shell reports other tools."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, *words], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 141


def test_a_broken_pipe_elsewhere_is_no_reader_that_left() -> None:
    def command() -> int:
        raise BrokenPipeError("a worker died")

    with pytest.raises(BrokenPipeError, match="a worker died"):
        while_read(command)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("qpipe 0.")


def test_cfg_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "quantizer=kl"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["calibrator"]["name"] == "kl"
    assert main(["-m", "--cfg", "calibrator=kl,mse"]) == 0
    documents = [*yaml.safe_load_all(capsys.readouterr().out)]
    assert [config["calibrator"]["name"] for config in documents] == ["kl", "mse"]


def test_a_run_writes_its_folder_and_tells_its_tracker(
    toyrun: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert toyrun("out=here") == 0
    written = {path.name for path in Path("here").iterdir()}
    assert written == {"report.json", "config.yaml", "report.html", "csv"}
    assert [path.name for path in Path().iterdir()] == ["here"]
    assert heard(tmp_path) == [["start", None], ["finish", True, True, "finished"]]
    out = capsys.readouterr().out
    assert "simulated" in out
    assert "fc:weight" in out
    assert "look here" in out
    assert main(["--config", "here/config.yaml", "out=again"]) == 0
    first, second = (json.loads(Path(p, "report.json").read_text())["metrics"] for p in ("here", "again"))
    assert first == second
    assert cli.main(["sync", "here"]) == 0
    assert heard(tmp_path)[-1] == ["sync", "here"]


def test_a_plan_touches_nothing(
    toyrun: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert toyrun("plan=true") == 0
    assert [*Path().iterdir()] == []
    assert not (tmp_path / "told.txt").exists()
    assert "fc:weight" in capsys.readouterr().out


def test_a_sweep_runs_every_job_under_one_parent(
    toyrun: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert toyrun("-m", "weight.num_bits=8,4", "model.width=2,3", "out=sweep") == 0
    assert sorted(path.name for path in Path("sweep").glob("[0-9]*")) == ["0", "1", "2", "3"]
    started = [words for words in heard(tmp_path) if words[0] == "start"]
    assert started == [["start", "parent"]] * 4
    assert heard(tmp_path)[0] == ["start_sweep"]
    assert heard(tmp_path)[-1] == ["finish_sweep", "parent", "finished"]
    assert "weight.num_bits=4" in capsys.readouterr().out


def test_a_sweep_goes_on_after_a_failure_and_says_how_to_repeat_it(
    toyrun: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", "granularity@weight.granularity=token,channel", "out=sweep"]
    assert toyrun(*words) == 4
    captured = capsys.readouterr()
    reason, repeat = captured.err.splitlines()[-2:]
    assert reason.startswith("qpipe: failed: granularity 'token' cannot serve weights")
    assert repeat.startswith("    repeat it with: python -m qpipe ")
    assert "granularity@weight.granularity=token" in repeat
    assert [path.name for path in Path("sweep").glob("[0-9]*")] == ["1"]
    assert heard(tmp_path)[-1] == ["finish_sweep", "parent", "failed"]
    assert toyrun(*words, "out=other", "fail_fast=true") == 4
    assert [*Path("other").glob("[0-9]*")] == []


def test_a_strangers_exception_fails_the_run(toyrun: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="this net fails"):
        toyrun("out=here", net="Fails")
    assert [*Path().iterdir()] == []
    assert heard(tmp_path)[-1] == ["finish", False, False, "failed"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt, which a shell makes its background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_is_killed_and_leaves_nothing(
    toyrun: Callable[..., int],
    tmp_path: Path,
    stop: str,
    interruptible: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert toyrun("out=runs/here", f"model.signal={stop}", net="Signals") == 130
    assert [*Path().iterdir()] == []
    assert heard(tmp_path)[-1] == ["finish", False, False, "killed"]
    assert "interrupted" in capsys.readouterr().err


def _broken_weights(folder: Path) -> None:
    state = {"fc.weight": torch.zeros(4, 3), "fc.bias": torch.zeros(4)}
    save_file(state, folder / "good.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:-8])
    save_file({"fc.weight": torch.zeros(4, 3)}, folder / "less.safetensors")
    save_file({**state, "extra": torch.zeros(1)}, folder / "more.safetensors")
    save_file({**state, "fc.bias": torch.zeros(5)}, folder / "shape.safetensors")
    torch.save(state, folder / "pickle.pt")
    with zipfile.ZipFile(folder / "junk.pt", "w") as archive:
        archive.writestr("data.pkl", b"cos\nsystem\n(S'true'\ntR.")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["model.weights=good.safetensor"], 2, "there is no such file; did you mean 'good.safetensors'?"),
        (["model.weights=cut.safetensors"], 1, "is no complete safetensors file"),
        (["model.weights=less.safetensors"], 2, "lacks fc.bias, which the model has"),
        (["model.weights=more.safetensors"], 2, "holds extra, which the model has not"),
        (["model.weights=shape.safetensors"], 2, "size mismatch for fc.bias"),
        (["model.weights=pickle.pt"], 1, "is a pickle, which can run code when it is read"),
        (
            ["model.weights=junk.pt", "model.weights_only_pt=true"],
            1,
            "holds more than tensors, or is damaged",
        ),
        (["calibrator=mes"], 2, "did you mean 'mse'?"),
        (["weight.num_bits=0"], 2, ""),
        (["model._target_=nowhere.Net"], 2, "model._target_=nowhere.Net cannot be imported"),
        (["model._target_=toyrun.things.Nett"], 2, "did you mean 'Net'?"),
        (["data.cuont=3"], 2, "data._target_=toyrun.things.batches takes no 'cuont'; did you mean 'count'?"),
        (["data.count=0"], 1, "is empty"),
        (["trainer.max_epoch=3"], 2, "did you mean 'max_epochs'?"),
        (["model.width=-1"], 2, "model._target_=toyrun.things.Net cannot be built: RuntimeError"),
        (["out=good.safetensors/x"], 2, "is not a folder one may write to"),
        (["out=."], 2, "holds something already"),
        (["layers=[{match:nothing,weight:{num_bits:4}}]"], 2, "nothing"),
        (["--config", "no.yaml"], 2, "no.yaml"),
        (["seed=abc"], 2, "seed=abc is no whole number"),
        (["gate.max_drop=abc"], 2, "gate.max_drop=abc is no number"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    toyrun: Callable[..., int], words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _broken_weights(Path())
    before = sorted(Path().iterdir())
    assert toyrun(*words) == code
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("qpipe: note:")]
    assert len(err) == 1, err
    assert said in err[0]
    assert sorted(Path().iterdir()) == before


def test_good_weights_are_loaded(toyrun: Callable[..., int]) -> None:
    _broken_weights(Path())
    assert toyrun("model.weights=good.safetensors", "out=a") == 0
    assert toyrun("model.weights=pickle.pt", "model.weights_only_pt=true", "out=b") == 0


def test_only_rank_zero_writes_and_prints(
    toyrun: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert toyrun("plan=true") == 0
    captured = capsys.readouterr()
    assert captured.out == ""


def test_plugins_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plugins", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["broken"] == []
    minmax = next(row for row in listed["plugins"] if (row["kind"], row["name"]) == ("calibrator", "minmax"))
    assert minmax["distribution"] == "qpipe-quant"
    assert cli.main(["plugins"]) == 0
    assert "calibrator  minmax" in " ".join(capsys.readouterr().out.split(" ")).replace("   ", "  ")


def test_a_new_plugin_passes_its_own_tests(tmp_path: Path) -> None:
    assert cli.main(["new-plugin", "qpipe-fresh", "--folder", str(tmp_path)]) == 0
    folder = tmp_path / "qpipe-fresh"
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert cli.main(["new-plugin", "qpipe-fresh", "--folder", str(tmp_path)]) == 2
    assert cli.main(["new-plugin", "9/x", "--folder", str(tmp_path)]) == 2


def test_sync_wants_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sync", str(tmp_path)]) == 2
    assert "is no finished run" in capsys.readouterr().err


def test_a_terminal_of_unknown_width_gets_its_summary(
    toyrun: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("os.get_terminal_size", lambda fd=1: os.terminal_size((0, 0)))
    assert toyrun("out=here") == 0
    assert "1 edges" in capsys.readouterr().out
