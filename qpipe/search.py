"""A sweep whose points a sweeper chooses by what the earlier ones gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from qpipe import console
from qpipe.choices import build_recipe
from qpipe.config import compose_config
from qpipe.errors import QpipeError, RecipeError
from qpipe.groups import groups
from qpipe.identity import data_digest, model_digest
from qpipe.jobs import Session
from qpipe.kinds.sweeper import Choice, Domain, Sweeper, Trial
from qpipe.launchers import build_launcher
from qpipe.overrides import SWEEPER, SWEEPER_KEYS, search_space
from qpipe.registry import suggest
from qpipe.stages.evaluate import expected
from qpipe.sweep import Row, Sweep, chosen, only_one, open_sweep, plain_value, plan_jobs, run_jobs

if TYPE_CHECKING:
    from qpipe.registry import PluginRegistry

_Config = Mapping[str, Any]
_Space = Mapping[str, Domain]


def run_search(
    words: Sequence[str],
    sweeper_words: Sequence[str],
    registry: PluginRegistry,
    file: Path | None = None,
    launcher: Sequence[str] = (),
) -> int:
    """Run the points that a sweeper asks for, each in its own folder; return the exit code.

    The same command again goes on, with as many more points as it asks for.

    Args:
        words: those of every job, and those that offer values.
        file: a run's config.yaml that every job starts from.

    Raises:
        RecipeError: a word has no meaning, or the sweeper looks at what nobody measures.
    """
    sweeper = build_sweeper(sweeper_words, registry)
    given, space = search_space(words)
    if not space:
        raise RecipeError(
            f"{SWEEPER}={sweeper.name}: no word offers several values; a,b or interval(0,1) does"
        )
    flags = ["--config", str(file)] if file else []
    jobs = Jobs(given, flags, file)
    configs = jobs.check(space)
    config = configs[0]
    depends_on = _check_figures(sweeper, configs, registry)
    launch_all = build_launcher(launcher)
    if config["plan"]:
        return plan_jobs([jobs.row(Trial(0, _corner(space)))], [config], registry)
    what = [
        chosen(config),
        {word: repr(domain) for word, domain in space.items()},
        sweeper.identity,
        depends_on,
    ]
    command = console.command(["-m", *flags, *sweeper_words, *launcher, *words])
    sweep = open_sweep([], what, config["out"], command)
    sweep.judged = list(sweeper.needs)
    with only_one(sweep):
        return run_jobs(sweep, _batches(sweep, sweeper, space, jobs), registry, launch_all, {}, sweeper.total)


def build_sweeper(words: Sequence[str], registry: PluginRegistry) -> Sweeper:
    """Build what words choose: 'hydra/sweeper=optuna hydra.sweeper.n_trials=50'.

    Raises:
        RecipeError: no sweeper is chosen, or a key has no value.
        PluginError: there is none of that name.
    """
    given = dict(word.lstrip("+").split("=", 1) for word in words)
    name = given.pop(SWEEPER, None)
    if name is None:
        raise RecipeError(
            f"{next(iter(given))} needs {SWEEPER}=…; installed: {', '.join(registry.names('sweeper'))}"
        )
    registry.get("sweeper", name)
    option = groups()[SWEEPER][name]
    settings = yaml.safe_load(option.path.read_text())
    settings |= {key.removeprefix(SWEEPER_KEYS): yaml.safe_load(value) for key, value in given.items()}
    settings = {key: value for key, value in settings.items() if value != "???"}
    sweeper: Sweeper = registry.create("sweeper", settings)
    return sweeper


class Jobs:
    """What the jobs of a search have in common.

    Args:
        given: their words.
        flags: what their commands begin with.
    """

    def __init__(self, given: Sequence[str], flags: Sequence[str], file: Path | None) -> None:
        self.given, self.flags, self.file = given, flags, file

    def words(self, values: Mapping[str, str]) -> list[str]:
        """Return the words of the job at a point."""
        return [*self.given, *(f"{word}={value}" for word, value in values.items())]

    def config(self, values: Mapping[str, str]) -> dict[str, Any]:
        """Return the configuration at a point."""
        return compose_config(self.words(values), self.file)

    def row(self, trial: Trial) -> Row:
        """Return the row of a point."""
        own = [*self.flags, *(word for word in self.words(trial.values) if not word.startswith("out="))]
        overrides = {word.lstrip("+"): plain_value(value) for word, value in trial.values.items()}
        return Row(trial.number, overrides, own, str(trial.number), console.command(own))

    def check(self, space: _Space) -> list[dict[str, Any]]:
        """Compose once with each value that can be named; return the configurations."""
        corner = _corner(space)
        choices = [
            (w, v) for w, domain in space.items() if isinstance(domain, Choice) for v in domain.values[1:]
        ]
        return [self.config(corner), *(self.config(corner | {word: value}) for word, value in choices)]


def _corner(space: _Space) -> dict[str, str]:
    return {w: d.values[0] if isinstance(d, Choice) else str(d.low) for w, d in space.items()}


def _check_figures(sweeper: Sweeper, configs: Sequence[_Config], registry: PluginRegistry) -> list[Any]:
    """Refuse figures that nobody will measure; return what the search depends on beside its words.

    A point may be one that cannot be done: the first that can is looked at.
    """
    for config in configs:
        try:
            recipe = build_recipe(config, registry)
            break
        except QpipeError as error:
            refused = error
    else:
        raise refused
    model, data, task = Session().build(config)
    variants = ["fp32", "simulated", *(exporter.name for exporter in recipe.exporters)]
    names = {variant: expected(model, task, recipe, variant) for variant in variants}
    known = [f"{variant}.{name}" for variant, found in names.items() for name in found or ()]
    for figure in sweeper.needs if None not in names.values() else ():
        if figure not in known:
            joint = suggest(figure, known) or ";"
            raise RecipeError(f"{figure} is not measured{joint} measured: {', '.join(known) or 'nothing'}")
    return [model_digest(model), data_digest(config["data"], data)]


def _batches(
    sweep: Sweep, sweeper: Sweeper, space: _Space, jobs: Jobs
) -> Iterator[Sequence[tuple[Row, _Config]]]:
    """Yield the jobs of earlier commands, then those that the sweeper asks for; tell it what they gave."""
    trials = sweeper.open(space, sweep.folder, sweep.id) or sweeper.ask()
    while trials:
        rows = [jobs.row(trial) for trial in trials]
        for row in rows:
            sweep.place(row)
        sweep.rows += rows
        sweep.axes = {word: _tried(sweep, word) for word in rows[0].overrides}
        yield [(row, jobs.config(trial.values)) for row, trial in zip(rows, trials, strict=True)]
        for trial in trials:
            metrics = sweep.rows[trial.number].metrics
            figures = {f"{v}.{name}": value for v in metrics for name, value in metrics[v].items()}
            sweeper.tell(trial.number, figures or None)
        sweep.findings = list(sweeper.findings())
        trials = sweeper.ask()


def _tried(sweep: Sweep, word: str) -> list[Any]:
    values = dict.fromkeys(row.overrides[word] for row in sweep.rows)
    return sorted(values) if all(isinstance(value, (int, float)) for value in values) else list(values)
