"""Metrics of tasks by name, each through the library of its field.

    score(metric, predictions, targets, **more) ─► float          METRICS[metric]: better high or low, range, library

`ranking_metrics` has those over orders of candidates, `text_metrics` those of answers found in a text.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError, MissingExtraError, nearest


@dataclass(frozen=True)
class Metric:
    """A registered metric.

    Attributes: compute: `(predictions, targets, **more) -> float`. higher_is_better; low, high: the range. library: the
        distribution that computes it ("moekit" where none of the field does), part of the extra `tasks`.
    """

    name: str
    compute: Callable[..., float] = field(repr=False)
    description: str
    higher_is_better: bool
    low: float
    high: float
    library: str

    @property
    def version(self) -> str | None:
        """Version of the library; None where it is not installed."""
        try:
            return importlib.metadata.version(self.library)
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def options(self) -> tuple[str, ...]:
        """Names of what `score` takes beside predictions and targets."""
        return tuple(inspect.signature(self.compute).parameters)[2:]

    def better(self, one: float, other: float) -> bool:
        """Whether `one` is strictly better than `other`."""
        return one > other if self.higher_is_better else one < other

    def report(self) -> dict[str, Any]:
        """What a table of results says of it, ready for JSON; an open end of the range is None."""
        ends = [None if math.isinf(end) else end for end in (self.low, self.high)]
        return {"metric": self.name, "higher_is_better": self.higher_is_better, "range": ends,
                "library": self.library, "version": self.version}  # fmt: skip


METRICS: dict[str, Metric] = {}


def register_metric(
    name: str,
    description: str,
    *,
    library: str,
    higher_is_better: bool = True,
    low: float = 0.0,
    high: float = 1.0,
) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Decorator: the function becomes the metric `name`."""

    def add(compute: Callable[..., float]) -> Callable[..., float]:
        METRICS[name] = Metric(name, compute, description, higher_is_better, low, high, library)
        return compute

    return add


def metrics() -> dict[str, Metric]:
    """All metrics by name."""
    for module in ("ranking_metrics", "picture_metrics", "text_metrics"):
        importlib.import_module(f"moekit.evaluate.{module}")
    return dict(sorted(METRICS.items()))


def find_metric(name: str) -> Metric:
    """The metric of that name. Errors: `ConfigError` with the nearest name."""
    known = metrics()
    if name not in known:
        raise ConfigError(f"metric {name!r} is unknown: {nearest(name, known)}")
    return known[name]


def score(metric: str, predictions: Any, targets: Any, **more: Any) -> float:
    """How good the predictions are.

    Args:
        metric: its name.
        predictions, targets: equally many, at least one.
        more: options of the metric.

    Errors: `ConfigError` for an unknown metric or option, for lengths that differ and for what the metric cannot read;
        `MissingExtraError` without its library.

    >>> score("recall_at_k", [[0.1, 0.9, 0.5]], [[1]], k=1)
    1.0
    """
    found = find_metric(metric)
    for option in more:
        if option not in found.options:
            known = nearest(option, found.options) if found.options else "it has none"
            raise ConfigError(f"{option!r} is no option of metric {metric!r}: {known}")
    if len(predictions) != len(targets):
        raise ConfigError(f"{metric}: {len(predictions)} predictions, but {len(targets)} targets")
    if len(targets) == 0:
        raise ConfigError(f"{metric}: there is nothing to measure; got 0 predictions and targets")
    if found.library != "moekit" and found.version is None:
        raise MissingExtraError(
            f"metric {metric!r} needs {found.library}. Install it: pip install 'moekit[tasks]'"
        )
    return float(found.compute(predictions, targets, **more))


# -------------------------------------------------------------------------------------------------------- classes


@register_metric("accuracy", "share of right labels; of lists of labels, of lists that are right whole",
                 library="scikit-learn")  # fmt: skip
def _accuracy(predictions: Any, targets: Any) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(*_coded("accuracy", predictions, targets)[:2])


