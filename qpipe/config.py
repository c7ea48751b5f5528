"""Compose what was chosen into plain data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from qpipe.errors import RecipeError
from qpipe.groups import SEVERAL, Option, groups, rank
from qpipe.overrides import OBJECTS, chosen_groups, translate, unfold, value_path
from qpipe.registry import conf_dir, installed_packages, suggest

_REQUIRED = (*OBJECTS, "target", "quantizer", "calibrator", "granularity")
_Groups = Mapping[str, Mapping[str, Option]]


class PluginFolders(SearchPathPlugin):
    """Let `group=option` find the yaml of every plugin package, none of them imported."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append each package's folder."""
        for package in installed_packages()[0]:
            search_path.append(package.name, f"file://{package.folder}")


def compose_config(words: Sequence[str], file: Path | None = None) -> dict[str, Any]:
    """Return the resolved configuration of one job as plain data.

    Args:
        words: command-line words, `calibrator=kl` or `weight.num_bits=4`.
        file: a run's config.yaml to start from, in place of the groups.

    Raises:
        RecipeError: a word names no group, option or key, or has no meaning there.
    """
    if file is not None and not file.is_file():
        raise RecipeError(f"--config {file}: there is no such file")
    options = groups() if file is None else {}
    if Plugins.instance().discover(SearchPathPlugin).count(PluginFolders) == 0:
        Plugins.instance().register(PluginFolders)
    words = unfold(words, options)
    config = _compose(translate(words, options), words, options, file)
    if file is None:
        own = {*options, *yaml.safe_load((conf_dir() / "config.yaml").read_text())}
        config = {
            key: value for key, value in config.items() if key in own
        }  # a preset's words are read by now
        config["explicit"] = chosen_groups(words, options)
    for name in _REQUIRED:
        if config.get(name) is None:
            raise RecipeError(
                f"no {name} is chosen; {name}=… takes {', '.join(sorted(options.get(name, ())))}"
            )
    _keep_chosen(config, words)
    return {key: config[key] for key in sorted(config, key=rank)}


def as_yaml(config: Mapping[str, Any]) -> str:
    """Return a configuration as yaml."""
    return str(OmegaConf.to_yaml(OmegaConf.create(dict(config))))


def _compose(
    overrides: list[str], words: Sequence[str], options: _Groups, file: Path | None
) -> dict[str, Any]:
    try:
        cfg = _hydra(overrides, file)
        resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise RecipeError(f"{error.full_key} has no value; give it one: {error.full_key}=…") from None
    except MissingConfigException as error:
        raise RecipeError(_not_installed(str(error.missing_cfg_file or error), options)) from None
    except (HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        _explain_key(words, options, file)
        raise RecipeError(_first_line(error)) from None
    assert isinstance(resolved, dict)  # noqa: S101  # a DictConfig gives a dict
    return {str(key): value for key, value in resolved.items()}


def _hydra(overrides: list[str], file: Path | None) -> Any:  # noqa: ANN401  # a DictConfig
    folder, name = (conf_dir(), "config") if file is None else (file.resolve().parent, file.stem)
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose(name, overrides)


def _not_installed(missing: str, options: _Groups) -> str:
    group, _, name = missing.removesuffix(".yaml").rpartition("/")
    only = os.environ.get("QPIPE_PLUGINS")
    limited = f"; QPIPE_PLUGINS={only} hides the rest" if only is not None else ""
    installed = ", ".join(sorted(options.get(group, ()))) or "none"
    return f"no {group} named '{name}'; installed: {installed}{limited}"


def _explain_key(words: Sequence[str], options: _Groups, file: Path | None) -> None:
    """Raise the sentence for the first word whose key is not in the configuration, if that is what failed."""
    accepted: list[str] = []
    for word in sorted(words, key=lambda word: len(value_path(word))):
        try:
            known = OmegaConf.to_container(_hydra(translate(accepted, options), file))
        except (HydraException, OmegaConfBaseException, OSError, ValueError):
            return
        _check_path(value_path(word), known, options)
        accepted.append(word)


def _check_path(path: list[str], node: Any, options: _Groups) -> None:  # noqa: ANN401  # a node of the tree
    if path[:1] and path[0] in options and path[0] not in node:
        return  # a group of which nothing is chosen by itself
    for depth, key in enumerate(path):
        where = ".".join(path[:depth])
        if not isinstance(node, dict):
            why = "is not chosen" if node is None else f"is {node!r}"
            raise RecipeError(f"'{where}' {why} and has no key '{key}'")
        known = {str(k) for k in node} | (set(options) if depth == 0 else set())
        if key not in node:
            if depth == 0 and (preset := _preset_with(key, options)):
                raise RecipeError(f"'{key}' is a word of {preset}, which is not chosen; add {preset}")
            hint = suggest(key, known)
            has = ", ".join(sorted(known))
            place = f"'{where}'" if where else "the configuration"
            named = f" ({node['name']})" if "name" in node else ""
            raise RecipeError(f"{place}{named} has no key '{key}'{hint}{' ' if hint else '; '}it has: {has}")
        node = node[key]


def _preset_with(key: str, options: _Groups) -> str:
    """Return the option that brings a key of its own, 'group=name'; '' if none does."""
    for group, found in options.items():
        for name, option in found.items():
            lines = option.path.read_text().splitlines()
            if "# @package _global_" in lines and any(line.startswith(f"{key}:") for line in lines):
                return f"{group}={name}"
    return ""


def _keep_chosen(config: Mapping[str, Any], words: Sequence[str]) -> None:
    """Drop an experiment's settings of methods that were left out; refuse other nodes that name no method."""
    typed = [value_path(word)[:2] for word in words]
    for kind in SEVERAL:
        for name, value in [*(config.get(kind) or {}).items()]:
            if not isinstance(value, Mapping):
                raise RecipeError(
                    f"{kind} '{config[kind].get('name', name)}': its yaml must begin with the line "
                    f"'# @package {kind}.<name>', or a list of several {kind}s would keep only the last"
                )
            if "name" not in value:
                if [kind, name] in typed:
                    raise RecipeError(
                        f"{kind}.{name} has settings ({', '.join(value)}), but {name} is not chosen; "
                        f"add it to {kind}=[…]"
                    )
                del config[kind][name]


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
