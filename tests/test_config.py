from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qpipe.config import as_yaml, compose_config
from qpipe.errors import PluginError, RecipeError
from qpipe.groups import groups
from qpipe.overrides import expand
from qpipe.registry import KINDS, PluginRegistry, arguments, conf_dir

Install = Callable[..., Path]


def test_the_default_job_is_composed_of_plain_data() -> None:
    config = compose_config([])
    assert yaml.safe_load(as_yaml(config)) == config
    assert config["quantizer"]["name"] == "uniform"
    assert config["weight"]["num_bits"] == config["activation"]["num_bits"] == 8
    assert config["explicit"] == []
    assert [entry["name"] for entry in config["exporter"].values()] == [*config["exporter"]]


def test_every_preset_is_uniform_with_its_calibrator_and_an_explicit_one_wins() -> None:
    for preset in ("minmax", "percentile", "kl", "mse"):
        config = compose_config([f"quantizer={preset}"])
        assert (config["quantizer"]["name"], config["calibrator"]["name"]) == ("uniform", preset)
        config = compose_config(["calibrator=aciq", f"quantizer={preset}"])
        assert (config["quantizer"]["name"], config["calibrator"]["name"]) == ("uniform", "aciq")


def test_a_slot_takes_its_own_word_and_keys() -> None:
    config = compose_config(["weight.calibrator=mse", "weight.calibrator.steps=50", "weight.num_bits=4"])
    assert config["weight"]["calibrator"] == {"name": "mse", "steps": 50}
    assert config["weight"]["num_bits"] == 4
    assert config["calibrator"]["name"] == "minmax"
    assert config["activation"]["calibrator"] is None
    spelt_out = compose_config(["calibrator@weight.calibrator=mse", "weight.calibrator.steps=50"])
    assert spelt_out["weight"]["calibrator"] == config["weight"]["calibrator"]


def test_lists_keep_their_order() -> None:
    assert [*compose_config(["evaluator=[size,sqnr,accuracy]"])["evaluator"]] == ["size", "sqnr", "accuracy"]
    assert [*compose_config(["evaluator=[accuracy,sqnr]"])["evaluator"]] == ["accuracy", "sqnr"]
    assert compose_config(["exporter=[]"])["exporter"] == {}
    assert compose_config(["exporter=none"])["exporter"] == {}
    assert [*compose_config(["evaluator=size"])["evaluator"]] == ["size"]


def test_layer_rules_parse() -> None:
    for words in (
        "layers=[{match:'stem.*',weight:{num_bits:8}}]",
        "layers=[{match: stem.*, activation: null}]",
    ):
        assert compose_config([words])["layers"][0]["match"] == "stem.*"
    assert compose_config(["layers=[{match:a,activation:null}]"])["layers"] == [
        {"match": "a", "activation": None}
    ]


def test_a_role_can_stay_in_floating_point() -> None:
    assert compose_config(["activation=null"])["activation"] is None


def test_ones_own_class_takes_no_key_of_the_default() -> None:
    config = compose_config(
        ["model._target_=my.module.Net", "model.weights=file.safetensors", "data._target_=my.Data"]
    )
    assert config["model"] == {"_target_": "my.module.Net", "weights": "file.safetensors"}
    assert config["data"] == {"_target_": "my.Data", "calibration": {"num_samples": 256}}


def test_a_trainer_takes_any_argument_without_a_plus() -> None:
    trainer = compose_config(["trainer.max_epochs=10", "trainer.devices=2", "trainer.strategy=ddp"])[
        "trainer"
    ]
    assert (trainer["max_epochs"], trainer["devices"], trainer["strategy"]) == (10, 2, "ddp")


def test_no_tracker() -> None:
    assert compose_config(["tracker=null"])["tracker"] is None
    assert compose_config(["tracker=none"])["tracker"] is None