@register_metric("macro_f1", "mean over the classes of their F1", library="scikit-learn")
def _macro_f1(predictions: Any, targets: Any, labels: Sequence[Any] | None = None) -> float:
    return _f1("macro", predictions, targets, labels)


@register_metric("micro_f1", "F1 over all decisions together; with one label each, the accuracy",
                 library="scikit-learn")  # fmt: skip
def _micro_f1(predictions: Any, targets: Any, labels: Sequence[Any] | None = None) -> float:
    return _f1("micro", predictions, targets, labels)


def _f1(average: str, predictions: Any, targets: Any, labels: Sequence[Any] | None) -> float:
    from sklearn.metrics import f1_score

    found, true, known = _coded(f"{average}_f1", predictions, targets, labels)
    # a class that is neither said nor true anywhere counts only where the labels were given
    places = None if found.ndim == 2 or labels is None else list(range(len(known)))
    return f1_score(true, found, average=average, labels=places, zero_division=0.0)


@register_metric("roc_auc", "area under the ROC curve; of several classes, the mean of one against the rest",
                 library="scikit-learn")  # fmt: skip
def _roc_auc(predictions: Any, targets: Any, labels: Sequence[Any] | None = None) -> float:
    """Predictions: `[n]`, larger for the second label, or `[n, labels]`. labels: False and True by default."""
    from sklearn.metrics import roc_auc_score

    table = _table("roc_auc", predictions)
    names = list(labels) if labels is not None else [False, True]
    if table.ndim == 2 and table.shape[1] != len(names):
        raise ConfigError(
            f"roc_auc: {table.shape[1]} columns of predictions need as many labels; got {names}"
        )
    lists = _holds_lists(targets)
    if lists:
        true = _indicator("roc_auc", targets, names)
    else:
        true = np.asarray([_place("roc_auc", value, names) for value in targets])
    if table.ndim == 1 and (len(names) != 2 or lists):
        raise ConfigError(f"roc_auc: one column of predictions is for two labels; got labels {names}")
    if table.ndim == 2 and len(names) == 2 and not lists:
        table = table[:, 1]
    if table.ndim == 1:
        true, table = true[:, None], table[:, None]
    elif not lists:
        true = np.eye(len(names), dtype=np.int64)[true]
    constant = [
        names[-1 if table.shape[1] == 1 else i] for i in range(true.shape[1]) if len(set(true[:, i])) < 2
    ]
    if constant:
        raise ConfigError(f"roc_auc is not defined: all or none of the targets are {constant[0]!r}")
    return roc_auc_score(true, table, average="macro")


# -------------------------------------------------------------------------------------------------------- numbers


@register_metric("rmse", "root of the mean squared error", library="scikit-learn", higher_is_better=False,
                 high=math.inf)  # fmt: skip
def _rmse(predictions: Any, targets: Any) -> float:
    from sklearn.metrics import mean_squared_error

    return math.sqrt(mean_squared_error(*_number_pair("rmse", predictions, targets)))


@register_metric("mae", "mean absolute error", library="scikit-learn", higher_is_better=False, high=math.inf)
def _mae(predictions: Any, targets: Any) -> float:
    from sklearn.metrics import mean_absolute_error

    return mean_absolute_error(*_number_pair("mae", predictions, targets))


@register_metric("r2", "share of the variance that is explained, mean over columns", library="scikit-learn",
                 low=-math.inf)  # fmt: skip
def _r2(predictions: Any, targets: Any) -> float:
    from sklearn.metrics import r2_score

    true, found = _number_pair("r2", predictions, targets)
    if len(true) < 2:
        raise ConfigError("r2 needs at least two examples; got 1")
    return r2_score(true, found)


# ----------------------------------------------------------------------------------------------------------- tags


@register_metric("tag_accuracy", "share of right tags over all words", library="scikit-learn")
def _tag_accuracy(predictions: Any, targets: Any) -> float:
    _check_tags("tag_accuracy", predictions, targets)
    flat = [[tag for tags in lists for tag in tags] for lists in (predictions, targets)]
    if not flat[0]:
        raise ConfigError("tag_accuracy: there is nothing to measure; all texts are empty")
    return _accuracy(*flat)


