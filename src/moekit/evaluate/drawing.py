"""Pictures of what a task's model answered, as PNG: boxes on pictures, masks beside them, generated ones in rows.

Pillow draws; it is part of the extra `tasks`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moekit.config.errors import MissingExtraError

# colours that are told apart on black, by the number of the class
COLOURS = (
    (0, 0, 0), (230, 90, 80), (90, 190, 90), (90, 140, 240), (240, 190, 60), (190, 110, 220), (80, 205, 205),
    (240, 140, 60), (150, 210, 90), (235, 130, 180), (170, 170, 170), (120, 100, 200),
)  # fmt: skip
_GAP = 4


def save_png(path: Path | str, picture: np.ndarray) -> Path:
    """Write `[H, W]` or `[H, W, 3]` of bytes. Errors: `MissingExtraError` without Pillow."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _pillow("Image").fromarray(np.ascontiguousarray(picture)).save(path)
    return path


def in_rows(pictures: Sequence[np.ndarray], columns: int, scale: int = 1) -> np.ndarray:
    """One picture `[H, W, 3]` of equally large ones, row by row, each pixel `scale` pixels wide.

    >>> in_rows([np.zeros((2, 2)), np.ones((2, 2, 1)), np.ones((2, 2))], columns=2, scale=3).shape
    (16, 16, 3)
    """
    shown = [np.kron(coloured(picture), np.ones((scale, scale, 1), np.uint8)) for picture in pictures]
    height, width, _ = shown[0].shape
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    page = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for place, picture in enumerate(shown):
        top, left = place // columns * (height + _GAP), place % columns * (width + _GAP)
        page[top : top + height, left : left + width] = picture
    return page


def coloured(picture: np.ndarray) -> np.ndarray:
    """`[H, W, 3]` bytes of a grey picture `[H, W]` or `[H, W, 1]`, or of one that has colours already."""
    picture = np.asarray(picture)
    picture = picture[..., None] if picture.ndim == 2 else picture
    return np.repeat(picture, 3 // picture.shape[-1], axis=2).astype(np.uint8)


def mask_picture(mask: np.ndarray) -> np.ndarray:
    """A colour for each class of a mask `[H, W]`; 0 is black."""
    palette = np.asarray(COLOURS, np.uint8)
    mask = np.asarray(mask)
    return palette[np.where(mask > 0, (mask - 1) % (len(COLOURS) - 1) + 1, 0)]


def boxes_picture(
    picture: np.ndarray, boxes: Sequence[Mapping[str, Any]], labels: Sequence[str], scale: int = 4
) -> np.ndarray:
    """A picture, enlarged, with boxes in the colours of their classes, and the classes' names.

    Args:
        picture: `[H, W]` or `[H, W, C]` of bytes.
        boxes: `{"box": [y, x, height, width], "label": ...}`, as detection answers, and with a score where it does.
        labels: all classes in order, by which colours are chosen.
        scale: pixels for a pixel.
    """
    image = _pillow("Image").fromarray(np.kron(coloured(picture), np.ones((scale, scale, 1), np.uint8)))
    pen = _pillow("ImageDraw").Draw(image)
    for one in boxes:
        y, x, height, width = (float(value) * scale for value in one["box"])
        place = list(labels).index(one["label"]) if one["label"] in labels else 0
        colour = COLOURS[place % (len(COLOURS) - 1) + 1]
        pen.rectangle([x, y, max(x, x + width - 1), max(y, y + height - 1)], outline=colour, width=2)
        score = f" {one['score']:.2f}" if "score" in one else ""
        pen.text((x + 3, max(0.0, y - 12)), f"{one['label']}{score}", fill=colour)
    return np.asarray(image)


def answer_picture(encoder: Any, answer: Mapping[str, Any], image: np.ndarray | None) -> np.ndarray | None:
    """What one answer looks like; None for an answer that is no picture.

    Args:
        encoder: of the target.
        answer: to one example, as `moekit.evaluate.task.predict` gives it.
        image: that was read, on which boxes are drawn; without it there is no picture of boxes.
    """
    if encoder.kind == "codes":
        return in_rows([np.clip(np.asarray(answer["prediction"]), 0, 255)], columns=1, scale=8)
    if encoder.kind == "mask":
        return in_rows([mask_picture(np.asarray(answer["prediction"]))], columns=1, scale=4)
    if encoder.kind == "boxes" and image is not None:
        return boxes_picture(image, answer["prediction"], encoder.labels)
    return None


def _pillow(module: str) -> Any:
    try:
        return importlib.import_module(f"PIL.{module}")
    except ImportError:
        raise MissingExtraError("drawing needs Pillow. Install it: pip install 'moekit[tasks]'") from None
