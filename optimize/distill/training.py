"""What every training here shares: its settings, its randomness, and the `Trainer` of transformers.

`distill: finetune`, `logits` and `features`, quantisation-aware training and the recovery between steps of pruning all
end up in `train`.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from optimize.config import Block
from optimize.context import Context
from optimize.device import check_device
from optimize.distill.lora import Lora
from optimize.distill.trainer import check_loss, last_checkpoint, progress, trainer_class
from optimize.errors import StageError
from optimize.quiet import quiet
from optimize.runtimes.transformers import TorchRunner

if TYPE_CHECKING:
    from optimize.tasks import Features


class Training(Block):
    """How a model is trained."""

    epochs: float = Field(1.0, gt=0)
    """Passes over the training rows."""
    learning_rate: float = Field(5e-5, gt=0)
    """The highest learning rate, reached at the end of the warm-up."""
    batch_size: int = Field(32, ge=1)
    """Rows a step and device."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Batches whose gradients are added up before a step."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled, on every weight but biases and norms."""
    warmup_ratio: float = Field(0.06, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """How the learning rate goes on after the warm-up."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    optim: Literal["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"] = "adamw_torch_fused"
    """The optimiser, by the Trainer's name for it. The fused AdamW takes an eighth of the other's time on a CPU."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the arithmetic (autocast); weights are kept and saved in float32."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after so many epochs without a lower validation loss, and keep the best epoch; None trains to the end."""
    save_steps: int = Field(100, ge=1)
    """Steps between checkpoints, from which a killed training goes on."""
    report_to: tuple[str, ...] = ()
    """Where training curves go: `tensorboard`, `mlflow`, `wandb`, or another that the Trainer knows."""
    seed: int = Field(0, ge=0)
    """Of the new head, the dropout and the order of the rows."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` is `cuda` where there is one."""
    threads: int | None = Field(None, ge=1)
    """CPU threads, by default every usable core. Another number gives other bits."""


class LargeTraining(Training):
    """How a model is trained that may not fit: with adapters, fewer activations kept, or on several devices."""

    lora: Lora | None = None
    """Train low-rank adapters instead of the weights, and merge them in the end; needs peft."""
    gradient_checkpointing: bool = False
    """Keep the activations of no block, and compute them again for the gradients: slower, in less memory."""
    processes: int = Field(1, ge=1)
    """Processes that train together, each with `batch_size` rows a step and a share of `threads`: one for each GPU.
    The last step of an epoch is filled up with rows of its beginning."""
    fsdp: dict[str, Any] | None = None
    """Share the weights out between the processes: what the Trainer takes as `fsdp_config`, such as `{version: 2}`."""
    deepspeed: dict[str, Any] | None = None
    """Settings of DeepSpeed, as in its own configuration file; needs deepspeed."""

    @model_validator(mode="after")
    def _fits_together(self) -> LargeTraining:
        sharded = [name for name in ("fsdp", "deepspeed") if getattr(self, name) is not None]
        if len(sharded) > 1:
            raise ValueError("fsdp and deepspeed are two ways to do the same: choose one")
        if sharded and self.lora:
            raise ValueError(f"lora trains too few weights to be shared out: leave {sharded[0]} out")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what came later and is left out, so that a key stays what it was."""
        said: dict[str, Any] = handler(self)
        fields = LargeTraining.model_fields
        later = [name for name in fields if name not in Training.model_fields]
        return {
            name: value
            for name, value in said.items()
            if name not in later or getattr(self, name) != fields[name].default
        }


class Rows:
    """Rows on their way to a training."""

    def __init__(self, preprocessor: Any, spec: Mapping[str, Any], context: Context) -> None:
        self.preprocessor, self.spec, self.context = preprocessor, spec, context

    def examples(self, split: str) -> list[Features]:
        """What the model is to learn from a split's rows."""
        return self.context.task.examples(self.preprocessor, self.context.data.rows(split), self.spec)

    def collate(self, batch: Sequence[Features]) -> dict[str, Any]:
        """Some of them as the tensors that the model takes."""
        import torch

        arrays = self.context.task.collate_examples(self.preprocessor, batch)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class NotTheFirst(Exception):
    """Ends a process that trained beside the first, which alone goes on to save the model."""


@contextlib.contextmanager
def training(config: Training, context: Context) -> Iterator[None]:
    """Where a model is made and trained: silent, with randomness and threads of its own. Raises `StageError` where the
    device can't do what `config` says.
    """
    import torch

    check_device(config.device)
    if config.precision == "float16" and not torch.cuda.is_available():
        raise StageError("float16 training needs a CUDA device", hint="set precision: bfloat16 or float32")
    if config.early_stopping_patience and not context.data.num_rows.get("validation"):
        raise StageError("early stopping needs validation rows", hint="give `data.splits.validation` a share")
    with quiet(), _own_randomness(config), _curves_in(context.logs):
        yield


