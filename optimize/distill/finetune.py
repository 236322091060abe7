"""Fine-tuning on the recipe's own labels, by the `Trainer` of transformers.

The first step of most recipes: its result is the baseline that smaller artifacts are held against. AdamW is Loshchilov
and Hutter's (2019, https://arxiv.org/abs/1711.05101); the way to fine-tune an encoder briefly is that of BERT (Devlin
et al., 2019, https://arxiv.org/abs/1810.04805).

    stages:
      - distill: finetune
        epochs: 1
        learning_rate: 5e-5
        batch_size: 32

The same seed, rows and number of threads give the same bits, also where a killed training goes on from its last
checkpoint. Training curves (`report_to: [tensorboard]`) lie in the run's folder below `logs/`.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from optimize.artifact import Artifact, sync_tree
from optimize.config import Block
from optimize.context import Context
from optimize.errors import StageError
from optimize.prune.masks import Held
from optimize.quiet import quiet
from optimize.runtimes import pytorch
from optimize.runtimes.transformers import TorchRunner

if TYPE_CHECKING:
    from optimize.tasks import Features

VERSION = 1

_COMPLETE = "complete"
"""An empty file in a checkpoint's folder, written after all else: one without it was cut short by a kill."""
_POOL = 50
"""Batches that are sorted by length together: enough to pad little, few enough to stay a shuffle."""


class Config(Block):
    """`distill: finetune`."""

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


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Train a copy of the model. Raises `StageError` where the loss is no number or the device can't do it."""
    trust = artifact.trust_remote_code
    task, spec = context.task, artifact.task
    with training(config, context):
        preprocessor = task.preprocessor(artifact.path, trust_remote_code=trust)
        preprocessor.save_pretrained(context.directory)  # before use, which leaves its truncation in what is saved
        model = task.load_model(artifact.path, spec, trust_remote_code=trust)
        masks = Held(artifact, model)
        if artifact.format == "pytorch":
            trained, details = train(with_loss(model), preprocessor, spec, config, context)
            pytorch.save(trained.module, context.directory, pytorch.described(artifact.path, spec))
        else:
            # The Trainer writes no paths, but the model remembers where it came from.
            model.config._name_or_path = ""
            trained, details = train(model, preprocessor, spec, config, context)
            masks.finish(trained, context.directory)
            trained.save_pretrained(context.directory)
    return Artifact.from_directory(
        context.directory, format=artifact.format, task=spec, details=details, trust_remote_code=trust
    )


@contextlib.contextmanager
def training(config: Config, context: Context) -> Iterator[None]:
    """Where a model is made and trained: silent, with randomness and threads of its own. Raises `StageError` where the
    device can't do what `config` says.
    """
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise StageError("no CUDA device", hint="set device: cpu")
    if config.precision == "float16" and not torch.cuda.is_available():
        raise StageError("float16 training needs a CUDA device", hint="set precision: bfloat16 or float32")
    if config.early_stopping_patience and not context.data.num_rows.get("validation"):
        raise StageError("early stopping needs validation rows", hint="give `data.splits.validation` a share")
    with quiet(), _own_randomness(config), _curves_in(context.logs):
        yield


