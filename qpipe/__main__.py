"""Compose, load plugins, build, run, exit code: `python -m qpipe`."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from qpipe.errors import QpipeError

_NO_ROOM = errno.ENOSPC, errno.EDQUOT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 ok, 1 failed, 2 usage, 3 a gate, 4 part of a sweep, 130."""
    from qpipe.console import while_read

    return while_read(lambda: _main(_arguments(argv)))


def _main(arguments: argparse.Namespace) -> int:
    if arguments.help:
        from qpipe.help import help_text

        print(help_text())
        return 0
    from qpipe.console import error
    from qpipe.errors import QpipeError

    signal.signal(signal.SIGTERM, _interrupt)
    sys.path.insert(0, str(Path.cwd()))  # a user's own modules, for the console script as for -m
    try:
        jobs, configs = _compose(arguments)
        if arguments.cfg:
            from qpipe.config import as_yaml

            print("---\n".join(as_yaml(config) for config in configs), end="")
            return 0
        return _run(jobs, configs, arguments)
    except QpipeError as problem:
        error(problem)
        return _code(problem)
    except OSError as problem:
        if problem.errno not in _NO_ROOM:
            raise
        error(f"failed: {problem.strerror}; make room, or choose another out=, and repeat the command")
        return 1
    except (KeyboardInterrupt, SystemExit):  # Lightning exits when interrupted
        kept = "the same command goes on" if arguments.multirun else "nothing was kept"
        error(f"interrupted; {kept}")
        return 130


def _compose(arguments: argparse.Namespace) -> tuple[list[list[str]], list[dict[str, Any]]]:
    from qpipe.config import compose_config
    from qpipe.launchers import split
    from qpipe.overrides import expand, split_sweeper

    if arguments.multirun:
        arguments.launcher, arguments.words = split(arguments.words)
        arguments.sweeper, arguments.words = split_sweeper(arguments.words)
        if arguments.sweeper:
            return [], []
    jobs = expand(arguments.words, arguments.multirun)
    return jobs, [compose_config(words, arguments.config) for words in jobs]


def _run(jobs: list[list[str]], configs: list[dict[str, Any]], arguments: argparse.Namespace) -> int:
    from qpipe.console import notice, set_up_logs
    from qpipe.jobs import run_job
    from qpipe.registry import PluginRegistry

    registry = PluginRegistry.load_installed()
    for message in registry.notices:
        notice(message)
    set_up_logs()
    if arguments.multirun and arguments.sweeper:
        from qpipe.search import run_search

        return run_search(arguments.words, arguments.sweeper, registry, arguments.config, arguments.launcher)
    if arguments.multirun:
        from qpipe.sweep import run_sweep

        flags = ["--config", str(arguments.config)] if arguments.config else []
        return run_sweep(jobs, configs, registry, arguments.words, flags, arguments.launcher)
    run_job(configs[0], registry)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    from importlib.metadata import version

    parser = argparse.ArgumentParser("qpipe", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--version", action="version", version=f"qpipe {version('qpipe-quant')}")
    return parser.parse_intermixed_args(argv)


def _code(error: QpipeError) -> int:
    from qpipe.errors import GateError, PluginError, RecipeError

    if isinstance(error, GateError):
        return 3
    return 2 if isinstance(error, (RecipeError, PluginError)) else 1


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
