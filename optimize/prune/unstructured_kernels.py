"""The inner loop of SparseGPT, compiled for the CPU. `unstructured_batched` has it for tensors on an accelerator.

Each row of a weight is a problem of its own, so that callers may give any rows to any thread; the interpreter's lock is
released. The first import on a machine compiles this module, which takes some seconds: import it where it is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from optimize.compiled import compiled

_LANES = 16
"""Rows that are taken abreast, one to a lane of a vector register."""
_Array = Any  # of any type and layout: the signature below is what counts


@compiled(
    "(float32[:,:], float32[:,:], float32[:,:], float32[:], int64, int64, boolean[:,:], float32[:,:], float32[:,:])",
    fastmath={"contract"},
)
def sweep(
    weight: _Array,
    target: _Array,
    feedback: _Array,
    variances: _Array,
    zeros: int,
    of: int,
    pruned: _Array,
    values: _Array,
    loss: _Array,
) -> None:
    """Set what is pruned to 0, one column after the other, and let those on the right make up for it.

    weight, target (weight plus what earlier blocks passed on) [rows, columns], feedback [columns, columns], of which
    what lies above the diagonal is used, variances [columns];
    in and out: pruned (bool) [rows, columns], to which, where `of` is not 0, columns are added until `zeros` of every
    `of` are, those of the least value^2 * variance as they are reached; out: values and loss (weight - values).
    """
    rows, columns = weight.shape
    # Transposed, with rows in the lanes: columns depend on each other, rows do not.
    aims = np.zeros((columns, _LANES), np.float32)
    losses = np.zeros((columns, _LANES), np.float32)
    gone = np.zeros((columns, _LANES), np.bool_)
    lost = np.zeros(_LANES, np.float32)
    ahead = np.zeros(max(of, 1), np.float32)
    for first in range(0, rows, _LANES):
        count = min(_LANES, rows - first)
        for lane in range(count):
            for column in range(columns):
                aims[column, lane] = target[first + lane, column]
                losses[column, lane] = weight[first + lane, column]
                gone[column, lane] = pruned[first + lane, column]
        for column in range(columns):
            if of > 0 and column % of == 0:
                stop = min(column + of, columns)
                for lane in range(count):
                    # What they would become if all of them stayed.
                    for other in range(column, stop):
                        ahead[other - column] = aims[other, lane]
                        for before in range(column, other):
                            moved = losses[before, lane] - ahead[before - column]
                            ahead[other - column] += feedback[before, other] * moved
                    missing = zeros
                    for other in range(column, stop):
                        missing -= gone[other, lane]
                    for _ in range(missing):
                        best, least = -1, np.float32(np.inf)
                        for other in range(column, stop):
                            score = ahead[other - column] * ahead[other - column] * variances[other]
                            if not gone[other, lane] and (best < 0 or score < least):
                                best, least = other, score
                        gone[best, lane] = True
            for lane in range(_LANES):
                value = np.float32(0) if gone[column, lane] else aims[column, lane]
                aims[column, lane] = value
                lost[lane] = losses[column, lane] - value
                losses[column, lane] = lost[lane]
            for later in range(column + 1, columns):
                share = feedback[column, later]
                for lane in range(_LANES):
                    aims[later, lane] += share * lost[lane]
        for lane in range(count):
            for column in range(columns):
                pruned[first + lane, column] = gone[column, lane]
                values[first + lane, column] = aims[column, lane]
                loss[first + lane, column] = losses[column, lane]