def test_the_groups_a_user_named_are_kept() -> None:
    words = ["exporter=[]", "weight.calibrator=mse", "quantizer=kl", "seed=3"]
    assert compose_config(words)["explicit"] == ["exporter", "quantizer"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("calibrator=mes", "no calibrator named 'mes'; did you mean 'mse'? installed: "),
        ("weight.calibrator=mes", "no calibrator named 'mes'; did you mean 'mse'?"),
        ("evaluator=[sqnr,acuracy]", "no evaluator named 'acuracy'; did you mean 'accuracy'?"),
        ("weight.num_bit=4", "'weight' has no key 'num_bit'; did you mean 'num_bits'?"),
        ("weigth.num_bits=4", "the configuration has no key 'weigth'; did you mean 'weight'?"),
        ("calibratr=mse", "the configuration has no key 'calibratr'; did you mean 'calibrator'?"),
        ("data.calibration.num_sample=4", "did you mean 'num_samples'?"),
        ("calibrator.steps=4", "'calibrator' (minmax) has no key 'steps'"),
        ("weight.quantizer=kl", "quantizer 'kl' is a preset that chooses the shared calibrator as well"),
        ("weight.calibrator.steps=4", "'weight.calibrator' is not chosen and has no key 'steps'"),
        ("calibrator={steps:3}", "write calibrator=name and calibrator.key=value"),
        ("calibrator={name:mse,step:3}", "'calibrator' (mse) has no key 'step'; did you mean 'steps'?"),
        ("trainer=null", "no trainer is chosen"),
        ("model=", "no model named ''"),
        ("+foo=3", "the configuration has no key 'foo'"),
        ("hydra.run.dir=x", "'hydra.run.dir=x' has no effect"),
        ("foo", "'foo' is not of the form key=value"),
        ("layers=[", "'layers=[' cannot be read"),
        ("out=${nowhere}", "Interpolation key 'nowhere' not found"),
        ("seed=???", "seed has no value"),
    ],
)
def test_a_mistake_is_one_sentence(word: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        compose_config([word])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_the_first_wrong_word_is_the_one_named() -> None:
    with pytest.raises(RecipeError, match=r"'weight.calibrator' \(mse\) has no key 'step'"):
        compose_config(["weight.calibrator.step=4", "weight.calibrator=mse", "model.anything=3"])


def test_a_sweep_is_the_product_of_what_each_word_offers() -> None:
    jobs = expand(["calibrator=minmax,kl", "weight.num_bits=8,4", "seed=range(2)", "plan=true"], True)
    assert len(jobs) == 8
    assert jobs[0] == ["calibrator=minmax", "weight.num_bits=8", "seed=0", "plan=true"]
    assert jobs[-1] == ["calibrator=kl", "weight.num_bits=4", "seed=1", "plan=true"]
    assert expand(["transform=[fold_bn],[]"], True) == [["transform=[fold_bn]"], ["transform=[]"]]
    assert expand(["layers=[{match:a,weight:{num_bits:4}}]"], True) == [
        ["layers=[{match:a,weight:{num_bits:4}}]"]
    ]


def test_an_option_is_given_with_its_keys_in_one_word() -> None:
    words = ["granularity={name:subchannel,group_size:16}", "weight.calibrator={name:mse,steps:50}"]
    apart = ["granularity=subchannel", "granularity.group_size=16"]
    apart += ["weight.calibrator=mse", "weight.calibrator.steps=50"]
    assert compose_config(words) == compose_config(apart)
    assert expand(["granularity=layer,{name:subchannel,group_size:16}"], True) == [
        ["granularity=layer"],
        ["granularity={name:subchannel,group_size:16}"],
    ]


@pytest.mark.parametrize("word", ["calibrator=minmax,kl", "seed=range(3)", "seed=choice(1,2)"])
def test_several_values_need_the_flag(word: str) -> None:
    with pytest.raises(RecipeError, match="offers several values; add -m"):
        expand([word], False)


@pytest.mark.parametrize("word", ["calibrator=glob(*)", "seed=interval(0,1)"])
def test_what_cannot_be_enumerated_is_refused(word: str) -> None:
    with pytest.raises(RecipeError, match="cannot be enumerated"):
        expand([word], True)


def test_a_run_is_repeated_from_its_file(tmp_path: Path) -> None:
    config = compose_config(["quantizer=kl", "weight.num_bits=4"])
    file = tmp_path / "config.yaml"
    file.write_text(as_yaml(config))
    assert compose_config([], file) == config
    assert compose_config(["weight.num_bits=3"], file)["weight"]["num_bits"] == 3
    with pytest.raises(RecipeError, match="num_bits"):
        compose_config(["weight.num_bit=3"], file)


def test_a_plugins_yaml_is_an_option_and_its_code_stays_unread(install: Install) -> None:
    install(
        "toyone", {"calibrator/toy.py": "raise RuntimeError", "calibrator/toy.yaml": "# A toy.\nname: toy\n"}
    )
    assert compose_config(["calibrator=toy"])["calibrator"] == {"name": "toy"}
    assert groups()["calibrator"]["toy"].description == "A toy."


def test_a_list_option_without_its_header_is_refused(install: Install) -> None:
    install("toyone", {"transform/toy.yaml": "# A toy.\nname: toy\n"})
    with pytest.raises(RecipeError, match=r"transform 'toy': its yaml must begin .* '# @package transform"):
        compose_config(["transform=[toy]"])


def test_an_experiments_settings_of_a_method_that_was_left_out_go_and_typed_ones_are_refused() -> None:
    assert compose_config(["experiment=weight_only_w4", "finetune=[]"])["finetune"] == {}
    chosen = compose_config(["experiment=weight_only_w4", "finetune=[bias_correction]"])["finetune"]
    assert [*chosen] == ["bias_correction"]
    said = r"finetune.gptq has settings \(match\), but gptq is not chosen; add it to finetune="
    with pytest.raises(RecipeError, match=said):
        compose_config(["experiment=weight_only_w4", "finetune=[]", "finetune.gptq.match=layer"])


def test_what_is_hidden_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPIPE_PLUGINS", "methods")
    with pytest.raises(RecipeError, match="installed: none; QPIPE_PLUGINS=methods hides the rest"):
        compose_config([])


@pytest.mark.parametrize("path", sorted((conf_dir() / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_composes(path: Path) -> None:
    assert compose_config([f"experiment={path.stem}"])["quantizer"]


@pytest.fixture(scope="module")
def registry() -> PluginRegistry:
    return PluginRegistry.load_installed()


def _options() -> list[tuple[str, str]]:
    return [(group, name) for group, options in groups().items() for name in options]


@pytest.mark.parametrize(("group", "name"), _options(), ids=lambda word: str(word))
def test_every_option_says_what_it_is(group: str, name: str) -> None:
    description = groups()[group][name].description
    assert description, f"{group}/{name}.yaml needs a first comment line"
    assert len(description) <= 110


@pytest.mark.parametrize(("group", "name"), [o for o in _options() if o[0] in KINDS], ids=lambda w: str(w))
def test_every_yaml_key_is_a_constructors_argument(registry: PluginRegistry, group: str, name: str) -> None:
    option = groups()[group][name]
    values: dict[str, Any] = yaml.safe_load(option.path.read_text())
    if option.is_preset:
        return
    names = values.pop("defaults", None) or [values.pop("name")]  # a preset names what it presets
    try:
        cls = registry.get(group, names[0])
    except PluginError as error:
        if "install the extra" not in str(error):
            raise
        pytest.skip(str(error))
    known = arguments(cls)
    assert option.path.is_relative_to(conf_dir()) or cls.name == name
    assert known is not None
    assert set(values) <= set(known)
    assert {key for key, required in known.items() if required} <= set(values)
