"""The words of the command line: Hydra's grammar, our slots, and one sentence for each mistake."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType, RangeSweep, ValueType
from hydra.errors import HydraException

from qpipe.errors import RecipeError
from qpipe.groups import SEVERAL, Option
from qpipe.kinds.sweeper import Choice, Domain, Interval
from qpipe.registry import suggest

SLOTS = ("weight", "activation")
OBJECTS = ("model", "data", "task", "trainer")  # built by `_target_`: their keys are their constructor's
_OURS = "data.calibration"
_BY_RATIO = "log"  # a tag in the command line's words
SWEEPER, SWEEPER_KEYS = "hydra/sweeper", "hydra.sweeper."
_OF_SWEEPS = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper")
_Groups = Mapping[str, Mapping[str, Option]]


def expand(words: Sequence[str], multirun: bool) -> list[list[str]]:
    """Return the words of every job: one list, or with multirun the product of what each word offers.

    Raises:
        RecipeError: a word does not parse, or offers several values without multirun.
    """
    offers = [list(_offers(_parse(word), word, multirun)) for word in words]
    return [list(job) for job in itertools.product(*offers)]


def search_space(words: Sequence[str]) -> tuple[list[str], dict[str, Domain]]:
    """Return the words that are given, and what a sweeper may choose of the others, by what is left of '='.

    Raises:
        RecipeError: a word does not parse, or offers what has no end.
    """
    parsed = [(_parse(word), word) for word in words]
    fixed = [word for override, word in parsed if not override.is_sweep_override()]
    varied = [(override, word) for override, word in parsed if override.is_sweep_override()]
    return fixed, {str(override.get_key_element()): _domain(override, word) for override, word in varied}


def split_sweeper(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words that choose a sweeper, and the others; Hydra's own, 'basic', is none."""
    ours = [word for word in words if word.lstrip("+").startswith((f"{SWEEPER}=", SWEEPER_KEYS))]
    rest = [word for word in words if word not in ours]
    return [word for word in ours if word != f"{SWEEPER}=basic"], rest


def unfold(words: Sequence[str], groups: _Groups) -> list[str]:
    """Return words, those that give an option with its keys, {name: …, key: …}, written as one word each."""
    return [plain for word in words for plain in _unfolded(word, groups)]


def translate(words: Sequence[str], groups: _Groups) -> list[str]:
    """Return one job's words as Hydra takes them, slots spelt out and options checked.

    Raises:
        RecipeError: no such group or option.
    """
    parsed = [_spelt_out(_parse(word), groups) for word in words]
    named = {override.key_or_group for override in parsed}
    dropped = [f"~{name}" for name in OBJECTS if f"{name}._target_" in named and name not in named]
    for override in parsed:
        _check_option(override, groups)
    return [*dropped, *(_text(override) for override in parsed)]


def chosen_groups(words: Sequence[str], groups: _Groups) -> list[str]:
    """Return the groups that words name, slots left out."""
    parsed = [_parse(word) for word in words]
    return list(dict.fromkeys(o.key_or_group for o in parsed if o.key_or_group in groups and not o.package))


def value_path(word: str) -> list[str]:
    """Return the keys a word walks, ['weight', 'num_bits']; none where the configuration fixes no keys."""
    override = _parse(word)
    key = override.key_or_group
    return [] if override.is_delete() or override.package or _is_free(key) else key.split(".")


def _parse(word: str) -> Override:
    if "=" not in word and not word.startswith("~"):
        raise RecipeError(f"'{word}' is not of the form key=value; see python -m qpipe --help")
    try:
        override: Override = OverridesParser.create().parse_override(word)
    except HydraException:
        raise RecipeError(
            f"'{word}' cannot be read; put quotes around a value with blanks or one of , : {{ }} [ ] ( )"
        ) from None
    return override


def _offers(override: Override, word: str, multirun: bool) -> Iterator[str]:
    if not override.is_sweep_override():
        yield word
        return
    if not multirun:
        raise RecipeError(f"'{word}' offers several values; add -m to run them all, or [a,b] for a list")
    if override.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
        raise RecipeError(
            f"'{word}' cannot be enumerated; write the values, or range(start,stop,step), "
            f"or let a sweeper choose: {SWEEPER}=…"
        )
    for value in override.sweep_string_iterator():
        yield f"{override.get_key_element()}={value}"


