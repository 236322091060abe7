"""`optimize doctor`: what is installed, what is missing and how to add it, and what this machine is good at.

Everything is read from package metadata and from the system's files: nothing heavy is imported, so it answers at once,
also where a library is broken.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.evaluate.host import cuda_devices, fingerprint

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.console import RenderableType

DISTRIBUTION = "optimize-workbench"
NO_BACK_ENDS = ("all", "test")
LITTLE_DISK, LITTLE_MEMORY = 5e9, 4e9
"""Bytes below which the quickstart may not fit: MiniLM trains in about 2 GB, and its artifacts take under 1 GB."""


def examine(work: Path) -> dict[str, Any]:
    """Everything, as JSON. `healthy` is false where something that every recipe needs is missing."""
    host = fingerprint()
    packages = {name: _state(one) for name, one in _requirements(None).items()}
    extras = {}
    for extra in metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
        if extra in NO_BACK_ENDS:
            continue
        needed = {name: _state(one) for name, one in _requirements(extra).items()}
        present = all(state["ok"] for state in needed.values())
        install = None if present else f"pip install '{DISTRIBUTION}[{extra}]'"
        extras[extra] = {"installed": present, "packages": needed, "install": install}
    disk = shutil.disk_usage(next(folder for folder in (work, *work.parents) if folder.exists()))
    machine = {**host, "cuda_devices": cuda_devices(), "free_disk_bytes": disk.free, "work": str(work)}
    return {
        "version": version(DISTRIBUTION),
        "healthy": all(state["ok"] for state in packages.values()),
        "packages": packages,
        "extras": extras,
        "machine": machine,
        "suggestions": suggest(machine, packages),
    }


def suggest(machine: Mapping[str, Any], packages: Mapping[str, Any]) -> list[str]:
    """What to do, the most urgent first."""
    said = []
    wrong = [f"{name}{state['required']}" for name, state in packages.items() if not state["ok"]]
    if wrong:
        said.append(f"Install what is missing or too old: pip install {' '.join(repr(name) for name in wrong)}")
    if machine["free_disk_bytes"] < LITTLE_DISK:
        said.append(
            "The disk is nearly full: free space, see `optimize store gc --dry-run`, or move the folder (--work)."
        )
    if (machine["memory_bytes"] or LITTLE_MEMORY) < LITTLE_MEMORY:
        said.append("Little memory: use a smaller `batch_size` when training.")
    flags = set(machine["cpu"]["flags"])
    if flags & {"amx_int8"}:
        said.append("The CPU has AMX: INT8 is fast here, and bfloat16 too.")
    elif flags & {"avx512_vnni", "avx_vnni", "asimddp", "i8mm"}:
        said.append("The CPU has 8-bit dot products (VNNI or their like): INT8 is fast here.")
    elif "avx2" in flags:
        said.append("The CPU has no VNNI: INT8 gains less here, and `reduce_range: true` keeps its sums exact.")
    if machine["cpu"]["cores"] < 2:
        said.append("One core only: latency is measured beside the operating system's own work; expect wide intervals.")
    return said


def _requirements(extra: str | None) -> dict[str, Requirement]:
    """What our own metadata asks for: always (None), or for an extra."""
    from packaging.requirements import Requirement

    found = {}
    for line in requires(DISTRIBUTION) or []:
        one = Requirement(line)
        always = one.marker is None or one.marker.evaluate({"extra": ""})
        if (
            always
            if extra is None
            else (not always and one.marker is not None and one.marker.evaluate({"extra": extra}))
        ):
            found[one.name] = one
    return found


def _state(requirement: Requirement) -> dict[str, Any]:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return {"installed": None, "required": str(requirement.specifier), "ok": False}
    ok = requirement.specifier.contains(installed, prereleases=True)
    return {"installed": installed, "required": str(requirement.specifier), "ok": ok}


def page(examined: Mapping[str, Any]) -> RenderableType:
    """The examination for people."""
    from rich.console import Group
    from rich.text import Text

    from optimize.report.table import megabytes
    from optimize.terminal import plain_table, safe

    machine, cpu = examined["machine"], examined["machine"]["cpu"]
    facts = plain_table("machine", "")
    memory = machine["memory_bytes"]
    for name, value in {
        "CPU": f"{cpu['model']}, {cpu['cores']} usable cores",
        "instructions": " ".join(cpu["flags"]) or "none that matter here",
        "memory": megabytes(memory) if memory else "unknown",
        "GPU": f"{machine['cuda_devices']} CUDA devices" if machine["cuda_devices"] else "none",
        "disk": f"{megabytes(machine['free_disk_bytes'])} free for {machine['work']}",
        "system": f"{machine['os']}, Python {machine['python']}",
    }.items():
        facts.add_row(name, safe(value))
    packages = plain_table("package", "installed", "needed")
    for name, state in examined["packages"].items():
        style = "" if state["ok"] else "bold red"
        packages.add_row(safe(name, style), safe(state["installed"] or "MISSING", style), safe(state["required"]))
    backends = plain_table("extra", "installed", "")
    for name, backend in examined["extras"].items():
        versions = ", ".join(f"{one} {state['installed']}" for one, state in backend["packages"].items())
        installed = backend["installed"]
        backends.add_row(name, "yes" if installed else "no", safe(versions if installed else backend["install"]))
    advice = [safe(f"- {line}") for line in examined["suggestions"]] or [Text("- Nothing to suggest.")]
    head = safe(f"optimize {examined['version']}", "bold")
    return Group(head, Text(), facts, Text(), packages, Text(), backends, Text(), Text("suggestions", "bold"), *advice)