def train(
    model: Any,
    preprocessor: Any,
    spec: Mapping[str, Any],
    config: Training,
    context: Context,
    rows: Rows | None = None,
) -> tuple[Any, dict[str, Any]]:
    """(the trained model on the CPU, in evaluation mode; what the manifest says of it). It goes on from the last
    checkpoint in `context.scratch`. Raises `StageError` where the loss is no number.

    `model` may be wrapped: by peft, whose adapters are merged, or by a module that holds it as `student` and gives the
    loss to train by; such a module names its `labels`. `rows` says what is learnt from, by default the rows' labels.
    """
    import torch
    import transformers

    task = context.task
    rows = rows or Rows(preprocessor, spec, context)
    validation = rows.examples("validation") if context.data.num_rows.get("validation") else []
    if getattr(config, "gradient_checkpointing", False):
        _checkpoint_activations(getattr(model, "student", model))
    fresh = _maker(getattr(model, "student", model))
    try:
        trainer = trainer_class()(
            model=model,
            args=_arguments(config, context.scratch, getattr(model, "labels", None)),
            train_dataset=rows.examples("train"),
            eval_dataset=validation or None,
            data_collator=rows.collate,
            callbacks=[progress(context)],
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise StageError(f"the Trainer can't be set up: {error}", hint="look at report_to, optim and device") from error
    if config.early_stopping_patience:
        trainer.add_callback(transformers.EarlyStoppingCallback(config.early_stopping_patience))
    trainer.remove_callback(transformers.PrinterCallback)
    outcome = trainer.train(resume_from_checkpoint=last_checkpoint(context.scratch))
    check_loss(outcome.training_loss, "in training")
    details: dict[str, Any] = {"steps": trainer.state.global_step}
    if validation:
        loss = trainer.evaluate(metric_key_prefix="validation")["validation_loss"]
        check_loss(loss, "on the validation rows")
        details["validation"] = {"loss": loss}
    trained = _trained(trainer, fresh)
    if validation:
        table = context.data.rows("validation")
        runner = TorchRunner(trained, torch.get_num_threads())
        outputs = task.respond(runner, preprocessor, table, spec, batch_size=config.batch_size)
        targets = task.targets(table)
        details["validation"] |= {name: task.metrics[name].compute(outputs, targets) for name in task.default_metrics}
    return trained, details


def _arguments(config: Training, scratch: Path, labels: list[str] | None) -> Any:
    from transformers import TrainingArguments

    stopping = config.early_stopping_patience is not None
    fsdp, deepspeed = getattr(config, "fsdp", None), getattr(config, "deepspeed", None)
    shared: dict[str, Any] = {}
    if fsdp is not None:
        shared = {"fsdp": True, "fsdp_config": dict(fsdp)}
    if deepspeed is not None:
        shared = {"deepspeed": dict(deepspeed)}
    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share
        lr_scheduler_type=config.lr_scheduler_type,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        bf16=config.precision == "bfloat16",
        fp16=config.precision == "float16",
        use_cpu=config.device == "cpu",
        dataloader_pin_memory=config.device != "cpu",
        seed=config.seed,
        eval_strategy="epoch" if stopping else "no",
        save_strategy="epoch" if stopping else "steps",
        save_steps=config.save_steps,
        save_total_limit=2,  # the last one stays until the next is complete
        load_best_model_at_end=stopping,
        metric_for_best_model="loss" if stopping else None,
        logging_steps=10,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        label_names=labels,
        report_to=list(config.report_to) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        **shared,
    )
    if labels and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # a teacher is on one device; several are for `processes`
    return arguments


def _checkpoint_activations(model: Any) -> None:
    """Raises `StageError` where the model has no blocks that could be computed again."""
    try:
        # Older versions of transformers have only the second name, newer ones deprecate it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    except (ValueError, AttributeError) as error:
        raise StageError(
            f"its activations can't be computed again: {error}", hint="leave gradient_checkpointing out"
        ) from error


def _maker(model: Any) -> Any:
    """Makes a model of the same kind, with weights of its own."""
    kind, settings = type(model), getattr(model, "config", None)
    return lambda: kind(settings)


def _trained(trainer: Any, fresh: Any) -> Any:
    """The model itself, without what training put around it, on the CPU and in evaluation mode.

    Raises `NotTheFirst` in all processes but one.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.is_world_process_zero():
            model = fresh()
            model.load_state_dict({name.removeprefix("student."): value for name, value in weights.items()})
            return model.eval()
    if not trainer.is_world_process_zero():
        raise NotTheFirst
    trained = trainer.accelerator.unwrap_model(trainer.model)
    trained = getattr(trained, "student", trained).cpu().eval()
    return trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else trained


@contextlib.contextmanager
def _curves_in(folder: Path) -> Iterator[None]:
    """Tell the Trainer where TensorBoard's files go: by default they lie with the checkpoints, which are removed."""
    variable = "TENSORBOARD_LOGGING_DIR"
    chosen = os.environ.setdefault(variable, str(folder))
    try:
        yield
    finally:
        if chosen == str(folder):
            del os.environ[variable]


@contextlib.contextmanager
def _own_randomness(config: Training) -> Iterator[None]:
    """Seeds and threads of the training's own; the caller's come back afterwards."""
    import numpy as np
    import torch
    from transformers import set_seed

    python, numpy, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        set_seed(config.seed)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.device == "cuda":
            torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
