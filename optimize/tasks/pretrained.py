"""Tokenizers and configs in a model's folder, as every task of text reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `SourceError` where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path.name} can't be read: {error}", location=str(path.parent)) from error
    if not isinstance(value, dict):
        raise SourceError(f"{path.name} holds no object", location=str(path.parent))
    return value


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
