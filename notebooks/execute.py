"""Execute the notebooks in their order and in one work folder, and keep their outputs.

    python notebooks/execute.py            # real figures, which takes minutes
    python notebooks/execute.py 3 4        # some of them

What tells only of the machine (times of execution, versions) is left out of the files. The tests do the same with
`OPTIMIZE_NOTEBOOKS_SMALL`, and write nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

HERE = Path(__file__).parent
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
SMALL = "OPTIMIZE_NOTEBOOKS_SMALL"


def execute(path: Path, environment: dict[str, str], timeout: float, more: Sequence[Any] = ()) -> Any:
    """The notebook with its outputs, and with `more` cells behind its own.

    Raises `CellExecutionError` where a cell fails, and `CellTimeoutError` where one takes more seconds than `timeout`.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += more
    with TemporaryDirectory() as sockets:  # no ports for others to listen at
        NotebookClient(
            notebook,
            kernel_name="python3",
            config=Config(KernelManager={"transport": "ipc", "ip": str(Path(sockets, "kernel"))}),
            timeout=timeout,
            startup_timeout=600,
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
        ).execute(env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found", **environment})  # tqdm's widgets
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main(chosen: list[str]) -> None:
    for path in NOTEBOOKS:
        if not chosen or path.name.lstrip("0").split("-")[0] in chosen:
            print(path.name, flush=True)
            nbformat.write(execute(path, {}, timeout=7200), path)


if __name__ == "__main__":
    main(sys.argv[1:])
