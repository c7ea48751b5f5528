"""Packages that come with the extra 'zoo'."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from qpipe import PluginError


def optional(module: str, wanted_by: str) -> ModuleType:
    """Import a module of the extra 'zoo'.

    Raises:
        PluginError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error.name or module, wanted_by) from None


def package_folder(package: str, wanted_by: str) -> Path:
    """Return the folder of a package of the extra 'zoo', without importing it.

    Raises:
        PluginError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise missing(package, wanted_by)
    return Path(spec.origin).parent


def missing(package: str, wanted_by: str) -> PluginError:
    """Return the error that names the extra."""
    return PluginError(f"{wanted_by} needs the package '{package}'; pip install 'qpipe-quant[zoo]'")
