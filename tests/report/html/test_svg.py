from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimize.report.html import svg, words
from optimize.report.html.svg import Scale, mark, picture, scale_of, tag, whisker, x_axis

finite = st.floats(-1e12, 1e12, allow_nan=False)
positive = st.floats(1e-9, 1e9)
unhurried = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@unhurried
@given(values=st.lists(finite, min_size=1, max_size=8), zero=st.booleans())
def test_a_scale_holds_its_values_in_their_order(values: list[float], zero: bool) -> None:
    scale = scale_of(values, 10, 350, zero=zero)
    places = [scale(value) for value in sorted(values)]
    assert all(10 <= place <= 350 for place in places)
    assert places == sorted(places)
    assert all(scale.low <= value <= scale.high for value in values)
    if zero:
        assert scale.low <= 0


@unhurried
@given(values=st.lists(positive, min_size=1, max_size=8))
def test_a_logarithmic_scale_does_too(values: list[float]) -> None:
    scale = scale_of(values, 350, 10, log=True)  # upwards
    places = [scale(value) for value in sorted(values)]
    assert all(10 <= place <= 350 for place in places)
    assert places == sorted(places, reverse=True)


@unhurried
@given(values=st.lists(finite, min_size=2, max_size=5), log=st.booleans(), most=st.integers(2, 8))
def test_ticks_are_inside_and_rise(values: list[float], log: bool, most: int) -> None:
    scale = scale_of([abs(value) for value in values] if log else values, 0, 100, log=log)
    ticks = scale.ticks(most)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= 4 * most
    assert all(scale.low - 1e-9 * abs(scale.low) <= tick <= scale.high + 1e-9 * abs(scale.high) for tick in ticks)


def test_ticks_are_round() -> None:
    assert Scale(0, 10, 0, 100).ticks(5) == [0, 2, 4, 6, 8, 10]
    assert Scale(0.9, 110, 0, 100, log=True).ticks(10) == [1, 2, 5, 10, 20, 50, 100]


@pytest.mark.parametrize("values", [[], [None], [math.nan, math.inf], [0.0], [5.0, 5.0]])
@pytest.mark.parametrize("log", [False, True])
def test_a_scale_of_nothing_much_still_draws(values: list[float | None], log: bool) -> None:
    scale = scale_of(values, 0, 100, log=log)
    assert scale.low < scale.high
    assert 0 <= scale(1.0) <= 100


@unhurried
@given(text=st.text(max_size=60))
def test_text_of_elements_comes_back_as_it_went_in(text: str) -> None:
    element = ET.fromstring(str(tag("text", text, class_=text)))
    assert len(element) == 0
    assert (element.text or "").replace("\r", "\n") == words.clean(text).replace("\r", "\n")
    assert set(element.attrib) == {"class"}


def test_clean_takes_out_what_commands_and_what_turns_text_round_but_no_letters() -> None:
    assert words.clean("a\x1b[31mb\u202ec\u2066d\x00") == "a\ufffd[31mb\ufffdc\ufffdd\ufffd"
    kept = "naïve 映画　good\u00a0one 👩\u200d👧 עברית\n\tend"
    assert words.clean(kept) == kept


@unhurried
@given(estimate=finite, half=st.floats(0, 1e6))
def test_a_whisker_contains_its_estimate_and_stays_inside(estimate: float, half: float) -> None:
    scale = scale_of([estimate - half, estimate + half], 8, 352)
    lines = ET.fromstring(f"<g>{whisker(scale, 5, (estimate - half, estimate + half), 'x')}</g>")
    xs = [float(line.attrib[end]) for line in lines for end in ("x1", "x2")]
    assert min(xs) - 0.01 <= scale(estimate) <= max(xs) + 0.01
    assert all(8 <= x <= 352 for x in xs)


def test_an_unknown_end_runs_to_the_frame_without_a_cap() -> None:
    scale = Scale(0, 10, 0, 100)
    lines = ET.fromstring(f"<g>{whisker(scale, 5, (2.0, None), 'x')}</g>")
    assert [(line.attrib["x1"], line.attrib["x2"]) for line in lines] == [("20", "100"), ("20", "20")]


@pytest.mark.parametrize("shape", ["circle", "square", "diamond", "triangle"])
def test_marks_are_centred(shape: str) -> None:
    element = ET.fromstring(str(mark(shape, 50, 50, 10, "x")))
    if shape == "circle":
        assert (element.attrib["cx"], element.attrib["r"]) == ("50", "10")
    else:
        points = [tuple(map(float, point.split(","))) for point in element.attrib["points"].split()]
        assert min(x for x, _ in points) + max(x for x, _ in points) == pytest.approx(100)


def test_a_picture_says_what_it_shows() -> None:
    element = ET.fromstring(str(picture("p", 100, "A & B", "<desc>")))
    assert element.attrib["role"] == "img"
    assert element.attrib["aria-labelledby"] == "p-title p-description"
    assert [child.text for child in element] == ["A & B", "<desc>"]
    assert {child.attrib["id"] for child in element} == {"p-title", "p-description"}


def test_labels_of_an_axis_do_not_touch() -> None:
    axis = ET.fromstring(f"<g>{x_axis(Scale(0, 1, 8, 352), 50, 0, lambda v: f'{v:.1f} of something long')}</g>")
    texts = [t for t in axis if t.tag == "text"]
    spans = [(float(t.attrib["x"]), len(t.text or "") * svg.CHARACTER) for t in texts]
    assert spans
    for (left, width), (right, other) in pairwise(spans):
        assert right - other / 2 >= left + width / 2
