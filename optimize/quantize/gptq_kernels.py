"""The inner loops of `gptq_solver`, compiled for the CPU.

Each row of a weight is a problem of its own, and no function here looks at two at once, so that callers may give any
rows to any thread; the interpreter's lock is released. Arrays are NumPy's, float32 unless said otherwise, and what is
named "out" is written. `gptq_batched` has the same functions for tensors on an accelerator.

The first import on a machine compiles this module, which takes some seconds: import it where it is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from optimize.compiled import compiled

_LANES = 16
"""Rows that `sweep` takes abreast, one to a lane of a vector register."""
_Array = Any  # of any type and layout: signatures below are what counts


@compiled(
    "(float32[:,::1], float32[::1], int64, float32[:,:,::1], float32[:,:,::1], float32, int64[:,::1])",
    fastmath={"contract", "reassoc", "nsz"},  # sums in any order, the same one each time
)
def choose(
    weight: _Array, importance: _Array, size: int, scales: _Array, zeros: _Array, top: float, best: _Array
) -> None:
    """Which candidate grid loses least on each group: sum of importance * (weight - rounded)^2.

    weight [rows, width], importance [width], groups of `size` columns, scales and zeros [rows, groups, candidates];
    out: best [rows, groups], an index of candidates.
    """
    rows, width = weight.shape
    for row in range(rows):
        for group in range(scales.shape[1]):
            values = weight[row, group * size : min((group + 1) * size, width)]
            factors = importance[group * size : min((group + 1) * size, width)]
            least = np.float32(np.inf)
            for candidate in range(scales.shape[2]):
                scale = scales[row, group, candidate]
                zero = zeros[row, group, candidate]
                per_step = np.float32(1) / scale
                error = np.float32(0)
                for i in range(len(values)):
                    code = min(max(np.rint(values[i] * per_step) + zero, np.float32(0)), top)
                    loss = values[i] - scale * (code - zero)
                    error += factors[i] * loss * loss
                if error < least:
                    least = error
                    best[row, group] = candidate


@compiled(
    "(float32[:,:], float32[:,:], boolean[:,:], float32[:,:], float32[:,:], float32[:,:], float32, "
    "float32[:,:], float32[:,:])",
    fastmath={"contract"},
)
def sweep(
    weight: _Array,
    target: _Array,
    free: _Array,
    feedback: _Array,
    scales: _Array,
    zeros: _Array,
    top: float,
    codes: _Array,
    loss: _Array,
) -> None:
    """Round one column after the other; what each loses is passed on to those on its right.

    weight, target (weight plus what earlier blocks passed on), free (bool; what is not gets the code of 0), scales and
    zeros [rows, columns], feedback [columns, columns], of which what lies above the diagonal is used; out: codes and
    loss [rows, columns].
    """
    rows, columns = weight.shape
    # Transposed, with rows in the lanes: columns depend on each other, rows do not.
    aims = np.zeros((columns, _LANES), np.float32)
    losses = np.zeros((columns, _LANES), np.float32)
    steps = np.ones((columns, _LANES), np.float32)
    middles = np.zeros((columns, _LANES), np.float32)
    moves = np.ones((columns, _LANES), np.bool_)
    lost = np.zeros(_LANES, np.float32)
    for first in range(0, rows, _LANES):
        count = min(_LANES, rows - first)
        for lane in range(count):
            for column in range(columns):
                aims[column, lane] = target[first + lane, column]
                losses[column, lane] = weight[first + lane, column]
                steps[column, lane] = scales[first + lane, column]
                middles[column, lane] = zeros[first + lane, column]
                moves[column, lane] = free[first + lane, column]
        for column in range(columns):
            for lane in range(_LANES):
                step, middle = steps[column, lane], middles[column, lane]
                code = min(max(np.rint(aims[column, lane] / step) + middle, np.float32(0)), top)
                code = code if moves[column, lane] else middle
                aims[column, lane] = code
                lost[lane] = losses[column, lane] - step * (code - middle)
                losses[column, lane] = lost[lane]
            for later in range(column + 1, columns):
                share = feedback[column, later]
                for lane in range(_LANES):
                    aims[later, lane] += share * lost[lane]
        for lane in range(count):
            for column in range(columns):
                codes[first + lane, column] = aims[column, lane]
                loss[first + lane, column] = losses[column, lane]


@compiled(
    "(float32[:,::1], float32[:,::1], float32[:,::1], float32[:,::1], boolean[:,::1], int64[::1], int64[::1], "
    "float32[:,::1], float32[:,::1], float32)",
    fastmath={"contract"},
)
def descend(
    codes: _Array,
    loss: _Array,
    gradient: _Array,
    matrix: _Array,
    free: _Array,
    order: _Array,
    group_of: _Array,
    scales: _Array,
    zeros: _Array,
    top: float,
) -> None:
    """Visit each column once and give it the code that is best while all the others stay.

    matrix [width, width], free (bool; what is not is passed over) [rows, width], order and group_of int64 [width],
    scales and zeros [rows, groups];
    in and out: codes, loss (weight - rounded weight) and gradient (loss @ matrix), [rows, width].
    """
    for row in range(len(codes)):
        pull = gradient[row]
        for column in order:
            if not free[row, column]:
                continue
            scale, zero = scales[row, group_of[column]], zeros[row, group_of[column]]
            old = codes[row, column]
            aim = old - zero + pull[column] / (matrix[column, column] * scale)
            new = min(max(np.rint(aim) + zero, np.float32(0)), top)
            if new != old:
                change = scale * (new - old)
                codes[row, column] = new
                loss[row, column] -= change
                line = matrix[column]
                for i in range(len(pull)):
                    pull[i] -= change * line[i]
