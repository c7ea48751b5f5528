"""From words to objects: what has no meaning together is refused here, before any data is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, get_args

import yaml

from qpipe.errors import RecipeError
from qpipe.functional import Rounding
from qpipe.gate import Gate
from qpipe.recipe import LayerRule, Recipe, Slot, SlotEdit
from qpipe.registry import PluginRegistry, conf_dir
from qpipe.types import QuantSpec, Role, Target

_SLOT_KINDS = ("quantizer", "calibrator", "granularity")
_Config = Mapping[str, Any]


def build_recipe(config: _Config, registry: PluginRegistry) -> Recipe:
    """Turn a resolved configuration into objects; whatever has no meaning is refused here.

    Args:
        config: plain data; 'explicit' lists the groups the user named.

    Raises:
        RecipeError: a slot cannot be served, or an exporter that was named cannot express the recipe.
    """
    notices: list[str] = []
    target = _target(config["target"])
    weight = _slot(config, Role.WEIGHT, registry, notices)
    activation = _slot(config, Role.ACTIVATION, registry, notices)
    several: dict[str, Any] = {
        field: _several(kind, config, registry)
        for field, kind in (
            ("transforms", "transform"),
            ("finetune", "finetune"),
            ("evaluators", "evaluator"),
            ("exporters", "exporter"),
        )
    }
    layers = tuple(_rule(rule, config, registry) for rule in _rules(config.get("layers") or ()))
    recipe = Recipe(weight, activation, target, layers, **several, gate=_gate(config.get("gate")))
    if "calibrator" in config.get("explicit", ()):
        _check_ranges(recipe, config["calibrator"])
    notices += dict.fromkeys(_not_executed(recipe))
    reached = replace(recipe, layers=(*recipe.layers, *_reached(recipe)))
    exporters = []
    for exporter in recipe.exporters:
        reason = exporter.reason_not(reached)
        if reason is None:
            exporters.append(exporter)
        elif "exporter" in config.get("explicit", ()):
            raise RecipeError(f"exporter '{exporter.name}' cannot express this recipe: {reason}")
        else:
            notices.append(f"exporter '{exporter.name}' is passed over: {reason}")
    return replace(recipe, exporters=tuple(exporters), notices=tuple(notices))


def library_config(choices: _Config, exporting: bool) -> dict[str, Any]:
    """Return the configuration the command line would have composed from the same words.

    Raises:
        RecipeError: a word the configuration does not know.
    """
    text = yaml.safe_load((conf_dir() / "config.yaml").read_text())
    config: dict[str, Any] = {
        "quantizer": "uniform",
        "calibrator": "minmax",
        "granularity": "channel",
        "target": "x86",
        "weight": text["weight"],
        "activation": text["activation"],
        "layers": [],
        "transform": ["fold_bn"],
        "finetune": [],
        "evaluator": ["sqnr", "size"],
        "exporter": ["safetensors", "onnx"] if exporting else [],
        "gate": {},
        "explicit": [*choices],
    }
    for key, value in choices.items():
        if key not in config:
            raise RecipeError(f"quantize() has no argument '{key}'; it takes {', '.join(sorted(config))}")
        both_maps = isinstance(config[key], Mapping) and isinstance(value, Mapping)
        config[key] = {**config[key], **value} if both_maps else value
    for key, value in _preset(config["quantizer"]).items():
        if key not in choices or key == "quantizer":
            config[key] = value
    for role in (role.value for role in Role):
        if isinstance(config[role], Mapping):
            config[role] = _without_preset(config[role], role)
    if isinstance(config["target"], str):
        config["target"] = _target_file(config["target"])
    return config


def _slot(config: _Config, role: Role, registry: PluginRegistry, notices: list[str]) -> Slot | None:
    chosen = config[role.value]
    if chosen is None:
        return None
    if not isinstance(chosen, Mapping):
        raise RecipeError(
            f"{role.value}={chosen} is no slot; give its keys, {role.value}.num_bits=4, or null"
        )
    parts = {kind: _part(kind, chosen, config, role, registry, notices) for kind in _SLOT_KINDS}
    spec = _spec({k: v for k, v in chosen.items() if k not in _SLOT_KINDS}, role)
    slot = Slot(**parts, spec=spec)
    if chosen.get("calibrator") is not None and not slot.quantizer.uses_range:
        raise RecipeError(_without_range(slot, f"{role.value}.calibrator", slot.calibrator.name))
    return _checked(slot, role)


def _check_ranges(recipe: Recipe, named: str | _Config) -> None:
    """Refuse a calibrator that the user named and nothing asks for a range."""
    slots = [slot for _, slot in recipe.every_slot()]
    if slots and not any(slot.quantizer.uses_range for slot in slots):
        name = named if isinstance(named, str) else named["name"]
        raise RecipeError(_without_range(slots[0], "calibrator", name))


def _without_range(slot: Slot, word: str, calibrator: str) -> str:
    return (
        f"quantizer '{slot.quantizer.name}' fits its levels to all values, so calibrator '{calibrator}' has "
        f"no range to give it; leave out {word}={calibrator}"
    )


def _part(
    kind: str, chosen: _Config, config: _Config, role: Role, registry: PluginRegistry, notices: list[str]
) -> Any:  # noqa: ANN401  # an instance of that kind
    explicit = chosen.get(kind)
    part = registry.create(kind, explicit or config[kind])
    if role in part.roles:
        return part
    if explicit is not None:
        raise RecipeError(_cannot_serve(kind, part, role, registry))
    stand_in = part.stand_in.get(role)
    if stand_in is None:
        raise RecipeError(_cannot_serve(kind, part, role, registry))
    notices.append(f"{kind} '{part.name}' does not serve {role.value}s; they get '{stand_in}'")
    return registry.create(kind, stand_in)


def _cannot_serve(kind: str, part: Any, role: Role, registry: PluginRegistry) -> str:  # noqa: ANN401
    others = [name for name in registry.names(kind) if role in registry.get(kind, name).roles]
    why = getattr(part, "why_not", {}).get(role)
    because = f": {why}" if why else ""
    return (
        f"{kind} '{part.name}' cannot serve {role.value}s ({role.value}.{kind}={part.name}){because}; "
        f"use {', '.join(others)} there"
    )


def _spec(fields: _Config, role: Role) -> QuantSpec:
    for key, value in fields.items():
        wanted = type(getattr(QuantSpec, key, None))
        if wanted in (int, bool) and type(value) is not wanted:
            kind = "a whole number" if wanted is int else "true or false"
            raise RecipeError(f"{role.value}.{key}={value} has no meaning; give {kind}")
    try:
        return QuantSpec(role=role, **fields)
    except TypeError:
        known = [name for name in QuantSpec.__dataclass_fields__ if name != "role"]
        unknown = ", ".join(f"'{key}'" for key in fields if key not in known)
        raise RecipeError(f"{role.value} has no key {unknown}; it takes {', '.join(known)}") from None


def _checked(slot: Slot, role: Role) -> Slot:
    spec = slot.spec
    if role is Role.WEIGHT and spec.dynamic:
        raise RecipeError("weight.dynamic=true has no meaning: weights do not change from batch to batch")
    if slot.granularity.dynamic_only and not spec.dynamic:
        raise RecipeError(
            f"granularity '{slot.granularity.name}' has as many scales as the tensor has rows; "
            f"it needs {role.value}.dynamic=true"
        )
    if spec.dynamic and slot.quantizer.uses_range and not slot.calibrator.dynamic:
        raise RecipeError(
            f"calibrator '{slot.calibrator.name}' needs many batches; "
            f"with {role.value}.dynamic=true use minmax"
        )
    if slot.quantizer.rounding not in get_args(Rounding):
        allowed = " or ".join(get_args(Rounding))
        raise RecipeError(f"quantizer.rounding={slot.quantizer.rounding} is unknown; use {allowed}")
    slot.quantizer.check(spec)
    return slot


def _rules(layers: Any) -> Sequence[Any]:  # noqa: ANN401
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise RecipeError(f"layers is a list of rules, [{{match: pattern, weight: {{…}}}}], not {layers}")
    return layers


def _rule(rule: _Config, config: _Config, registry: PluginRegistry) -> LayerRule:
    known = isinstance(rule, Mapping) and set(rule) <= {"match", *Role} and isinstance(rule.get("match"), str)
    if not known or not all(rule.get(role) is None or isinstance(rule[role], Mapping) for role in Role):
        raise RecipeError(f"a layer rule is {{match: pattern, weight: {{…}}, activation: {{…}}}}, not {rule}")
    edits = {role: _edit(rule[role.value], role, config, registry) for role in Role if role.value in rule}
    if not edits:
        raise RecipeError(
            f"the layer rule for '{rule['match']}' changes nothing; give it weight or activation"
        )
    return LayerRule(rule["match"], edits)


def _edit(fields: _Config | None, role: Role, config: _Config, registry: PluginRegistry) -> SlotEdit:
    if fields is None:
        return SlotEdit(off=True)
    parts = {
        kind: registry.create(kind, fields[kind]) for kind in _SLOT_KINDS if fields.get(kind) is not None
    }
    for kind, part in parts.items():
        if role not in part.roles:
            raise RecipeError(_cannot_serve(kind, part, role, registry))
    spec = {k: v for k, v in fields.items() if k not in _SLOT_KINDS}
    edit = SlotEdit(**parts, spec=spec)
    base = _slot({**config, role.value: config[role.value] or {}}, role, registry, [])
    _spec({**_spec_fields(base), **spec}, role)
    merged = edit.apply(base, base)
    if merged is not None:
        _checked(merged, role)
    return edit


def _spec_fields(slot: Slot | None) -> dict[str, Any]:
    return {k: v for k, v in asdict(slot.spec).items() if k != "role"} if slot else {}


def _several(kind: str, config: _Config, registry: PluginRegistry) -> tuple[Any, ...]:
    chosen = config.get(kind) or ()
    entries: Sequence[Any] = [*chosen.values()] if isinstance(chosen, Mapping) else chosen
    return tuple(registry.create(kind, entry) for entry in entries)


def _gate(bounds: _Config | None) -> Gate:
    known = [*Gate.__dataclass_fields__]
    if bounds is not None and not (isinstance(bounds, Mapping) and set(bounds) <= set(known)):
        raise RecipeError(f"gate takes {', '.join(known)}, gate.max_drop=1.0; not {bounds}")
    return Gate(**(bounds or {}))


def _reached(recipe: Recipe) -> Iterator[LayerRule]:
    """Yield a rule for every change of a slot that fine-tuning may make, each checked."""
    for strategy in recipe.finetune:
        for role, edit in strategy.edits(recipe):
            base = recipe.weight if role is Role.WEIGHT else recipe.activation
            slot = edit.apply(base, base)
            try:
                _checked(slot, role) if slot is not None else None
            except RecipeError as error:
                raise RecipeError(
                    f"finetune '{strategy.name}' may choose {dict(edit.spec)}: {error}"
                ) from None
            yield LayerRule("*", {role: edit})


def _not_executed(recipe: Recipe) -> Iterator[str]:
    """Say what of the recipe the target has no kernels for."""
    target = recipe.target
    for role, slot in ((Role.WEIGHT, recipe.weight), (Role.ACTIVATION, recipe.activation)):
        if slot is None:
            continue
        allowed = {
            "num_bits": getattr(target, f"{role.value}_bits"),
            "granularity": getattr(target, f"{role.value}_granularities"),
        }
        is_centred = role is Role.WEIGHT and slot.spec.num_bits < 8  # convert() makes them symmetric int8
        for key in () if is_centred else ("signed", "symmetric"):
            fixed = getattr(target, f"{role.value}_{key}")
            allowed[key] = () if fixed is None else (fixed,)
        if slot.spec.dynamic and not target.dynamic:
            yield f"target '{target.name}' has no dynamic ranges: {role.value} figures are simulated"
        if not slot.quantizer.is_affine(slot.spec):
            what = f"computes on codes of quantizer '{slot.quantizer.name}'"
            instead = "files store such weights packed and compute in floating point"
            yield (
                f"no engine of target '{target.name}' {what}: "
                f"{instead if role is Role.WEIGHT else 'simulated'}"
            )
        described = slot.describe()
        if role is Role.WEIGHT and recipe.activation is None:
            continue  # nothing is multiplied by codes of activations: any that can be stored are executed
        for key, values in allowed.items():
            if values and described[key] not in values:
                words = " or ".join(str(v).lower() for v in values)
                yield (
                    f"target '{target.name}' executes {role.value}.{key}={words}, "
                    f"not {str(described[key]).lower()}: simulated"
                )


def _target(fields: _Config) -> Target:
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    try:
        return Target(**values)
    except TypeError as error:
        raise RecipeError(f"target '{fields.get('name')}': {error}") from None


def _target_file(name: str) -> dict[str, Any]:
    folder = conf_dir() / "target"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(
            f"no target named '{name}'; installed: {', '.join(sorted(p.stem for p in folder.glob('*.yaml')))}"
        )
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def _preset(quantizer: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return what a preset in conf/quantizer stands for, {} when the word is no preset."""
    path = conf_dir() / "quantizer" / f"{quantizer}.yaml"
    if not isinstance(quantizer, str) or not path.is_file():
        return {}
    words: dict[str, Any] = {}
    arguments = yaml.safe_load(path.read_text())
    for entry in arguments.pop("defaults"):
        if isinstance(entry, str) and entry != "_self_":
            words["quantizer"] = entry
        elif isinstance(entry, Mapping):
            words |= {key.split("/")[-1].split("@")[0]: value for key, value in entry.items()}
    return {**words, "quantizer": {"name": words["quantizer"], **arguments}} if arguments else words


def _without_preset(slot: _Config, role: str) -> dict[str, Any]:
    """Return a slot with the preset of its quantizer, if it is one, written out."""
    words = _preset(slot.get("quantizer"))
    if len(words) > 1:
        raise RecipeError(
            f"{role}.quantizer={slot['quantizer']} is a preset that chooses the shared calibrator too; "
            f"say {role}.calibrator={words['calibrator']} instead"
        )
    return {**slot, **words}
