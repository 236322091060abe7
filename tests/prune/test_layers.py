"""`prune: layers`: which blocks matter least, by definitions; what is left is a plain checkpoint that answers alike."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from places import TRAINING, Place

from optimize import runtimes
from optimize.artifact import Artifact
from optimize.errors import StageError
from optimize.export import onnx
from optimize.prune import blocks, layers, structured
from optimize.prune.forward import answers, loss_of
from optimize.prune.layers import Config

QUICK: dict[str, Any] = {"calibration": {"num_samples": 16, "max_length": 32, "batch_size": 8}, "device": "cpu"}


def pruned(place: Place, **settings: Any) -> Artifact:
    return layers.run(place.artifact, Config(**{**QUICK, **settings}), place.room())


def idle(place: Place, layer: int) -> Any:
    """The model with a block that does next to nothing: what it adds is nearly zero."""
    model = place.load()
    block = blocks.of(model)[layer]
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1e-4)
    return model


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (6, 9), generator=generator)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in (ids[:4], ids[4:])]


def test_angles_are_those_of_the_states(llama: Place, batches: list[dict[str, torch.Tensor]]) -> None:
    model = llama.load()
    got = blocks.angular_distances(model, batches, 2, lambda *_: None)
    with torch.no_grad():
        states = [model(**batch, output_hidden_states=True, use_cache=False).hidden_states for batch in batches]
    # The library's own record of what each block gets, at the last token; what the last gives it has only normed.
    rows = torch.cat([torch.stack([state[:, -1] for state in one[:3]]) for one in states], dim=1).double()
    cosine = torch.nn.functional.cosine_similarity(rows[0], rows[2], dim=-1)
    assert got[0] == pytest.approx(float((cosine.arccos() / np.pi).mean()), abs=1e-6)
    assert len(got) == 2
    assert all(0 <= value <= 1 for value in got)


def test_padding_does_not_count(bert: Place) -> None:
    model = bert.load()
    ids = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 9, 3, 0, 0, 0]])
    padded = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    alone = [{name: value[i : i + 1, : 4 - i] for name, value in padded.items()} for i in range(2)]
    both = blocks.angular_distances(model, [padded], 1, lambda *_: None)
    each = blocks.angular_distances(model, alone, 1, lambda *_: None)
    np.testing.assert_allclose(both, each, atol=1e-6)


@pytest.mark.parametrize("importance", ["angular", "loss"])
def test_an_idle_block_is_found(llama: Place, batches: list[dict[str, torch.Tensor]], importance: str) -> None:
    model = idle(llama, 1)
    look = blocks.angular_distances if importance == "angular" else blocks.losses_without
    values = look(model, batches, 1, lambda *_: None)
    if importance == "loss":
        whole = np.average([float(loss_of(model, batch).detach()) for batch in batches], weights=[4, 2])
        values = [abs(value - whole) for value in values]
    assert int(np.argmin(values)) == 1


def test_what_is_left_answers_as_if_the_blocks_were_passed_by(
    llama: Place, batches: list[dict[str, torch.Tensor]]
) -> None:
    model = llama.load()
    short = copy.deepcopy(model)
    blocks.keep(short, [0, 2])
    blocks.of(model)[1].forward = lambda hidden_states, *_, **__: hidden_states
    with torch.no_grad():
        torch.testing.assert_close(answers(short, batches[0])["logits"], answers(model, batches[0])["logits"])


@pytest.mark.parametrize("settings", [{"num_hidden_layers": 1}, {"num_hidden_layers": 2, "consecutive": False}])
def test_a_decoder_becomes_a_plain_checkpoint_with_its_cache(llama: Place, settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    artifact = pruned(llama, **settings)
    depth = settings["num_hidden_layers"]
    assert artifact.details["plain"]
    assert artifact.details["layers"]["after"] == depth
    model, loading = AutoModelForCausalLM.from_pretrained(artifact.path, output_loading_info=True)
    assert not any(loading.values())
    assert model.config.num_hidden_layers == depth
    runner = runtimes.open_artifact(artifact, 1)
    ids = np.array([[5, 9, 77, 30]])
    decoder = runner.decoder(8)
    decoder.forward(ids[0, :3])
    np.testing.assert_allclose(decoder.forward(ids[0, 3:]), runner.run({"input_ids": ids})["logits"][0, -1], atol=1e-4)


def test_lists_of_a_config_follow(tmp_path: Any) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    kinds = ["full_attention", "sliding_attention", "full_attention"]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"sliding_window": 2, "use_sliding_window": True}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_hidden_layers=3, layer_types=kinds, **sizes))
    kept = copy.deepcopy(model)
    blocks.keep(kept, [1, 2])
    assert kept.config.layer_types == kinds[1:]
    assert [layer.self_attn.layer_idx for layer in kept.model.layers] == [0, 1]
    kept.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 2
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        loaded = Qwen2ForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(ids).logits, kept.eval()(ids).logits)


def test_an_encoder_with_recovery_is_exported(bert: Place) -> None:
    artifact = pruned(bert, num_hidden_layers=2, importance="loss", consecutive=False, recovery=TRAINING)
    assert len(artifact.details["importance"]["from_layer"]) == 3
    assert artifact.details["recovery"]["steps"] > 0
    assert artifact.details["params"]["after"] < artifact.details["params"]["before"]
    assert artifact.details["macs"]["after"] < artifact.details["macs"]["before"]
    assert onnx.run(artifact, onnx.Config(), bert.room()).details["max_difference"] < 1e-4
    again = pruned(bert, num_hidden_layers=2, importance="loss", consecutive=False, recovery=TRAINING)
    assert again.digest == artifact.digest


def test_narrower_layers_become_fewer(bert: Place) -> None:
    """Shapes of its own follow the numbers of the layers."""
    config = structured.Config(
        pruning_ratio=0.5, units=["heads"], targets=["*.layer.2.*"], calibration=QUICK["calibration"], device="cpu"
    )
    narrow = structured.run(bert.artifact, config, bert.room())
    artifact = layers.run(narrow, Config(num_hidden_layers=2, consecutive=False, **QUICK), bert.room())
    model = bert.load(artifact)
    widths = [layer.attention.self.query.out_features for layer in model.bert.encoder.layer]
    kept = [i for i in range(3) if i not in artifact.details["layers"]["dropped"]]
    assert widths == [16 if i == 2 else 32 for i in kept]


def test_too_many_layers_are_refused(bert: Place) -> None:
    with pytest.raises(StageError, match="the model has 3 layers"):
        pruned(bert, num_hidden_layers=3)
