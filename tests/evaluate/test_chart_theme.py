"""Colours that everyone can tell apart, scales, ticks, and numbers written for people."""

from __future__ import annotations

import math
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.evaluate.charts import (
    format_bytes,
    format_change,
    format_count,
    format_duration,
    format_number,
    format_percent,
)
from moekit.evaluate.charts.heatmap import _DARK_CELL
from moekit.evaluate.charts.scale import Scale, make_scale, tick_format, ticks
from moekit.evaluate.charts.theme import COLOURS, SERIES, clean, shorten, text_width

NAN = float("nan")

# colours ----------------------------------------------------------------------------------------------

# Machado, Oliveira & Fernandes 2009, severity 1, on linear RGB
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def linear(colour: np.ndarray) -> np.ndarray:
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


def contrast(first: np.ndarray, second: np.ndarray) -> float:
    """The contrast ratio of WCAG 2."""
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (first, second))
    return (high + 0.05) / (low + 0.05)


def oklab(colour: np.ndarray) -> np.ndarray:
    to_cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return to_lab @ np.cbrt(to_cones @ np.clip(colour, 0, 1))


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_series_colours_stand_out_from_the_background(dark: bool) -> None:
    surface, track = rgb(COLOURS["surface"][dark]), rgb(COLOURS["track"][dark])
    for name in ("ink", "muted", *SERIES):
        assert contrast(rgb(COLOURS[name][dark]), surface) >= 4.5, name
    for name in ("ink", "muted"):
        assert contrast(rgb(COLOURS[name][dark]), track) >= 4.5, name


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_first_four_series_colours_differ_for_the_colour_blind(kind: str, dark: bool) -> None:
    seen = {name: oklab(BLINDNESS[kind] @ linear(rgb(COLOURS[name][dark]))) for name in SERIES[:4]}
    for first, second in combinations(seen, 2):
        assert np.linalg.norm(seen[first] - seen[second]) >= 0.085, (first, second)


# scales and numbers -----------------------------------------------------------------------------------

finite = st.floats(-1e9, 1e9, allow_nan=False)


@given(st.lists(st.one_of(finite, st.none(), st.just(NAN)), max_size=6), st.booleans())
def test_a_scale_holds_its_values_and_its_ticks_lie_inside(values: list, log: bool) -> None:
    scale = make_scale(values, 0, 300, log=log)
    assert scale.low < scale.high
    for value in values:
        if scale.shows(value):
            assert -0.01 <= scale.at(value) <= 300.01
    found = ticks(scale)
    assert 1 <= len(found) <= 20
    assert found == sorted(set(found))
    labels = [tick_format(found, log)(value) for value in found]
    assert all(-0.01 <= scale.at(value) <= 300.01 for value in found)
    assert all(label and "nan" not in label for label in labels)


def test_ticks_are_round() -> None:
    assert ticks(Scale(0, 1, 0, 1)) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(Scale(3.31, 5.2, 0, 1), 4) == [3.5, 4.0, 4.5, 5.0]
    assert ticks(Scale(0.04, 2.0, 0, 1, log=True)) == [0.1, 0.3, 1.0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (format_count(1_234_567), "1.23 M"),
        (format_count(999_999), "1 M"),
        (format_count(-4096), "−4.1 k"),
        (format_count(0), "0"),
        (format_bytes(3.1e9), "3.1 GB"),
        (format_bytes(999.9999), "1 kB"),
        (format_duration(45), "45 s"),
        (format_duration(59.99), "1 min"),
        (format_duration(3599.7), "1 h"),
        (format_duration(90), "1 min 30 s"),
        (format_duration(0.0042), "4.2 ms"),
        (format_percent(0.5634, 0), "56%"),
        (format_change(-0.00001), "0.0%"),
        (format_change(0.012), "+1.2%"),
        (format_number(-0.0001, 2), "0.00"),
        (format_number(NAN), "–"),
        (format_count(None), "–"),
        (format_bytes(math.inf), "–"),
        (format_duration(None), "–"),
        (format_change(None), "–"),
    ],
)
def test_numbers_are_written_for_people(text: str, wanted: str) -> None:
    assert text == wanted


@given(st.text(max_size=60), st.floats(0, 200))
def test_shortened_text_fits_and_is_clean(text: str, room: float) -> None:
    short = shorten(text, 12, room)
    assert text_width(short, 12) <= max(room, text_width("…", 12)) + 1e-6
    ElementTree.fromstring(f"<a>{clean(short).replace('&', '&amp;').replace('<', '&lt;')}</a>")


@pytest.mark.parametrize("dark", [False, True])
def test_text_in_every_shade_of_a_cell_is_readable(dark: bool) -> None:
    heat, surface = rgb(COLOURS["heat"][dark]), rgb(COLOURS["surface"][dark])
    for opacity in np.linspace(0.03, 0.97, 95):
        name = "cell-low" if opacity < _DARK_CELL else "cell-high"
        cell = opacity * heat + (1 - opacity) * surface
        assert contrast(rgb(COLOURS[name][dark]), cell) >= 4.5, f"opacity {opacity:.2f}"
