"""Errors a user can act on: one sentence that says what is wrong and what to change."""

from __future__ import annotations


class QpipeError(Exception):
    """Base of every error qpipe raises on purpose; the command prints it without a traceback."""


def cause(error: BaseException) -> str:
    """Return the kind and the first line of what an error was raised from, of others the innermost."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


class RecipeError(QpipeError):
    """The combination that was asked for has no meaning, or does not fit the model (exit code 2)."""


class PluginError(QpipeError):
    """A plugin is missing, broken or in conflict with another (exit code 2)."""


class DataError(QpipeError):
    """Data, weights or activations cannot be used: empty, truncated, NaN or infinite (exit code 1)."""


class ProofError(QpipeError):
    """An exported file does not do what the simulation does (exit code 1)."""


class GateError(QpipeError):
    """A result misses the bound the user set (exit code 3)."""