@register_metric("entity_f1", "F1 of entities: a right one has the type and both ends right (BIO tags)",
                 library="nervaluate")  # fmt: skip
def _entity_f1(predictions: Any, targets: Any) -> float:
    """An entity starts at B-, or at I- where none of its type goes on, as the CoNLL script reads it."""
    from nervaluate import Evaluator

    _check_tags("entity_f1", predictions, targets)
    for lists in (predictions, targets):
        for tags in lists:
            for tag in tags:
                if tag != "O" and not (isinstance(tag, str) and tag[:2] in ("B-", "I-") and len(tag) > 2):
                    raise ConfigError(f"entity_f1: a tag must be O, B-TYPE or I-TYPE; got {tag!r}")
    types = sorted(
        {tag[2:] for lists in (predictions, targets) for tags in lists for tag in tags if tag != "O"}
    )
    if not types:
        return 1.0  # no entity there and none said
    evaluator = Evaluator([list(tags) for tags in targets], [list(tags) for tags in predictions],
                          tags=types, loader="list")  # fmt: skip
    return evaluator.evaluate()["overall"]["strict"].f1


# ----------------------------------------------------------------------------------------------------------- text


@register_metric("bleu", "BLEU of a corpus, 0..100", library="sacrebleu", high=100.0)
def _bleu(predictions: Any, targets: Any, tokenize: str = "auto") -> float:
    """tokenize: of sacrebleu; "auto" is "zh" where most letters of the targets are Chinese, else "13a".

    A target is a text, or a list of texts, equally many for all.
    """
    from sacrebleu.metrics import BLEU

    known = ("auto", "13a", "intl", "zh", "char", "none")
    if tokenize not in known:
        raise ConfigError(f"bleu: tokenize {tokenize!r} is unknown: {nearest(tokenize, known)}")
    texts, references = _texts_and_references("bleu", predictions, targets)
    if tokenize == "auto":
        letters = [c for reference in references for text in reference for c in text if c.isalpha()]
        chinese = sum("\u3400" <= c <= "\u9fff" for c in letters)
        tokenize = "zh" if 2 * chinese > len(letters) else "13a"
    return BLEU(tokenize=tokenize).corpus_score(texts, references).score


@register_metric("chrf", "chrF of a corpus: F-score of runs of up to 6 characters, 0..100", library="sacrebleu",
                 high=100.0)  # fmt: skip
def _chrf(predictions: Any, targets: Any) -> float:
    from sacrebleu.metrics import CHRF

    return CHRF().corpus_score(*_texts_and_references("chrf", predictions, targets)).score


@register_metric("wer", "word error rate: changes over words of the targets", library="jiwer", higher_is_better=False,
                 high=math.inf)  # fmt: skip
def _wer(predictions: Any, targets: Any) -> float:
    return _error_rate("wer", predictions, targets)


@register_metric("cer", "character error rate: changes over characters of the targets", library="jiwer",
                 higher_is_better=False, high=math.inf)  # fmt: skip
def _cer(predictions: Any, targets: Any) -> float:
    return _error_rate("cer", predictions, targets)


def _error_rate(name: str, predictions: Any, targets: Any) -> float:
    import jiwer

    said, true = _texts(name, predictions, "predictions"), _texts(name, targets, "targets")
    for place, text in enumerate(true):
        if not text.strip():
            raise ConfigError(f"{name}: target {place} is empty, so it has no words that could be wrong")
    return getattr(jiwer, name)(true, said)


# ------------------------------------------------------------------------------------------------- what is handed in


def _holds_lists(values: Any) -> bool:
    return any(isinstance(value, list | tuple | set | frozenset | np.ndarray) for value in values)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _place(name: str, value: Any, labels: Sequence[Any]) -> int:
    value = _plain(value)
    if value not in labels:
        raise ConfigError(f"{name}: label {value!r} is not one of {list(labels)}")
    return list(labels).index(value)


