"""Words in order without times: both searches against all ways of a small case, and words that are learnt."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moekit.config.errors import ConfigError
from moekit.config.task import AudioInput
from moekit.config.task_transcript import TranscriptTarget
from moekit.data.examples import Examples
from moekit.evaluate.baselines import markov
from moekit.evaluate.baselines.base import fit_baseline
from moekit.evaluate.task_metrics import score


def ways(n_frames: int, n_places: int):
    """All ways `[frames]` from place 0 to the last one that stay or go one on."""
    for path in itertools.product(range(n_places), repeat=n_frames):
        steps = np.diff(path)
        if path[0] == 0 and path[-1] == n_places - 1 and set(steps.tolist()) <= {0, 1}:
            yield path


def worth(emitted: np.ndarray, path: tuple[int, ...]) -> float:
    on = int(np.diff(path).sum())
    moves = on * markov._GO + (len(path) - 1 - on) * markov._STAY
    return float(moves + sum(emitted[time, place] for time, place in enumerate(path)))


@pytest.mark.parametrize("seed", range(5))
def test_the_cut_is_the_best_of_all_ways(seed):
    rng = np.random.default_rng(seed)
    emitted = rng.normal(size=(2, 6, 3)) * 2
    found = markov.along_chain(emitted, np.array([6, 5]), np.array([3, 2]))
    for row, (frames, places) in enumerate([(6, 3), (5, 2)]):
        best = max(ways(frames, places), key=lambda path: worth(emitted[row], path))
        assert tuple(found[row].tolist()) == best


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("penalty", [-3.0, 0.0])
def test_the_words_are_the_best_of_all_words(seed, penalty):
    rng = np.random.default_rng(seed)
    likely = rng.normal(size=(2, 6, 2, 2)) * 2
    found = markov.in_loop(likely, np.array([6, 5]), penalty)
    for row, frames in enumerate([6, 5]):
        best, words = -np.inf, ()
        for count in (1, 2, 3):
            for said in itertools.product(range(2), repeat=count):
                chain = np.stack([likely[row, :, word, state] for word in said for state in range(2)], axis=1)
                for path in ways(frames, 2 * count):
                    value = worth(chain, path) + penalty * count
                    if value > best:
                        best, words = value, said
        assert tuple(found[row]) == words


def utterances(n: int, seed: int) -> Examples:
    """One to three of two words of 5 to 9 frames: one rises, the other falls."""
    rng = np.random.default_rng(seed)
    frames, said = [], []
    for _ in range(n):
        words = rng.integers(2, size=rng.integers(1, 4))
        parts = []
        for word in words:
            line = np.linspace(-1, 1, int(rng.integers(5, 10))) * (1 if word else -1)
            parts.append(np.stack([line, line**2], axis=1) + rng.normal(0, 0.1, (len(line), 2)))
        frames.append(np.concatenate(parts).astype(np.float32))
        said.append(["up" if word else "down" for word in words])
    return Examples({"frames": frames, "said": said})


def test_it_learns_words_from_their_order_alone():
    pytest.importorskip("sklearn")
    inputs, target = {"sound": AudioInput(column="frames")}, {"said": TranscriptTarget(column="said")}
    fitted = fit_baseline(
        "hmm-transcript",
        utterances(80, 0),
        utterances(20, 1),
        inputs,
        target,
        options={"states": 3, "mixtures": 1},
    )
    test = utterances(40, 2)
    said = fitted.predict(test)["said"].values
    assert score("wer", said, [" ".join(words) for words in test["said"]]) < 0.05
    assert len(fitted.settings["said"]["wrong on validation"]) == 5
    # too short for any word: nothing is said
    assert fitted.predict(Examples({"frames": [np.zeros((2, 2), np.float32)]}))["said"].values == [""]


def test_two_inputs_are_refused():
    pytest.importorskip("sklearn")
    inputs = {"a": AudioInput(column="frames"), "b": AudioInput(column="frames")}
    with pytest.raises(ConfigError, match="hmm-transcript reads one input of kind audio; got a, b"):
        fit_baseline(
            "hmm-transcript",
            utterances(5, 0),
            utterances(2, 1),
            inputs,
            {"said": TranscriptTarget(column="said")},
        )
