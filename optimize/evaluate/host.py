"""What a measurement depends on: processor, memory, system, library versions. Reads files, imports no library."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

FLAGS = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)
"""Instruction sets that kernels for small numbers look for."""
HALF = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}
"""16-bit type -> the instruction sets, any one of which multiplies in it."""
LIBRARIES = ("numpy", "torch", "transformers", "tokenizers", "onnxruntime", "openvino", "pillow")
OURSELVES = "optimize-workbench"


@cache
def fingerprint() -> dict[str, Any]:
    """What a score carries: latency and memory of two different fingerprints are never compared. JSON."""
    return {
        "cpu": {**_processor(), "machine": platform.machine(), "cores": cpu_count(), "quota": cpu_quota()},
        "memory_bytes": memory_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": _libraries(),
    }


@cache
def cpu_count() -> int:
    """How many threads can run at once: the affinity mask, bounded by the control group's quota; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


@cache
def cpu_quota() -> float | None:
    """How many processors' worth of time the control group allows (the tightest level counts); None where unlimited."""
    quotas = []
    for folder in control_groups("cpu"):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def computes_in(dtype: Literal["bfloat16", "float16"]) -> bool:
    """Whether the processor multiplies in that type, rather than by way of float32."""
    return bool(HALF[dtype] & set(fingerprint()["cpu"]["flags"]))


def memory_bytes() -> int | None:
    """Physical memory, bounded by the control group's limit; None where the system does not tell."""
    sizes = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for folder in control_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                sizes.append(int((folder / name).read_text()))
            except (OSError, ValueError):
                continue
    return min(sizes, default=None)


def cuda_devices() -> int:
    """How many NVIDIA devices this process may use, without asking torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
    if visible is None:
        return present
    return min(present, sum(1 for name in visible.split(",") if name.strip() not in ("", "-1")))


def control_groups(controller: str) -> Iterator[Path]:
    """The folders of this process' control group and of those around it, innermost first (version 2, then 1)."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, inner = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for base in (root / controllers, root / controller) if controllers else (root, root / "unified"):
            # A container may see itself at the root while the file names its path outside: walk up to what exists.
            folder = base / inner.lstrip("/")
            yield from (level for level in (folder, *folder.parents) if level.is_relative_to(base) and level.is_dir())


def _processor() -> dict[str, Any]:
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    except OSError:
        return {"model": platform.processor() or platform.machine(), "flags": []}
    present = set((facts.get("flags") or facts.get("Features") or "").split())
    model = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [facts[name] for name in ("cpu family", "model", "stepping") if name in facts]
    return {"model": " ".join([model, *(["/".join(numbers)] if numbers else [])]), "flags": sorted(present & {*FLAGS})}


def _libraries() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, entry_points, version

    found = {}
    for name in (*LIBRARIES, OURSELVES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    # A third party's runtime or task has a part in every answer as well.
    for group in ("optimize.runtimes", "optimize.tasks"):
        found.update({point.dist.name: point.dist.version for point in entry_points(group=group) if point.dist})
    return found
