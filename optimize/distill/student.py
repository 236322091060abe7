"""A smaller model of the same kind, to be taught: fewer layers, fewer or narrower heads, less width.

Every weight comes from the model that the stage takes: layers are chosen, widths cut. So the student begins with what
its teacher knows, as DistilBERT did (Sanh et al., 2019, https://arxiv.org/abs/1910.01108). It is an ordinary checkpoint
with the same tokenizer and the same labels, and answers badly until it is trained.

    stages:
      - distill: finetune
        name: teacher
      - distill: student
        num_hidden_layers: 3
        layers: uniform
      - distill: logits
        teacher: teacher

`source` takes any other model in its place, such as `./tiny-bert`: one without a head gets a new one.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from optimize.artifact import Artifact
from optimize.config import Block
from optimize.context import Context
from optimize.errors import StageError
from optimize.quiet import quiet

VERSION = 1
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


class Config(Block):
    """`distill: student`."""

    num_hidden_layers: int | None = Field(None, ge=1)
    """Transformer blocks; the default is as many as before, or as many as `layers` lists."""
    hidden_size: int | None = Field(None, ge=1)
    """Width of what the blocks hand on: the first of each head's share stay."""
    num_attention_heads: int | None = Field(None, ge=1)
    """Heads of each block; those that share keys and values lose as many each."""
    intermediate_size: int | None = Field(None, ge=1)
    """Width inside the feed-forward layers: the first stay."""
    layers: Literal["uniform", "first", "last"] | tuple[int, ...] = "uniform"
    """Which blocks stay: `uniform`, spread evenly from the first to the last; `first`; `last`; or a list, counted from
    0."""
    source: str | None = None
    """Take this model instead of a smaller copy: a folder, a hub id, or wheel://NAME==VERSION/path."""
    seed: int = Field(0, ge=0)
    """Of the head that a `source` without one gets."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Config:
        sizes = [name for name in _SIZES if getattr(self, name) is not None]
        listed = isinstance(self.layers, tuple)
        if self.source is not None and (sizes or listed):
            raise ValueError(f"source is a model of its own size: leave {(sizes or ['layers'])[0]} out")
        if self.source is None and not sizes and not listed:
            raise ValueError(f"nothing says what is smaller: give {', '.join(_SIZES)}, or source")
        if isinstance(self.layers, tuple):
            if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
                raise ValueError("layers lists blocks, counted from 0, each once")
            if self.num_hidden_layers not in (None, len(self.layers)):
                raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}, and layers lists {len(self.layers)}")
        return self


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Raises `StageError` where the sizes make no model of this kind, and where a `source` has other labels, or another
    tokenizer that matters.
    """
    import torch

    devices = range(torch.cuda.device_count())
    with quiet(), torch.random.fork_rng(devices=devices), tempfile.TemporaryDirectory(dir=context.scratch) as scratch:
        torch.manual_seed(config.seed)
        if config.source is not None:
            model, preprocessor, details = _other(artifact, config, context, Path(scratch))
        else:
            model, preprocessor, details = _smaller(artifact, config, context)
        preprocessor.save_pretrained(context.directory)
        model.config._name_or_path = ""
        model.save_pretrained(context.directory)
    details["parameters"] = sum(weight.numel() for weight in model.parameters())
    return Artifact.from_directory(
        context.directory,
        format="transformers",
        task=artifact.task,
        details=details,
        trust_remote_code=artifact.trust_remote_code,
    )


def _smaller(artifact: Artifact, config: Config, context: Context) -> tuple[Any, Any, dict[str, Any]]:
    """The model, what prepares its inputs, and which blocks it is made of."""
    from optimize.distill import narrowing

    trust, task = artifact.trust_remote_code, context.task
    teacher = task.load_model(artifact.path, artifact.task, trust_remote_code=trust)
    try:
        plan = narrowing.Plan(teacher.config, {name: getattr(config, name) for name in _SIZES}, config.layers)
        student = type(teacher)(plan.config)
        student.load_state_dict(narrowing.cut(teacher, plan))
    except ValueError as error:
        raise StageError(str(error), hint="look at the sizes of the student") from error
    student.tie_weights()
    if getattr(teacher, "generation_config", None):
        student.generation_config = copy.deepcopy(teacher.generation_config)
    preprocessor = task.preprocessor(artifact.path, trust_remote_code=trust)
    return student, preprocessor, {"layers": list(plan.layers)}


def _other(artifact: Artifact, config: Config, context: Context, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    from optimize.distill.teacher import same_inputs

    task, spec = context.task, artifact.task
    context.sources["source"].copy_to(folder)
    # Raises where it has a head for other labels.
    model, preprocessor = task.load_model(folder, spec), task.preprocessor(folder)
    given = task.preprocessor(artifact.path, trust_remote_code=artifact.trust_remote_code)
    if not task.per_row and not same_inputs(task, preprocessor, given, spec, context):
        raise StageError(
            f"the tokenizer of {config.source} is not that of the model it is to learn from, and models for "
            f"{task.name} answer for every token",
            hint="take a model with the same tokenizer, or give sizes (num_hidden_layers: 3) in place of source",
        )
    return model, task.preprocessor(folder), {}
