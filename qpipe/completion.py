"""What the command line could go on with; read from files alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from qpipe.groups import groups
from qpipe.registry import conf_dir

_FLAGS = ("--multirun", "--cfg", "--config", "--version", "--help")
_BASH = """\
_qpipe() {
  local line=${COMP_LINE:0:COMP_POINT}
  local word=${line##* }
  COMPREPLY=($(qpipe completion words -- ${line% *} "$word" 2>/dev/null))
  COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*[=:]}"}"}")
  [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace 2>/dev/null
  true
}
_qpipe_python() { [[ $COMP_LINE =~ \\ -m\\ qpipe\\  ]] && _qpipe; }
complete -F _qpipe qpipe
complete -o bashdefault -o default -F _qpipe_python python python3
"""
_ZSH = """\
_qpipe() {
  local -a found
  found=(${(f)"$(qpipe completion words -- ${words[1,CURRENT-1]} "$PREFIX" 2>/dev/null)"})
  compadd -S '' -- $found
}
compdef _qpipe qpipe
"""
_FISH = """\
complete -c qpipe -f -a '(qpipe completion words -- (commandline -opc) (commandline -ct) 2>/dev/null)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def continuations(words: Sequence[str], commands: Iterable[str] = ()) -> list[str]:
    """Return what the last of words can become: groups, keys, options, each spelt out in full.

    Args:
        words: of the line, the program's name first or left out.
        commands: that follow the name alone.
    """
    *before, word = words or [""]
    if before == ["qpipe"]:
        return sorted(name for name in commands if name.startswith(word))
    key, equals, value = word.partition("=")
    if not equals:
        return sorted(name for name in {*_keys(before), *_FLAGS} if name.startswith(word))
    head = re.match(r"(.*[\[,])?", value)
    given = head[0] if head else ""
    return sorted(f"{key}={given}{name}" for name in _values(key) if name.startswith(value[len(given) :]))


def _keys(before: Sequence[str]) -> Iterator[str]:
    """Yield every group, and every key of the configuration and of the options chosen so far."""
    found = groups()
    yield from (f"{group}=" for group in found)
    yield from (f"{slot}.{kind}=" for slot in ("weight", "activation") for kind in _slot_kinds())
    yield from _leaves(_configuration())
    for word in before:
        group, _, value = word.partition("=")
        for name in re.findall(r"\w+", value) if group in found else ():
            if (option := found[group].get(name)) is not None:
                text = option.path.read_text()
                place = re.search(r"# @package ([\w.]+)", text)
                where = place[1] if place else group
                prefix = "" if where == "_global_" else f"{where}."
                yield from (prefix + leaf for leaf in _leaves(yaml.safe_load(text) or {}))


def _values(key: str) -> list[str]:
    """Return what a group or a yes-or-no key may be."""
    found, (slot, _, kind) = groups(), key.partition(".")
    if slot in ("weight", "activation") and kind in found:
        return [name for name, option in found[kind].items() if not option.is_preset]
    if key in found:
        return [*found[key]]
    node: Any = _configuration()
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return ["true", "false"] if isinstance(node, bool) else []


def _slot_kinds() -> list[str]:
    return [key for key, value in _configuration()["weight"].items() if value is None]


def _configuration() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((conf_dir() / "config.yaml").read_text())
    return {key: value for key, value in loaded.items() if key != "defaults"}


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif key not in ("name", "defaults") and not str(key).startswith("_"):
            yield f"{prefix}{key}="
