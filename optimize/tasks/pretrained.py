"""Tokenizers and configs in a model's folder, as every task of text reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optimize import shapes
from optimize.errors import SourceError


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer. One whose config names its class is loaded without `AutoTokenizer`, which imports torch.

    Raises `SourceError` where it can't be loaded.
    """
    import transformers

    from optimize.quiet import quiet

    try:
        with quiet():
            config = path / "tokenizer_config.json"
            name = read_config(config).get("tokenizer_class") if config.exists() else None
            cls = getattr(transformers, str(name), None)
            if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedTokenizerBase)):
                cls = transformers.AutoTokenizer
            return cls.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except SourceError:
        raise
    except Exception as error:  # tokenizers raises plain ones
        raise SourceError(f"the tokenizer can't be loaded: {first_line(error)}", location=str(path)) from error


def load_word_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """A tokenizer for rows that are split into words already. Raises `SourceError` where it can't tell words apart."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise SourceError(
            "the tokenizer does not tell which word its tokens are of",
            location=str(path),
            hint="take a model with a tokenizer.json",
        )
    splitter = tokenizer.backend_tokenizer.pre_tokenizer
    if isinstance(splitter, ByteLevel):
        # Without a space before it a word would be read as the inside of one.
        splitter.add_prefix_space = tokenizer.add_prefix_space = tokenizer.init_kwargs["add_prefix_space"] = True
    return tokenizer


def load_model(auto_class: str, path: Path, *, trained: bool, trust_remote_code: bool = False, **settings: Any) -> Any:
    """The torch model in float32 and evaluation mode, by transformers' class of that name (`AutoModelFor...`).

    Raises `SourceError` where it can't be loaded, and where weights are missing though the head is `trained`: else they
    belong to a head that is made anew. `ignore_mismatched_sizes` is about the head alone.
    """
    import torch
    import transformers

    from optimize.quiet import quiet

    cls = shapes.carried(getattr(transformers, auto_class), path)
    try:
        with quiet():
            model, loading = cls.from_pretrained(
                path,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **settings,
            )
    except Exception as error:  # transformers, safetensors and torch each raise their own
        raise SourceError(f"the model can't be loaded: {first_line(error)}", location=str(path)) from error
    if bent := [key for key, *_ in loading["mismatched_keys"] if key.startswith(f"{model.base_model_prefix}.")]:
        raise SourceError(
            f"the weights of {', '.join(bent[:5])} have another shape than config.json says", location=str(path)
        )
    missing = sorted(loading["missing_keys"])
    if missing and trained:
        raise SourceError(f"the weights of {', '.join(missing[:5])} are missing", location=str(path))
    return model.eval()


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `SourceError` where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path.name} can't be read: {error}", location=str(path.parent)) from error
    if not isinstance(value, dict):
        raise SourceError(f"{path.name} holds no object", location=str(path.parent))
    return value


def architectures(path: Path) -> tuple[str, ...]:
    """The classes that a model folder's config names. Raises `SourceError` where it can't be read."""
    return tuple(map(str, read_config(path / "config.json").get("architectures") or ()))


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
