"""Several things at a time on the CPU, each on a thread of its own: their results do not depend on how many there are.

That also scales better than torch's own threads, which meet at the end of every small operation.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of glibc's malloc.h: larger pieces of memory come from the system and go back to it."""


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[int]:
    """Inside, torch has that many threads (None: as many as before), as it has on threads begun there.

    Yields how many there were before.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def each(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`function` of every item, on as many threads as torch has."""
    with threads(1) as number, ThreadPoolExecutor(number) as pool:
        return list(pool.map(function, items))


@contextlib.contextmanager
def memory_returned() -> Iterator[None]:
    """Inside, large tensors' memory goes back to the system with them.

    glibc keeps it for the thread that asked for it: with a thread for each batch, gigabytes that nobody uses. Does
    nothing where the library is another one.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 1 << 25)  # what the library itself comes to, once it has seen large pieces
