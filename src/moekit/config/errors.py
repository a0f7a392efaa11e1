"""The errors a user can meet, each with the exit code that the command line returns for it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoekitError(Exception):
    """Base of all errors that moekit raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(MoekitError, ValueError):
    """A configuration value breaks a rule: the message names field, value, rule and remedy."""

    exit_code = 2


class DataError(MoekitError):
    """Input data is missing, broken or does not match its recorded hash."""

    exit_code = 3


class CheckpointError(MoekitError):
    """A checkpoint is incomplete, damaged or belongs to another configuration."""

    exit_code = 4


class NonFiniteError(MoekitError):
    """A loss or gradient became NaN or infinite; the optimizer was not stepped."""

    exit_code = 5


class MissingExtraError(MoekitError, ImportError):
    """An optional dependency is not installed; the message gives the command that installs it."""

    exit_code = 6


class WrongResultError(MoekitError):
    """A contestant of a benchmark computed something else than the reference; its times are not reported."""

    exit_code = 7


class Interrupted(MoekitError):
    """SIGTERM or SIGINT arrived; a checkpoint was written before leaving."""

    exit_code = 143


class UntaughtRouterWarning(UserWarning):
    """A learned router whose choice the task's loss cannot improve."""


def require(condition: object, field: str, value: object, rule: str, remedy: str = "") -> None:
    """Raise `ConfigError` unless `condition` holds.

    >>> require(9 <= 8, "model.moe.top_k", 9, "must be in 1..n_experts (8)")
    Traceback (most recent call last):
    ...
    moekit.config.errors.ConfigError: model.moe.top_k must be in 1..n_experts (8); got 9
    """
    if not condition:
        tail = f". {remedy}" if remedy else ""
        raise ConfigError(f"{field} {rule}; got {value!r}{tail}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Phrase for an unknown name: the nearest known one where there is one, and all of them.

    >>> nearest("top_kk", ["top_k", "n_experts"])
    "did you mean 'top_k'? Known: n_experts, top_k"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"
