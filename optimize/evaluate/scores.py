"""The memory of measurements: values and arrays by what they depend on, below `work.scores`."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.artifact import digest_of
from optimize.atomic import write_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VERSION = 1
"""Of this evaluator: raised when the same artifact on the same rows would be measured or judged in another way."""


class Scores:
    """A folder of what was measured before. A file that can't be read is measured again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.computed: list[str] = []
        """The kinds of what was not there and had to be measured."""

    def path(self, kind: str, key: Mapping[str, Any], suffix: str = ".json") -> Path:
        """Where a value lies; its name is the digest of the key."""
        return self.root / kind / (digest_of({"evaluator": VERSION, **key}).removeprefix("sha256:")[:40] + suffix)

    def value(self, kind: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """A JSON value: read, or computed and kept."""
        path = self.path(kind, key)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return json.loads(path.read_bytes())["value"]
        value = compute()
        self.computed.append(kind)
        # JSON as Python writes it: an interval may end at infinity.
        write_bytes(path, json.dumps({"key": key, "value": value}).encode())
        return value

    def array(self, kind: str, key: Mapping[str, Any], compute: Callable[[], NDArray[np.float32]]) -> NDArray[Any]:
        """An array: read, or computed and kept. Nothing is ever unpickled."""
        import numpy as np

        path = self.path(kind, key, ".npz")
        # A damaged archive raises whatever the part that finds out does: zipfile, zlib or NumPy.
        with contextlib.suppress(Exception), path.open("rb") as file:
            return np.load(file, allow_pickle=False)["value"]  # type: ignore[no-any-return]
        value = compute()
        self.computed.append(kind)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, value=value)
        write_bytes(path, buffer.getvalue())
        return value
