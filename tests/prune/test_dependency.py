"""What can be pruned, by torch-pruning's graph: a model without units answers like the same one with them masked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from places import Place

from optimize.errors import StageError
from optimize.prune.dependency import find
from optimize.prune.forward import answers, plain_attention
from optimize.prune.units import Dimension, drop, mask


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name in ("vit", "convnet"):
        return {"pixel_values": torch.rand(2, 3, 12, 12, generator=generator)}
    ids = torch.randint(5, 100, (2, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def found(model: Any, name: str) -> list[Dimension]:
    with plain_attention(model):
        return find(model, inputs_of(name))


EXPECTED = {
    "bert": {"heads": [4, 4, 4], "ffn": [64, 64, 64], "hidden": [32]},
    "llama": {"heads": [3, 3, 3], "ffn": [96, 96, 96], "hidden": [96]},
    "vit": {"heads": [2, 2], "ffn": [64, 64], "hidden": [32]},
    "convnet": {"channels": [8, 8, 16, 16, 32, 32]},
}


@pytest.fixture
def model(request: pytest.FixtureRequest, name: str) -> Any:
    place: Place = request.getfixturevalue(name)
    return place.load()


@pytest.mark.parametrize("name", EXPECTED)
def test_all_dimensions_are_found(model: Any, name: str) -> None:
    kinds: dict[str, list[int]] = {}
    for one in found(model, name):
        kinds.setdefault(one.kind, []).append(one.units)
        for part in one.slices:
            assert len(part.channels) == one.units
            assert len({len(own) for own in part.channels}) == 1
    assert kinds == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_dropping_units_is_masking_them(model: Any, name: str) -> None:
    dimensions = [one for one in found(model, name) if one.kind != "hidden"]
    generator = torch.Generator().manual_seed(1)
    dropped = {
        one.name: sorted(torch.randperm(one.units, generator=generator)[: max(1, one.units // 3)].tolist())
        for one in dimensions
    }
    masked, narrower = copy.deepcopy(model), copy.deepcopy(model)
    mask(masked, dimensions, dropped)
    drop(narrower, dimensions, dropped)
    inputs = inputs_of(name)
    with torch.no_grad():
        whole, expected, got = (answers(one, inputs)["logits"] for one in (model, masked, narrower))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (whole - expected).abs().max() > 1e-4  # what went did matter
    assert sum(p.numel() for p in narrower.parameters()) < sum(p.numel() for p in model.parameters())


def test_heads_that_share_keys_go_together(llama: Place) -> None:
    model = llama.load()
    heads = next(one for one in found(model, "llama") if one.kind == "heads")
    drop(model, [heads], {heads.name: [1]})
    attention = model.model.layers[0].self_attn
    widths = [projection.out_features for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert (*widths, attention.o_proj.in_features) == (64, 32, 32, 64)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_hidden_width_is_every_weight_sliced_alike(model: Any, name: str) -> None:
    """The oracle: a model of that config, whose every tensor is the old one without those rows and columns."""
    narrow = copy.deepcopy(model)
    dimension = next(one for one in found(narrow, name) if one.kind == "hidden")
    drop(narrow, [dimension], {dimension.name: [0, 5]})
    kept = torch.tensor([i for i in range(dimension.units) if i not in (0, 5)])
    cut = set()
    for (label, before), after in zip(model.named_parameters(), narrow.parameters(), strict=True):
        expected = before.detach()
        for dim in range(before.ndim):
            if before.shape[dim] != after.shape[dim]:
                expected, _ = expected.index_select(dim, kept), cut.add(label)
        assert torch.equal(after.detach(), expected), label
    assert len(cut) > 20
    with torch.no_grad():
        assert answers(narrow, inputs_of(name))["logits"].isfinite().all()


def test_a_tied_head_stays_tied(llama: Place) -> None:
    model = llama.load()
    dimension = next(one for one in found(model, "llama") if one.kind == "hidden")
    drop(model, [dimension], {dimension.name: [3]})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (320, 95)


def test_a_layer_that_the_library_does_not_know_is_named() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=120, n_embd=32, n_layer=2, n_head=2, n_positions=32))
    dimensions = found(model, "bert")
    assert not [one for one in dimensions if one.kind in ("heads", "ffn")]


def test_what_is_no_transformer_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=120, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    with pytest.raises(StageError):
        find(model, {**inputs_of("bert"), "decoder_input_ids": inputs_of("bert")["input_ids"]})
