"""Templates, filled with everything escaped."""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qpipe.errors import RecipeError
from qpipe.page import words

if TYPE_CHECKING:
    from jinja2 import Environment

Row = Mapping[str, Any]
log = logging.getLogger("qpipe")


@contextmanager
def only_a_page(folder: Path) -> Iterator[None]:
    """Turn whatever is wrong with a page into a warning: what it shows is there without it."""
    try:
        yield
    except Exception as error:
        why = error if isinstance(error, RecipeError) else f"{type(error).__name__}: {error}"
        log.warning("the page of %s could not be written: %s; all else is there", folder, why)


@functools.cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qpipe.page"),
        autoescape=True,  # whatever a name holds, it stays text
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["breakable"] = _breakable
    environment.filters |= {"figure": words.figure, "label": words.label, "quantity": words.quantity}
    environment.tests["number"] = lambda value: words.number(value) is not None
    return environment


def _breakable(name: object) -> str:
    """Let a browser break a dotted name where its parts end; escaped."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(?<=[.:/_])", "<wbr>", str(escape(str(name)))))  # noqa: S704  # escaped above


def render(template: str, script: str = "", **view: Any) -> str:  # noqa: ANN401
    """Return a page that needs nothing but itself.

    Args:
        script: file of the one script that the page may run, by its digest; without it the page loses nothing
            but comfort.
    """
    from markupsafe import Markup

    templates = _templates()
    code = templates.get_template(script).render() if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"'sha256-{digest}'" if script else "'none'"
    view |= {"script": Markup(code), "script_policy": Markup(policy)}  # noqa: S704  # ours
    return templates.get_template(template).render(**view)


@contextmanager
def refusing(file: Path) -> Iterator[None]:
    """Turn what a file of another shape does to a page into one sentence.

    Raises:
        RecipeError: the file is no record of qpipe's.
    """
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise RecipeError(f"{file} is not as qpipe writes it ({type(error).__name__}: {error})") from error


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        RecipeError: the file is missing, or holds something else.
    """
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror}; give a finished run's folder") from None
    except ValueError as error:
        raise RecipeError(f"{file} is no JSON ({error}); give a finished run's folder") from None
    if not isinstance(found, dict):
        raise RecipeError(f"{file} holds no report; give a finished run's folder")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Return what config.yaml of a run holds as plain data, {} when there is none.

    Raises:
        RecipeError: it cannot be read.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(f"{file} cannot be read ({first}); repair it, or take it away") from None
    return found if isinstance(found, dict) else {}


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    """Write rows under the union of their keys; nested values as JSON, and no formula of a spreadsheet."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([_cell(column) for column in columns])
        writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)


def _cell(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") and words.number(value) is None:
        return f"'{value}"
    return json.dumps(value) if isinstance(value, (list, Mapping)) else value
