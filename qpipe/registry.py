"""Find the installed plugins, and the class behind a kind and a name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pluggy

from qpipe import hookspecs
from qpipe.errors import PluginError, RecipeError

API = 1  # the major version of the plugin interface: `qpipe_api` of every plugin package
_HOOK = "qpipe_register_"
KINDS = tuple(name.removeprefix(_HOOK) for name in vars(hookspecs) if name.startswith(_HOOK))


@dataclass(frozen=True)
class Package:
    """An installed plugin package, found by its entry point and not yet imported.

    Args:
        name: of the entry point, the word QPIPE_PLUGINS takes.
        module: the import package.
        folder: where its code and yaml lie.
        distribution, version: what brought it.
        extras: optional dependencies its entry point declares: `x = "qpipe_x [openvino]"`.
    """

    name: str
    module: str
    folder: Path
    distribution: str
    version: str
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plugin:
    """A class that a plugin package offers."""

    kind: str
    name: str
    cls: type[Any]
    package: Package


@dataclass(frozen=True)
class Broken:
    """A plugin that could not be loaded, and why."""

    module: str
    distribution: str
    error: str

    def __str__(self) -> str:
        """Say it in one sentence."""
        return f"plugin '{self.module}' of {self.distribution} could not be loaded: {self.error}"


def conf_dir() -> Path:
    """Return the folder that composes a run: beside the package in a wheel, beside qpipe/ in a clone."""
    inside = Path(__file__).with_name("conf")
    return inside if inside.is_dir() else Path(__file__).resolve().parent.parent / "conf"


def installed_packages() -> tuple[list[Package], list[Broken]]:
    """Find plugin packages without importing them, those of QPIPE_PLUGINS only if it is set."""
    packages: list[Package] = []
    broken: list[Broken] = []
    for entry in _chosen(sorted(entry_points(group="qpipe"), key=lambda entry: entry.name)):
        dist = entry.dist
        label, version = (dist.name, dist.version) if dist else ("unknown", "")
        try:
            folder = _folder(entry.module)
        except ImportError as error:
            broken.append(Broken(entry.module, label, str(error)))
            continue
        packages.append(Package(entry.name, entry.module, folder, label, version, tuple(entry.extras)))
    return packages, broken


def suggest(word: str, options: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the option nearest to word, or ''."""
    near = difflib.get_close_matches(word, [*options], n=1, cutoff=0.5)
    if not near:
        same = [option for option in options if sorted(option) == sorted(word)]
        near = same[:1]
    return f"; did you mean '{near[0]}'?" if near else ""


@dataclass
class PluginRegistry:
    """What is installed, by kind and name."""

    plugins: dict[str, dict[str, Plugin]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    broken: list[Broken] = field(default_factory=list)

    @classmethod
    def load_installed(cls) -> PluginRegistry:
        """Import every installed plugin; one that fails is kept in `broken`, the rest works.

        Raises:
            PluginError: two plugins offer one name for a kind, or QPIPE_PLUGINS names none that is installed.
        """
        packages, broken = installed_packages()
        registry = cls(broken=broken)
        manager = pluggy.PluginManager("qpipe")
        manager.add_hookspecs(hookspecs)
        for package in packages:
            registry._load(package, manager)
        return registry

    @property
    def notices(self) -> tuple[str, ...]:
        """One sentence for each plugin that could not be loaded."""
        return tuple(str(broken) for broken in self.broken)

    def names(self, kind: str) -> list[str]:
        """Return the names installed for a kind, sorted."""
        return sorted(self.plugins[kind])

    def get(self, kind: str, name: str) -> type[Any]:
        """Return the class called name.

        Raises:
            PluginError: none is installed, or an optional dependency of it is missing.
        """
        if name not in self.plugins[kind]:
            raise PluginError(self._unknown(kind, name))
        plugin = self.plugins[kind][name]
        _check_extras(plugin)
        return plugin.cls

    def create(self, kind: str, config: str | Mapping[str, Any]) -> Any:  # noqa: ANN401  # of that kind
        """Build from a name, or from a mapping of 'name' and the constructor's arguments.

        Raises:
            PluginError: no such name is installed.
            RecipeError: an argument is unknown, missing or refused.
        """
        given = {"name": config} if isinstance(config, str) else dict(config)
        name = given.pop("name", None)
        if name is None:
            raise RecipeError(f"{kind} {given} has no 'name'; installed: {', '.join(self.names(kind))}")
        cls = self.get(kind, name)
        _check_arguments(cls, f"{kind} '{name}' ({cls.__name__})", given)
        try:
            return cls(**given)
        except ValueError as error:
            raise RecipeError(f"{kind} '{name}': {error}") from error
        except TypeError as error:  # the constructor met a word where it wanted a number, say
            raise RecipeError(f"{kind} '{name}' cannot be built with {given}: {error}") from error

    def _unknown(self, kind: str, name: str) -> str:
        presets = (path.stem for path in (conf_dir() / kind).glob("*.yaml"))
        installed = sorted({*self.names(kind), *presets})
        lead = f"no {kind} named '{name}'{suggest(name, installed)}"
        joint = " " if lead.endswith("?") else "; "
        return "; ".join([f"{lead}{joint}installed: {', '.join(installed) or 'none'}", *self.notices])

    def _load(self, package: Package, manager: pluggy.PluginManager) -> None:
        try:
            _check_api(package)
        except Exception as error:  # whatever a stranger's import raises
            self._report(package.module, package, error)
            return
        for module_name in _public_modules(package):
            try:
                offered = _offered(module_name, manager)
            except Exception as error:
                self._report(module_name, package, error)
                continue
            for kind, plugin_class in offered:
                self._add(Plugin(kind, plugin_class.name, plugin_class, package))

    def _add(self, plugin: Plugin) -> None:
        other = self.plugins[plugin.kind].setdefault(plugin.name, plugin)
        if other.cls is not plugin.cls:
            ours, theirs = (f"{p.package.distribution} ({p.cls.__module__})" for p in (other, plugin))
            raise PluginError(
                f"two plugins offer {plugin.kind} '{plugin.name}': {ours} and {theirs}; "
                f"uninstall one, or name the packages to load in QPIPE_PLUGINS"
            )

    def _report(self, module: str, package: Package, error: Exception) -> None:
        detail = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and package.extras:
            detail += f"; install {package.distribution}[{','.join(package.extras)}]"
        self.broken.append(Broken(module, package.distribution, " ".join(detail.split())))


def _chosen(entries: list[EntryPoint]) -> list[EntryPoint]:
    wanted = os.environ.get("QPIPE_PLUGINS")
    if wanted is None:
        return entries
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    installed = [entry.name for entry in entries]
    for name in names:
        if name not in installed:
            raise PluginError(
                f"QPIPE_PLUGINS={wanted}: no plugin package named '{name}'{suggest(name, installed)} "
                f"installed: {', '.join(installed)}"
            )
    return [entry for entry in entries if entry.name in names]


def _folder(module: str) -> Path:
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"no package named '{module}' although an entry point names it; reinstall it")
    return Path(next(iter(spec.submodule_search_locations)))


