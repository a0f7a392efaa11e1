"""A monitor of a stream of news: topic and tone of each, a running summary of each topic, and how long that takes.

    text ─► topic, tone, experts (one pass of the model) ─► the topic's counts, mean tone, terms, recent texts ─► page

    python -m moekit.recipes.news_monitor runs/news-monitor-1 --out monitor.html            # the run's own test news
    python -m moekit.recipes.news_monitor runs/news-monitor-1 mine.csv --json --out monitor.json

The summary is extractive and made for texts without punctuation, as the Reuters files of this recipe are: there are no
sentences in them to choose from. A topic is summed up by the terms that set it apart, by the recent text that is
nearest to its weighted mean (its first words are shown), and by the first words of the latest texts. All means fade: a
text counts half as much when `half_life` more texts have been read.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moekit.config.atomic import write_json, write_text
from moekit.config.errors import require
from moekit.data.encoding.text import BagEncoder
from moekit.data.examples import Examples, TaskData, Values
from moekit.data.tables import read_examples
from moekit.data.task_data import columns_of_inputs, load_task_data
from moekit.evaluate.task import layers_of, predict
from moekit.train.run import LoadedTask, load_task_run

TERMS, LATEST, RECENT = 8, 3, 40
MOST_MEASURED = 1000  # texts of the stream that a run's latency is measured on
_FIRST_WORDS = 14


@dataclass
class Topic:
    """What is known of a topic so far; sums fade with the stream."""

    vector: np.ndarray  # [terms] sum of the texts' TF-IDF weights
    count: int = 0
    weight: float = 0.0
    tone: float = 0.0
    read: int = 0  # how many texts the stream had when this was last brought up to date
    experts: np.ndarray | None = None  # sum of the shares of the topic's mixture
    recent: deque[tuple[int, str, np.ndarray, np.ndarray, float]] = field(
        default_factory=lambda: deque(maxlen=RECENT)
    )


class Monitor:
    """Reads texts one by one.

    Args:
        loaded: a run with an input of kind bag, and the targets `topic` and `tone`; the tone's labels are `positive`
            and `negative`.
        half_life: texts after which a text counts half.

    Errors: `ConfigError` for a run without these.
    """

    def __init__(self, loaded: LoadedTask, half_life: float = 200.0) -> None:
        require(half_life > 0, "half_life", half_life, "must be above 0")
        bags = {name: one for name, one in loaded.encoding.inputs.items() if isinstance(one, BagEncoder)}
        require(bags, "inputs", list(loaded.encoding.inputs), "must hold one of kind bag, for the summaries")
        for name in ("topic", "tone"):
            require(name in loaded.encoding.targets, "targets", list(loaded.encoding.targets), f"must hold {name}",
                    "Train recipe:news-monitor")  # fmt: skip
        self.loaded, self.fade = loaded, 0.5 ** (1 / half_life)
        self.bag_name, bag = next(iter(bags.items()))
        self.terms, self.columns = bag.terms, columns_of_inputs(loaded.config)
        self.stop_words = _stop_words()
        self.layers = layers_of(loaded.model)
        self.topics: dict[str, Topic] = {}
        self.all = Topic(np.zeros(len(self.terms) + 1))
        self.read_texts = 0
        self.seconds: list[float] = []
        self.history: list[tuple[str, float, bool | None]] = []  # topic, tone, whether the topic was right

    def read(self, text: str, truth: str | None = None) -> dict[str, Any]:
        """Take in one text; what is said of it: topic, probability, tone (-1 to 1), milliseconds.

        Args:
            text: of any length; empty is allowed.
            truth: its topic, where that is known, for the accuracy in the report.
        """
        began = time.perf_counter()
        given = Examples({column: [text] for column in self.columns})
        encoded = self.loaded.encoding.encode(given, targets=False)
        found = predict(self.loaded.model, self.loaded.encoding, encoded, with_experts=True)
        topic, tone = found.answers["topic"][0], found.answers["tone"][0]
        balance = 2 * float(tone["probabilities"].get("positive", 0.5)) - 1
        bag = encoded.inputs[self.bag_name].batch(np.array([0]))
        ids, weights = bag["ids"][0].numpy(), bag["weights"][0].numpy().astype(np.float64)
        self.read_texts += 1
        name = str(topic["prediction"])
        kept = self.topics.setdefault(name, Topic(np.zeros(len(self.terms) + 1)))
        for one in (kept, self.all):
            self._add(one, ids, weights, balance)
        kept.recent.append((self.read_texts, text, ids, weights, balance))
        shares = self._of_topic(found.experts[0])
        if shares is not None:
            kept.experts = shares if kept.experts is None else kept.experts + shares
        taken = time.perf_counter() - began
        self.seconds.append(taken)
        self.history.append((name, balance, None if truth is None else truth == name))
        return {
            "topic": name,
            "probability": topic["probability"],
            "tone": balance,
            "milliseconds": 1e3 * taken,
        }

    def _add(self, one: Topic, ids: np.ndarray, weights: np.ndarray, tone: float) -> None:
        faded = self.fade ** (self.read_texts - one.read)
        one.vector *= faded
        np.add.at(one.vector, ids, weights)
        one.weight, one.tone = one.weight * faded + 1, one.tone * faded + tone
        one.count, one.read = one.count + 1, self.read_texts

    def _of_topic(self, shares: np.ndarray) -> np.ndarray | None:
        """`[E]` shares of the mixture that the topic is answered from; None where there is none."""
        for layer, told in enumerate(self.layers):
            if told["task"] == "topic":
                return np.asarray(shares[layer][: len(told["names"])])
        return None

    def latency(self) -> dict[str, float]:
        """Median and 95th percentile in milliseconds: encoding, model and summary of one text."""
        taken = [1e3 * seconds for seconds in self.seconds]
        if not taken:
            return {}
        return {"median": statistics.median(taken), "p95": float(np.quantile(taken, 0.95))}

    def report(self) -> dict[str, Any]:
        """Everything so far, ready for JSON; the topics with the largest faded counts first."""
        known = [right for _, _, right in self.history if right is not None]
        order = sorted(self.topics.items(), key=lambda item: -self._weight(item[1]))
        experts = next((list(told["names"]) for told in self.layers if told["task"] == "topic"), [])
        return {
            "texts": self.read_texts, "milliseconds": self.latency(), "run": str(self.loaded.folder),
            "half_life": round(float(np.log(0.5) / np.log(self.fade)), 3),
            "accuracy": statistics.fmean(known) if known else None,
            "tone_is": "transferred from reviews; not checked on these texts",
            "experts": experts,
            "topics": [self._summary(name, topic) for name, topic in order],
            "history": [[name, round(tone, 4)] for name, tone, _ in self.history],
        }  # fmt: skip

    def _weight(self, topic: Topic) -> float:
        return float(topic.weight * self.fade ** (self.read_texts - topic.read))

    def _summary(self, name: str, topic: Topic) -> dict[str, Any]:
        experts = None if topic.experts is None else (topic.experts / topic.count).round(4).tolist()
        recent = self._weight(topic) / max(self.all.weight, 1)
        return {
            "topic": name, "texts": topic.count, "recent_share": round(recent, 4),
            "tone": round(topic.tone / topic.weight, 4), "terms": self.terms_of(topic),
            "central": self.central(topic), "experts": experts,
            "latest": [{"number": number, "text": first_words(text), "tone": round(tone, 4)}
                       for number, text, _, _, tone in list(topic.recent)[: -LATEST - 1 : -1]],
        }  # fmt: skip

    def terms_of(self, topic: Topic) -> list[str]:
        """The terms whose mean weight in the topic is farthest above that in all texts; none of stop words alone."""
        surplus = topic.vector / topic.weight - self.all.vector / max(self.all.weight, 1e-12)
        if len(self.topics) == 1:
            surplus = topic.vector
        found: list[str] = []
        for place in np.argsort(-surplus, kind="stable"):
            if len(found) == TERMS or surplus[place] <= 0:
                break
            term = self.terms[place - 1] if place else ""
            words = term.split()
            if all(word in self.stop_words or len(word) < 2 for word in words):
                continue
            if any(set(words) <= set(other.split()) or set(other.split()) <= set(words) for other in found):
                continue
            found.append(term)
        return found

    def central(self, topic: Topic) -> dict[str, Any]:
        """The recent text nearest to the topic's mean by cosine, an older one less by its fading."""
        norm = float(np.linalg.norm(topic.vector)) or 1.0
        best, value = topic.recent[-1], -1.0
        for one in topic.recent:
            number, _, ids, weights, _ = one
            length = float(np.linalg.norm(weights)) or 1.0
            near = float(topic.vector[ids] @ weights) / (norm * length) * self.fade ** (topic.read - number)
            if near > value:
                best, value = one, near
        return {"number": best[0], "text": first_words(best[1])}


