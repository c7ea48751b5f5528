"""The console script: `qpipe run`, and the small commands beside it."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from qpipe.console import aligned, error, notice
from qpipe.errors import QpipeError, RecipeError
from qpipe.registry import PluginRegistry


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["run"]:
        from qpipe.__main__ import main as run

        return run(words[1:])
    arguments = _parser().parse_args(words)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except QpipeError as problem:
        error(problem)
        return 2


def plugins(arguments: argparse.Namespace) -> int:
    """List what is installed, and what is broken."""
    registry = PluginRegistry.load_installed()
    rows = [
        {
            "kind": kind,
            "name": plugin.name,
            "distribution": plugin.package.distribution,
            "version": plugin.package.version,
            "description": (inspect.getdoc(plugin.cls) or "").partition("\n")[0],
        }
        for kind, by_name in registry.plugins.items()
        for _, plugin in sorted(by_name.items())
    ]
    if arguments.json:
        broken = [vars(plugin) for plugin in registry.broken]
        print(json.dumps({"plugins": rows, "broken": broken}, indent=1))
        return 0
    print(
        "\n".join(aligned([["kind", "name", "distribution", "version", ""], *([*r.values()] for r in rows)]))
    )
    for message in registry.notices:
        notice(message)
    return 0


def new_plugin(arguments: argparse.Namespace) -> int:
    """Write a package that holds one calibrator and passes its own tests."""
    from qpipe.scaffold import write_plugin

    folder = write_plugin(arguments.name, arguments.folder)
    print(f"wrote {folder}; next: pip install -e {folder} && pytest {folder}")
    return 0


def sync(arguments: argparse.Namespace) -> int:
    """Record finished run folders that their tracker never got."""
    registry = PluginRegistry.load_installed()
    for folder in arguments.folders:
        tracker = registry.create("tracker", _stored_tracker(folder))
        print(tracker.sync(folder.absolute()))
    return 0


def page(arguments: argparse.Namespace) -> int:
    """Make the pages of finished runs and sweeps from what they recorded."""
    from qpipe.page.run import write_page
    from qpipe.page.sweep import FILE, write_sweep_page

    for folder in arguments.folders:
        print(write_sweep_page(folder) if (folder / FILE).is_file() else write_page(folder))
    return 0


def _stored_tracker(folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    if not file.is_file() or not (folder / "report.json").is_file():
        raise RecipeError(f"{folder} is no finished run: it needs config.yaml and report.json")
    tracker = yaml.safe_load(file.read_text()).get("tracker")
    if not tracker:
        raise RecipeError(f"{folder} was run with tracker=null; there is nothing to record it in")
    return dict(tracker)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("qpipe", description="Quantize PyTorch models.")
    commands = parser.add_subparsers(title="commands", required=True)
    commands.add_parser("run", help="the same as python -m qpipe; see qpipe run --help")
    listing = commands.add_parser("plugins", help="list what is installed")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(command=plugins)
    scaffold = commands.add_parser("new-plugin", help="write a plugin package that passes its own tests")
    scaffold.add_argument("name", help="of the package: qpipe-mine")
    scaffold.add_argument("--folder", type=Path, default=Path(), help="where to put it (default: here)")
    scaffold.set_defaults(command=new_plugin)
    syncing = commands.add_parser("sync", help="record finished run folders that their tracker never got")
    syncing.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    syncing.set_defaults(command=sync)
    pages = commands.add_parser("page", help="make the pages of finished runs and sweeps anew")
    pages.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    pages.set_defaults(command=page)
    return parser


if __name__ == "__main__":
    sys.exit(main())
