"""Connected words by hidden Markov models: what is said, in order, where training does not tell when.

    frames ─► states of each word, left to right, a mixture of Gaussians each ─► words in a loop ─► the likeliest path

Rabiner 1989, "A tutorial on hidden Markov models", with Viterbi training from a flat start: at first each utterance is
cut evenly into the states of its words, then the mixtures and the cuts are fitted in turns.

Shape legend: N utterances, T frames of the longest, F features, W words, S states of a word, K states of an utterance.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moekit.config.errors import ConfigError
from moekit.data.encoding.base import filled
from moekit.data.encoding.transcripts import label_lists
from moekit.data.examples import Examples
from moekit.evaluate.baselines.base import Answers, Fitted, Problem, register_baseline

# what a frame more, or the next state, costs: words of about 35 frames in 6 states
_STAY, _GO = np.log(5 / 6), np.log(1 / 6)
_AT_ONCE = 500
_LEAST_VARIANCE = 1e-2
# frames by which the mixtures of a state are fitted
_MOST_FRAMES = 4000
_FAR = -1e30


@register_baseline("hmm-transcript", "hidden Markov model of each label, mixtures of Gaussians, labels in a loop",
                   reads=("audio",), answers=("transcript",), libraries=("scikit-learn",))  # fmt: skip
def hmm(
    problem: Problem,
    states: int = 6,
    mixtures: int = 4,
    rounds: int = 6,
    penalties: Sequence[float] = (-80.0, -60.0, -40.0, -20.0, 0.0),
) -> Fitted:
    """Fit to one column of frames `[T, F]`.

    Args:
        problem: whose transcripts are lists of labels, none longer than its frames allow.
        states: of each label.
        mixtures: Gaussians of each state.
        rounds: of fitting and cutting.
        penalties: on each label, of which the one with the fewest wrong labels on validation is taken.
    """
    if len(problem.inputs) != 1:
        raise ConfigError(
            f"baseline hmm-transcript reads one input of kind audio; got {', '.join(problem.inputs)}"
        )
    (column,) = (value.column for value in problem.inputs.values())  # type: ignore[union-attr]
    said = label_lists(problem.target, problem.train)
    labels = sorted({label for words in said for label in words})
    numbers = {label: number for number, label in enumerate(labels)}
    scale = _Scale.of([np.asarray(item, np.float32) for item in problem.train[column]])
    frames = scale.features(problem.train[column])
    fits = [i for i, item in enumerate(frames) if said[i] and len(item) >= states * len(said[i])]
    model = _Words(len(labels), states, mixtures, problem.seed)
    model.train([frames[i] for i in fits], [[numbers[label] for label in said[i]] for i in fits], rounds)

    def texts(examples: Examples, penalty: float) -> list[str]:
        found = model.decoded(scale.features(examples[column]), penalty)
        return [" ".join(labels[number] for number in words) for words in found]

    penalty, tried = 0.0, {}
    if len(problem.validation):
        wanted = [" ".join(words) for words in label_lists(problem.target, problem.validation)]
        tried = {value: _wrong(texts(problem.validation, value), wanted) for value in penalties}
        penalty = min(tried, key=lambda value: tried[value])
    settings = {
        "states": states, "mixtures": mixtures, "penalty": penalty,
        "wrong on validation": {str(value): round(share, 4) for value, share in tried.items()},
    }  # fmt: skip
    return Fitted(lambda examples: Answers(texts(examples, penalty)), settings)


def _wrong(said: Sequence[str], wanted: Sequence[str]) -> float:
    from moekit.evaluate.task_metrics import score

    return score("wer", said, wanted)


@dataclass(frozen=True)
class _Scale:
    """Features as the model reads them: standardised, with their slopes."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, frames: Sequence[np.ndarray]) -> _Scale:
        every = np.concatenate(frames)
        return cls(every.mean(axis=0), np.maximum(every.std(axis=0), 1e-6))

    def features(self, values: Any) -> list[np.ndarray]:
        """`[T, 2 F]` of each `[T, F]`."""
        found = []
        for value in values:
            item = (np.asarray(value, np.float32) - self.mean) / self.deviation
            slope = np.gradient(item, axis=0) if len(item) > 1 else np.zeros_like(item)
            found.append(np.concatenate([item, slope], axis=1).astype(np.float32))
        return found


