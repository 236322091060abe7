"""Reading a result that somebody else may have written: a run.json, or the document of an error.

A job for pull requests from forks runs the fork's code, so what it hands on is hostile: its size, its depth and every
value that the outputs draw are checked here, before anything is drawn or posted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from optimize.errors import RecipeError

MAX_BYTES = 8 << 20
MAX_NESTING = 32

_Text = Annotated[str, Field(max_length=20_000)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Ends = Annotated[list[_Number | None], Field(min_length=2, max_length=2)]
_Limit = Literal["min", "max", "max_ms", "max_drop", "max_increase", "min_ratio", "max_ratio", "min_speedup"]
_Count = Annotated[int, Field(ge=0, le=1 << 60)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Diagnostic(_Model):
    message: _Text
    path: _Text = ""
    hint: _Text | None = None
    location: _Text = ""


class _Error(_Model):
    type: _Text
    message: _Text
    stage: _Text | None = None
    location: _Text | None = None
    hint: _Text | None = None
    diagnostics: Annotated[list[_Diagnostic], Field(max_length=1_000)] = []


class _Acknowledged(_Model):
    reason: _Text = ""
    expires: _Text = ""
    location: _Text | None = None


class _Gate(_Model):
    metric: _Text
    artifact: _Text
    over: _Text | None
    setting: _Text | None
    limit: Annotated[dict[_Limit, _Number], Field(min_length=1, max_length=1)]
    estimate: _Number | None
    ci: _Ends
    margin: _Number | None
    verdict: Literal["pass", "fail", "inconclusive"]
    reason: _Text
    location: _Text | None = None
    acknowledged: _Acknowledged | None = None


class _Comparison(_Model):
    artifact: _Text
    over: _Text | None
    metric: _Text
    setting: _Text | None
    estimate: _Number | None
    ci: _Ends
    n: _Count


class _Score(_Model):
    value: _Number | None


class _Latency(_Model):
    p50_ms: _Number
    p90_ms: _Number | None = None
    mean_ms: _Number | None = None
    tokens_per_second: _Number = 0.0
    samples: _Count | None = None
    phase: _Text = "latency"

    @model_validator(mode="after")
    def _decode_has_a_rate(self) -> _Latency:
        if self.phase == "decode" and "tokens_per_second" not in self.model_fields_set:
            raise ValueError("`tokens_per_second` is missing")
        return self


class _Artifact(_Model):
    name: _Text
    digest: _Text
    size_bytes: _Count
    scores: Annotated[dict[_Text, Any], Field(max_length=50)]


class _Control(_Model):
    estimate: _Number | None = None
    ci: _Ends


class _Measurement(_Model):
    rounds: _Count = 0
    dropped: _Count = 0
    control: dict[_Text, _Control] = {}


class _Confirmation(_Model):
    among: Annotated[list[_Text], Field(max_length=1_000)]
    gates: Annotated[list[_Gate], Field(max_length=5_000)]
    measurement: _Measurement = _Measurement()


class _Change(_Model):
    what: _Text


class _Older(_Model):
    ref: _Text
    version: int | None = None


class _Against(_Model):
    ref: _Text
    version: int | None
    promoted_at: _Text | None = None
    changed: dict[_Text, Annotated[list[_Change], Field(max_length=10_000)]] = {}
    since: Annotated[list[_Older], Field(max_length=1_000)] = []


class _Promoted(_Model):
    alias: _Text
    version: int


class _Cpu(_Model):
    model: _Text = "?"
    cores: int | None = None


class _Host(_Model):
    cpu: _Cpu = _Cpu()
    os: _Text = "?"
    python: _Text = "?"
    libraries: dict[_Text, _Text] = {}


class _Split(_Model):
    digest: _Text
    rows: _Count


class _Failed(_Model):
    """The document of an error before there was a run."""

    error: _Error
    recipe: _Text | None = None
    recipe_file: _Text | None = None


class _Run(_Model):
    run: _Text
    recipe: _Text
    recipe_digest: _Text | None = None
    recipe_file: _Text | None = None
    verdict: Literal["pass", "fail", "inconclusive"] | None
    error: _Error | None
    baseline: _Text | None
    selected: _Text | None
    promoted: _Promoted | None
    seconds: _Number
    host: _Host = _Host()
    data: dict[_Text, _Split]
    measurement: _Measurement = _Measurement()
    artifacts: Annotated[list[_Artifact], Field(max_length=100)]
    comparisons: Annotated[list[_Comparison], Field(max_length=5_000)]
    gates: Annotated[list[_Gate], Field(max_length=5_000)]
    confirmation: _Confirmation | None = None
    compared: dict[_Text, _Text] | None = None
    against: _Against | None = None


_LATENCIES = TypeAdapter(Annotated[list[_Latency], Field(max_length=100)])
_OPTIONAL = TypeAdapter(Annotated[_Number | None, Field(strict=True)])


def read_result(path: Path) -> dict[str, Any]:
    """The document in a file, every value of it that is drawn being of the right kind. Raises `RecipeError`."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"the result can't be read: {error.strerror}", location=str(path)) from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"no result is larger than {MAX_BYTES >> 20} MiB", location=str(path))
    try:
        document = json.loads(raw, parse_constant=_refuse)
        _check(document)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"this is no result of optimize: {_told(error)}", location=str(path)) from error
    return document  # type: ignore[no-any-return]


def _check(document: Any) -> None:
    if not isinstance(document, dict) or document.get("schema") != 1:
        raise ValueError("`schema` is not 1")
    if _nesting(document) > MAX_NESTING:
        raise ValueError(f"nested more than {MAX_NESTING} deep")
    if "run" not in document:
        _Failed.model_validate(document)
        return
    run = _Run.model_validate(document)
    if "confirmation" in document and run.confirmation is None:
        raise ValueError("`confirmation` is null")
    for one in run.artifacts:
        _LATENCIES.validate_python(one.scores.get("latency") or [])
        for name in ("sparsity", "peak_memory_bytes"):
            _OPTIONAL.validate_python(one.scores.get(name))
    # What is a metric of one artifact is drawn of all.
    scores = [item for one in run.artifacts for item in one.scores.items()]
    metrics = {name for name, score in scores if isinstance(score, dict) and "value" in score}
    for name, score in scores:
        if name in metrics and score is not None:
            _Score.model_validate(score)


def _nesting(value: Any) -> int:
    """How deep lists and mappings lie in one another."""
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        level = [item for part in level for item in (part.values() if isinstance(part, dict) else part)]
    return depth


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _told(error: BaseException) -> str:
    """What is wrong, without a line of what was read: that is for nobody's terminal."""
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_context=False, include_url=False)[0]
        place = ".".join(str(part)[:40] for part in first["loc"])
        return f"{place}: {first['msg']}"
    return "nested too deep" if isinstance(error, RecursionError) else str(error)
