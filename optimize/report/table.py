"""The result of a run as one table and one line, from `run.json` alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimize.run import verdict_on

_MARKS = {"pass": "pass", "fail": "FAIL", "inconclusive": "inconclusive"}


@dataclass(frozen=True)
class Cell:
    """A measurement, how it compares with the baseline's, and the interval of that."""

    value: str = ""
    change: str = ""
    interval: str = ""


@dataclass(frozen=True)
class Table:
    """What a terminal, a notebook and a page draw. Shows itself as text and, in a notebook, as HTML."""

    document: Mapping[str, Any]

    @property
    def headers(self) -> list[str]:
        settings = [_title(setting, self._settings) for setting in self._settings]
        return ["artifact", *self._metrics, *settings, "size", "verdict"]

    def rows(self) -> list[tuple[str, list[Cell], str]]:
        """For each artifact its name, a cell for each header between the first and the last, and its verdict."""
        return [
            (
                one["name"],
                [
                    *(self._quality(one, metric) for metric in self._metrics),
                    *(self._time(one, setting) for setting in self._settings),
                    self._size(one),
                ],
                self._verdict(one),
            )
            for one in self.document["artifacts"]
        ]

    @property
    def notes(self) -> list[str]:
        """What has to be known of the sizes and times in the table."""
        found = {one["name"]: one["scores"].get("sparsity") for one in self.document["artifacts"]}
        zeros = ", ".join(f"{name} {share:.1%}" for name, share in found.items() if share is not None)
        if not zeros:
            return []
        return [
            f"Weights that are 0 in pruned layers: {zeros}. They are stored and multiplied like any other number, "
            "and make nothing smaller or faster by themselves."
        ]

    def __str__(self) -> str:
        import io

        from rich.console import Console

        from optimize.terminal import result_table

        text = io.StringIO()
        # In a notebook rich would draw beside the file it is given.
        Console(file=text, width=120, color_system=None, force_jupyter=False).print(result_table(self.document))
        return text.getvalue().rstrip()

    def _repr_html_(self) -> str:
        import html

        from optimize.commands.reporting import plain

        def escape(text: str) -> str:
            return html.escape(plain(text))

        def drawn(cell: Cell) -> str:
            detail = " ".join(part for part in (cell.change, cell.interval) if part)
            return escape(cell.value) + (f"<br><small>{escape(detail)}</small>" if detail else "")

        head = "".join(f"<th>{escape(name)}</th>" for name in self.headers)
        body = "".join(
            f"<tr><th>{escape(name)}</th>{''.join(f'<td>{drawn(cell)}</td>' for cell in cells)}"
            f"<td>{escape(verdict)}</td></tr>"
            for name, cells, verdict in self.rows()
        )
        below = "".join(f"<p>{escape(text)}</p>" for text in (*self.notes, summary(self.document)))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": self._repr_html_()}

    @property
    def _metrics(self) -> list[str]:
        """The task's own, in the order of the first artifact that has them."""
        scores = [one["scores"] for one in self.document["artifacts"]]
        named = (
            name for one in scores for name, value in one.items() if isinstance(value, Mapping) and "value" in value
        )
        return list(dict.fromkeys(named))

    @property
    def _settings(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        for one in self.document["artifacts"]:
            found += [setting for score in _latencies(one) if (setting := _setting(score)) not in found]
        return found

    def _quality(self, artifact: Mapping[str, Any], metric: str) -> Cell:
        score = artifact["scores"].get(metric)
        if not score:
            return Cell()
        value = score["value"]
        return _cell("?" if value is None else f"{value:.3f}", self._compared(artifact, metric), "{:+.3f}")

    def _time(self, artifact: Mapping[str, Any], setting: Mapping[str, str]) -> Cell:
        for score in _latencies(artifact):
            if _setting(score) == setting:
                metric = setting.get("phase", "latency")
                shown = f"{score['p50_ms']:.2f} ms"
                if metric == "decode":
                    rate = score["tokens_per_second"]
                    shown = f"{rate:.1f} tokens/s" if rate < 1000 else f"{rate:,.0f} tokens/s"
                return _cell(shown, self._compared(artifact, metric, setting), "{:.2f}", "x")
        return Cell()

    def _size(self, artifact: Mapping[str, Any]) -> Cell:
        compared = self._compared(artifact, "size")
        return Cell(megabytes(artifact["size_bytes"]), f"{compared['estimate']:.2f}x" if compared else "")

    def _verdict(self, artifact: Mapping[str, Any]) -> str:
        if verdict := verdict_on(self.document, artifact["name"]):
            return _MARKS[verdict]
        return "baseline" if artifact["digest"] == self.document["baseline"] else ""

    def _compared(
        self, artifact: Mapping[str, Any], metric: str, setting: Mapping[str, str] | None = None
    ) -> Mapping[str, Any] | None:
        """The comparison with the baseline, where there is one."""
        baselines = [a["name"] for a in self.document["artifacts"] if a["digest"] == self.document["baseline"]]
        for one in self.document["comparisons"]:
            same = (one["artifact"], one["metric"]) == (artifact["name"], metric) and one["over"] in baselines
            if same and (setting is None or _parsed(one["setting"]).items() <= setting.items()):
                return one  # type: ignore[no-any-return]
        return None


def megabytes(size: float) -> str:
    """Bytes as people read them: `12.3 kB`, `90.9 MB`, `1.25 GB`."""
    if size < 1e6:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def summary(document: Mapping[str, Any]) -> str:
    """One line: what was decided and why."""
    if document["error"]:
        error = document["error"]
        where = f" in stage {error['stage']}" if error.get("stage") else ""
        return f"ERROR{where}: {error['message']}"
    verdict = document["verdict"]
    if verdict is None:
        return "No gate was asked, so there is no verdict and nothing is promoted."
    gates = deciding_gates(document)
    if verdict == "pass":
        held = [gate for gate in gates if not gate.get("acknowledged")]
        closest = f"; closest: {_gate(min(held, key=_closeness))}" if held else ""
        said = f"PASS: {_count(len(held), 'gate check')} held{closest}{_let_pass(gates)}"
        promoted = document["promoted"]
        if promoted:
            said += f"; promoted to {document['recipe']}@{promoted['alias']} as version {promoted['version']}"
        elif unjudged := _selected_unjudged(document):
            said += f"; nothing was promoted, since no gate judges {unjudged}"
        return said + "."
    deciding = [gate for gate in gates if gate["verdict"] == verdict and not gate.get("acknowledged")]
    others = f" (and {len(deciding) - 1} more)" if len(deciding) > 1 else ""
    worst = max(deciding, key=_closeness) if verdict == "fail" else deciding[0]
    return f"{verdict.upper()}: {worst['artifact']}: {worst['reason']}{others}; nothing was promoted."


def deciding_gates(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The gates that the run's verdict is of: where one of several leaves was selected, its confirmation speaks."""
    confirmation = document.get("confirmation")
    if not confirmation:
        return list(document["gates"])
    others = (gate for gate in document["gates"] if gate["artifact"] not in confirmation["among"])
    return [*others, *confirmation["gates"]]


def _let_pass(gates: Sequence[Mapping[str, Any]]) -> str:
    told = [gate["acknowledged"]["expires"] for gate in gates if gate.get("acknowledged")]
    return f"; {_count(len(told), 'regression')} acknowledged until {min(told)}" if told else ""


def _selected_unjudged(document: Mapping[str, Any]) -> str | None:
    names = [one["name"] for one in document["artifacts"] if one["digest"] == document["selected"]]
    return names[-1] if names and not any(verdict_on(document, name) for name in names) else None


def _cell(value: str, compared: Mapping[str, Any] | None, form: str, unit: str = "") -> Cell:
    if compared is None or compared["estimate"] is None:
        return Cell(value)
    # An end that too few rounds can't bound is null in run.json.
    low, high = ("?" if end is None else form.format(end) for end in compared["ci"])
    return Cell(value, form.format(compared["estimate"]) + unit, f"[{low}, {high}]")


def _latencies(artifact: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return artifact["scores"].get("latency") or []


def _setting(score: Mapping[str, Any]) -> dict[str, str]:
    """What a time was measured at."""
    names = ("phase", "batch_size", "sequence_length", "prompt_length", "new_tokens", "threads")
    return {name: str(score[name]) for name in names if name in score}


def _parsed(setting: str | None) -> dict[str, str]:
    """`batch_size=8,threads=1` of a comparison, in the form of `_setting`."""
    return dict(pair.split("=", 1) for pair in (setting or "").split(",") if "=" in pair)


def _title(setting: Mapping[str, str], settings: Sequence[Mapping[str, str]]) -> str:
    """`p50, batch 8`, and what else tells it from the other settings; of a language model what its user waits for."""
    if setting.get("phase") == "prefill":
        return f"first token, prompt {setting['prompt_length']}"
    if setting.get("phase") == "decode":
        return "decode"
    others = [f"{name.split('_')[0]} {value}" for name, value in setting.items() if name != "batch_size"]
    crowded = sum(other.get("batch_size") == setting.get("batch_size") for other in settings) > 1
    return ", ".join([f"p50, batch {setting.get('batch_size', '?')}", *(others if crowded else ())])


def _gate(gate: Mapping[str, Any]) -> str:
    return f"{gate['artifact']}: {gate['reason']}"


def _closeness(gate: Mapping[str, Any]) -> float:
    """How near the estimate is to the limit, relative to the limit's size."""
    (limit,) = gate["limit"].values()
    if gate["margin"] is None:
        return math.inf
    return float(abs(gate["margin"]) / max(abs(limit), 1e-9))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