def first_words(text: str, most: int = _FIRST_WORDS) -> str:
    """The first words of a text.

    >>> first_words("a b c", 2)
    'a b …'
    """
    words = text.split()
    return " ".join(words[:most]) + (" …" if len(words) > most else "")


def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)


def follow(monitor: Monitor, texts: Iterable[str], truths: Values | None = None) -> dict[str, Any]:
    """Read all texts and report."""
    for row, text in enumerate(texts):
        monitor.read(text, None if truths is None else truths[row])
    return monitor.report()


def news_of(examples: Examples) -> Examples:
    """The texts whose topic is known, by their column `order` where they have one."""
    rows = [row for row, topic in enumerate(examples["topic"]) if topic is not None]
    if "order" in examples.columns:
        rows.sort(key=lambda row: examples["order"][row])
    return examples.rows(rows)


def measure(loaded: LoadedTask, data: TaskData) -> dict[str, float]:
    """Milliseconds of a text of the stream: encoding, model and summary, one text at a time."""
    monitor, news = Monitor(loaded), news_of(data.test)
    follow(monitor, news["text"][: min(MOST_MEASURED, len(news))])
    return {f"{name} ms": value for name, value in monitor.latency().items()}


def notes(loaded: LoadedTask, data: TaskData) -> str:
    """Writes monitor.html and monitor.json of all test news into the run's folder, and says what they hold."""
    news = news_of(data.test)
    report = follow(Monitor(loaded), news["text"], news["topic"])
    write_pages(report, loaded.folder / "monitor.html")
    first = report["topics"][0]
    return (
        f"{report['texts']} test news read one by one; the running summary of {len(report['topics'])} topics is in "
        f"{loaded.folder / 'monitor.html'} (at the end mostly {first['topic']}: {', '.join(first['terms'][:4])})."
    )


