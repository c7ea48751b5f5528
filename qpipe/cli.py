"""The console script: `qpipe run`, and the small commands beside it."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qpipe.console import aligned, error, notice, while_read
from qpipe.errors import QpipeError, RecipeError
from qpipe.registry import PluginRegistry

if TYPE_CHECKING:
    from qpipe.cache import Listed

SWEEP = "sweep.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return while_read(lambda: _main(sys.argv[1:] if argv is None else list(argv)))


def _main(words: list[str]) -> int:
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
        if (folder / SWEEP).is_file():
            _sync_sweep(folder.absolute(), registry)
        else:
            tracker = registry.create("tracker", _stored_tracker(folder))
            print(tracker.sync(folder.absolute()))
    return 0


def _sync_sweep(folder: Path, registry: PluginRegistry) -> None:
    """Record a sweep's parent and its finished jobs, each once."""
    stored = json.loads((folder / SWEEP).read_text())
    done = [
        folder / job["folder"] for job in stored["jobs"] if (folder / job["folder"] / "report.json").is_file()
    ]
    if not done:
        raise RecipeError(f"{folder} holds no finished job; repeat its command: {stored['command']}")
    chosen = _stored_tracker(done[0])
    tracker = registry.create("tracker", chosen)
    config = yaml.safe_load((done[0] / "config.yaml").read_text())
    parent = tracker.start_sweep(config, stored["parent"])
    if parent is None:
        raise RecipeError(f"the tracker does not answer; try qpipe sync {folder} again later")
    if parent != stored["parent"]:
        from qpipe.record import write_aside

        write_aside(folder / SWEEP, json.dumps({**stored, "parent": parent}, indent=1) + "\n")
    for job in done:
        print(registry.create("tracker", chosen).sync(job, parent))
    tracker.finish_sweep(parent, stored["status"], folder)


def page(arguments: argparse.Namespace) -> int:
    """Make the pages of finished runs and sweeps from what they recorded."""
    from qpipe.page.run import write_page
    from qpipe.page.sweep import FILE, write_sweep_page

    for folder in arguments.folders:
        print(write_sweep_page(folder) if (folder / FILE).is_file() else write_page(folder))
    return 0


def cache(arguments: argparse.Namespace) -> int:
    """List what the cache holds, or remove it."""
    from qpipe.cache import Store, default_folder, default_limit

    store = Store(default_folder(), default_limit())
    entries = [entry for entry in store.listed() if not arguments.kinds or entry.kind in arguments.kinds]
    if arguments.action == "clear":
        for entry in entries:
            store.remove(entry.kind, entry.key)
        print(f"removed {len(entries)} entries, {_mib(entries)} MiB")
        return 0
    if arguments.json:
        print(json.dumps([vars(entry) for entry in entries], indent=1))
        return 0
    rows = [["kind", "entries", "MiB", "used from", "to"]]
    for kind in sorted({entry.kind for entry in entries}):
        own = [entry for entry in entries if entry.kind == kind]
        used = sorted(entry.used for entry in own)
        rows.append([kind, str(len(own)), _mib(own), _age(used[0]), _age(used[-1])])
    if entries:
        print("\n".join(aligned(rows)))
    print(f"{_mib(entries)} MiB of at most {store.limit_bytes / 2**20:,.0f} MiB in {store.folder}")
    return 0


def _mib(entries: Sequence[Listed]) -> str:
    return f"{sum(entry.num_bytes for entry in entries) / 2**20:,.1f}"


def _age(moment: float) -> str:
    seconds = max(time.time() - moment, 0)
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def compare(arguments: argparse.Namespace) -> int:
    """Lay two runs beside each other."""
    from qpipe.comparison import compare as compare_runs
    from qpipe.page.compare import comparison_page, text_rows
    from qpipe.record import strict

    with tempfile.TemporaryDirectory(prefix="qpipe-") as scratch:
        a, b = (_run_folder(run, Path(scratch) / run) for run in (arguments.a, arguments.b))
        found = {**compare_runs(a, b), "a": arguments.a, "b": arguments.b}
    if arguments.html:
        arguments.html.write_text(comparison_page(found), encoding="utf-8")
    if arguments.json:
        print(json.dumps(strict(found), indent=1))
        return 0
    print(f"A: {arguments.a}\nB: {arguments.b}")
    for title, rows in text_rows(found):
        print("\n".join(["", title, *aligned(rows)]) if rows else "", end="\n" if rows else "")
    for warning in found["warnings"]:
        notice(warning)
    return 0


def _run_folder(run: str, scratch: Path) -> Path:
    """Return the folder of a run: itself, its report.json's, or one with the files its tracker has of it."""
    from qpipe.config import compose_config
    from qpipe.record import SAMPLES

    path = Path(run)
    if (path / SWEEP).is_file():
        raise RecipeError(f"{run} is a sweep; give the folder of one of its jobs, {path / '0'}")
    if path.exists():
        return path if path.is_dir() else path.parent
    if "/" in run or not (tracker := compose_config([])["tracker"]):
        raise RecipeError(
            f"{run} is no folder; give a finished run's folder, its report.json, or its tracker's id"
        )
    scratch.mkdir(exist_ok=True)
    fetched = ("report.json", "config.yaml", SAMPLES)
    PluginRegistry.load_installed().create("tracker", tracker).fetch(run, fetched, scratch)
    if not (scratch / "report.json").is_file():
        raise RecipeError(f"{run} holds no report.json; give a finished run, not the parent of a sweep")
    return scratch


def _stored_tracker(folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    if not file.is_file() or not (folder / "report.json").is_file():
        raise RecipeError(f"{folder} is no finished run: it needs config.yaml and report.json")
    tracker = yaml.safe_load(file.read_text()).get("tracker")
    if not tracker:
        raise RecipeError(f"{folder} was run with tracker=null; there is nothing to record it in")
    return dict(tracker)


def completion(arguments: argparse.Namespace) -> int:
    """Print the script that makes a shell complete words, or what a command line could go on with."""
    from qpipe.completion import SCRIPTS, continuations

    print(SCRIPTS.get(arguments.shell) or "\n".join(continuations(arguments.words, arguments.commands)))
    return 0


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
    completing = commands.add_parser(
        "completion", help='let a shell complete: eval "$(qpipe completion bash)"'
    )
    completing.add_argument("shell", choices=["bash", "zsh", "fish", "words"])
    completing.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    completing.set_defaults(command=completion, commands=commands.choices)
    syncing = commands.add_parser("sync", help="record finished run folders that their tracker never got")
    syncing.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    syncing.set_defaults(command=sync)
    pages = commands.add_parser("page", help="make the pages of finished runs and sweeps anew")
    pages.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    pages.set_defaults(command=page)
    caching = commands.add_parser("cache", help="list what earlier runs left for later ones, or clear it")
    caching.add_argument("action", nargs="?", choices=("list", "clear"), default="list")
    caching.add_argument("kinds", nargs="*", metavar="KIND", help="these kinds only: statistics, baseline, …")
    caching.add_argument("--json", action="store_true")
    caching.set_defaults(command=cache)
    comparing = commands.add_parser("compare", help="lay two runs beside each other")
    for run in ("a", "b"):
        comparing.add_argument(
            run, metavar=run.upper(), help="a run's folder, its report.json, or its tracker's id"
        )
    comparing.add_argument("--json", action="store_true")
    comparing.add_argument("--html", type=Path, metavar="FILE", help="write the comparison as a page")
    comparing.set_defaults(command=compare)
    return parser


if __name__ == "__main__":
    sys.exit(main())
