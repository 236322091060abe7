"""Where stages compute."""

from __future__ import annotations

from optimize.errors import StageError


def check_device(device: str) -> None:
    """Raises `StageError` for `cuda` where PyTorch has no such device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise StageError("no CUDA device", hint="set device: cpu")
