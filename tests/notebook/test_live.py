"""Progress in a notebook: one output, drawn now and then, and one line in the end."""

from __future__ import annotations

import pytest

from optimize.notebook.live import SECONDS_BETWEEN, Live
from optimize.notebook.shown import Bundle
from optimize.progress import in_notebook

NASTY = "<img src=x onerror=alert(1)>\x1b[2J"


class Screen:
    """What was shown, and the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.shown: list[tuple[Bundle, bool]] = []
        self.live = Live(lambda bundle, update: self.shown.append((dict(bundle), update)), lambda: self.now)


@pytest.fixture
def screen() -> Screen:
    return Screen()


def test_it_is_one_output(screen: Screen) -> None:
    screen.live.start("teacher", "distill.finetune")
    screen.live.finish("teacher", seconds=2)
    screen.live.end("tiny: pass")
    assert [update for _, update in screen.shown] == [False, True, True]


def test_a_thousand_updates_are_few_drawings(screen: Screen) -> None:
    screen.live.start("teacher")
    for done in range(1000):
        screen.now += SECONDS_BETWEEN / 50
        screen.live.update("teacher", done, 1000, "loss 0.5")
    assert 15 <= len(screen.shown) <= 25
    assert 'value="0.9' in screen.shown[-1][0]["text/html"]


def test_in_the_end_it_is_one_line(screen: Screen) -> None:
    for name, cached in (("source", True), ("teacher", False), ("int8", False)):
        screen.live.start(name)
        screen.now += 30
        screen.live.finish(name, seconds=0 if cached else 30, cached=cached)
    screen.live.end("tiny: pass")
    last = screen.shown[-1][0]
    assert last["text/plain"] == "tiny: pass in 1:30 (source reused, teacher 30.0 s, int8 30.0 s)"
    assert last["text/html"] == f"<div>{last['text/plain']}</div>"


def test_warnings_stay_and_each_is_said_once(screen: Screen) -> None:
    screen.live.start("int8")
    for _ in range(3):
        screen.live.warn("int8", "no VNNI")
    screen.live.end("tiny: pass")
    assert screen.shown[-1][0]["text/plain"].splitlines()[1:] == ["warning: int8: no VNNI"]


def test_what_failed_and_what_was_stopped_is_said(screen: Screen) -> None:
    screen.live.start("teacher")
    screen.live.fail("teacher")
    screen.live.start("int8")
    screen.live.end("interrupted")
    assert screen.shown[-1][0]["text/plain"] == "interrupted in 0.00 s (teacher failed 0.00 s, int8 running 0.00 s)"


def test_what_never_began_is_shown_all_the_same(screen: Screen) -> None:
    screen.now = 1
    screen.live.update("scores", 1, 0)
    screen.live.end("failed")
    assert "scores" in screen.shown[0][0]["text/html"]


def test_nothing_of_a_recipe_is_markup(screen: Screen) -> None:
    screen.live.start(NASTY, NASTY)
    screen.now = 1
    screen.live.update(NASTY, 1, 2, NASTY)
    screen.live.warn(NASTY, NASTY)
    screen.live.end(NASTY)
    for bundle, _ in screen.shown:
        assert "<img" not in bundle["text/html"]
        assert not any("\x1b" in text for text in bundle.values())


def test_a_test_is_no_notebook() -> None:
    assert not in_notebook()
