"""How the vectors of a sentence's tokens become one: what a folder of sentence-transformers says, and the arithmetic.

https://sbert.net; Reimers and Gurevych, 2019, https://arxiv.org/abs/1908.10084. Vectors are made as long as 1, so that
the dot product of two is their cosine.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from optimize.errors import SourceError
from optimize.tasks.pretrained import read_config

if TYPE_CHECKING:
    import torch

Mode = Literal["mean", "cls", "last"]
MODULES = "modules.json"
EMBEDDING = "sentence_embedding"
_NAMES: Mapping[str, Mode] = {
    "mean": "mean",
    "mean_tokens": "mean",
    "cls": "cls",
    "cls_token": "cls",
    "lasttoken": "last",
}
"""What sentence-transformers calls them, now and in older versions."""
_KNOWN = ("Transformer", "Pooling", "Normalize")


def pooling_of(folder: Path) -> Mode | None:
    """What the folder says, None where it says nothing. Raises `SourceError` for what can't be done here."""
    modules = _modules(folder)
    if not modules:
        return None
    for kind, _ in modules:
        if kind not in _KNOWN:
            raise SourceError(
                f"a model with the module {kind} can't be taken: only {', '.join(_KNOWN)} are known",
                location=str(folder / MODULES),
            )
    paths = [path for kind, path in modules if kind == "Pooling"]
    if len(paths) != 1:
        raise SourceError(f"{len(paths)} modules pool, not one", location=str(folder / MODULES))
    config = read_config(folder / paths[0] / "config.json")
    said = config.get("pooling_mode") or [
        name.removeprefix("pooling_mode_") for name, on in config.items() if name.startswith("pooling_mode_") and on
    ]
    names = [said] if isinstance(said, str) else list(said)
    if len(names) != 1 or names[0] not in _NAMES:
        raise SourceError(
            f"pooling by {' and '.join(map(str, names)) or 'nothing'} can't be done: known are "
            f"{', '.join(get_args(Mode))}",
            location=str(folder / paths[0]),
        )
    return _NAMES[names[0]]


def copy_pooling(source: Path, target: Path) -> None:
    """The files that say how tokens are pooled, so that sentence-transformers can open the new folder, too."""
    modules = _modules(source)
    for name in (MODULES, *(f"{path}/config.json" for _, path in modules if path)):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(the name of its class, its folder) of each module, in their order; none where the folder says nothing.

    Raises `SourceError` where it makes no sense.
    """
    file = folder / MODULES
    if not file.is_file():
        return []
    try:
        found = [
            (str(module["type"]).rpartition(".")[2], str(module["path"]))
            for module in json.loads(file.read_text(encoding="utf-8"))
        ]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise SourceError(f"{MODULES} makes no sense: {error!r}", location=str(folder)) from error
    if any(Path(path).is_absolute() or ".." in Path(path).parts for _, path in found):
        raise SourceError(f"{MODULES} names a folder outside of its own", location=str(folder))
    return found


def pooled_tokens(mode: Mode, length: int) -> list[int]:
    """1 for each token of a row [length] whose vector counts, 0 for the others."""
    if mode == "mean":
        return [1] * length
    chosen = 0 if mode == "cls" else length - 1
    return [int(place == chosen) for place in range(length)]


def pool_in_model(model: Any, mode: Mode) -> Any:
    """The model, answering with `sentence_embedding` [batch, D] in place of its tokens' vectors.

    Rows are padded on the right. It keeps the name of its class, and with it what is written into its config.
    """
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(self: Any, *arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        import torch

        tokens, mask = kind.forward(self, *arguments, **named).last_hidden_state, named["attention_mask"]
        if mode == "mean":
            weights = mask[..., None].to(tokens.dtype)
            vectors = (tokens * weights).sum(dim=1) / weights.sum(dim=1)
        elif mode == "cls":
            vectors = tokens[:, 0]
        else:
            vectors = tokens[torch.arange(len(tokens)), mask.sum(dim=1) - 1]
        return {EMBEDDING: torch.nn.functional.normalize(vectors, dim=1)}

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return model
