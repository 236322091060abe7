"""A student that learns from a teacher: what `distill: logits` and `distill: features` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimize.artifact import Artifact
from optimize.distill.answers import SPAN, Batch, Signal
from optimize.distill.finetune import with_loss
from optimize.distill.lora import adapted
from optimize.distill.teacher import Teacher, encoded, own_inputs
from optimize.distill.teacher_cache import Cache, Kept
from optimize.distill.training import Rows, train, training
from optimize.errors import StageError
from optimize.prune.masks import Held
from optimize.runtimes import pytorch

if TYPE_CHECKING:
    from optimize.context import Context
    from optimize.distill.logits import Config
    from optimize.tasks import Features

Signals = Callable[[Any, Teacher], Mapping[str, Signal]]
"""(the student, its teacher) -> what is learnt, by name."""
_PLACE = "place"
"""In an example: its split and number."""


class Pupil(nn.Module):
    """The student while it learns. Its weights are those that are trained: neither the teacher's nor frozen ones."""

    accepts_loss_kwargs = False
    _keys_to_ignore_on_save = None
    """What the Trainer asks for where a checkpoint lacks weights, as it lacks frozen ones."""

    def __init__(self, student: Any, teacher: Teacher, signals: Mapping[str, Signal], alpha: float) -> None:
        super().__init__()
        self.student = student
        self.signals = nn.ModuleDict(signals)
        self.teacher = teacher  # no module, so that it is neither saved nor shared out
        self.alpha = alpha
        self.asks = {name: value for signal in signals.values() for name, value in signal.asks.items()}
        self.register_state_dict_post_hook(_only_trained)  # type: ignore[no-untyped-call]

    @property
    def labels(self) -> list[str]:
        """By which names the rows' labels go."""
        return list(SPAN) if self.teacher.task.name == "question-answering" else ["labels"]

    @property
    def _no_split_modules(self) -> Any:
        """What accelerate asks for where it shares weights out."""
        return getattr(self.student, "_no_split_modules", None)

    def forward(self, teacher: Mapping[str, Any] | None = None, **batch: Any) -> dict[str, Tensor]:
        """{"loss"} of a batch with labels. `teacher` has what it said (`kept`), or its own `inputs` where these are not
        the student's.
        """
        told = teacher or {}
        kept = told["kept"] if "kept" in told else self.kept(told.get("inputs", batch), batch)
        outputs = self.student(**batch, **self.asks)
        loss = (1 - self.alpha) * outputs["loss"] if self.alpha < 1 else outputs["loss"].new_zeros(())
        for name, signal in self._signals():
            prefix = f"{name}/"
            wanted = {key.removeprefix(prefix): value for key, value in kept.items() if key.startswith(prefix)}
            loss = loss + signal.weight * signal.loss(wanted, outputs, batch)
        return {"loss": loss}

    def kept(self, inputs: Mapping[str, Tensor], batch: Batch) -> Kept:
        """What is kept of the teacher's outputs, by `signal/name`."""
        outputs = self.teacher(inputs, **self.asks)
        return {
            f"{name}/{key}": value
            for name, signal in self._signals()
            for key, value in signal.of_teacher(outputs, batch).items()
        }

    def kept_by_row(self, inputs: Mapping[str, Tensor], batch: Batch) -> list[Kept]:
        """The same cut apart, on the CPU."""
        counts = {name: signal.counts(batch) for name, signal in self._signals()}
        rows = len(next(iter(batch.values())))
        parts = {
            key: torch.split(value.cpu(), counts[key.partition("/")[0]] or len(value) // rows)
            for key, value in self.kept(inputs, batch).items()
        }
        return [{key: part[row].clone() for key, part in parts.items()} for row in range(rows)]

    def _signals(self) -> list[tuple[str, Signal]]:
        return list(self.signals.items())  # type: ignore[arg-type]


def _only_trained(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave frozen weights out of a checkpoint, and the second name of tied ones, which its format does not know."""
    own = {name for name, weight in module.named_parameters() if weight.requires_grad}
    own |= {name for name, _ in module.named_buffers()}
    for name in [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) not in own]:
        del state[name]


class TaughtRows(Rows):
    """Rows with what the teacher says of them, or what it reads of them, where that is not what the student reads."""

    def __init__(
        self, pupil: Pupil, preprocessor: Any, spec: Mapping[str, Any], config: Config, context: Context
    ) -> None:
        super().__init__(preprocessor, spec, context)
        self.pupil, self.teacher, self.config = pupil, pupil.teacher, config
        self._own = own_inputs(pupil.teacher, preprocessor, spec, context)
        if self._own and any(signal.of_tokens for signal in pupil.signals.values()):
            raise StageError(
                f"the teacher {self.teacher.name} reads other tokens than the student, so that their hidden states "
                "can't be compared",
                hint="`distill: logits` can learn from it",
            )
        self._theirs: dict[str, Sequence[Features]] = {}
        self._examples: dict[str, list[Features]] = {}
        self._cache: Cache | None = None
        if config.cache_teacher:
            self._cache = Cache(context.scratch / "teacher", self._compute, config.batch_size)

    def examples(self, split: str) -> list[Features]:
        found = super().examples(split)
        if self._own:
            self._theirs[split] = encoded(self.teacher, split, self.spec, self.context)
        if self._cache:
            self._examples[split] = found
            self._cache.fill(split, found, lambda done, total: self.context.update(done, total, "asking the teacher"))
        return [{**row, _PLACE: (split, number)} for number, row in enumerate(found)]

    def collate(self, batch: Sequence[Features]) -> dict[str, Any]:
        places = [row[_PLACE] for row in batch]
        tensors = super().collate([{name: row[name] for name in row if name != _PLACE} for row in batch])
        if self._cache:
            tensors["teacher"] = {"kept": self._cache.rows(places)}
        elif self._own:
            tensors["teacher"] = {"inputs": self._inputs(places)}
        return tensors

    def _inputs(self, places: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        rows = [self._theirs[split][number] for split, number in places]
        arrays = self.context.task.collate(self.teacher.preprocessor, rows)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _compute(self, split: str, rows: list[int]) -> list[Kept]:
        device = torch.device(self.config.device if self.config.device != "auto" else "cpu")
        batch = super().collate([self._examples[split][row] for row in rows])
        inputs = self._inputs([(split, row) for row in rows]) if self._own else batch
        inputs, batch = ({name: value.to(device) for name, value in part.items()} for part in (inputs, batch))
        precision: torch.dtype = getattr(torch, self.config.precision)
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            return self.pupil.kept_by_row(inputs, batch)


def teach(artifact: Artifact, config: Config, context: Context, signals: Signals) -> Artifact:
    """Train a copy of the artifact's model on what its teacher says. Raises `StageError` as `distill: finetune` does,
    and where the teacher has other labels, or another tokenizer that matters.
    """
    trust = artifact.trust_remote_code
    task, spec = context.task, artifact.task
    with training(config, context):
        preprocessor = task.preprocessor(artifact.path, trust_remote_code=trust)
        preprocessor.save_pretrained(context.directory)
        teacher = Teacher(config.teacher, context.artifacts[config.teacher], spec, task)
        model = task.load_model(artifact.path, spec, trust_remote_code=trust)
        masks = Held(artifact, model)
        plain = artifact.format == "pytorch"
        if not plain:
            model.config._name_or_path = ""
        student = adapted(with_loss(model) if plain else model, config.lora)
        pupil = Pupil(student, teacher, signals(student, teacher), config.alpha)
        rows = TaughtRows(pupil, preprocessor, spec, config, context)
        trained, details = train(pupil, preprocessor, spec, config, context, rows)
        if plain:
            pytorch.save(trained.module, context.directory, pytorch.described(artifact.path, spec))
        else:
            masks.finish(trained, context.directory)
            trained.save_pretrained(context.directory)
    return Artifact.from_directory(
        context.directory, format=artifact.format, task=spec, details=details, trust_remote_code=trust
    )
