"""A static picture: PNG, which every code host shows, and words for whoever sees no pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

DOTS_PER_INCH = 110


@dataclass(frozen=True)
class Picture:
    """Shows itself in a notebook. `figure` is matplotlib's, to be changed at will."""

    figure: Any
    words: str
    """What the picture says."""

    def png(self) -> bytes:
        """The same bytes for the same figure and version of matplotlib."""
        import io

        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
        return file.getvalue()

    def save(self, path: str | PathLike[str]) -> Path:
        """PNG, SVG or PDF, by the name's ending."""
        path = Path(path)
        self.figure.savefig(path, dpi=DOTS_PER_INCH)
        return path

    def __repr__(self) -> str:
        return self.words

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], Mapping[str, Any]]:
        import base64

        image = base64.b64encode(self.png()).decode()
        return {"text/plain": self.words, "image/png": image}, {"image/png": {"alt": self.words}}
