"""Keeps libraries that print, warn and draw bars away from the terminal: standard output belongs to `--json`."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Python code prints nothing to standard output, warns and logs nothing, and transformers draws no bars.

    Standard error stays open, since progress is shown there meanwhile.
    """
    bars = sys.modules.get("transformers.utils.logging")
    had_bars = bars is not None and bars.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        if bars is not None and had_bars:
            bars.disable_progress_bar()
        try:
            yield
        finally:
            logging.disable(disabled)
            if bars is not None and had_bars:
                bars.enable_progress_bar()
