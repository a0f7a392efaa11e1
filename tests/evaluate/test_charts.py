"""Charts: well-formed, true to the numbers, readable by everyone, unharmed by hostile text and odd data."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from moekit.evaluate.charts import (
    Bars,
    Drawing,
    Mark,
    Reference,
    Series,
    bar_chart,
    draw_bars,
    draw_heat_map,
    draw_lines,
    draw_multiples,
    heat_map,
    horizontal_bars,
    line_chart,
    small_multiples,
)
from moekit.evaluate.charts.theme import text_width

SVG = "{http://www.w3.org/2000/svg}"
NAN = float("nan")
HOSTILE = "<script>alert(1)</script>\"'&]]>\x00\ud800"
CURVE = Series("MoE", [0, 1, 2, 3], [4.0, 3.0, 2.5, 2.25])
PAIR = [Bars("a", [1, 2]), Bars("b", [2, 1])]

CHARTS = {
    "line": lambda **more: line_chart([CURVE, Series("dense", [0, 3], [4.0, 2.5])], title="loss", **more),
    "bars": lambda **more: bar_chart(["code", "chinese"], PAIR, title="bars", **more),
    "horizontal": lambda **more: horizontal_bars(["code", "chinese"], PAIR, title="bars", **more),
    "heat": lambda **more: heat_map([[0.1, 0.9]], ["code"], ["0", "1"], title="heat", **more),
    "multiples": lambda **more: small_multiples(
        [draw_lines([CURVE], title="one"), draw_bars(["a"], [Bars("a", [1])], title="two")],
        columns=2,
        title="two panels",
        **more,
    ),
}


def parse(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    return root


def marks(svg: str, css_class: str) -> list[ElementTree.Element]:
    return [node for node in parse(svg).iter() if css_class in (node.get("class") or "").split()]


def texts(svg: str) -> list[str]:
    """What is written in the chart, without what shows on hover."""
    nodes = parse(svg).iter(f"{SVG}text")
    return [(node.text or "") + "".join(child.tail or "" for child in node) for node in nodes]


def tips(svg: str) -> list[str]:
    return [title.text or "" for node in parse(svg).iter() for title in node.findall(f"{SVG}title")][1:]


# every chart ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_an_accessible_self_contained_svg(name: str) -> None:
    svg = CHARTS[name](standalone=False)
    root = parse(svg)
    assert root.get("role") == "img"
    title = root.find(f"{SVG}title")
    assert title is not None
    assert title.text
    assert title.get("id") in (root.get("aria-labelledby") or "").split()
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in svg


@pytest.mark.parametrize("name", CHARTS)
def test_colours_are_variables_in_a_page_and_literal_for_both_themes_in_a_file(name: str) -> None:
    inside, alone = CHARTS[name](standalone=False), CHARTS[name](standalone=True)
    assert "var(--mk-" in inside
    assert "prefers-color-scheme" not in inside
    assert parse(inside).get("width") is None  # as wide as its place in the page
    assert "var(" not in alone  # librsvg and image viewers know no variables
    assert "@media (prefers-color-scheme: dark)" in alone
    assert float(parse(alone).get("width") or 0) > 0
    for css_class in re.findall(r'class="([^"]*)"', alone):
        for colour in re.findall(r"\b([fs]-[\w-]+)", css_class):
            assert alone.count(f".{colour}{{") == 2, f"{colour} needs a light and a dark rule"


@pytest.mark.parametrize("name", CHARTS)
def test_the_same_data_give_the_same_bytes_and_ids_are_unique(name: str) -> None:
    svg = CHARTS[name](standalone=False)
    assert svg == CHARTS[name](standalone=False)
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    for target in re.findall(r"url\(#([^)]+)\)", svg):
        assert target in ids


def test_hostile_text_stays_text_everywhere() -> None:
    svgs = [
        line_chart(
            [Series(HOSTILE, [0, 1], [1, 2])],
            title=HOSTILE,
            description=HOSTILE,
            heading=HOSTILE,
            x_label=HOSTILE,
            y_label=HOSTILE,
            references=[Reference(1.5, HOSTILE)],
            marks=[Mark(0.5, 1.5, HOSTILE)],
        ),
        bar_chart(
            [HOSTILE], [Bars(HOSTILE, [1]), Bars("b", [2])], title=HOSTILE, reference=Reference(1, HOSTILE)
        ),
        horizontal_bars([HOSTILE], [Bars(HOSTILE, [None]), Bars("b", [2])], title=HOSTILE, x_label=HOSTILE),
        heat_map(
            [[1.0]], [HOSTILE], [HOSTILE], title=HOSTILE, note=HOSTILE, subheading=HOSTILE, key_label=HOSTILE
        ),
    ]
    for svg in svgs:
        root = parse(svg)  # raises if a quote or a bracket got through
        assert not [node for node in root.iter() if node.tag.endswith("script")]
        assert "<script" not in svg
        svg.encode("utf-8")


def test_chinese_is_kept_and_counted_as_wide() -> None:
    svg = bar_chart(["中文新闻"], [Bars("模型", [1]), Bars("b", [1])], title="中文")
    assert "中文新闻" in texts(svg)
    assert "模型" in texts(svg)
    assert "Noto Sans CJK SC" in svg
    assert text_width("中文", 10) == 20


# lines ------------------------------------------------------------------------------------------------


def test_each_series_is_one_path_whose_points_follow_the_values() -> None:
    svg = line_chart([CURVE, Series("dense", [0, 3], [4.0, 2.5])], title="loss")
    paths = [node for node in marks(svg, "series") if node.tag == f"{SVG}path"]
    assert len(paths) == 2
    points = [
        tuple(map(float, pair.split())) for pair in re.findall(r"[\d.]+ [\d.]+", paths[0].get("d") or "")
    ]
    xs, ys = zip(*points, strict=True)
    assert np.allclose(np.diff(xs), np.diff(xs)[0], atol=0.11)  # equal steps of x
    drops = np.diff(ys)
    assert np.allclose(drops / drops[0], [1.0, 0.5, 0.25], atol=0.01)  # 4 -> 3 -> 2.5 -> 2.25, downwards
    assert drops[0] > 0
    assert paths[0].get("stroke-dasharray") != paths[1].get("stroke-dasharray")  # told apart without colour


def test_missing_values_break_the_line_and_a_lone_value_is_a_dot() -> None:
    svg = line_chart([Series("a", range(7), [1, 2, None, 3, NAN, 4, 5])], title="gaps")
    (path,) = [node for node in marks(svg, "series") if node.tag == f"{SVG}path"]
    assert (path.get("d") or "").count("M") == 2
    dots = [node for node in marks(svg, "series") if node.tag == f"{SVG}circle"]
    assert len(dots) == 1


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([5], [2.0]),
        ([0, 1, 2], [4.0, 4.0, 4.0]),
        ([0, 1], [0.0, 0.0]),
        ([0, 1], [None, NAN]),
        ([], []),
        ([0, 1], [math.inf, -math.inf]),
        ([1e-9, 2e-9], [1e12, 3e12]),
        ([0, 1], [-1e-12, 1e-12]),
        ([None, 1], [1.0, 2.0]),
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_odd_data_never_break_a_line_chart(x: list, y: list, log: bool) -> None:
    svg = line_chart([Series("a", x, y), Series("b", [0, 1], [1, 2])], title="odd", y_log=log)
    alone = line_chart([Series("a", x, y)], title="odd", x_log=log, y_log=log, x_label="x", y_label="y")
    for one in (svg, alone):
        parse(one)
        assert "nan" not in one
        assert "inf" not in re.sub(r"[a-z]+inf|inf[a-z]+", "", one)


def test_a_chart_without_values_says_so() -> None:
    assert "no values" in texts(line_chart([Series("a", [0], [None])], title="empty"))


def test_a_log_axis_places_decades_at_equal_distances_and_skips_zeros() -> None:
    svg = line_chart([Series("a", [1, 2, 3, 4], [1.0, 0.1, 0.01, 0.0])], title="log", y_log=True)
    (path,) = [node for node in marks(svg, "series") if node.tag == f"{SVG}path"]
    heights = [float(pair.split()[1]) for pair in re.findall(r"[\d.]+ [\d.]+", path.get("d") or "")]
    assert len(heights) == 3
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.11)


def test_a_range_is_shaded_between_its_bounds() -> None:
    svg = line_chart([Series("a", [0, 1], [2, 3], low=[1, 2], high=[3, 4])], title="range")
    (area,) = marks(svg, "range")
    corners = [tuple(map(float, pair.split(","))) for pair in (area.get("points") or "").split()]
    assert len(corners) == 4
    assert corners[0][1] < corners[3][1]  # the upper bound lies above the lower one on the screen


@pytest.mark.parametrize("y", [[4 * 0.93**i for i in range(40)], [0.1 * i for i in range(40)]])
def test_the_mark_sits_on_its_point_and_its_label_keeps_clear_of_the_lines(y: list[float]) -> None:
    x = list(range(40))
    svg = line_chart(
        [Series("a", x, y)], title="mark", marks=[Mark(20, y[20], "the first and long row\nthe second")]
    )
    (ring,) = marks(svg, "mark")
    (path,) = [node for node in marks(svg, "series") if node.tag == f"{SVG}path"]
    points = [tuple(map(float, pair.split())) for pair in re.findall(r"[\d.]+ [\d.]+", path.get("d") or "")]
    assert (float(ring.get("cx") or 0), float(ring.get("cy") or 0)) == pytest.approx(points[20], abs=0.06)
    (label,) = [node for node in parse(svg).iter(f"{SVG}text") if node.text == "the first and long row"]
    left, base = float(label.get("x") or 0), float(label.get("y") or 0)
    if label.get("text-anchor") == "end":
        left -= text_width("the first and long row", 11)
    right = left + text_width("the first and long row", 11)
    assert not [1 for px, py in points if left <= px <= right and base - 10 <= py <= base + 14]


def test_lines_are_clipped_to_the_limits() -> None:
    svg = line_chart([Series("a", [0, 1, 2], [100.0, 2.0, 1.0])], title="cut", y_limits=(None, 3.0))
    (clip,) = list(parse(svg).iter(f"{SVG}clipPath"))
    (group,) = [node for node in parse(svg).iter(f"{SVG}g") if node.get("clip-path")]
    assert group.get("clip-path") == f"url(#{clip.get('id')})"


def test_direct_labels_keep_apart_and_inside() -> None:
    runs = [Series(f"run {index}", [0, 1], [5, 2 + index * 1e-3]) for index in range(6)]
    svg = line_chart(runs, title="crowded", labels="direct", width=400, height=240)
    labels = [node for node in parse(svg).iter(f"{SVG}text") if (node.text or "").startswith("run ")]
    heights = sorted(float(node.get("y") or 0) for node in labels)
    assert len(heights) == 6
    assert min(np.diff(heights)) >= 12
    assert heights[-1] <= 240
    assert all(float(n.get("x") or 0) + text_width(n.text or "", 12) <= 400 for n in labels)


def test_hovering_tells_every_line_at_that_place() -> None:
    svg = line_chart(
        [CURVE, Series("dense", [0, 1, 2, 3], [5.0, 4.0, 3.5, 3.0])],
        title="loss",
        x_label="steps",
        value_format=lambda value: f"{value:.2f}",
    )
    assert len(marks(svg, "hit")) == 4
    assert "2 steps\nMoE: 2.50\ndense: 3.50" in tips(svg)


def test_a_long_legend_does_not_eat_the_plot() -> None:
    names = [Series("a very long name of a series " + str(index), [0, 1], [index, 1]) for index in range(12)]
    drawing = draw_lines(names, title="many", width=300, height=200)
    assert drawing.height >= 12 * 19 + 90


# bars -------------------------------------------------------------------------------------------------


def test_bars_start_at_zero_and_are_as_long_as_their_values() -> None:
    upright = marks(bar_chart(["a", "b"], [Bars("x", [1.0, 3.0]), Bars("y", [2.0, 1.5])], title="b"), "bar")
    heights = [float(node.get("height") or 0) for node in upright]
    assert np.allclose(np.array(heights) / heights[0], [1, 2, 3, 1.5], rtol=0.01)
    feet = {round(float(node.get("y") or 0) + float(node.get("height") or 0), 1) for node in upright}
    assert feet == {280 - 22}  # on the lower edge of the plot
    flat = marks(horizontal_bars(["a", "b"], [Bars("x", [1.0, 3.0])], title="b"), "bar")
    widths = [float(node.get("width") or 0) for node in flat]
    assert widths[1] / widths[0] == pytest.approx(3, rel=0.01)


def test_negative_bars_lie_on_the_other_side_of_zero() -> None:
    left, right = marks(horizontal_bars(["a", "b"], [Bars("x", [-2.0, 1.0])], title="b"), "bar")
    zero = float(right.get("x") or 0)
    assert float(left.get("x") or 0) + float(left.get("width") or 0) == pytest.approx(zero, abs=0.05)
    above, below = marks(bar_chart(["a", "b"], [Bars("x", [2.0, -1.0])], title="b"), "bar")
    assert float(below.get("y") or 0) == pytest.approx(
        float(above.get("y") or 0) + float(above.get("height") or 0), abs=0.05
    )


@pytest.mark.parametrize("chart", [bar_chart, horizontal_bars])
def test_missing_bars_are_dashes(chart) -> None:  # type: ignore[no-untyped-def]
    svg = chart(["a", "b"], [Bars("x", [1.0, None]), Bars("y", [NAN, 0.0])], title="b")
    assert texts(svg).count("–") == 2
    assert len(marks(svg, "bar")) == 2
    parse(chart([], [Bars("x", [])], title="none"))
    parse(chart(["a"], [Bars("x", [None])], title="none"))
    parse(chart(["a"], [Bars("x", [0.0])], title="zero"))


def test_values_are_written_where_they_fit_only() -> None:
    few = bar_chart(["a", "b"], [Bars("x", [1.25, 2.5])], title="few", value_format=lambda v: f"{v:.2f}")
    many = bar_chart([str(i) for i in range(64)], [Bars("x", [1.17] * 64)], title="many")
    assert "1.25" in texts(few)
    assert "1.17" not in texts(many)
    assert len(marks(many, "bar")) == 64
    names = [text for text in texts(many) if text.isdigit()]
    assert 4 < len(names) < 40  # every n-th expert is named


def test_long_names_are_cut_and_told_in_full_on_hover() -> None:
    name = "a domain with a name that is far too long for its place in the chart"
    for svg in (
        horizontal_bars([name, "b"], [Bars("x", [1, 2])], title="h"),
        heat_map([[1.0], [2.0]], [name, "b"], ["c"], title="h"),
    ):
        assert name not in texts(svg)
        assert any(text.endswith("…") for text in texts(svg))
        assert name in tips(svg)


# heat maps --------------------------------------------------------------------------------------------


def test_a_heat_map_shades_by_value_and_names_each_cell() -> None:
    svg = heat_map(
        [[0.0, 0.5], [1.0, None]], ["code", "english"], ["3", "7"], title="h", column_tip="expert",
        tip_format=lambda value: f"{value:.0%}",
    )  # fmt: skip
    shades = [float(node.get("fill-opacity") or 0) for node in marks(svg, "cell")]
    assert shades[0] < shades[1] < shades[2]
    assert shades[1] == pytest.approx((shades[0] + shades[2]) / 2, abs=0.01)
    assert "code, expert 7: 50%" in tips(svg)
    assert "english, expert 7: no value" in tips(svg)
    assert "–" in texts(svg)


def test_sixty_four_experts_fit_without_values_and_get_a_key() -> None:
    values = [[(row + column) % 7 / 7 for column in range(64)] for row in range(3)]
    wide = draw_heat_map(values, ["a", "b", "c"], [str(i) for i in range(64)], title="h", width=540)
    svg = wide.to_svg()
    assert len(marks(svg, "cell")) == 192
    for cell in marks(svg, "cell"):
        assert float(cell.get("x") or 0) >= 0
        assert float(cell.get("x") or 0) + float(cell.get("width") or 0) <= 540
    numbers = [text for text in texts(svg) if "." in text]
    assert len(numbers) <= 2  # the two ends of the key, no values
    tall = draw_heat_map([[0.5, 0.2]] * 64, [str(i) for i in range(64)], ["a", "b"], title="h", cell_height=5)
    assert tall.height < 64 * 5 + 90
    parse(tall.to_svg())


@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[None, NAN]], [[]], [[-1.0, 1.0]], [[1e-12, 1e12]]])
def test_odd_data_never_break_a_heat_map(values: list) -> None:
    svg = heat_map(values, ["a"], [str(i) for i in range(len(values[0]))], title="odd")
    parse(svg)
    assert "nan" not in svg


def test_small_multiples_place_all_drawings_without_overlap() -> None:
    panels = [draw_lines([CURVE], title=str(index), width=200, height=150) for index in range(5)]
    sheet = draw_multiples(panels, columns=3, title="five", gap=20)
    assert (sheet.width, sheet.height) == (3 * 200 + 2 * 20, 2 * 150 + 20)
    svg = sheet.to_svg()
    assert len(marks(svg, "series")) == 5
    places = re.findall(r"translate\(([\d.]+) ([\d.]+)\)", svg)
    assert places == [("0", "0"), ("220", "0"), ("440", "0"), ("0", "170"), ("220", "170")]
    assert isinstance(sheet, Drawing)
    parse(draw_multiples([], columns=3, title="none").to_svg())
