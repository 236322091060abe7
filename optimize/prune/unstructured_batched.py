"""The inner loop of SparseGPT on tensors of any device, all rows abreast; `unstructured_kernels` says what it does."""

from __future__ import annotations

from torch import Tensor


def sweep(
    weight: Tensor,
    target: Tensor,
    feedback: Tensor,
    variances: Tensor,
    zeros: int,
    of: int,
    pruned: Tensor,
    values: Tensor,
    loss: Tensor,
) -> None:
    values.copy_(target)
    for column in range(weight.shape[1]):
        if of and column % of == 0:
            part = slice(column, column + of)
            ahead = values[:, part].clone()  # what they would become if all of them stayed
            for i in range(ahead.shape[1]):
                ahead[:, i + 1 :].addr_(
                    weight[:, column + i] - ahead[:, i], feedback[column + i, column + i + 1 : part.stop]
                )
            scores = (ahead.square() * variances[part]).masked_fill(pruned[:, part], -1)
            pruned[:, part].scatter_(1, scores.argsort(dim=1, stable=True)[:, :zeros], True)
        values[:, column].masked_fill_(pruned[:, column], 0)
        loss[:, column] = weight[:, column] - values[:, column]
        values[:, column + 1 :].addr_(loss[:, column], feedback[column, column + 1 :])
