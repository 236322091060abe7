"""What GitLab shows of a run besides JUnit: a merge request's note, and the recipe's lines (Code Quality)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimize.report.checks import Outcome, checks, place_of, worst_first
from optimize.report.escape import one_line
from optimize.report.github import below
from optimize.report.markdown import GITLAB_LIMIT, comment

_SEVERITIES: dict[Outcome, str] = {
    **{"fail": "critical", "inconclusive": "major"},
    **{"warned": "minor", "acknowledged": "info"},
}


def note(document: Mapping[str, Any]) -> str:
    """The Markdown of a note, within GitLab's limit."""
    return comment(document, limit=GITLAB_LIMIT)


def code_quality(document: Mapping[str, Any], root: Path | None = None) -> str:
    """A Code Quality report: one issue for each gate that does not pass, and for each mistake or error.

    The same gate keeps its fingerprint from run to run, whatever was measured. A place is asked for, so an issue
    without one stands in the first line of the recipe's file, and is left out where there is none either.

    https://docs.gitlab.com/ci/testing/code_quality/#code-quality-report-format
    """
    error = document["error"]
    found: list[tuple[str, str, str, object]] = []
    for one in (error.get("diagnostics") or (error,)) if error else ():
        name = str(error.get("stage") or one.get("path") or error.get("type") or "error")
        found.append(("blocker", name, one.get("message", ""), one.get("location")))
    for check in worst_first(checks(document)) if not error else ():
        if check.outcome != "pass":
            limit = next(iter(check.gate["limit"]))
            name = f"{check.what}: {limit}"
            found.append((_SEVERITIES[check.outcome], name, check.gate["reason"], check.gate.get("location")))
    issues = []
    for severity, name, message, location in found:
        file, line, _ = place_of(location) or (document.get("recipe_file"), 1, 1)
        if file:
            path = below(str(file), root)
            issues.append(
                {
                    "type": "issue",
                    "check_name": f"optimize: {one_line(name)}",
                    "description": one_line(message, 2_000),
                    "severity": severity,
                    "fingerprint": hashlib.sha256(f"{path}\n{name}".encode("utf-8", "replace")).hexdigest(),
                    "location": {"path": one_line(path), "lines": {"begin": line}},
                }
            )
    return json.dumps(issues, indent=2) + "\n"