def _coded(
    name: str, predictions: Any, targets: Any, labels: Sequence[Any] | None = None
) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Predictions and targets as numbers `[n]`, or `[n, labels]` of 0 and 1 for lists of labels, and the labels."""
    for values, what in ((predictions, "predictions"), (targets, "targets")):
        for place, value in enumerate(values):
            if value is None:
                raise ConfigError(f"{name}: {what}[{place}] is None; leave such examples out")
    lists = [_holds_lists(predictions), _holds_lists(targets)]
    if lists[0] != lists[1]:
        raise ConfigError(
            f"{name}: {'predictions' if lists[0] else 'targets'} hold lists of labels, the others single ones"
        )
    if labels is None:
        every: Iterable[Any] = [value for values in (predictions, targets) for value in values]
        if lists[0]:
            every = [label for value in every for label in value]
        labels = sorted({_plain(label) for label in every}, key=lambda label: (str(type(label)), str(label)))
        if lists[0] and not labels:
            labels = ["none"]  # all lists are empty, and so right
    if lists[0]:
        return _indicator(name, predictions, labels), _indicator(name, targets, labels), list(labels)
    places = {label: place for place, label in enumerate(labels)}
    coded = []
    for values in (predictions, targets):
        unknown = [label for label in map(_plain, values) if label not in places]
        if unknown:
            raise ConfigError(f"{name}: label {unknown[0]!r} is not one of {list(labels)}")
        coded.append(np.asarray([places[_plain(label)] for label in values], dtype=np.int64))
    return coded[0], coded[1], list(labels)


def _indicator(name: str, values: Any, labels: Sequence[Any]) -> np.ndarray:
    table = np.zeros((len(values), len(labels)), dtype=np.int64)
    for row, value in enumerate(values):
        for label in value:
            table[row, _place(name, label, labels)] = 1
    return table


def _table(name: str, values: Any) -> np.ndarray:
    """Finite numbers `[n]` or `[n, columns]`."""
    try:
        table = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: numbers [n] or [n, columns] are needed: {error}") from None
    if table.ndim not in (1, 2):
        raise ConfigError(f"{name}: numbers [n] or [n, columns] are needed; got shape {table.shape}")
    if not np.isfinite(table).all():
        raise ConfigError(f"{name}: all numbers must be finite; got {table[~np.isfinite(table)][0]} at "
                          f"{np.argwhere(~np.isfinite(table))[0].tolist()}")  # fmt: skip
    return table


def _number_pair(name: str, predictions: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    """(targets, predictions), as scikit-learn orders them."""
    found, true = _table(name, predictions), _table(name, targets)
    if found.shape != true.shape:
        raise ConfigError(
            f"{name}: predictions have shape {found.shape}, targets {true.shape}; they must be equal"
        )
    return true, found


def _check_tags(name: str, predictions: Any, targets: Any) -> None:
    for place, (found, true) in enumerate(zip(predictions, targets, strict=True)):
        if isinstance(found, str) or isinstance(true, str) or not hasattr(found, "__len__"):
            raise ConfigError(f"{name}: predictions and targets must be lists of lists of tags")
        if len(found) != len(true):
            raise ConfigError(
                f"{name}: text {place} has {len(found)} predicted tags, but {len(true)} true ones"
            )


def _texts(name: str, values: Any, what: str) -> list[str]:
    for place, value in enumerate(values):
        if not isinstance(value, str):
            raise ConfigError(f"{name}: {what}[{place}] must be a text; got {type(value).__name__}")
    return list(values)


def _texts_and_references(name: str, predictions: Any, targets: Any) -> tuple[list[str], list[list[str]]]:
    """Texts, and the references as sacrebleu takes them: a list for each number of the reference."""
    lists = [[target] if isinstance(target, str) else list(target) for target in targets]
    if len({len(each) for each in lists}) != 1 or not lists[0]:
        raise ConfigError(f"{name}: every target must have equally many texts, at least one")
    references = [_texts(name, each, "targets") for each in zip(*lists, strict=True)]
    return _texts(name, predictions, "predictions"), references