def train(
    model: Any, preprocessor: Any, spec: Mapping[str, Any], config: Config, context: Context
) -> tuple[Any, dict[str, Any]]:
    """(the trained model on the CPU, in evaluation mode; what the manifest says of it). It goes on from the last
    checkpoint in `context.scratch`. Raises `StageError` where the loss is no number.
    """
    import torch
    import transformers

    task = context.task

    def examples(split: str) -> list[Features]:
        return task.examples(preprocessor, context.data.rows(split), spec)

    def collate(batch: Sequence[Features]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in task.collate_examples(preprocessor, batch).items()}

    validation = examples("validation") if context.data.num_rows.get("validation") else []
    try:
        trainer = _trainer_class()(
            model=model,
            args=_arguments(config, context.scratch),
            train_dataset=examples("train"),
            eval_dataset=validation or None,
            data_collator=collate,
            callbacks=[_progress(context)],
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise StageError(f"the Trainer can't be set up: {error}", hint="look at report_to, optim and device") from error
    if config.early_stopping_patience:
        trainer.add_callback(transformers.EarlyStoppingCallback(config.early_stopping_patience))
    trainer.remove_callback(transformers.PrinterCallback)
    outcome = trainer.train(resume_from_checkpoint=_last_checkpoint(context.scratch))
    _check_loss(outcome.training_loss, "in training")
    details: dict[str, Any] = {"steps": trainer.state.global_step}
    if validation:
        loss = trainer.evaluate(metric_key_prefix="validation")["validation_loss"]
        _check_loss(loss, "on the validation rows")
        details["validation"] = {"loss": loss}
    trained = trainer.accelerator.unwrap_model(trainer.model).cpu().eval()
    if validation:
        table = context.data.rows("validation")
        runner = TorchRunner(trained, torch.get_num_threads())
        outputs = task.respond(runner, preprocessor, table, spec, batch_size=config.batch_size)
        targets = task.targets(table)
        details["validation"] |= {name: task.metrics[name].compute(outputs, targets) for name in task.default_metrics}
    return trained, details


def _arguments(config: Config, scratch: Path) -> Any:
    from transformers import TrainingArguments

    stopping = config.early_stopping_patience is not None
    return TrainingArguments(
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
        report_to=list(config.report_to) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
    )


def with_loss(module: Any) -> Any:
    """A module of the user's own, which takes pixels and gives logits, as the Trainer wants it."""
    from torch import Tensor, nn

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            outputs = pytorch.named(self.module(pixel_values))
            if labels is None:
                return outputs
            return {"loss": nn.functional.cross_entropy(outputs[pytorch.OUTPUT], labels), **outputs}

    return WithLoss()


def _trainer_class() -> Any:
    """The Trainer with batches of similar length, in an order that only the seed and the epoch decide.

    Its own `group_by_length` draws from the global generator: a resume would give the second epoch another order.
    """
    import torch
    from transformers import Trainer

    class Sampler(torch.utils.data.Sampler[int]):
        def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
            self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(self.lengths)

        def __iter__(self) -> Iterator[int]:
            return iter(length_grouped(self.lengths, self.batch_size, f"{self.seed}/{self.epoch}"))

    class LengthGroupedTrainer(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
            rows: Any = self.train_dataset if train_dataset is None else train_dataset
            return Sampler([len(row.get("input_ids", ())) for row in rows], self.args.train_batch_size, self.args.seed)

    return LengthGroupedTrainer


def length_grouped(lengths: Sequence[int], batch_size: int, seed: str) -> list[int]:
    """Row numbers in a shuffled order in which every `batch_size` neighbours are of similar length."""
    draw = random.Random(seed)
    rows = list(range(len(lengths)))
    draw.shuffle(rows)
    pool = _POOL * batch_size
    pools = [sorted(rows[i : i + pool], key=lengths.__getitem__, reverse=True) for i in range(0, len(rows), pool)]
    batches = [part[i : i + batch_size] for part in pools for i in range(0, len(part), batch_size)]
    # The one batch that is not full has to stay the last.
    full = [batch for batch in batches if len(batch) == batch_size]
    draw.shuffle(full)
    return [row for batch in full + [batch for batch in batches if len(batch) < batch_size] for row in batch]


def _progress(context: Context) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        loss = ""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            context.update(state.global_step, state.max_steps, self.loss)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                _check_loss(logs["loss"], f"at step {state.global_step}")
                self.loss = f"loss {logs['loss']:.3f}"

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sync_tree(checkpoint)
            (checkpoint / _COMPLETE).touch()

    return Progress()


def _check_loss(loss: float, when: str) -> None:
    if not math.isfinite(loss):
        raise StageError(f"the loss is {loss} {when}", hint="lower learning_rate, or set precision: float32")


def _last_checkpoint(scratch: Path) -> str | None:
    complete = [path.parent for path in scratch.glob(f"checkpoint-*/{_COMPLETE}")]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


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
def _own_randomness(config: Config) -> Iterator[None]:
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
