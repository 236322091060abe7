"""Fine-tuning on the recipe's own labels, by the `Trainer` of transformers.

The first step of most recipes: its result is the baseline that smaller artifacts are held against. AdamW is Loshchilov
and Hutter's (2019, https://arxiv.org/abs/1711.05101); the way to fine-tune an encoder briefly is that of BERT (Devlin
et al., 2019, https://arxiv.org/abs/1810.04805).

    stages:
      - distill: finetune
        epochs: 1
        learning_rate: 5e-5
        batch_size: 32

A model that is too large to be trained whole gets adapters, which are merged in the end:

    stages:
      - distill: finetune
        lora: {r: 16, alpha: 32}
        learning_rate: 2e-4
        gradient_checkpointing: true

The same seed, rows and number of threads give the same bits, also where a killed training goes on from its last
checkpoint. Training curves (`report_to: [tensorboard]`) lie in the run's folder below `logs/`.
"""

from __future__ import annotations

from typing import Any

from optimize.artifact import Artifact
from optimize.context import Context
from optimize.distill import launch
from optimize.distill.lora import adapted
from optimize.distill.training import LargeTraining, train, training
from optimize.prune.masks import Held
from optimize.runtimes import pytorch

VERSION = 2


class Config(LargeTraining):
    """`distill: finetune`."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Train a copy of the model. Raises `StageError` where the loss is no number or the device can't do it."""
    if config.processes > 1:
        return launch.run(__name__, artifact, config, context)
    trust = artifact.trust_remote_code
    task, spec = context.task, artifact.task
    with training(config, context):
        preprocessor = task.preprocessor(artifact.path, trust_remote_code=trust)
        preprocessor.save_pretrained(context.directory)  # before use, which leaves its truncation in what is saved
        model = task.load_model(artifact.path, spec, trust_remote_code=trust)
        masks = Held(artifact, model)
        if artifact.format == "pytorch":
            trained, details = train(adapted(with_loss(model), config.lora), preprocessor, spec, config, context)
            pytorch.save(trained.module, context.directory, pytorch.described(artifact.path, spec))
        else:
            # The Trainer writes no paths, but the model remembers where it came from.
            model.config._name_or_path = ""
            trained, details = train(adapted(model, config.lora), preprocessor, spec, config, context)
            masks.finish(trained, context.directory)
            trained.save_pretrained(context.directory)
    return Artifact.from_directory(
        context.directory, format=artifact.format, task=spec, details=details, trust_remote_code=trust
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
