"""Distillation of what goes on inside a teacher: hidden states and attention, besides its answers.

Hidden states by their difference (FitNets: Romero et al., 2015, https://arxiv.org/abs/1412.6550) or cosine (DistilBERT:
Sanh et al., 2019, https://arxiv.org/abs/1910.01108); attention by its maps or by MiniLM's value relations (Wang et al.,
2020, https://arxiv.org/abs/2002.10957).

    stages:
      - distill: finetune
        name: teacher
      - distill: student
        num_hidden_layers: 3
      - distill: features
        teacher: teacher
        temperature: 4
        alpha: 0.7
        hidden: {weight: 1, loss: mse}
        attention: {weight: 1, kind: relations}
        layer_map: uniform
        epochs: 3

The loss is that of `distill: logits` plus each part times its weight, over all tokens but padding. Where the hidden
widths differ, the student's states go through a linear projection that is trained with it and thrown away. Both models
have to read the same tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from optimize.artifact import Artifact
from optimize.config import Block
from optimize.context import Context
from optimize.distill import launch, logits

if TYPE_CHECKING:
    from optimize.distill.answers import Signal

VERSION = 1


class Hidden(Block):
    """How hidden states are compared."""

    weight: float = Field(1.0, gt=0)
    """By which this part is multiplied."""
    loss: Literal["mse", "cosine"] = "mse"
    """The mean square of the difference, or one less the cosine."""


class Attention(Block):
    """How attention is compared."""

    weight: float = Field(1.0, gt=0)
    """By which this part is multiplied."""
    kind: Literal["relations", "maps"] = "relations"
    """`relations`: of the last layers' values, whatever their width. `maps`: who looks at whom, of the layers of
    `layer_map`; where the numbers of heads differ, the mean over heads. Slower, since fast attention makes no maps."""
    relation_heads: int | None = Field(None, ge=1)
    """Parts that values are cut into for `relations`; the default is what both models' heads have in common."""


class Config(logits.Config):
    """`distill: features`."""

    hidden: Hidden | None = Hidden()
    """Hidden states; null leaves them out."""
    attention: Attention | None = None
    """Attention; left out unless given."""
    layer_map: Literal["uniform", "last"] | dict[int, int] = "uniform"
    """Which of the teacher's layers each of the student's follows: `uniform`, the one at the same depth; `last`, the
    last one alone; or {student's layer: teacher's layer}, counted from 0."""

    @model_validator(mode="after")
    def _has_features(self) -> Config:
        if self.hidden is None and self.attention is None:
            raise ValueError("neither hidden nor attention is left: that is `distill: logits`")
        if self.layer_map == {}:
            raise ValueError("the layer_map is empty")
        return self


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Raises `StageError` as `distill: logits` does, and where a layer that is named is not there."""
    if config.processes > 1:
        return launch.run(__name__, artifact, config, context)
    from optimize.distill.answers import Answers
    from optimize.distill.distilling import teach
    from optimize.distill.inside import hidden_states, maps, value_relations

    def signals(student: Any, teacher: Any) -> dict[str, Signal]:
        learnt: dict[str, Signal] = {"answers": Answers(context.task, config.alpha, config.temperature, config.top_k)}
        if config.hidden:
            learnt["hidden"] = hidden_states(student, teacher.model, config.hidden, config.layer_map)
        if config.attention and config.attention.kind == "maps":
            learnt["attention"] = maps(student, teacher.model, config.attention, config.layer_map)
        elif config.attention:
            learnt["attention"] = value_relations(student, teacher.model, config.attention)
        return learnt

    return teach(artifact, config, context, signals)
