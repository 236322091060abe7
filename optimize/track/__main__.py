"""The process that sends a run: a job on standard input, the reply in the file that is named."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> dict[str, str]:
    from optimize.track import TRACKERS
    from optimize.track.content import Content

    try:
        tracker = TRACKERS[job["to"]].load()
        config = tracker.Config.model_validate(job["config"])
        content = Content.of(Path(job["folder"]))
        os.chdir(job["here"])  # a store that is named by a relative path lies where the user stands
        return {"where": tracker.send(content, config, Path(job["base"]))}
    except BaseException as error:  # a library that exits has not sent it either
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    reply = json.dumps(main(json.load(sys.stdin)))
    temporary = Path(f"{sys.argv[1]}.tmp")
    temporary.write_text(reply, encoding="utf-8")
    temporary.replace(sys.argv[1])
    os._exit(0)  # no waiting for threads that a library left behind
