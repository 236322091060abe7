"""The block `track`: a tracker's name, a block with its settings, or a list of these."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from optimize.masking import masked
from optimize.recipe.blocks import did_you_mean, read_block, show
from optimize.recipe.stages import installed
from optimize.recipe.text import Text, Trail
from optimize.track import TRACKERS, Target

MAX_TARGETS = 10


def read_track(text: Text, value: Any) -> tuple[Target, ...]:
    """What can be sent to; mistakes are in `text`, and no password of an address is in them."""
    before = len(text.diagnostics)
    if isinstance(value, list):
        if len(value) > MAX_TARGETS:
            text.report(("track",), f"at most {MAX_TARGETS} trackers")
        found = [_read(text, one, ("track", number)) for number, one in enumerate(value[:MAX_TARGETS])]
    else:
        found = [] if value is None else [_read(text, value, ("track",))]
    addresses = [one for one in _texts(value) if "://" in one]
    text.diagnostics[before:] = [
        replace(
            one,
            message=masked(one.message, *addresses),
            file=masked(one.file, *addresses),
            source_line=masked(one.source_line, *addresses),
        )
        for one in text.diagnostics[before:]
    ]
    return tuple(target for target in found if target)


def _read(text: Text, value: Any, trail: Trail) -> Target | None:
    block = {"to": value} if isinstance(value, str) else value
    if not isinstance(block, dict):
        if len(trail) > 1:  # of a single one the document's own type is told already
            text.report(trail, f"expected a tracker's name or a mapping of keys, got {show(value)}")
        return None
    place = trail if isinstance(value, str) else (*trail, "to")
    if "to" not in block:
        text.report(trail, "the key `to` is missing", f"one of {', '.join(TRACKERS)}", key=True)
        return None
    tracker = TRACKERS.get(block["to"]) if isinstance(block["to"], str) else None
    if tracker is None:
        text.report(place, f"no tracker is named {show(block['to'])}", did_you_mean(block["to"], TRACKERS))
        return None
    if not any(installed(library) for library in tracker.libraries):
        message = f"`{tracker.name}` is not installed here"
        text.report(place, message, f'pip install "optimize-workbench[{tracker.extra}]"')
    rest = {key: setting for key, setting in block.items() if key != "to"}
    config = read_block(text, tracker.load().Config, rest, trail, also=("to",))
    return Target(tracker.name, config) if config else None


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [found for inner in value.values() for found in _texts(inner)]
    if isinstance(value, list):
        return [found for inner in value for found in _texts(inner)]
    return [value] if isinstance(value, str) else []