def write_pages(report: dict[str, Any], path: Path) -> None:
    """The page, and beside it everything on it as JSON."""
    from moekit.recipes.news_page import render_monitor

    write_text(path, render_monitor(report))
    write_json(path.with_suffix(".json"), report)


def main(arguments: list[str] | None = None) -> int:
    """Follow a file of texts, or the run's own test news, and write a page."""
    parser = argparse.ArgumentParser(prog="python -m moekit.recipes.news_monitor", description=main.__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of recipe:news-monitor")
    parser.add_argument(
        "file", nargs="?", help="texts in order (.csv, .tsv, .jsonl, .parquet); else its test news"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("monitor.html"), help="the page; .json lies beside it"
    )
    parser.add_argument("--json", action="store_true", help="write the .json alone")
    parser.add_argument("--limit", type=int, help="read so many texts at most")
    parser.add_argument("--half-life", type=float, default=200.0, help="texts after which one counts half")
    options = parser.parse_args(arguments)
    loaded = load_task_run(options.run)
    monitor = Monitor(loaded, options.half_life)
    (column,) = monitor.columns
    truths: Values | None = None
    if options.file is not None:
        texts = read_examples(options.file, {}, [column])[column]
    else:
        news = news_of(load_task_data(loaded.config).test)
        texts, truths = news[column], news["topic"]
    report = follow(monitor, texts[: options.limit], truths)
    if options.json:
        write_json(options.out.with_suffix(".json"), report)
    else:
        write_pages(report, options.out)
    taken = ", ".join(f"{name} {value:.1f} ms" for name, value in report["milliseconds"].items())
    print(f"{report['texts']} texts, {len(report['topics'])} topics; a text takes: {taken}")
    print(f"written: {options.out.with_suffix('.json') if options.json else options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
