"""What a layer is given: the second moment of its inputs, and the factor of it that GPTQ and SparseGPT go by.

Both change a weight one input column after the other and make up for it in those still to come, so that the layer's
output, tr(dW H dW^T), changes least (Frantar et al., 2022, https://arxiv.org/abs/2210.17323). `factorise` puts that in
the form of LDLQ (Chee et al., 2023, https://arxiv.org/abs/2307.13304, Theorem 6): one Cholesky factor and no inverse.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimize.errors import StageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_STRIP = 640
"""Rows of a Hessian that are summed up at a time, right of the diagonal: wide enough to multiply fast."""


class Hessian:
    """The second moment X^T X / n of a layer's inputs, summed up in float32 as they come."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        import torch

        self._sums = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.tokens = 0
        self.dropped = 0
        """Rows with a NaN or an infinity, which were left out."""

    def add(self, x: Tensor) -> None:
        """Take in x [tokens, width], of any float type and device.

        Numbers in bfloat16 have products that float32 holds exactly: processors with instructions for it sum those up
        three times as fast.
        """
        import torch

        narrow = x.dtype == torch.bfloat16
        x = x.detach().to(self._sums.device, torch.float32)
        if not bool(torch.isfinite(x.sum())):  # one cheap look first
            finite = torch.isfinite(x).all(dim=1)
            self.dropped += int((~finite).sum())
            x = x[finite]
        if not len(x):
            return
        before, self.tokens = self.tokens, self.tokens + len(x)

        # Only what lies on the diagonal and right of it: the matrix is symmetric.
        with _read_as_bfloat16() if narrow else contextlib.nullcontext():
            for start in range(0, len(self._sums), _STRIP):
                strip, inputs = self._sums[start : start + _STRIP, start:], x[:, start : start + _STRIP]
                strip.addmm_(inputs.T, x[:, start:], beta=before / self.tokens, alpha=1 / self.tokens)

    @property
    def matrix(self) -> Tensor:
        """float32 [width, width]; the sums' own memory, so ask for it when all is in."""
        for start in range(0, len(self._sums), _STRIP):
            rows = self._sums[start : start + _STRIP]
            corner = rows[:, start : start + _STRIP]
            corner.copy_(corner.triu() + corner.triu(1).T)
            rows[:, :start] = self._sums[:start, start : start + _STRIP].T
        return self._sums


@contextlib.contextmanager
def _read_as_bfloat16() -> Iterator[None]:
    """Inside, the CPU may take float32 factors for bfloat16 ones; it adds up in float32 all the same."""
    import torch

    mkldnn: Any = torch.backends.mkldnn
    settings = mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@dataclass(frozen=True)
class Factors:
    """hessian + ridge = R D R^T, with R unit upper triangular in some order of the columns."""

    ridge: float
    """What was added to the diagonal."""
    feedback: Tensor
    """[in, in] in that order, strictly upper part: the share of column i's loss that goes to column j > i."""
    variances: Tensor
    """[in], in the inputs' own order: of each, given those that come after it in `feedback`'s."""
    damp_percent: float
    """What `ridge` is of the mean diagonal: more than asked for where that was needed."""


def factorise(hessian: Tensor, order: Tensor, damp_percent: float) -> Factors:
    """Factorise a Hessian [in, in], damped by that share of its mean diagonal, or by more where it takes more.

    `order` int64 [in]: the columns in the order in which they are visited. Raises `StageError` where the Hessian is not
    finite, or can't be factorised with all of its mean diagonal added to it.
    """
    import torch

    diagonal = hessian.diagonal().double()
    if not bool(torch.isfinite(hessian).all()):
        raise StageError("the Hessian is not finite", hint="look at what the layer is given during calibration")
    mean = float(diagonal[diagonal > 0].mean()) if bool((diagonal > 0).any()) else 1.0
    reverse, back = order.flip(0), order.argsort()
    while True:
        ridge = damp_percent * mean
        # From the lower factor of the matrix turned round. No step takes more memory, so that it is done in place;
        # LAPACK wants what lies in columns.
        lower = hessian[reverse][:, reverse].double().mT
        lower.diagonal().add_(ridge)
        failed = torch.empty((), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed:
            roots = lower.diagonal().clone()
            lower = lower.div_(roots).float()
            feedback = lower.flip(0, 1).contiguous()
            return Factors(ridge, feedback, roots.square().flip(0)[back].float(), damp_percent)
        if damp_percent >= 1:
            raise StageError("the Hessian can't be factorised, not even with its whole mean diagonal added to it")
        damp_percent = min(2 * damp_percent, 1.0)
