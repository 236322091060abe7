"""A pruned model as files: a plain checkpoint wherever its `config.json` can say what it is.

The numbers of a config are tried out, and those kept with which the model that it makes is nearest to the one at hand.
What still differs goes into `shapes.json` (`optimize/shapes.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import shapes
from optimize.quiet import quiet
from optimize.runtimes import pytorch

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.context import Context

Units = Mapping[str, Collection[tuple[int, int]]]
"""Kind -> (how many units a dimension had, how many it has) of its dimensions, equal ones once."""
_WIDTHS = {
    "ffn": ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner", "mlp_dim"),
    "hidden": ("hidden_size",),
}
"""What configs call the width of every layer."""


def save(model: Any, artifact: Artifact, folder: Path, units: Units) -> bool:
    """Write config, weights and, where they are needed, shapes; whether the checkpoint is a plain one."""
    (folder / shapes.FILE).unlink(missing_ok=True)
    if artifact.format == "pytorch":
        config = pytorch.described(artifact.path, artifact.task)
        with quiet():
            plain = pytorch.make(str(config["module"]), config.get("module_args") or {})
        pytorch.save(model, folder, config)
        return _write(folder, shapes.difference(plain, model))
    model.config = _fitting(model, units)
    model.config._name_or_path = ""
    left = shapes.difference(_made(model, model.config), model)
    with quiet():
        model.save_pretrained(folder)
    return _write(folder, left)


def copy_preprocessor(artifact: Artifact, context: Context, folder: Path) -> None:
    trust = artifact.trust_remote_code
    found = context.task.preprocessor(artifact.path, trust_remote_code=trust)
    found.save_pretrained(folder)


def _write(folder: Path, left: Mapping[str, Any]) -> bool:
    (folder / shapes.FILE).unlink(missing_ok=True)  # of a parent's, which its class writes
    plain = not (left["shapes"] or left["numbers"])
    if not plain:
        shapes.write(folder, left)
    return plain


def _fitting(model: Any, units: Units) -> Any:
    """The config that comes nearest to the model: every set of kinds is tried, since numbers may only do together."""
    alike = {kind: next(iter(found)) for kind, found in units.items() if len(found) == 1}
    best, distance = model.config, _distance(model, model.config)
    for kinds in chain.from_iterable(combinations(alike, count + 1) for count in range(len(alike))):
        config = copy.deepcopy(model.config)
        said = all(_say(config.get_text_config(), kind, *alike[kind]) for kind in kinds)
        if said and (nearer := _distance(model, config)) < distance:
            best, distance = config, nearer
    return best


def _say(config: Any, kind: str, had: int, made: int) -> bool:
    """Have a config say that every layer has `made` units in place of `had`; whether it says such a thing at all."""
    if kind == "heads":
        # Units are the heads that keys have; several queries may share one.
        shared = config.num_attention_heads // had
        if getattr(config, "num_key_value_heads", None) == had:
            config.num_key_value_heads = made
        config.num_attention_heads = shared * made
        return True
    names = [name for name in _WIDTHS.get(kind, ()) if getattr(config, name, None) == had]
    for name in names:
        setattr(config, name, made)
    return bool(names)


def _distance(model: Any, config: Any) -> int:
    """How many tensors and numbers the config gets wrong."""
    try:
        left = shapes.difference(_made(model, config), model)
    except Exception:  # configs raise their own: no such model can be, as with a width that its heads do not divide
        return 1 << 62
    return len(left["shapes"]) + len(left["numbers"])


def _made(model: Any, config: Any) -> Any:
    """The model that a config makes, without weights."""
    import torch
    import transformers

    cls = getattr(transformers, type(model).__name__)
    with quiet(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        # As if from its file: it is checked on the way.
        return cls(type(config).from_dict(copy.deepcopy(config.to_dict())))
