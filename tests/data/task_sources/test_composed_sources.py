"""Composed examples: boxes that fit, directions that are true, pairs that add up, parts with items of their own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moekit.config.errors import ConfigError
from moekit.data.examples import Examples, TaskData
from moekit.data.task_sources import composed
from moekit.data.task_sources.images import FASHION_LABELS


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def clothes(values: range) -> Examples:
    """One item for each value: a rectangle of that grey level, not square, away from the border."""
    images = np.zeros((len(values), 28, 28, 1), np.uint8)
    for image, value in zip(images, values, strict=True):
        image[3 : 5 + value % 20, 4 : 10 + value % 7] = value
    return Examples({"image": images, "label": [FASHION_LABELS[value % 10] for value in values]})


def digits(values: range) -> Examples:
    images = np.zeros((len(values), 28, 28, 1), np.uint8)
    for image, value in zip(images, values, strict=True):
        image[4:24, 8:16] = value
    return Examples({"image": images, "label": [str(value % 10) for value in values]})


def test_boxes_hold_their_items_tightly_and_apart() -> None:
    items = clothes(range(1, 41))
    canvases = composed.compose_canvases(items, 60, rng())
    assert {len(boxes) for boxes in canvases["boxes"]} == {1, 2, 3}
    for image, boxes, labels, mask in zip(
        *(canvases[n] for n in ("image", "boxes", "labels", "mask")), strict=True
    ):
        covered = np.zeros((64, 64), int)
        for (y, x, height, width), label in zip(boxes, labels, strict=True):
            assert y >= 0
            assert x >= 0
            inside = image[y : y + height, x : x + width, 0]
            assert inside.shape == (height, width)
            assert len(np.unique(inside)) == 1
            value = int(inside[0, 0])
            assert (height, width) == (2 + value % 20, 6 + value % 7)
            assert label == FASHION_LABELS[value % 10]
            assert (mask[y : y + height, x : x + width] == 1 + value % 10).all()
            covered[y : y + height, x : x + width] += 1
        assert covered.max() == 1
        assert (image[..., 0][covered == 0] == 0).all()
        assert ((mask > 0) == (covered == 1)).all()


def test_holes_of_an_item_are_not_its_pixels() -> None:
    ring = np.zeros((1, 28, 28, 1), np.uint8)
    ring[0, 5:9, 5:9] = 7
    ring[0, 6:8, 6:8] = 0
    canvases = composed.compose_canvases(Examples({"image": ring, "label": ["bag"]}), 1, rng(4))
    y, x, height, width = canvases["boxes"][0][0]
    assert (height, width) == (4, 4)
    assert (canvases["mask"][0, y : y + 4, x : x + 4] == [[9] * 4, [9, 0, 0, 9], [9, 0, 0, 9], [9] * 4]).all()


def test_clips_move_as_their_label_says() -> None:
    clips = composed.compose_clips(digits(range(1, 31)), 200, 5, rng())
    assert clips["clip"].shape == (200, 5, 32, 32)
    assert set(clips["label"]) == set(composed.DIRECTIONS)
    assert set(clips["speed"]) == set(composed.SPEEDS)
    for clip, label, digit, speed in zip(
        *(clips[n] for n in ("clip", "label", "digit", "speed")), strict=True
    ):
        assert clip.max() % 10 == int(digit)
        step = (composed.DIRECTIONS[label][0] * speed, composed.DIRECTIONS[label][1] * speed)
        for before, after in itertools.pairwise(clip):
            assert np.array_equal(np.roll(before, step, axis=(0, 1)), after)
            # and in no other direction
            assert not np.array_equal(np.roll(before, (-step[0], -step[1]), axis=(0, 1)), after)


def test_a_single_frame_does_not_tell_the_direction() -> None:
    clips = composed.compose_clips(digits(range(1, 11)), 4000, 4, rng())
    places = np.stack([frame.any(1) for frame in clips["clip"][:, 0]]).astype(float)
    up = np.asarray(clips["label"]) == "up"
    down = np.asarray(clips["label"]) == "down"
    # how often each row holds a pixel of the first frame: 10 of 32 rows, whatever the direction
    assert abs(places[up].mean(0) - 10 / 32).max() < 0.1
    assert abs(places[down].mean(0) - 10 / 32).max() < 0.1


def spoken(values: range) -> Examples:
    return Examples(
        {
            "frames": [np.full((1 + value % 3, 13), value, np.float32) for value in values],
            "label": [str(value % 10) for value in values],
        }
    )


def test_pairs_say_whether_they_agree_and_add_up() -> None:
    pairs = composed.compose_pairs(spoken(range(50)), digits(range(100, 150)), 400, rng())
    for frames, image, same, total, heard, seen in zip(
        *(pairs[n] for n in ("frames", "image", "same", "sum", "spoken", "written")), strict=True
    ):
        assert frames[0, 0] % 10 == int(heard)
        assert image.max() % 10 == int(seen)
        assert same == ("yes" if heard == seen else "no")
        assert int(total) == int(heard) + int(seen)
    assert pairs["same"].count("yes") == 200
    # neither side alone tells: each digit is heard and seen with both answers
    for side in ("spoken", "written"):
        assert len(set(zip(pairs[side], pairs["same"], strict=True))) == 20
    assert len(composed.compose_pairs(spoken(range(50)), digits(range(50)), 0, rng())) == 0


def test_numbers_are_recordings_one_behind_the_other() -> None:
    items = spoken(range(50))
    numbers = composed.compose_numbers(items, 100, rng())
    assert {len(digits) for digits in numbers["digits"]} == {2, 3, 4, 5}
    assert {digit for digits in numbers["digits"] for digit in digits} == {str(n) for n in range(10)}
    for frames, digits in zip(numbers["frames"], numbers["digits"], strict=True):
        # each recording is 1 to 3 frames of one value, whose last figure is the digit
        said, at = [], 0
        while at < len(frames):
            value = int(frames[at, 0])
            assert (frames[at : at + 1 + value % 3] == value).all()
            said.append(str(value % 10))
            at += 1 + value % 3
        assert said == digits
    assert len(composed.compose_numbers(items, 0, rng())) == 0


@pytest.fixture
def _small_sources(monkeypatch) -> None:
    """Each item has a value of its own, so that a composed example tells what it was composed from."""

    def data(make, *bounds: int) -> TaskData:
        parts = [make(range(low, high)) for low, high in itertools.pairwise(bounds)]
        return TaskData(parts[0], parts[1], parts[2])

    monkeypatch.setattr(composed, "fashion_mnist", lambda fetch: data(clothes, 1, 201, 201, 251))
    monkeypatch.setattr(composed, "mnist_10k", lambda fetch: data(digits, 1, 101, 151, 251))
    monkeypatch.setattr(composed, "spoken_digits", lambda fetch: data(spoken, 0, 200, 200, 250))


def values_of(examples: Examples, column: str) -> set[int]:
    return {int(value) for example in examples[column] for value in np.unique(example)} - {0}


@pytest.mark.usefixtures("_small_sources")
@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("canvases", "image"),
        ("moving_digits", "clip"),
        ("digit_pairs", "frames"),
        ("digit_pairs", "image"),
        ("spoken_numbers", "frames"),
    ],
)
def test_parts_share_no_item_and_the_seed_decides(name, column) -> None:
    source = getattr(composed, name)
    sizes = {"n_train": 200, "n_validation": 30, "n_test": 40}
    data = source(None, **sizes)
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [200, 30, 40]
    values = [values_of(part, column) for part in parts]
    assert all(len(found) > 5 for found in values)
    assert all(not (one & other) for one, other in itertools.combinations(values, 2))
    assert data.fingerprint() == source(None, **sizes).fingerprint()
    assert data.fingerprint() != source(None, **sizes, seed=1).fingerprint()
    # more to train on changes nothing of what is tested on
    more = source(None, **{**sizes, "n_train": 210})
    assert TaskData(more.test, more.test, more.test).fingerprint() == (
        TaskData(data.test, data.test, data.test).fingerprint()
    )
    assert "composed by moekit" in data.sources[-1].origin
    assert len(source(None, **{**sizes, "n_validation": 0}).validation) == 0


@pytest.mark.usefixtures("_small_sources")
def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.options\.n_test must be at least 1; got 0"):
        composed.canvases(None, n_test=0)
    with pytest.raises(ConfigError, match=r"data.options.n_frames must be in 2..64; got 1"):
        composed.moving_digits(None, n_frames=1)
