"""What every tracker's block may say."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from optimize.config import Block
from optimize.masking import holds_secret


def _check_no_secret(address: str) -> str:
    if holds_secret(address):
        raise ValueError("a recipe is no place for a password or a token: give it in the environment")
    return address


Address = Annotated[str, AfterValidator(_check_no_secret)]
"""A URL without a password: a recipe is committed, copied and sent."""


class Settings(Block):
    """What every tracker's block may say."""

    timeout_seconds: float = Field(60.0, gt=0)
    """How long sending may take; then it is given up, and the run goes on as if it had not been asked for."""
