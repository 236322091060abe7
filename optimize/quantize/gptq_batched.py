"""The inner loops of `gptq_solver` on tensors of any device, all rows abreast; `gptq_kernels` says what each does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def choose(
    weight: Tensor, importance: Tensor, size: int, scales: Tensor, zeros: Tensor, top: float, best: Tensor
) -> None:
    rows, groups, candidates = scales.shape
    missing = groups * size - weight.shape[1]
    values = pad(weight, (0, missing)).view(rows, groups, size)
    factors = pad(importance, (0, missing)).view(groups, size)
    least = torch.full_like(scales[..., 0], torch.inf)
    for candidate in range(candidates):
        scale, zero = scales[..., candidate, None], zeros[..., candidate, None]
        code = ((values / scale).round() + zero).clamp(0, top)
        error = ((values - scale * (code - zero)).square() * factors).sum(dim=2)
        best[error < least] = candidate
        least = torch.minimum(error, least)


def sweep(
    weight: Tensor,
    target: Tensor,
    free: Tensor,
    feedback: Tensor,
    scales: Tensor,
    zeros: Tensor,
    top: float,
    codes: Tensor,
    loss: Tensor,
) -> None:
    aims = target.clone()
    for column in range(weight.shape[1]):
        scale, zero = scales[:, column], zeros[:, column]
        code = ((aims[:, column] / scale).round() + zero).clamp(0, top)
        codes[:, column] = code.where(free[:, column], zero)
        loss[:, column] = weight[:, column] - scale * (codes[:, column] - zero)
        aims[:, column + 1 :].addr_(loss[:, column], feedback[column, column + 1 :])


def descend(
    codes: Tensor,
    loss: Tensor,
    gradient: Tensor,
    matrix: Tensor,
    free: Tensor,
    order: Tensor,
    group_of: Tensor,
    scales: Tensor,
    zeros: Tensor,
    top: float,
) -> None:
    for column in order.tolist():
        group = group_of[column]
        scale, zero, old = scales[:, group], zeros[:, group], codes[:, column]
        aim = old - zero + gradient[:, column] / (matrix[column, column] * scale)
        new = (aim.round() + zero).clamp(0, top).where(free[:, column], old)
        change = scale * (new - old)
        codes[:, column] = new
        loss[:, column] -= change
        gradient.addr_(change, matrix[column], alpha=-1)
