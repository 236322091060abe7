"""A model that somebody has in a folder of plain files, described so that it can be scored and asked.

Nothing is copied or changed. What the task needs is looked up in the model's `config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimize import tasks
from optimize.artifact import Artifact, walk
from optimize.errors import SourceError, StoreError
from optimize.tasks.causal_lm import max_positions
from optimize.tasks.pooling import MODULES
from optimize.tasks.pretrained import read_config

FORMATS = {
    "model.onnx": "onnx",
    "decoder.onnx": "onnx",
    "model.xml": "openvino",
    "model.pt": "torchscript",
    "model.pt2": "torch_export",
}
"""A file that only a model of that format has -> the format; a folder without one of these must hold safetensors."""
PROGRAMS = ("torchscript", "torch_export")
"""Formats that are programs: who opens one runs it."""
TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForImageClassification": "image-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForQuestionAnswering": "question-answering",
    "ForConditionalGeneration": "text2text",
    "MTModel": "text2text",
    "EncoderDecoderModel": "text2text",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
}
"""How the name of the architecture ends -> the task."""
MAX_LENGTH = 128
MASK_PROBABILITY = 0.15
CONTEXT_LENGTH = 512


def load_folder(path: Path, *, trust_remote_code: bool = False) -> Artifact:
    """The model in a folder, such as `optimize get` or `save_pretrained` wrote.

    Raises `SourceError` for what would not be taken as a recipe's model either (pickled weights only, code of the
    model's own), for a program that is not trusted and for a graph that reaches out of its folder, and `StoreError`
    where the folder, its format or its task can't be told.
    """
    folder = path.expanduser().resolve()
    if not folder.is_dir():
        raise StoreError(f"no folder {path}", hint="give a folder, a digest, or name@alias")
    names = [name for name, _ in walk(folder)]
    format = next((FORMATS[name] for name in FORMATS if name in names), "transformers")
    if format in PROGRAMS and "model.safetensors" in names:
        format = "transformers"  # whose weights lie there in another form as well
    if format == "transformers" and "config.json" in names and "module" in read_config(folder / "config.json"):
        format = "pytorch"
    vet(path, folder, format, names, trust_remote_code)
    return Artifact.from_directory(folder, format=format, task=_task(folder), trust_remote_code=trust_remote_code)


def vet(what: object, folder: Path, format: str, names: Sequence[str], trusted: bool) -> None:
    """Refuse a model from elsewhere that could do more than answer. Raises `SourceError`; `what` is its name there."""
    from optimize.source import vetting

    if format in ("transformers", "pytorch"):
        vetting.check_names(what, names)
        vetting.check_weights(what, folder, names)
    if format in (*PROGRAMS, "pytorch"):
        _check_trust(what, format, trusted)
    elif format == "openvino":
        vetting.check_openvino(what, folder, names)
    elif format != "transformers":
        vetting.check_graph(what, folder, names)
    vetting.check_configs(what, folder, trusted)


def _check_trust(what: object, format: str, trusted: bool) -> None:
    if not trusted:
        raise SourceError(
            f"{what} holds a program of {format}, which can do more than answer when it is opened",
            hint="load it by its name or digest from the work folder that made it; or, where you trust its maker, "
            "optimize.load(PATH, trust_remote_code=True) or --trust-remote-code",
        )


def _task(folder: Path) -> dict[str, Any]:
    """`Artifact.task`, from config.json."""
    config = json.loads((folder / "config.json").read_bytes())
    said = config.get("architectures")
    names = [str(name) for name in said] if isinstance(said, list) else []
    task = next((TASKS[end] for end in TASKS for name in names if name.endswith(end)), None)
    if config.get("task") == "image-classification":  # of a module of the user's own
        task = "image-classification"
    if task is None and (folder / MODULES).is_file():  # of sentence-transformers
        task = "sentence-similarity"
    if task is None:
        told = f"of architecture {names[0]}" if names else "without `architectures` in its config.json"
        hint = f"known are {', '.join(f'*{end}' for end in TASKS)}"
        raise StoreError(f"the task of a model {told} can't be told", location=str(folder), hint=hint)
    try:
        if task == "causal-lm":
            length = min(CONTEXT_LENGTH, max_positions(config) or CONTEXT_LENGTH)
            return {"name": task, "context_length": length, "stride": length}
        if task in ("question-answering", "text2text"):
            known = tasks.get(task)
            return known.spec(known.Data.model_construct(), {"unanswerable": False})
        length = min(MAX_LENGTH, int(config.get("max_position_embeddings") or MAX_LENGTH))
        if task == "fill-mask":
            return {"name": task, "max_length": length, "mask_probability": MASK_PROBABILITY, "mask_seed": 0}
        if task == "sentence-similarity":
            return {"name": task, "max_length": length, "pooling": None}
        # transformers leaves the names out of config.json where they are these.
        labels = config.get("id2label") or {i: f"LABEL_{i}" for i in range(int(config.get("num_labels", 2)))}
        names = [str(labels[index]) for index in sorted(labels, key=int)]
        if task == "image-classification":
            return {"name": task, "labels": names}
        return {"name": task, "max_length": length, "labels": names}
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise StoreError(f"config.json makes no sense: {error}", location=str(folder)) from error
