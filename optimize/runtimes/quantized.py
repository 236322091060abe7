"""The libraries that serve quantised checkpoints inside transformers, and what they must not do on the way.

Left to themselves, they fetch compiled code from a hub (bitsandbytes, on a CPU with AVX512-BF16 and where the package
`kernels` is installed), put the model on a GPU, reseed the global random generators, set environment variables (the
hub's cache among them), print banners, and refuse to work on a machine of two cores (gptqmodel).
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from optimize.errors import EvaluationError
from optimize.quiet import quiet
from optimize.runtimes import gptq_mixed

SERVED_BY = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "gptq": ("gptqmodel", "gptq"),
    "torchao": ("torchao", "torchao"),
}
"""`quant_method` in config.json -> the module that serves it, and our extra that installs that."""


@contextlib.contextmanager
def serving(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A place to load such a checkpoint in; yields what `from_pretrained` has to be told besides.

    Raises `EvaluationError` where the library is missing or the method is none of `SERVED_BY`.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        yield {}
        return
    method = quantization.get("quant_method")
    if method not in SERVED_BY:
        raise EvaluationError(
            f"weights quantised by {method!r} can't be opened", hint=f"known are {', '.join(sorted(SERVED_BY))}"
        )
    with untouched_randomness(), _absent_weights_left():
        load_library(*SERVED_BY[method])
        apart = method == "gptq" and gptq_mixed.mixed(quantization)
        with gptq_mixed.layers_of_their_own(quantization) if apart else contextlib.nullcontext():
            yield {"device_map": {"": "cpu"}}


def load_library(name: str, extra: str) -> Any:
    """Import it, silently and without code from a hub. Raises `EvaluationError` where it can't be imported."""
    environment = dict(os.environ)
    hidden = sys.modules.get("kernels")
    # It takes half of the processors as its workers, and wants two of them.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # so that importing it fails
    try:
        with quiet():
            library = import_module(name)
    except ImportError as error:
        raise EvaluationError(f"{name}: {error}", hint=f'pip install "optimize-workbench[{extra}]"') from error
    finally:
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden
        # gptqmodel moves the hub's cache, and more, for us and whatever we start.
        for changed in [key for key in os.environ if key != "GPTQMODEL_CPU_WORKERS" and key not in environment]:
            del os.environ[changed]
        os.environ.update({key: value for key, value in environment.items() if os.environ.get(key) != value})
    logging.getLogger(name).setLevel(logging.ERROR)  # LLM.int8() says at every call that it rounds
    return library


@contextlib.contextmanager
def untouched_randomness() -> Iterator[None]:
    """Put the global generators back as they were."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _absent_weights_left() -> Iterator[None]:
    """Let GPT-2 load: once it has its weights it draws those anew that are missing, by names quantised layers lack."""
    from transformers import PreTrainedModel

    original = PreTrainedModel._initialize_weights

    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        except AttributeError as error:
            lacking = str(error)
            if not lacking.endswith("has no attribute 'weight'") and "_LinearWeightMetadata" not in lacking:
                raise

    PreTrainedModel._initialize_weights = initialize  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = original  # type: ignore[method-assign]
