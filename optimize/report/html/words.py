"""How a page writes numbers and text that came from recipes, data and libraries."""

from __future__ import annotations

import math
import re
from typing import Any

from optimize.report.table import megabytes

_HOSTILE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
MINUS = "\N{MINUS SIGN}"
SETTING = ("batch_size", "sequence_length", "prompt_length", "new_tokens", "threads")
"""What times are measured at, in the order of a comparison's `setting`."""
_UNITS = {
    "batch_size": "batch {}",
    "sequence_length": "{} tokens",
    "prompt_length": "prompt {}",
    "new_tokens": "{} new tokens",
    "threads": "{} thread{s}",
}


def clean(text: object) -> str:
    """Text without control characters, directional overrides and what no document may hold."""
    return _HOSTILE.sub("\N{REPLACEMENT CHARACTER}", str(text))


def number(value: float | None, digits: int = 4) -> str:
    """As many digits as tell something: `0.8067`, `12.3`, `91,581,440`; `?` where there is none."""
    if value is None or not math.isfinite(value):
        return "?"
    if abs(value) >= 10_000:
        return _signed(f"{value:,.0f}")
    text = f"{value:.{digits}g}"
    return _signed(f"{value:.0f}" if "e+" in text else text)


def change(value: float | None) -> str:
    """A difference with its sign: `+0.003`."""
    if value is None or not math.isfinite(value):
        return "?"
    return _signed(f"{value:+.3f}" if abs(value) < 10 else f"{value:+.4g}")


def times(value: float | None) -> str:
    """A ratio: `3.27×`."""
    if value is None or not math.isfinite(value):
        return "?"
    return f"{value:.2f}×" if value < 100 else f"{value:,.0f}×"


def milliseconds(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "?"
    digits = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f} ms"


def bytes_words(value: float | None) -> str:
    """Bytes as people read them, also of an axis that begins at 0."""
    return "?" if value is None else megabytes(value) if value else "0"


def round_milliseconds(value: float) -> str:
    """Of an axis, whose ticks are round: `20 ms`."""
    return f"{number(value)} ms"


def in_unit(value: float | None, unit: str) -> str:
    """A comparison's number in its unit."""
    return change(value) if unit == "difference" else times(value) if unit in ("ratio", "speedup") else number(value)


def interval(ci: Any, unit: str) -> str:
    """`[−0.005, +0.004]`."""
    low, high = ci
    return f"[{in_unit(low, unit)}, {in_unit(high, unit)}]"


def setting_words(label: str | None) -> str:
    """`batch 8, 128 tokens, 1 thread` of `batch_size=8,sequence_length=128,threads=1`."""
    words = []
    for part in (label or "").split(","):
        name, _, value = part.partition("=")
        if value:
            words.append(_UNITS.get(name, f"{name} {{}}").format(value, s="" if value == "1" else "s"))
    return ", ".join(words)


def time_words(metric: str, label: str | None) -> str:
    """What a time is of, for a title."""
    phase = {"prefill": "first token", "decode": "each further token"}.get(metric, metric)
    at = setting_words(label)
    return f"{phase}, {at}" if at else phase


def short(text: object, most: int = 24) -> str:
    """The text, or its two ends."""
    whole = clean(text)
    return whole if len(whole) <= most else f"{whole[: most - most // 3 - 1]}…{whole[len(whole) - most // 3 :]}"


def _signed(text: str) -> str:
    return text.replace("-", MINUS)
