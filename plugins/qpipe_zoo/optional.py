"""Packages that come with an extra, 'zoo' or 'llm'."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

from qpipe import PluginError


def optional(module: str, wanted_by: str, extra: str = "zoo") -> ModuleType:
    """Import a module of an extra.

    Raises:
        PluginError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error.name or module, wanted_by, extra) from None


def package_folder(package: str, wanted_by: str) -> Path:
    """Return the folder of a package of the extra 'zoo', without importing it.

    Raises:
        PluginError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise missing(package, wanted_by)
    return Path(spec.origin).parent


def missing(package: str, wanted_by: str, extra: str = "zoo") -> PluginError:
    """Return the error that names the extra."""
    return PluginError(f"{wanted_by} needs the package '{package}'; pip install 'qpipe-quant[{extra}]'")


@contextmanager
def quietly(transformers: Any) -> Iterator[None]:  # noqa: ANN401  # the module
    """Keep transformers' progress bars and advice off the terminal; errors are raised as ever."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