class _Words:
    """Mixtures of each state of each word: state s of word w is number w * S + s."""

    def __init__(self, n_words: int, states: int, mixtures: int, seed: int) -> None:
        self.n_words, self.states, self.mixtures, self.seed = n_words, states, mixtures, seed
        self.machines: list[Any] = []

    def train(self, frames: Sequence[np.ndarray], words: Sequence[Sequence[int]], rounds: int) -> None:
        """Frames `[T, F]` of utterances and their words, in order."""
        chains = [
            np.concatenate([np.arange(self.states) + word * self.states for word in each]) for each in words
        ]
        # from a flat start: as many frames for each state
        paths = [
            chain[np.arange(len(item)) * len(chain) // len(item)]
            for item, chain in zip(frames, chains, strict=True)
        ]
        flat = np.concatenate(frames)
        for round_ in range(rounds):
            # single Gaussians find the cuts, mixtures the details
            self._fit(flat, np.concatenate(paths), self.mixtures if round_ >= rounds // 2 else 1)
            if round_ < rounds - 1:
                paths = self._cut(frames, chains)

    def _fit(self, flat: np.ndarray, path: np.ndarray, mixtures: int) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        rng = np.random.Generator(np.random.PCG64([self.seed, 9]))
        machines = []
        for state in range(self.n_words * self.states):
            mine = flat[path == state]
            mine = mine[rng.permutation(len(mine))[:_MOST_FRAMES]]
            if len(mine) < 2:  # a word that is hardly ever said is as likely as anything
                mine = flat[rng.permutation(len(flat))[:_MOST_FRAMES]]
            machine = GaussianMixture(
                min(mixtures, len(mine) // 2), covariance_type="diag", reg_covar=_LEAST_VARIANCE, max_iter=20,
                tol=1e-2, init_params="k-means++", random_state=self.seed,
            )  # fmt: skip
            with warnings.catch_warnings():  # the next round goes on with the fit
                warnings.simplefilter("ignore", ConvergenceWarning)
                machines.append(machine.fit(mine))
        self.machines = machines

    def _likelihoods(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """`[N, T, W * S]`: the logarithm of each state's density, 0 at padding."""
        flat = np.concatenate(frames)
        table = np.stack([machine.score_samples(flat) for machine in self.machines], axis=1)
        cuts = np.cumsum([len(item) for item in frames])[:-1]
        return filled(np.split(table.astype(np.float32), cuts), 0.0)

    def _cut(self, frames: Sequence[np.ndarray], chains: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The likeliest state of each frame, along the chain of states of each utterance."""
        found: list[np.ndarray] = []
        for start in range(0, len(frames), _AT_ONCE):
            part, mine = frames[start : start + _AT_ONCE], chains[start : start + _AT_ONCE]
            likely = self._likelihoods(part)
            longest = max(len(chain) for chain in mine)
            padded = np.stack([np.pad(chain, (0, longest - len(chain))) for chain in mine])
            emitted = np.take_along_axis(likely, padded[:, None, :].repeat(likely.shape[1], 1), axis=2)
            lengths = np.asarray([len(item) for item in part])
            ends = np.asarray([len(chain) for chain in mine])
            for row, places in enumerate(along_chain(emitted, lengths, ends)):
                found.append(padded[row, places])
        return found

    def decoded(self, frames: Sequence[np.ndarray], penalty: float) -> list[list[int]]:
        """The likeliest words of each utterance; one too short for a word has none."""
        found: list[list[int]] = []
        for start in range(0, len(frames), _AT_ONCE):
            part = frames[start : start + _AT_ONCE]
            likely = self._likelihoods(part)
            lengths = np.asarray([len(item) for item in part])
            found += in_loop(likely.reshape(*likely.shape[:2], self.n_words, self.states), lengths, penalty)
        return found


def along_chain(emitted: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """The likeliest way from the first to the last state of a chain, a frame at a time, none skipped.

    Args:
        emitted: `[N, T, K]` log-density of each frame in each place of its chain.
        lengths, ends: `[N]` frames and places that are real, never more places than frames.

    Returns the place of each frame, `[lengths[n]]` for each of N.

    >>> one = np.array([[[0.0, -9], [0, -1], [-9, 0]]])
    >>> along_chain(one, np.array([3]), np.array([2]))[0].tolist()
    [0, 0, 1]
    """
    n, longest, k = emitted.shape
    best = np.full((n, k), _FAR)
    best[:, 0] = emitted[:, 0, 0]
    went = np.zeros((n, longest, k), bool)
    for time in range(1, longest):
        going = np.concatenate([np.full((n, 1), _FAR), best[:, :-1]], axis=1) + _GO
        staying = best + _STAY
        went[:, time] = going > staying
        best = np.maximum(going, staying) + emitted[:, time]
    found = []
    for row in range(n):
        place = int(ends[row]) - 1
        path = np.zeros(int(lengths[row]), np.int64)
        for time in range(len(path) - 1, -1, -1):
            path[time] = place
            place -= int(went[row, time, place])
        found.append(path)
    return found


def in_loop(likely: np.ndarray, lengths: np.ndarray, penalty: float) -> list[list[int]]:
    """The likeliest words, each of all its states in order, any word behind any other.

    One pass over time (Ney 1984): each state carries the frame in which its word began, and the best end of a word in
    each frame is kept.

    Args:
        likely: `[N, T, W, S]` log-density of each state.
        lengths: `[N]` real frames.
        penalty: added for each word.

    >>> frames = np.full((1, 4, 2, 2), -9.0)
    >>> frames[0, [0, 1, 2, 3], [1, 1, 0, 0], [0, 1, 0, 1]] = 0.0
    >>> in_loop(frames, np.array([4]), 0.0)
    [[1, 0]]
    """
    n, longest, words, states = likely.shape
    score = np.full((n, words, states), _FAR)
    began = np.zeros((n, words, states), np.int64)
    # of each frame, the best word that ends in it: its score, which word, and where it began
    ended = np.full((n, longest), _FAR)
    which = np.zeros((n, longest), np.int64)
    since = np.zeros((n, longest), np.int64)
    rows = np.arange(n)
    for time in range(longest):
        enter = np.zeros(n) if time == 0 else ended[:, time - 1] + _GO
        going = np.concatenate([np.broadcast_to(enter[:, None, None] + penalty, (n, words, 1)),
                                score[:, :, :-1] + _GO], axis=2)  # fmt: skip
        came = np.concatenate([np.full((n, words, 1), time), began[:, :, :-1]], axis=2)
        staying = score + _STAY
        on = going > staying
        score = np.where(on, going, staying) + likely[:, time]
        began = np.where(on, came, began)
        last = score[:, :, -1]
        which[:, time] = last.argmax(axis=1)
        ended[:, time] = last[rows, which[:, time]]
        since[:, time] = began[rows, which[:, time], -1]
    found: list[list[int]] = []
    for row in range(n):
        time, said = int(lengths[row]) - 1, []
        while time >= 0 and ended[row, time] > _FAR / 2:
            said.append(int(which[row, time]))
            time = int(since[row, time]) - 1
        found.append(said[::-1])
    return found
