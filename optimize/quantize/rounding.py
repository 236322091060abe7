"""8-bit grids: the codes of a weight, and the scale and zero point of an activation (Jacob et al., 2018,
https://arxiv.org/abs/1712.05877): value = scale * (code - zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Codes:
    """A constant in integers: `codes` of its shape; `scale` (float32) and `zero` (as `codes`) of [channels] or []."""

    codes: NDArray[Any]
    scale: NDArray[np.float32]
    zero: NDArray[Any]


def weight_codes(weight: NDArray[np.float32], axis: int | None, *, sym: bool, bits: int = 8) -> Codes:
    """Round a weight to the nearest codes (int8), with a scale for each index of `axis`, or one for all (None).

    With `sym` codes lie evenly around 0, else they use the whole range; 0 is always exact.
    """
    import numpy as np

    channels = None if axis is None else axis % weight.ndim
    others = tuple(i for i in range(weight.ndim) if i != channels)
    low, high = np.minimum(weight.min(axis=others), 0), np.maximum(weight.max(axis=others), 0)
    top = 2 ** (bits - 1) - 1
    bottom = -top if sym else -top - 1
    scale = np.maximum(-low, high) / top if sym else (high - low) / (top - bottom)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    zero = np.zeros_like(scale) if sym else np.clip(np.rint(bottom - low / scale), bottom, top)
    shape = [-1 if i == channels else 1 for i in range(weight.ndim)]
    codes = np.rint(weight / scale.reshape(shape)) + zero.reshape(shape)
    return Codes(np.clip(codes, bottom, top).astype(np.int8), scale, zero.astype(np.int8))


def bias_codes(bias: NDArray[np.float32], scale: NDArray[np.float32]) -> Codes:
    """A bias on the grid of the sums that it is added to: int32, `scale` being the input's times the weight's."""
    import numpy as np

    largest = np.iinfo(np.int32)
    scale = np.broadcast_to(scale, bias.shape).astype(np.float32)
    codes = np.clip(np.rint(bias.astype(np.float64) / scale), largest.min, largest.max).astype(np.int32)
    return Codes(codes, scale, np.zeros(bias.shape, dtype=np.int32))


def activation_grid(low: float, high: float, *, sym: bool) -> tuple[float, int]:
    """Scale and zero point of the unsigned bytes that cover a range with 0 in it; with `sym` 128 stands for 0."""
    if sym:
        return max(-low, high) / 127 or 1.0, 128
    scale = (high - low) / 255 or 1.0
    return scale, round(-low / scale)
