"""Search with Optuna: by default tree-structured Parzen estimators, for several figures NSGA-II."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe import RecipeError, Sweeper, hookimpl
from qpipe.gate import better_low
from qpipe.kinds.sweeper import Choice, Domain, Trial
from qpipe.page.words import quantity, unit

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as OptunaTrial

_SAMPLERS = {  # of those that take a seed and need no other package
    "tpe": "TPESampler",
    "nsgaii": "NSGAIISampler",
    "qmc": "QMCSampler",
    "random": "RandomSampler",
}
_DIRECTIONS = ("maximize", "minimize")


@dataclass(frozen=True)
class Bound:
    """A constraint: a figure is at most, or at least, a number."""

    figure: str
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Bound:
        """Read 'simulated.size_bytes <= 50000'.

        Raises:
            RecipeError: it is written otherwise.
        """
        found = re.fullmatch(r"\s*([\w.]+)\s*(<=|>=)\s*([-+.\deE_]+)\s*", str(text))
        try:
            return cls(found[1], found[2], float(found[3]))  # type: ignore[index]  # caught below
        except (TypeError, ValueError):
            raise RecipeError(
                f"hydra.sweeper.constraints: '{text}' is not of the form 'simulated.size_bytes <= 50000'"
            ) from None

    def violation(self, figures: Mapping[str, float]) -> float:
        """Return by how much figures break it; at most 0 where they keep it."""
        over = figures[self.figure] - self.limit
        return over if self.sign == "<=" else -over

    def __str__(self) -> str:
        """Return it as it is written."""
        return f"{self.figure} {self.sign} {self.limit:g}"


class OptunaSweeper(Sweeper):
    """Choose the next points by what the earlier ones gave.

    The study is kept in a storage that optuna-dashboard opens. Every point is drawn with a generator of its
    own, so that a search that was interrupted and repeated asks for the points it would have asked for.

    Args:
        metric: 'variant.metric', or several.
        direction: 'maximize' or 'minimize', one for each metric; None: by the last word of its name.
        n_trials: points in all, those of earlier commands counted.
        constraints: such as 'simulated.size_bytes <= 50000'.
        sampler: tpe, nsgaii, qmc or random; None: tpe, for several metrics nsgaii.
        n_jobs: points that are asked for at once.
        storage: URL of a database; None: optuna.db in the sweep's folder.

    Source: Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", KDD 2019;
        Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011 (TPE); Deb et al., "A
        Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", IEEE TEC 2002.
    """

    name = "optuna"

    def __init__(
        self,
        metric: str | Sequence[str],
        direction: str | Sequence[str] | None = None,
        n_trials: int = 20,
        constraints: Sequence[str] = (),
        sampler: str | None = None,
        n_jobs: int = 1,
        seed: int = 0,
        storage: str | None = None,
    ) -> None:
        self.metrics = [metric] if isinstance(metric, str) else list(metric)
        self.directions = _directions(self.metrics, direction)
        self.bounds = [
            Bound.parse(text) for text in ([constraints] if isinstance(constraints, str) else constraints)
        ]
        self.sampler = sampler or ("tpe" if len(self.metrics) == 1 else "nsgaii")
        if self.sampler not in _SAMPLERS:
            raise RecipeError(f"hydra.sweeper.sampler={sampler} is none of {', '.join(_SAMPLERS)}")
        for key, value in (("n_trials", n_trials), ("n_jobs", n_jobs)):
            if type(value) is not int or value < 1:
                raise RecipeError(
                    f"hydra.sweeper.{key}={value} is no number of points; give a whole one above 0"
                )
        self.n_trials, self.n_jobs, self.seed, self.storage = n_trials, n_jobs, seed, storage

    @property
    def needs(self) -> Sequence[str]:
        """Return the metrics, and what the constraints bound."""
        return list(dict.fromkeys([*self.metrics, *(bound.figure for bound in self.bounds)]))

    @property
    def total(self) -> int:
        """Return the number of points in all."""
        return self.n_trials

    @property
    def identity(self) -> Any:  # noqa: ANN401  # plain data
        """Return what is looked for and how, without how long."""
        return [self.metrics, self.directions, [str(bound) for bound in self.bounds], self.sampler, self.seed]

    def open(self, space: Mapping[str, Domain], folder: Path, name: str) -> Sequence[Trial]:
        """Make the study, or load it."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = self.storage or f"sqlite:///{folder / 'optuna.db'}"
        try:
            self.study: Study = optuna.create_study(
                storage=storage, study_name=name, directions=self.directions, load_if_exists=True
            )
        except Exception as error:  # whatever a database raises
            first = str(error).splitlines()[0]
            raise RecipeError(f"hydra.sweeper.storage={storage} cannot be opened: {first}") from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.set_metric_names(self.metrics)  # for the dashboard
        self.space = {word: _distribution(domain) for word, domain in space.items()}
        return [_trial(trial) for trial in self.study.get_trials(deepcopy=False)]

    def ask(self) -> Sequence[Trial]:
        """Draw n_jobs points, or as many as are left."""
        left = self.n_trials - len(self.study.get_trials(deepcopy=False))
        return [self._draw() for _ in range(min(self.n_jobs, left))]

    def tell(self, number: int, figures: Mapping[str, float] | None) -> None:
        """Finish a point; one that failed, or has no finite figure, teaches nothing."""
        import optuna

        trial = self.study.get_trials(deepcopy=False)[number]
        if trial.state.is_finished():
            return
        values = [figures[name] for name in self.needs] if figures else [math.nan]
        if figures is None or not all(map(math.isfinite, values)):
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)
            return
        handle = optuna.trial.Trial(self.study, trial._trial_id)  # which may be of an earlier command
        for bound in self.bounds:
            handle.set_constraint(str(bound), bound.violation(figures))
        self.study.tell(number, [figures[name] for name in self.metrics])

    def findings(self) -> Sequence[str]:
        """Name the best point, or those that no other beats in every metric."""
        bounds = " and ".join(map(str, self.bounds))
        count = sum(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))
        best = self.study.best_trials
        if not best:
            return (
                [f"None of {count} points {f'keeps {bounds}' if bounds else 'has figures'}."] if count else []
            )
        keeping = f", of those with {bounds}" if bounds else ""
        if len(self.metrics) == 1:
            way = "most" if self.directions[0] == "maximize" else "least"
            return [f"Of {count} points{keeping}, the {way} {self.metrics[0]} has job {self._told(best[0])}."]
        best.sort(key=lambda trial: (trial.values, -trial.number), reverse=self.directions[0] == "maximize")
        once = {str(trial.params): trial for trial in best}  # a sampler may ask for a point again
        which = "both" if len(self.metrics) == 2 else "all"
        return [
            f"Of {count} points{keeping}, no other is better in {which} than job {self._told(trial)}."
            for trial in once.values()
        ]

    def _told(self, trial: FrozenTrial) -> str:
        words = " ".join(f"{word}={value}" for word, value in _trial(trial).values.items())
        pairs = zip(trial.values, self.metrics, strict=True)
        return (
            f"{trial.number} ({words}): {', '.join(quantity(x, name.partition('.')[2]) for x, name in pairs)}"
        )

    def _draw(self) -> Trial:
        """Draw one point, by a sampler whose generator depends on the seed and the point's number alone."""
        import numpy as np

        number = len(self.study.get_trials(deepcopy=False))
        self.study.sampler = self._sampler(
            int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        )
        return _trial(self.study.ask(self.space))

    def _sampler(self, seed: int) -> BaseSampler:
        import optuna

        sampler: BaseSampler = getattr(optuna.samplers, _SAMPLERS[self.sampler])(seed=seed)
        return sampler


