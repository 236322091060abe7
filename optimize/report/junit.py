"""JUnit XML: one case a gate and setting, as the test views of CI hosts read it.

| the gate | the case |
|---|---|
| pass | passes |
| fail | `failure` |
| inconclusive | `failure` of type `inconclusive`: the run exits with 3 and promotes nothing |
| inconclusive under `on_inconclusive: warn` | `skipped`: the run exits with 0 |
| fails, but is acknowledged | `skipped`, with the reason and the expiry |
| only chose among leaves, and did not pass | `skipped`: the chosen one was measured again |

A run that ended with an error has the gates that it came to (none) and one case with an `error`; a recipe with mistakes
one for each of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

from optimize.report.checks import Check, checks, others
from optimize.report.escape import one_line, xml
from optimize.report.table import summary


def junit(document: Mapping[str, Any]) -> str:
    """The XML of a run.json, or of the document of an error."""
    recipe = one_line(document.get("recipe") or "recipe", 64)
    suite = ET.Element("testsuite", name=recipe)
    properties = ET.SubElement(suite, "properties")
    for name in ("run", "recipe_digest", "recipe_file", "verdict"):
        if document.get(name):
            ET.SubElement(properties, "property", name=name, value=one_line(document[name]))
    if document["error"]:
        _errors(suite, recipe, document["error"])
    else:
        for check in checks(document):
            _case(suite, recipe, check)
        for check in others(document):
            _case(suite, recipe, check, decides=False)
    ET.SubElement(suite, "system-out").text = xml(one_line(summary(document), 4_000))
    for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(sum(1 for _ in suite.iter(tag))))
    suite.set("time", f"{document.get('seconds', 0.0):.3f}")
    if began := re.match(r"(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)(\d\d)-", str(document.get("run") or "")):
        suite.set("timestamp", "{}-{}-{}T{}:{}:{}".format(*began.groups()))
    suites = ET.Element("testsuites")
    suites.append(suite)
    ET.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _case(suite: ET.Element, recipe: str, check: Check, *, decides: bool = True) -> None:
    gate = check.gate
    name = one_line(f"{check.what}: {check.limit}")
    owner = ".".join([recipe, *(() if decides else ["selection"]), one_line(gate["artifact"], 64)])
    case = ET.SubElement(suite, "testcase", classname=owner, name=name, time="0")
    reason = xml(one_line(gate["reason"], 2_000))
    if check.outcome == "pass":
        return
    if not decides:
        message, kind, tag = "chose among leaves; the chosen one was measured again", "selection", "skipped"
    elif check.outcome == "acknowledged":
        told = gate["acknowledged"]
        message = one_line(f"acknowledged until {told.get('expires', '?')}: {told.get('reason', '')}")
        kind, tag = "acknowledged", "skipped"
    elif check.outcome == "warned":
        message, kind, tag = "inconclusive, which only warns", "inconclusive", "skipped"
    else:
        message, kind, tag = f"{check.estimate}, interval {check.interval}", check.outcome, "failure"
    found = ET.SubElement(case, tag, type=kind, message=xml(one_line(message)))
    where = gate.get("location")
    found.text = reason + (f"\n{xml(one_line(where))}" if where else "")


def _errors(suite: ET.Element, recipe: str, error: Mapping[str, Any]) -> None:
    stage = one_line(error.get("stage") or "", 64)
    for one in error.get("diagnostics") or (error,):
        where, hint = one.get("location"), one.get("hint")
        name = stage or one_line(one.get("path") or "recipe" if "diagnostics" in error else "run")
        case = ET.SubElement(suite, "testcase", classname=recipe, name=name, time="0")
        message = xml(one_line(one.get("message", ""), 2_000))
        found = ET.SubElement(case, "error", type=one_line(error.get("type", "error"), 64), message=message)
        lines = [message, f"try: {one_line(hint)}" if hint else "", one_line(where) if where else ""]
        found.text = xml("\n".join(line for line in lines if line))