def _check_api(package: Package) -> None:
    declared = getattr(importlib.import_module(package.module), "qpipe_api", None)
    if declared is None:
        raise PluginError("it declares no qpipe_api; its __init__.py needs the line 'qpipe_api = 1'")
    if declared != API:
        raise PluginError(
            f"it is written for qpipe_api {declared}, this is {API}; install a version for {API}"
        )


def _public_modules(package: Package) -> Iterator[str]:
    for kind in KINDS:
        for module in pkgutil.iter_modules([str(package.folder / kind)]):
            if not module.name.startswith("_"):
                yield f"{package.module}.{kind}.{module.name}"


def _offered(module_name: str, manager: pluggy.PluginManager) -> list[tuple[str, type[Any]]]:
    """Import one module and ask its hooks for classes; a misspelt hook is an error."""
    module = importlib.import_module(module_name)
    manager.register(module, module_name)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        manager.unregister(module)
        unknown = str(error).split("'")[1]
        hint = suggest(unknown, [_HOOK + kind for kind in KINDS])
        raise PluginError(f"there is no hook '{unknown}'{hint}") from None
    return [
        (kind, cls)
        for kind in KINDS
        for impl in getattr(manager.hook, _HOOK + kind).get_hookimpls()
        if impl.plugin is module
        for cls in impl.function()
    ]


def arguments(cls: type[Any]) -> dict[str, bool] | None:
    """Return the names a constructor takes and whether each must be given; None if it takes any.

    Keywords typed `**options: Unpack[SomeTypedDict]` count by name.
    """
    names: dict[str, bool] = {}
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            names[parameter.name] = parameter.default is parameter.empty
            continue
        unpacked = get_args(get_type_hints(cls.__init__).get(parameter.name))
        if not unpacked:
            return None
        names |= {key: key in unpacked[0].__required_keys__ for key in unpacked[0].__annotations__}
    return names


def _check_arguments(cls: type[Any], label: str, given: Mapping[str, Any]) -> None:
    known = arguments(cls)
    if known is None:
        return
    for key in given:
        if key not in known:
            hint = suggest(key, known) or ";"
            raise RecipeError(f"{label} has no key '{key}'{hint} it takes {', '.join(known) or 'none'}")
    for key, required in known.items():
        if required and key not in given:
            raise RecipeError(f"{label} needs a value for '{key}'")


def _check_extras(plugin: Plugin) -> None:
    """Refuse a plugin whose entry point declares an extra of which a package is not installed."""
    package = plugin.package
    if not package.extras:
        return
    for requirement in distribution(package.distribution).requires or ():
        extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", requirement)
        if extra and extra[1] in package.extras and _installed(requirement) is None:
            raise PluginError(
                f"{plugin.kind} '{plugin.name}' needs {requirement.split(';')[0].strip()}, "
                f"which is not installed; install the extra: {package.distribution}[{extra[1]}]"
            )


def _installed(requirement: str) -> Distribution | None:
    name = re.match(r"[\w.-]+", requirement)
    try:
        return distribution(name[0]) if name else None
    except PackageNotFoundError:
        return None
