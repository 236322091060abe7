"""GGUF files, llama.cpp's format of quantised models: de-quantised into a plain folder of safetensors and tokenizer.

transformers reads the file (`gguf_file=`): weights, config and tokenizer all come out of it, nothing is fetched and no
code is run; what a header claims beyond the file's end is an error. The weights come out in float32, which holds
exactly what llama.cpp computes with. They still lie on the grid that they were quantised to: quantising them again at
the same group size shows no loss and proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from optimize.errors import SourceError

SUFFIX = ".gguf"
LIBRARIES = ("gguf", "sentencepiece")
"""What transformers needs to read a GGUF file; the extra `gguf` brings them along."""


def is_gguf(name: str) -> bool:
    return name.lower().endswith(SUFFIX)


def check_installed(source: object) -> None:
    """Raises `SourceError` that names the extra where a library is missing. Imports none of them."""
    missing = [name for name in LIBRARIES if _version(name) is None]
    if missing:
        raise SourceError(
            f"{source} is a GGUF file, and reading one needs {' and '.join(missing)}",
            hint='pip install "optimize-workbench[gguf]"',
        )


def readers() -> dict[str, str]:
    """Major.minor of the libraries that decide what comes out; part of the source's identity."""
    return {name: ".".join((_version(name) or "").split(".")[:2]) for name in ("gguf", "transformers")}


def unpack(source: object, file: Path, directory: Path) -> None:
    """De-quantise `file`, alone in its folder, into the folder `directory`. Holds the whole model in memory.

    `source` is what messages call it. Raises `SourceError` where it is no GGUF file, or holds a model or a tokenizer
    that transformers does not know. The same file gives the same bytes.
    """
    check_installed(source)
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise SourceError(
                f"{source} is no GGUF file",
                hint="fetch it again (a file of about 130 bytes is a placeholder: `git lfs pull`)",
            )
    import torch
    import transformers

    from optimize.quiet import quiet

    model_class: Any = transformers.AutoModelForCausalLM

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        with quiet(), _no_bar():
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
            model, loading = model_class.from_pretrained(
                file.parent, dtype=torch.float32, output_loading_info=True, **where
            )
    except Exception as error:  # gguf, tokenizers and transformers each raise their own, and plain ones
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise SourceError(f"{source} can't be read as GGUF: {reason}") from error
    if missing := sorted(loading["missing_keys"]):
        raise SourceError(f"{source} lacks the weights of {', '.join(missing[:5])}")
    # transformers takes the model for a quantised one still, and refuses to save it.
    model.hf_quantizer = None
    model.config.quantization_config = None
    del model.config.quantization_config
    with quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


@contextmanager
def _no_bar() -> Iterator[None]:
    """transformers draws a bar of its own here, whatever it is told of bars, and it would draw over ours."""
    reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    drawn = reader.tqdm
    reader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reader.tqdm = drawn


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
