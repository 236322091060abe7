"""Pico models wide enough to lose something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from places import Place, place

from optimize.artifact import Artifact


@pytest.fixture(scope="session")
def bert(pico_model: Path, pico_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A BERT classifier of 3 layers, 4 heads of 8 and a feed-forward width of 64, with weights that matter."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("prune") / "bert"
    config = BertConfig.from_pretrained(
        pico_model, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.2, architectures=None
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(pico_model).save_pretrained(folder)
    spec = {"name": "text-classification", "max_length": 32, "labels": ["negative", "positive"]}
    artifact = Artifact.from_directory(folder, format="transformers", task=spec)
    return place(artifact, pico_csv, tmp_path_factory, max_length=32)


@pytest.fixture(scope="session")
def llama(pico_llama: Path, pico_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A Llama of 3 layers, 6 query heads of 16 on 3 of keys, a width of 96, and a tied head."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("prune") / "llama"
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}
    config = LlamaConfig.from_pretrained(pico_llama, num_hidden_layers=3, hidden_size=96, **heads, architectures=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(pico_llama).save_pretrained(folder)
    artifact = Artifact.from_directory(folder, format="transformers", task={"name": "causal-lm"})
    return place(artifact, pico_corpus, tmp_path_factory, context_length=32)


@pytest.fixture(scope="session")
def vit(pico_vit: Artifact, pico_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place(pico_vit, pico_images, tmp_path_factory)


@pytest.fixture(scope="session")
def convnet(pico_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A convolutional network of a factory of ours, 8, 16 and 32 channels wide."""
    from optimize.source.image import Image
    from optimize.source.modules import ModuleSource

    folder = tmp_path_factory.mktemp("prune") / "convnet"
    folder.mkdir()
    ModuleSource("optimize.examples:convnet", {"classes": 3, "width": 8}, Image(size=12), None).copy_to(folder)
    spec = {"name": "image-classification", "labels": ["dark", "light", "striped"]}
    artifact = Artifact.from_directory(folder, format="pytorch", task=spec, trust_remote_code=True)
    return place(artifact, pico_images, tmp_path_factory)
