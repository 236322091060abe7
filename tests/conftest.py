"""Pico models and data: random weights, seconds."""

from __future__ import annotations

import csv
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimize import tasks
from optimize.artifact import Artifact
from optimize.context import Context
from optimize.data import prepare
from optimize.progress import Progress
from optimize.work import Work

if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a test process for each core: threads beside it would only wait for one another, and spin.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

LONG = ("test_recipes.py", "test_faults.py", "test_engine.py")
"""Files whose tests take the longest. They come first, so that the processes end at the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


GOOD = ["good", "great", "fine", "lovely", "superb", "moving", "funny", "warm", "bright", "clever"]
BAD = ["bad", "dull", "awful", "boring", "weak", "cold", "clumsy", "tired", "flat", "stale"]
PLAIN = [
    "the",
    "a",
    "film",
    "story",
    "actor",
    "scene",
    "plot",
    "with",
    "and",
    "of",
    "it",
    "is",
    "this",
    "very",
    "rather",
]
WORDS = GOOD + BAD + PLAIN + [f"word{i}" for i in range(150)]


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path / "work")


@pytest.fixture(scope="session")
def pico_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT classifier of 2 layers and 32 dimensions with random weights, as `from_pretrained` wants it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("pico") / "model"
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
                id2label={0: "negative", 1: "positive"},
                label2id={"negative": 0, "positive": 1},
            )
        )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pico_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 different sentences whose label follows from their adjectives."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    seen: set[str] = set()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        while len(seen) < 240:
            label = len(seen) % 2
            words = rng.choices(PLAIN, k=rng.randint(3, 12)) + rng.choices(GOOD if label else BAD, k=3)
            rng.shuffle(words)
            text = " ".join(words)
            if text not in seen:
                seen.add(text)
                writer.writerow([text, ["negative", "positive"][label]])
    return path


@pytest.fixture
def pico_recipe(pico_model: Path, pico_csv: Path) -> dict[str, Any]:
    return _recipe(pico_model, pico_csv)


@pytest.fixture(scope="session")
def _built(pico_model: Path, pico_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import optimize

    root = tmp_path_factory.mktemp("built") / "work"
    optimize.apply({**_recipe(pico_model, pico_csv), "evaluate": {"latency": None, "peak_memory": False}}, work=root)
    return root


@pytest.fixture
def built_work(_built: Path, tmp_path: Path) -> Work:
    """A work folder of the test's own, where the stages of `pico_recipe` have run and answers were scored."""
    for part in ("data", "scores", "store"):
        if (_built / part).exists():
            shutil.copytree(_built / part, tmp_path / "work" / part)
    return Work(tmp_path / "work")


def _recipe(pico_model: Path, pico_csv: Path) -> dict[str, Any]:
    return {
        "version": 1,
        "name": "pico-sentiment",
        "model": {"source": str(pico_model), "task": "text-classification"},
        "data": {
            "source": str(pico_csv),
            "text": "text",
            "label": "label",
            "splits": {"train": 0.5, "validation": 0.1, "calibration": 0.1, "evaluation": 0.3},
        },
        "stages": [
            {"distill": "finetune", "epochs": 5, "batch_size": 16, "learning_rate": 2e-3, "threads": 1},
            {"export": "onnx"},
            {"quantize": "int8", "mode": "dynamic"},
        ],
        "baseline": "finetune",
        "evaluate": {
            "latency": {
                "batch_sizes": [1],
                "sequence_length": 16,
                "rounds": 6,
                "half_width": 1.0,
                "budget_seconds": 60,
            }
        },
        "gates": [{"metric": "size", "max_ratio": 1.5}],
    }


@pytest.fixture(scope="session")
def pico_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 different lines of text, about 14,000 tokens of the pico Llama."""
    rng = random.Random(0)
    lines: set[str] = set()
    while len(lines) < 400:
        words = rng.choices(PLAIN + GOOD + BAD, k=rng.randint(6, 20))
        lines.add(" ".join(words).capitalize() + rng.choice(".!?"))
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(sorted(lines)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pico_llama(pico_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers and 64 dimensions (4 heads, 2 of keys and values) with random weights and a tied head.

    Its tokenizer is byte-level BPE of 320 tokens, so any text comes back as it went in.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("pico") / "llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train(
        [str(pico_corpus)],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=256
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=320,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
                tie_word_embeddings=True,
                initializer_range=0.1,
            )
        )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pico_source(pico_model: Path) -> Artifact:
    """The pico model as the source artifact of its task."""
    spec = {"name": "text-classification", "max_length": 32, "labels": ["negative", "positive"]}
    return Artifact.from_directory(pico_model, format="transformers", task=spec)


@pytest.fixture(scope="session")
def new_context(pico_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Context]:
    """Makes a room that a stage works in, with the pico data (or other): every call one in a folder of its own."""
    task = tasks.get("text-classification")
    config = task.Data(source=str(pico_csv), splits={"train": 0.5, "validation": 0.2, "evaluation": 0.3})
    rows = prepare(config, task, Work(tmp_path_factory.mktemp("rows")), pico_csv.parent).for_stages()

    def make(*, scratch: Path | None = None, progress: Progress | None = None, data: Any = rows) -> Context:
        directory = tmp_path_factory.mktemp("artifact")
        scratch = scratch or tmp_path_factory.mktemp("scratch")
        return Context(directory, scratch, task, data, scratch / "logs", stage="stage", progress=progress or Progress())

    return make


IMAGE_SPEC = {"name": "image-classification", "labels": ["dark", "light", "striped"]}


@pytest.fixture(scope="session")
def pico_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 120 noisy images of 12 x 12 pixels in three folders, named after what they look like."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("images") / "rows"
    stripes = 90 * (np.arange(12) % 2)[:, None, None]
    for label, level in {"dark": 40, "light": 170, "striped": 60 + stripes}.items():
        (folder / label).mkdir(parents=True)
        for number in range(40):
            pixels = np.clip(level + rng.normal(0, 20, (12, 12, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def pico_module(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A small convolutional network of a factory of ours with random weights: the format `pytorch`, trusted."""
    from optimize.source.image import Image
    from optimize.source.modules import ModuleSource

    folder = tmp_path_factory.mktemp("module")
    ModuleSource("optimize.examples:convnet", {"classes": 3, "width": 4}, Image(size=12), None).copy_to(folder)
    return Artifact.from_directory(folder, format="pytorch", task=IMAGE_SPEC, trust_remote_code=True)


@pytest.fixture(scope="session")
def pico_vit(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A ViT of 2 layers and 32 dimensions for images of 12 x 12 pixels, with random weights."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("vit")
    names = IMAGE_SPEC["labels"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(
            ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                image_size=12,
                patch_size=4,
                id2label=dict(enumerate(names)),
                label2id={name: i for i, name in enumerate(names)},
            )
        )
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(folder)
    return Artifact.from_directory(folder, format="transformers", task=IMAGE_SPEC)


@pytest.fixture(scope="session")
def image_context(pico_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Context]:
    """Makes a room that a stage works in, with the pico images."""
    task = tasks.get("image-classification")
    config = task.Data(source=str(pico_images), splits={"train": 0.5, "validation": 0.2, "evaluation": 0.3})
    rows = prepare(config, task, Work(tmp_path_factory.mktemp("rows")), pico_images.parent).for_stages()

    def make() -> Context:
        directory, scratch = tmp_path_factory.mktemp("artifact"), tmp_path_factory.mktemp("scratch")
        return Context(directory, scratch, task, rows, scratch / "logs", stage="stage", progress=Progress())

    return make