def _domain(override: Override, word: str) -> Domain:
    offered = override.value()
    if isinstance(offered, IntervalSweep):
        return _interval(offered, word)
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        raise RecipeError(f"'{word}' cannot be searched; write the values")
    if isinstance(offered, RangeSweep):
        values = sorted(offered.range())
        if not values:
            raise RecipeError(f"'{word}' offers nothing; a range ends before its second number")
        return Interval(values[0], values[-1], abs(offered.step))
    return Choice(tuple(override.sweep_string_iterator()))


def _interval(offered: IntervalSweep, word: str) -> Interval:
    low, high = offered.start, offered.end
    if wrong := offered.tags - {_BY_RATIO}:
        raise RecipeError(f"'{word}': tag '{min(wrong)}' has no meaning; there is tag(log,interval(…))")
    if low is None or high is None or low > high:
        raise RecipeError(f"'{word}' begins above its end")
    if _BY_RATIO in offered.tags and low <= 0:
        raise RecipeError(f"'{word}': ratios count in it, so it begins above 0")
    return Interval(low, high, log=_BY_RATIO in offered.tags)


def _unfolded(word: str, groups: _Groups) -> Iterator[str]:
    override = _parse(word)
    key, value = override.key_or_group, override.value()
    slot, _, part = key.partition(".")
    group = part if slot in SLOTS else key
    if not isinstance(value, dict) or "name" not in value or group not in groups or group in SEVERAL:
        yield word
        return
    where = override.package or key
    yield _text(replace(override, _value=value.pop("name")))
    for name, given in value.items():
        yield _text(replace(override, key_or_group=f"{where}.{name}", package=None, _value=given))


def _spelt_out(override: Override, groups: _Groups) -> Override:
    """Return the word with its slot, its place or its empty list written as Hydra wants them."""
    key, value = override.key_or_group, override.value()
    slot, _, kind = key.partition(".")
    if slot in SLOTS and kind in groups and isinstance(value, str):
        return replace(override, key_or_group=kind, package=key)
    if key in SEVERAL and value in ("none", None) and "none" not in groups.get(key, {}):
        return replace(override, _value=[])
    if (key in groups and value is None) or (key == "tracker" and value in ("none", None)):
        return replace(override, type=OverrideType.DEL, value_type=None)
    if override.is_delete():
        return override
    return replace(override, type=OverrideType.FORCE_ADD if _is_free(key) else OverrideType.CHANGE)


def _is_free(key: str) -> bool:
    """Whether a key is an argument of the user's own class."""
    return key.partition(".")[0] in OBJECTS and "." in key and not key.startswith(_OURS)


def _text(override: Override) -> str:
    if override.is_delete() and override.value_type is None:
        return str(override.get_key_element())
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def _check_option(override: Override, groups: _Groups) -> None:
    group, value = override.key_or_group, override.value()
    if group.startswith(_OF_SWEEPS):
        raise RecipeError(f"'{override.input_line}' says how a sweep is done; add -m")
    if override.is_hydra_override():
        raise RecipeError(
            f"'{override.input_line}' has no effect: qpipe alone decides where a run goes; use out="
        )
    if group not in groups or override.is_delete():
        return
    if isinstance(value, Mapping):
        raise RecipeError(f"{group} takes a name, not {value}; write {group}=name and {group}.key=value")
    options = groups[group]
    for name in value if isinstance(value, list) else [value]:
        if name is not None and name not in options:
            raise RecipeError(_no_option(group, str(name), options))
        if override.package and name is not None and options[str(name)].is_preset:
            raise RecipeError(
                f"{override.package}={name}: {group} '{name}' is a preset that chooses the shared calibrator "
                f"as well; write {override.package.split('.')[0]}.calibrator={name}"
            )


def _no_option(group: str, name: str, options: Mapping[str, Any]) -> str:
    hint = suggest(name, options)
    return f"no {group} named '{name}'{hint}{' ' if hint else '; '}installed: {', '.join(sorted(options))}"
