"""How the jobs of a sweep are carried out: one after the other, or in parallel processes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml

from qpipe.errors import RecipeError
from qpipe.registry import suggest

CHOICE, KEYS = "hydra/launcher=", "hydra.launcher."
_EXTRAS = {"joblib": "parallel", "submitit": "slurm"}
T = TypeVar("T")
R = TypeVar("R")
Launch = Callable[[Callable[[T], R], Sequence[T]], Iterator[R]]


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words that choose a launcher, and the others."""
    chosen = [word for word in words if word.lstrip("+").startswith((CHOICE, KEYS))]
    return chosen, [word for word in words if word not in chosen]


def build_launcher(words: Sequence[str]) -> Launch[Any, Any]:
    """Return what the words choose: 'hydra/launcher=joblib hydra.launcher.n_jobs=4'.

    Raises:
        RecipeError: there is no such launcher or key, or its package is not installed.
    """
    name, options = "basic", {}
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key + "=" == CHOICE:
            name = value
        else:
            options[key.removeprefix(KEYS)] = yaml.safe_load(value)
    if name not in LAUNCHERS:
        raise RecipeError(
            f"no launcher named '{name}'{suggest(name, LAUNCHERS) or ';'} installed: {', '.join(LAUNCHERS)}"
        )
    return LAUNCHERS[name](options)


def _basic(options: Mapping[str, Any]) -> Launch[T, R]:
    """One job after the other, in this process."""
    if options:
        raise RecipeError(
            f"the jobs run one after the other; {KEYS}{next(iter(options))} needs {CHOICE}joblib"
        )

    def launch(work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        return map(work, tasks)

    return launch


def _joblib(options: Mapping[str, Any]) -> Launch[T, R]:
    """Parallel processes of this machine; keys are joblib.Parallel's."""
    joblib = _optional("joblib", "joblib")

    def launch(work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        settings = {"n_jobs": -1, **options, "return_as": "generator_unordered"}
        try:
            parallel = joblib.Parallel(**settings)
        except TypeError as error:
            raise RecipeError(f"{CHOICE}joblib: {error}; its keys are those of joblib.Parallel") from None
        results: Iterator[R] = parallel(joblib.delayed(work)(task) for task in tasks)
        return results

    return launch


def _submitit(cluster: str) -> Callable[[Mapping[str, Any]], Launch[T, R]]:
    def build(options: Mapping[str, Any]) -> Launch[T, R]:
        submitit = _optional("submitit", f"submitit_{cluster}")

        def launch(work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
            settings = {"timeout_min": 60, **options}
            executor = submitit.AutoExecutor(settings.pop("submitit_folder", ".submitit"), cluster)
            try:
                executor.update_parameters(**settings)
            except (TypeError, NameError, ValueError) as error:
                raise RecipeError(f"{CHOICE}submitit_{cluster}: {str(error).splitlines()[0]}") from None
            yield from (
                job.result()
                for job in submitit.helpers.as_completed(executor.map_array(work, tasks), poll_frequency=1)
            )

        return launch

    return build


def _optional(module: str, launcher: str) -> Any:  # noqa: ANN401  # a module
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise RecipeError(
            f"{CHOICE}{launcher} needs {module}, which is not installed; "
            f"install the extra: qpipe-quant[{_EXTRAS[module]}]"
        ) from None


LAUNCHERS: dict[str, Callable[[Mapping[str, Any]], Launch[Any, Any]]] = {
    "basic": _basic,
    "joblib": _joblib,
    "submitit_local": _submitit("local"),
    "submitit_slurm": _submitit("slurm"),
}
