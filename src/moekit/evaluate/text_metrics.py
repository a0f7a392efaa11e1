"""Metrics of answers that stand in a text (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1).

Before they are compared, answers lose their case, punctuation and English articles. No light library has them: those
that do bring a framework or a download along. A target is a text, or a list of texts of which the best one counts.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any

from moekit.config.errors import ConfigError
from moekit.evaluate.task_metrics import register_metric

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_UNSPACED = re.compile(r"([぀-ヿ㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff])")


def plain_words(text: str) -> list[str]:
    """The words that are compared; a Chinese or Japanese character is a word.

    >>> plain_words("The U.S. Army's  band"), plain_words("“客厅” light")
    (['us', 'armys', 'band'], ['客', '厅', 'light'])
    """
    kept = "".join(c for c in text.lower() if unicodedata.category(c)[0] != "P" and c not in "$+<=>^`|~")
    return _UNSPACED.sub(r" \1 ", _ARTICLES.sub(" ", kept)).split()


@register_metric("exact_match", "share of answers that are right whole, but for case, punctuation and articles",
                 library="moekit")  # fmt: skip
def exact_match(predictions: Any, targets: Any) -> float:
    return _mean("exact_match", predictions, targets, lambda said, true: float(said == true))


@register_metric("token_f1", "mean over the answers of the F1 of their words", library="moekit")
def token_f1(predictions: Any, targets: Any) -> float:
    """An answer without words is right only where the other has none either."""
    return _mean("token_f1", predictions, targets, _f1)


def _f1(said: list[str], true: list[str]) -> float:
    if not said or not true:
        return float(said == true)
    shared = sum((Counter(said) & Counter(true)).values())
    return 2 * shared / (len(said) + len(true))


def _mean(
    name: str, predictions: Any, targets: Any, compare: Callable[[list[str], list[str]], float]
) -> float:
    total = 0.0
    for place, (said, true) in enumerate(zip(predictions, targets, strict=True)):
        every = [true] if isinstance(true, str) else list(true or [])
        if not isinstance(said, str) or not every or not all(isinstance(each, str) for each in every):
            raise ConfigError(
                f"{name}: a text and its right answers are needed; got {said!r} and {true!r} at {place}"
            )
        total += max(compare(plain_words(said), plain_words(each)) for each in every)
    return total / len(predictions)