def _directions(metrics: Sequence[str], given: str | Sequence[str] | None) -> list[str]:
    if given is None:
        return [_by_unit(metric) for metric in metrics]
    directions = [given] if isinstance(given, str) else list(given)
    if len(directions) != len(metrics) or not {*directions} <= {*_DIRECTIONS}:
        raise RecipeError(
            f"hydra.sweeper.direction={given} must be {' or '.join(_DIRECTIONS)}, "
            f"one for each of {', '.join(metrics)}"
        )
    return directions


def _by_unit(metric: str) -> str:
    if not unit(metric) and not better_low(metric):
        raise RecipeError(
            f"is more or less of {metric} better? give hydra.sweeper.direction={'|'.join(_DIRECTIONS)}"
        )
    return "minimize" if better_low(metric) else "maximize"


def _distribution(domain: Domain) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.values)
    if isinstance(domain.low, int) and isinstance(domain.high, int):
        return IntDistribution(domain.low, domain.high, domain.log, int(domain.step or 1))
    return FloatDistribution(domain.low, domain.high, domain.log, domain.step)


def _trial(trial: FrozenTrial | OptunaTrial) -> Trial:
    return Trial(trial.number, {word: str(value) for word, value in trial.params.items()})


@hookimpl
def qpipe_register_sweeper() -> list[type[Sweeper]]:
    """Offer the sweeper of Optuna."""
    return [OptunaSweeper]
