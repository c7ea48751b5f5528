from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qpipe import PluginError, QpipeError, RecipeError, hookspecs
from qpipe.registry import KINDS, PluginRegistry, conf_dir, installed_packages, suggest

Install = Callable[..., Path]
CALIBRATOR = '''
from qpipe import Calibrator, Range, hookimpl


class Toy(Calibrator):
    """A toy."""

    name = "{name}"

    def __init__(self, steps: int = 3) -> None:
        if steps < 0:
            raise ValueError("steps must be positive")
        self.steps = steps

    def range(self, stats, quantizer, spec):
        return Range(stats.low, stats.high)


@hookimpl
def qpipe_register_calibrator():
    return [Toy]
'''


def toy(name: str) -> dict[str, str]:
    return {f"calibrator/{name}.py": CALIBRATOR.format(name=name)}


def test_kinds_are_the_hooks() -> None:
    assert set(KINDS) == {
        *("transform", "granularity", "calibrator", "quantizer"),
        *("finetune", "evaluator", "exporter", "tracker", "sweeper"),
    }
    assert all(callable(getattr(hookspecs, f"qpipe_register_{kind}")) for kind in KINDS)


def test_a_name_or_a_mapping_makes_an_instance(install: Install) -> None:
    install("toyone", toy("toyone"))
    registry = PluginRegistry.load_installed()
    assert registry.create("calibrator", "toyone").steps == 3
    assert registry.create("calibrator", {"name": "toyone", "steps": 7}).steps == 7
    assert registry.get("calibrator", "toyone").name == "toyone"
    assert "toyone" in registry.names("calibrator")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"name": "toyone", "step": 5}, r"'toyone' \(Toy\) has no key 'step'; did you mean 'steps'\?"),
        ({"name": "toyone", "steps": -1}, "toyone.: steps must be positive"),
        ({"steps": 5}, "has no 'name'; installed: "),
    ],
)
def test_a_wrong_argument_is_one_sentence(install: Install, config: dict[str, object], said: str) -> None:
    install("toyone", toy("toyone"))
    with pytest.raises(RecipeError, match=said):
        PluginRegistry.load_installed().create("calibrator", config)


def test_an_unknown_name_suggests_the_nearest(install: Install) -> None:
    install("toyone", toy("toyone"))
    with pytest.raises(
        PluginError, match=r"no calibrator named 'toyon'; did you mean 'toyone'\? installed: "
    ):
        PluginRegistry.load_installed().get("calibrator", "toyon")


def test_a_transposition_counts_as_near() -> None:
    assert suggest("mes", ["kl", "minmax", "mse"]) == "; did you mean 'mse'?"
    assert suggest("zzz", ["kl", "minmax", "mse"]) == ""


def test_a_plugin_that_fails_on_import_is_named_and_the_rest_works(install: Install) -> None:
    install("badone", {"calibrator/worse.py": "raise RuntimeError('no such luck')", **toy("fine")})
    registry = PluginRegistry.load_installed()
    (notice,) = registry.notices
    assert notice == (
        "plugin 'badone.calibrator.worse' of badone could not be loaded: RuntimeError: no such luck"
    )
    assert "fine" in registry.names("calibrator")
    with pytest.raises(PluginError, match=r"no calibrator named 'worse'.*badone\.calibrator\.worse"):
        registry.get("calibrator", "worse")


@pytest.mark.parametrize(
    ("api", "said"),
    [
        ("", "declares no qpipe_api"),
        ("qpipe_api = 2\n", "written for qpipe_api 2, this is 1"),
        ("import nowhere_to_be_found\n", "ModuleNotFoundError"),
    ],
)
def test_a_package_of_another_interface_is_refused_by_name(install: Install, api: str, said: str) -> None:
    install("oldone", toy("oldone"), api=api)
    registry = PluginRegistry.load_installed()
    assert "oldone" not in registry.names("calibrator")
    assert [said in notice and "'oldone'" in notice for notice in registry.notices] == [True]


def test_a_misspelt_hook_is_named_with_the_one_that_was_meant(install: Install) -> None:
    text = CALIBRATOR.format(name="oops").replace("register_calibrator", "register_calibrater")
    install("oops", {"calibrator/oops.py": text})
    (notice,) = PluginRegistry.load_installed().notices
    assert "there is no hook 'qpipe_register_calibrater'" in notice
    assert "did you mean 'qpipe_register_calibrator'" in notice


def test_two_plugins_of_one_name_are_refused_naming_both(install: Install) -> None:
    install("firstone", toy("same"))
    install("secondone", toy("same"))
    with pytest.raises(PluginError, match=r"two plugins offer calibrator 'same': firstone .* and secondone "):
        PluginRegistry.load_installed()


def test_qpipe_plugins_restricts_what_is_loaded(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("toyone", toy("toyone"))
    monkeypatch.setenv("QPIPE_PLUGINS", "toyone")
    assert PluginRegistry.load_installed().names("calibrator") == ["toyone"]
    monkeypatch.setenv("QPIPE_PLUGINS", "toyon")
    with pytest.raises(PluginError, match=r"no plugin package named 'toyon'; did you mean 'toyone'\?"):
        PluginRegistry.load_installed()


def test_private_modules_and_other_folders_are_no_plugins(install: Install) -> None:
    install("quiet", {"calibrator/_helper.py": "raise RuntimeError", "other/thing.py": "raise RuntimeError"})
    assert PluginRegistry.load_installed().broken == []


def test_an_entry_point_of_a_package_that_is_gone_is_named(install: Install) -> None:
    install("ghost", {}, entry="ghost = ghost_that_left")
    (notice,) = PluginRegistry.load_installed().notices
    assert "ghost_that_left" in notice


def test_a_missing_extra_is_named(install: Install) -> None:
    site = install("heavy", toy("heavy"), entry="heavy = heavy [big]")
    with (site / "heavy-0.1.dist-info" / "METADATA").open("a") as metadata:
        metadata.write('Provides-Extra: big\nRequires-Dist: no-such-engine>=2; extra == "big"\n')
    registry = PluginRegistry.load_installed()
    with pytest.raises(PluginError, match=r"needs no-such-engine>=2, .* install the extra: heavy\[big\]"):
        registry.create("calibrator", "heavy")


def test_finding_packages_imports_none_of_them(install: Install) -> None:
    install("badone", {"calibrator/worse.py": "raise RuntimeError"}, api="raise RuntimeError\n")
    packages, broken = installed_packages()
    assert "badone" in [package.module for package in packages]
    assert not broken
    assert "badone" not in sys.modules


def test_our_plugins_all_load() -> None:
    registry = PluginRegistry.load_installed()
    assert registry.broken == []
    assert all(issubclass(error, QpipeError) for error in (PluginError, RecipeError))


def test_every_registered_name_has_a_yaml_beside_its_code() -> None:
    registry = PluginRegistry.load_installed()
    for kind in KINDS:
        for name, plugin in registry.plugins[kind].items():
            file = plugin.package.folder / kind / f"{name}.yaml"
            assert file.is_file(), f"{kind} '{name}' has no {file}"


def test_conf_is_found_in_a_clone() -> None:
    assert (conf_dir() / "config.yaml").is_file()


def test_importing_qpipe_registers_nothing() -> None:
    code = "import qpipe, qpipe.registry, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert not [name for name in loaded if name.startswith(("qpipe_", "torch"))]
