"""The losses that a student is held to its teacher by: functions of tensors, without models.

- Softened answers: Hinton et al. (2015, https://arxiv.org/abs/1503.02531).
- Hidden states: FitNets (Romero et al., 2015, https://arxiv.org/abs/1412.6550), by cosine as DistilBERT (Sanh et al.,
  2019, https://arxiv.org/abs/1910.01108).
- Attention maps and value relations: MiniLM (Wang et al., 2020, https://arxiv.org/abs/2002.10957), with any number of
  relation heads as in MiniLMv2 (2021, https://arxiv.org/abs/2012.15828).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal


def softened(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher / T, student / T) of logits [n, labels], a mean over n, in nats. A logit of -inf is no choice, and
    has to be one for both.

    The factor keeps the gradients as large as those of the hard loss, whatever T is.
    """
    wanted = functional.log_softmax(teacher.float() / temperature, dim=-1)
    found = functional.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * divergence(wanted, found).mean()


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL of log-probabilities [..., n] -> [...]; outcomes that neither allows (-inf) count nothing."""
    possible = wanted > -torch.inf
    difference = torch.where(possible, wanted - found.where(possible, 0), 0)
    return (wanted.exp() * difference).sum(dim=-1)


def most_likely(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Of logits [n, vocabulary] at that temperature: the k largest log-probabilities and that of all others together
    [n, k + 1], and which the k are [n, k].
    """
    found = functional.log_softmax(logits.float() / temperature, dim=-1)
    indices = found.topk(k, dim=-1).indices
    return _outcomes(found, indices), indices


def softened_top(wanted: Tensor, indices: Tensor, student: Tensor, temperature: float) -> Tensor:
    """`softened` by what `most_likely` keeps of the teacher: k outcomes, and all others together as one more.

    Putting outcomes together can only lower a divergence, so that it is never above the whole one.
    """
    found = functional.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * divergence(wanted, _outcomes(found, indices)).mean()


def _outcomes(found: Tensor, indices: Tensor) -> Tensor:
    """Log-probabilities [n, vocabulary] -> [n, k + 1]: those of `indices`, and of all others together. These are added
    up: one less the others' sum would be rounding errors where the others are nearly all.
    """
    others = found.scatter(-1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([found.gather(-1, indices), others], dim=-1)


def hidden_distance(wanted: Tensor, found: Tensor, kind: Literal["mse", "cosine"]) -> Tensor:
    """Of hidden states [n, width]: the mean square of their difference, or one less their cosine, a mean over n."""
    if kind == "mse":
        return functional.mse_loss(found.float(), wanted.float())
    return 1 - functional.cosine_similarity(found.float(), wanted.float(), dim=-1).mean()


def map_distance(wanted: Tensor, found: Tensor) -> Tensor:
    """KL of attention [n, heads, keys] of n queries, a mean over n and heads. Where the numbers of heads differ, the
    mean map of each is compared. Keys that are padding have no attention in either.
    """
    if wanted.shape[1] != found.shape[1]:
        wanted, found = wanted.mean(dim=1, keepdim=True), found.mean(dim=1, keepdim=True)
    wanted, found = wanted.float(), found.float().clamp(min=1e-12)
    return divergence(wanted.log(), found.log()).mean()


def relations(vectors: Tensor, seen: Tensor, heads: int) -> Tensor:
    """How much each token's vector has of each other's: the logarithm of softmax(v v^T / sqrt(d)).

    `vectors` [batch, length, heads * d], `seen` [batch, length] of bool -> [batch, heads, length, length]; keys that
    are not seen have none (-inf).
    """
    batch, length, width = vectors.shape
    split = vectors.float().view(batch, length, heads, width // heads).transpose(1, 2)
    scores: Tensor = split @ split.transpose(-1, -2) / (width // heads) ** 0.5
    return functional.log_softmax(scores.masked_fill(~seen[:, None, None, :], -torch.inf), dim=-1)


def relation_distance(wanted: Tensor, found: Tensor, seen: Tensor, heads: int) -> Tensor:
    """KL of the relations of vectors [batch, length, width] (widths may differ), a mean over heads and seen tokens."""
    both = [relations(vectors, seen, heads) for vectors in (wanted, found)]
    apart: Tensor = divergence(*both)
    return apart.transpose(1, 2)[seen].mean()


def layer_pairs(layer_map: str | Mapping[int, int], students: int, teachers: int) -> list[tuple[int, int]]:
    """(the student's layer, the teacher's layer that it follows), counted from 0.

    `uniform`: every layer follows the one at the same depth, the last the last; `last`: the last alone. Raises
    `ValueError` where a mapping names a layer that is not there.
    """
    if layer_map == "uniform":
        return [(layer, round((layer + 1) * teachers / students) - 1) for layer in range(students)]
    if layer_map == "last":
        return [(students - 1, teachers - 1)]
    assert not isinstance(layer_map, str)
    for named, count, whose in ((layer_map, students, "student"), (layer_map.values(), teachers, "teacher")):
        if wrong := [layer for layer in named if not 0 <= layer < count]:
            raise ValueError(f"the {whose} has layers 0 to {count - 1}, and no {wrong[0]}")
    return sorted(layer_map.items())
