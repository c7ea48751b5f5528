"""What a shell offers, and that it takes no torch."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from qpipe import cli
from qpipe.completion import SCRIPTS, continuations


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (["quantizer=k"], ["quantizer=kl"]),
        (["-m", "calibrator=kl,ms"], ["calibrator=kl,mse"]),
        (["finetune=[gptq,adar"], ["finetune=[gptq,adaround"]),
        (["finetune=[gptq]", "finetune.gptq.act"], ["finetune.gptq.act_order="]),
        (["bits=auto", "budget.s"], ["budget.size="]),
        (["weight.num"], ["weight.num_bits="]),
        (["weight.calib"], ["weight.calibrator="]),
        (["weight.calibrator=ms"], ["weight.calibrator=mse"]),
        (["activation.dynamic="], ["activation.dynamic=false", "activation.dynamic=true"]),
        (["gate.max"], ["gate.max_drop="]),
        (["--ver"], ["--version"]),
    ],
)
def test_words_go_on_as_the_command_takes_them(words: list[str], some: list[str]) -> None:
    assert continuations(words) == some


def test_a_slot_is_offered_no_preset_and_an_unknown_key_nothing() -> None:
    assert "activation.quantizer=uniform" in continuations(["activation.quantizer="])
    assert "activation.quantizer=kl" not in continuations(["activation.quantizer="])
    assert continuations(["weight.num_bits="]) == []
    assert continuations(["nothing.here="]) == []


def test_it_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; from qpipe import cli; cli.main(['completion', 'words', '--', 'qpipe', 'run', 'qua']);"
        "assert not {'torch', 'hydra', 'pytorch_lightning'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "quantizer=\n"


def test_the_shells_have_a_script_and_others_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in SCRIPTS:
        assert cli.main(["completion", shell]) == 0
    assert capsys.readouterr().out.count("completion words --") == 3
    with pytest.raises(SystemExit, match="2"):
        cli.main(["completion", "csh"])


@pytest.mark.skipif(not shutil.which("bash") or not shutil.which("qpipe"), reason="needs bash and qpipe")
@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("qpipe run quantizer=k", "kl"),  # readline replaces what follows the equals sign
        ("qpipe new", "new-plugin"),
        ("python -m qpipe weight.num", "weight.num_bits="),
        ("python -m pytest weight.num", ""),
    ],
)
def test_bash_offers_it(line: str, reply: str) -> None:
    function = "_qpipe" if line.startswith("qpipe") else "_qpipe_python"
    script = f'eval "$(qpipe completion bash)"; COMP_LINE="{line}" COMP_POINT={len(line)}; {function}; '
    done = subprocess.run(
        ["bash", "-c", script + 'echo "${COMPREPLY[@]}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout.strip(), done.stderr) == (reply, "")
