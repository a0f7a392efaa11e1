"""The registry of baselines: one function and one line add one."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError, MissingExtraError, nearest, require
from moekit.config.task import AnyInput, NumberTarget
from moekit.data.examples import Examples


@dataclass(frozen=True)
class Problem:
    """What a baseline is fitted to: one target from the inputs that it can read.

    Attributes: train, validation: examples whose target is known; validation may be empty. inputs: those that the
        baseline reads. name, target: of what is answered. seed: of whatever is drawn.
    """

    train: Examples
    validation: Examples
    inputs: Mapping[str, AnyInput]
    name: str
    target: Any
    seed: int


@dataclass(frozen=True)
class Answers:
    """What a baseline says of some examples.

    Attributes: values: labels, lists of labels, lists of tags, texts, or an array of numbers `[n]` or `[n, columns]`.
        labels: of the columns of `class_scores`, where the target is a class. class_scores: `[n, labels]`,
        probabilities where `probabilistic`, else distances from the separating planes; either orders examples, as ROC
        AUC wants.
    """

    values: Sequence[Any] | np.ndarray
    labels: tuple[Any, ...] = ()
    class_scores: np.ndarray | None = None
    probabilistic: bool = False


@dataclass(frozen=True)
class Fitted:
    """A baseline fitted to one target: `predict` answers; `settings` says what was chosen, and by which figures."""

    predict: Callable[[Examples], Answers]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """A registered baseline.

    Attributes: fit: `(problem, **options) -> Fitted`. reads, answers: kinds of inputs and targets. libraries:
        distributions that do the work; all of them belong to the extra `tasks`.
    """

    name: str
    fit: Callable[..., Fitted] = field(repr=False)
    description: str
    reads: tuple[str, ...]
    answers: tuple[str, ...]
    libraries: tuple[str, ...]

    @property
    def options(self) -> dict[str, Any]:
        """The options and their defaults."""
        parameters = list(inspect.signature(self.fit).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}


BASELINES: dict[str, Baseline] = {}


def register_baseline(
    name: str, description: str, *, reads: Sequence[str], answers: Sequence[str], libraries: Sequence[str]
) -> Callable[[Callable[..., Fitted]], Callable[..., Fitted]]:
    """Decorator: the function becomes the baseline `name`. Errors: `ConfigError` for a name that another one has."""

    def add(fit: Callable[..., Fitted]) -> Callable[..., Fitted]:
        earlier = BASELINES.get(name)
        same = earlier is None or earlier.fit.__module__ == fit.__module__
        require(same, "name", name, "must be another one: a baseline of another module has it")
        BASELINES[name] = Baseline(name, fit, description, tuple(reads), tuple(answers), tuple(libraries))
        return fit

    return add


def baselines() -> dict[str, Baseline]:
    """All baselines by name."""
    package = importlib.import_module("moekit.evaluate.baselines")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"moekit.evaluate.baselines.{module.name}")
    return dict(sorted(BASELINES.items()))


def find_baseline(name: str) -> Baseline:
    """The baseline of that name. Errors: `ConfigError` with the nearest name."""
    known = baselines()
    if name not in known:
        raise ConfigError(f"baseline {name!r} is unknown: {nearest(name, known)}")
    return known[name]


class FittedBaseline:
    """A baseline fitted to every target of a task.

    Attributes: name, libraries (versions by distribution), fit_seconds, predict_seconds (of the latest `predict`; None
        before it), settings (by target), inputs (names of the inputs that it reads), n_train, n_validation.
    """

    def __init__(self, baseline: Baseline, parts: Mapping[str, Fitted], problem: Problem, fit_seconds: float):
        self.name = baseline.name
        self.libraries = {name: importlib.metadata.version(name) for name in baseline.libraries}
        self.parts = dict(parts)
        self.inputs = tuple(problem.inputs)
        self.n_train, self.n_validation = len(problem.train), len(problem.validation)
        self.fit_seconds = fit_seconds
        self.predict_seconds: float | None = None

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        return {name: dict(part.settings) for name, part in self.parts.items()}

    def predict(self, examples: Examples) -> dict[str, Answers]:
        """The answers for each target; the examples need the columns of the inputs only."""
        start = time.perf_counter()
        answers = {name: part.predict(examples) for name, part in self.parts.items()}
        self.predict_seconds = time.perf_counter() - start
        return answers

    def report(self) -> dict[str, Any]:
        """What a table of results says of it, ready for JSON."""
        return {
            "baseline": self.name,
            "libraries": self.libraries,
            "inputs": list(self.inputs),
            "settings": self.settings,
            "n_train": self.n_train,
            "n_validation": self.n_validation,
            "fit_seconds": round(self.fit_seconds, 3),
            "predict_seconds": None if self.predict_seconds is None else round(self.predict_seconds, 3),
        }


def fit_baseline(
    name: str,
    train: Examples,
    validation: Examples,
    inputs: Mapping[str, AnyInput],
    targets: Mapping[str, Any],
    *,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> FittedBaseline:
    """Fit a baseline to each target by itself.

    Args:
        name: of the baseline.
        train, validation: examples; those whose target is None are left out. Settings are chosen on validation, and
            are the defaults where it is empty.
        inputs, targets: as in the configuration of a run. Inputs of other kinds than the baseline reads are passed
            over, and `FittedBaseline.inputs` names those that it does read.
        seed: of whatever is drawn.
        options: of the baseline, such as its grid.

    Errors: `ConfigError` for an unknown baseline or option and for kinds that it cannot read or answer;
        `MissingExtraError` without its library.

    >>> from moekit.config.task import ClassTarget, TextInput
    >>> train = Examples({"text": ["a b", "b c", "c"], "label": ["x", "y", "y"]})
    >>> none = train.rows([])
    >>> fitted = fit_baseline("majority", train, none, {"text": TextInput()}, {"label": ClassTarget()})
    >>> fitted.predict(Examples({"text": ["a"]}))["label"].values
    ['y']
    """
    baseline = find_baseline(name)
    options = dict(options or {})
    for option in options:
        if option not in baseline.options:
            known = nearest(option, baseline.options)
            raise ConfigError(f"option {option!r} is no option of baseline {name!r}: {known}")
    read = {key: value for key, value in inputs.items() if value.kind in baseline.reads}
    if not read:
        raise ConfigError(
            f"baseline {name!r} reads inputs of kind {', '.join(baseline.reads)}; got "
            f"{', '.join(sorted({value.kind for value in inputs.values()})) or 'none'}. {_others('reads', inputs)}"
        )
    for key, target in targets.items():
        if target.kind not in baseline.answers:
            raise ConfigError(
                f"baseline {name!r} answers targets of kind {', '.join(baseline.answers)}; targets.{key} is of kind "
                f"{target.kind}. {_others('answers', {key: target})}"
            )
    for library in baseline.libraries:
        _require_installed(library, f"baseline {name!r}")
    start = time.perf_counter()
    parts = {}
    for key, target in targets.items():
        problem = Problem(known_rows(train, target), known_rows(validation, target), read, key, target, seed)
        if len(problem.train) == 0:
            raise ConfigError(f"targets.{key} is known in no training example, so {name!r} learns nothing")
        parts[key] = baseline.fit(problem, **options)
    return FittedBaseline(baseline, parts, problem, time.perf_counter() - start)


def known_rows(examples: Examples, target: Any) -> Examples:
    """The examples whose target is known: neither None nor, for numbers, NaN."""
    if len(examples) == 0:
        return examples
    known = np.ones(len(examples), bool)
    for column in target_columns(target):
        values = examples[column]
        if isinstance(target, NumberTarget):
            known &= ~np.isnan(numbers(values))
        elif not isinstance(values, np.ndarray) or values.dtype == object:
            known &= np.asarray([value is not None for value in values], bool)
    return examples if known.all() else examples.rows(np.flatnonzero(known))


def target_columns(target: Any) -> tuple[str, ...]:
    """The columns that hold a target."""
    return tuple(target.columns) if isinstance(target, NumberTarget) else (target.column,)


def numbers(values: Any) -> np.ndarray:
    """A column of numbers as float64; None becomes NaN. Errors: `ConfigError` for what is no number."""
    try:
        return np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a column of numbers must hold numbers or nothing: {error}") from None


def _require_installed(library: str, what: str) -> None:
    try:
        importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError(f"{what} needs {library}. Install it: pip install 'moekit[tasks]'") from None


def _others(side: str, kinds: Mapping[str, Any]) -> str:
    wanted = {value.kind for value in kinds.values()}
    fitting = [name for name, other in baselines().items() if wanted & set(getattr(other, side))]
    return f"For those there are: {', '.join(fitting) or 'none'}"
