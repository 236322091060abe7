"""The registry of stages: which file does what, and which formats it takes and gives.

It is data. A third party adds to it with an entry point in the group `optimize.stages` whose value is an `Entry`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.config import Block
    from optimize.context import Context

VERBS = ("distill", "prune", "quantize", "export")


class Method(Protocol):
    """What the module behind an entry holds."""

    Config: type[Block]
    """What the recipe's block may say."""
    VERSION: int
    """Raised when the same input and config would give other bytes than before; part of the cache key."""

    def run(self, artifact: Artifact, config: Any, context: Context) -> Artifact:
        """Turn one artifact into the next: write files below `context.directory` and describe them."""


@dataclass(frozen=True)
class Entry:
    """One method with one back end."""

    verb: str
    method: str
    module: str
    takes: tuple[str, ...]
    gives: str
    summary: str
    backend: str | None = None
    """The library that does the work, where a method has more than one."""
    mode: str | None = None
    """The `mode` that this file is for, where another with the same format (and back end) serves the rest."""
    libraries: tuple[str, ...] = ()
    """Distributions whose major.minor version is part of the cache key."""
    serving: tuple[str, ...] = ()
    """Further distributions that the artifact can't be opened without: asked for beforehand, no part of the key."""
    extra: str | None = None
    """The extra of `optimize-workbench` that installs what is needed; None where the base install is enough."""
    splits: tuple[str, ...] = ()
    """Splits of the data that the method reads; their digests are part of the cache key."""
    reads: tuple[str, ...] = ()
    """Fields of the Config that name another stage, or `source`, whose artifact is read (`teacher`); their digests
    enter the key. It has to be of a format that the method takes."""
    sources: tuple[str, ...] = ()
    """Fields of the Config that name a model elsewhere, as `model.source` does; what it is enters the key."""
    options: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Fields of the Config that need a further distribution where they are given -> that, and the extra with it."""
    aside: tuple[str, ...] = ()
    """Fields of the Config that change no byte of the result (where curves are logged); they stay out of the key."""
    refuses: Mapping[str, str] = field(default_factory=dict)
    """Task, or task and a setting's value (`summarization static`) -> why the method does nothing for its models; said
    when a recipe is validated."""
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """A setting that only some of the formats in `takes` allow, as `field: value` -> those formats."""

    @property
    def id(self) -> str:
        return f"{self.verb}.{self.method}"

    @property
    def needs(self) -> tuple[str, ...]:
        """Distributions that have to be installed."""
        return self.libraries + self.serving

    def load(self) -> Method:
        return cast("Method", import_module(self.module))


_TEXT_TO_TEXT = ("summarization", "text2text")
_ENCODERS = (
    *("text-classification", "token-classification", "question-answering", "fill-mask", "sentence-similarity"),
    "image-classification",
)
_NO_CACHE = dict.fromkeys(("causal-lm", *_TEXT_TO_TEXT), "it has no key/value cache there; export: onnx has")
_NO_LOSS = "its rows say nothing that a loss could be of"
_TWO_GRAPHS = "a model that is an encoder's and a decoder's graph is quantised by quantize: int8, mode: dynamic"

_LORA = {"lora": ("peft", "lora")}

_BUILT_IN = (
    Entry(
        verb="distill",
        method="finetune",
        module="optimize.distill.finetune",
        takes=("transformers",),
        gives="transformers",
        summary="Train on the recipe's labels with the transformers Trainer.",
        libraries=("torch", "transformers", "tokenizers", "accelerate"),
        splits=("train", "validation"),
        aside=("report_to", "save_steps"),
        options=_LORA,
        refuses={"sentence-similarity": "its rows say nothing that this loss could be of"},
    ),
    Entry(
        verb="distill",
        method="finetune",
        module="optimize.distill.finetune",
        takes=("pytorch",),
        gives="pytorch",
        summary="Train a module of your own on the recipe's labels with the transformers Trainer.",
        libraries=("torch", "transformers", "accelerate", "safetensors"),
        splits=("train", "validation"),
        aside=("report_to", "save_steps"),
    ),
    Entry(
        verb="prune",
        method="unstructured",
        module="optimize.prune.unstructured",
        takes=("transformers",),
        gives="transformers",
        summary="Zeros in place of single weights: magnitude, Wanda, SparseGPT.",
        libraries=("torch", "transformers", "tokenizers", "numba", "safetensors"),
        splits=("calibration",),
        aside=("activations_mb",),
        refuses={
            f"{task} {importance}": f"importance: {importance} {why}; magnitude serves it"
            for importance in ("wanda", "sparsegpt")
            for task, why in (
                *((task, "goes through the blocks of one stack of layers alone") for task in _TEXT_TO_TEXT),
                ("image-classification", "goes through the blocks of a model that reads tokens"),
            )
        },
    ),
    Entry(
        verb="prune",
        method="structured",
        module="optimize.prune.structured",
        takes=("transformers",),
        gives="transformers",
        summary="Heads and widths that matter least go: a smaller dense model.",
        libraries=("torch", "transformers", "tokenizers", "accelerate", "safetensors", "torch-pruning"),
        extra="pruning",
        splits=("train", "validation", "calibration"),
        refuses={
            **dict.fromkeys(_TEXT_TO_TEXT, "it goes through one stack of layers alone"),
            **{f"sentence-similarity {way}": _NO_LOSS for way in ("taylor", "hessian")},
        },
    ),
    Entry(
        verb="prune",
        method="structured",
        module="optimize.prune.structured",
        takes=("pytorch",),
        gives="pytorch",
        summary="Channels that matter least go from a module of your own.",
        libraries=("torch", "transformers", "accelerate", "safetensors", "torch-pruning"),
        extra="pruning",
        splits=("train", "validation", "calibration"),
    ),
    Entry(
        verb="prune",
        method="layers",
        module="optimize.prune.layers",
        takes=("transformers",),
        gives="transformers",
        summary="The transformer blocks that matter least go.",
        libraries=("torch", "transformers", "tokenizers", "accelerate", "safetensors"),
        splits=("train", "validation", "calibration"),
        refuses={
            **dict.fromkeys(_TEXT_TO_TEXT, "it goes through one stack of layers alone"),
            "sentence-similarity loss": _NO_LOSS,
        },
    ),
    Entry(
        verb="distill",
        method="student",
        module="optimize.distill.student",
        takes=("transformers",),
        gives="transformers",
        summary="Make a smaller model of the same kind, to be taught.",
        libraries=("torch", "transformers", "tokenizers", "safetensors"),
        splits=("train",),
        sources=("source",),
        refuses=dict.fromkeys(_TEXT_TO_TEXT, "it has two stacks of blocks, and makes fewer of one alone"),
    ),
    Entry(
        verb="distill",
        method="logits",
        module="optimize.distill.logits",
        takes=("transformers",),
        gives="transformers",
        summary="Train on a teacher's softened answers beside the labels.",
        libraries=("torch", "transformers", "tokenizers", "accelerate", "safetensors"),
        splits=("train", "validation"),
        reads=("teacher",),
        aside=("report_to", "save_steps"),
        options=_LORA,
        refuses={"sentence-similarity": "its rows say nothing that this loss could be of"},
    ),
    Entry(
        verb="distill",
        method="logits",
        module="optimize.distill.logits",
        takes=("pytorch",),
        gives="pytorch",
        summary="Train a module of your own on a teacher's softened answers beside the labels.",
        libraries=("torch", "transformers", "accelerate", "safetensors"),
        splits=("train", "validation"),
        reads=("teacher",),
        aside=("report_to", "save_steps"),
    ),
    Entry(
        verb="distill",
        method="features",
        module="optimize.distill.features",
        takes=("transformers",),
        gives="transformers",
        summary="Train on a teacher's hidden states and attention as well.",
        libraries=("torch", "transformers", "tokenizers", "accelerate", "safetensors"),
        splits=("train", "validation"),
        reads=("teacher",),
        aside=("report_to", "save_steps"),
        options=_LORA,
        refuses={
            "sentence-similarity": "its rows say nothing that this loss could be of",
            **dict.fromkeys(_TEXT_TO_TEXT, "it looks at one stack of blocks; distill: logits learns from the answers"),
        },
    ),
    Entry(
        verb="quantize",
        method="cast",
        module="optimize.quantize.cast",
        takes=("transformers",),
        gives="transformers",
        summary="The same weights in 16 bits.",
        libraries=("torch", "safetensors"),
    ),
    Entry(
        verb="quantize",
        method="gptq",
        module="optimize.quantize.gptq",
        takes=("transformers",),
        gives="transformers",
        summary="2- to 8-bit weights by GPTQ, block by block.",
        libraries=("torch", "transformers", "tokenizers", "numba", "safetensors"),
        serving=("gptqmodel", "optimum"),
        extra="gptq",
        splits=("calibration",),
        aside=("activations_mb",),
        refuses={
            **dict.fromkeys(_TEXT_TO_TEXT, "it goes through the blocks of one stack of layers alone"),
            "image-classification": "it goes through the blocks of a model that reads tokens",
        },
    ),
    Entry(
        verb="quantize",
        method="gptq",
        backend="gptqmodel",
        module="optimize.quantize.gptq_gptqmodel",
        takes=("transformers",),
        gives="transformers",
        summary="GPTQ by the solver of the library GPTQModel.",
        libraries=("torch", "transformers", "tokenizers", "safetensors", "gptqmodel", "optimum"),
        extra="gptq",
        splits=("calibration",),
        refuses=dict.fromkeys((*_ENCODERS, *_TEXT_TO_TEXT), "that library knows decoders alone; leave `backend` out"),
    ),
    Entry(
        verb="quantize",
        method="nf4",
        module="optimize.quantize.nf4",
        takes=("transformers",),
        gives="transformers",
        summary="4-bit weights with unevenly spaced levels, by bitsandbytes.",
        libraries=("torch", "transformers", "safetensors", "bitsandbytes"),
        extra="bitsandbytes",
    ),
    Entry(
        verb="quantize",
        method="int8",
        backend="bitsandbytes",
        module="optimize.quantize.int8_bitsandbytes",
        takes=("transformers",),
        gives="transformers",
        summary="8-bit weights and activations but for outlying columns: LLM.int8(), by bitsandbytes.",
        libraries=("torch", "transformers", "safetensors", "bitsandbytes"),
        extra="bitsandbytes",
    ),
    Entry(
        verb="quantize",
        method="int8",
        backend="torchao",
        module="optimize.quantize.int8_torchao",
        takes=("transformers",),
        gives="transformers",
        summary="8-bit weights and activations by torchao, fast where the model is compiled.",
        libraries=("torch", "transformers", "safetensors", "torchao"),
        extra="torchao",
    ),
    Entry(
        verb="quantize",
        method="int8",
        backend="torchao",
        mode="qat",
        module="optimize.quantize.int8_qat_torchao",
        takes=("transformers",),
        gives="transformers",
        summary="Quantisation-aware training to an 8-bit checkpoint of torchao.",
        libraries=("torch", "transformers", "tokenizers", "accelerate", "safetensors", "torchao"),
        extra="torchao",
        splits=("train", "validation"),
        aside=("report_to", "save_steps"),
        refuses={
            "causal-lm": "8-bit training is for models that answer at once; quantize: gptq rounds language models",
            "sentence-similarity": "its rows say nothing that a loss could be of",
            **dict.fromkeys(_TEXT_TO_TEXT, "8-bit training is for models that answer at once, not token by token"),
        },
    ),
    Entry(
        verb="quantize",
        method="int8",
        backend="onnxruntime",
        mode="qat",
        module="optimize.quantize.int8_qat_onnxruntime",
        takes=("transformers",),
        gives="onnx",
        summary="Quantisation-aware training to an 8-bit graph for ONNX Runtime.",
        refuses={
            "causal-lm": "a language model's graph is not rounded that way; quantize: gptq keeps it small",
            "sentence-similarity": "its rows say nothing that a loss could be of",
            **dict.fromkeys(_TEXT_TO_TEXT, _TWO_GRAPHS),
        },
        libraries=(
            *("torch", "transformers", "tokenizers", "accelerate"),
            *("onnx", "onnx_ir", "onnxscript", "onnxruntime"),
        ),
        splits=("train", "validation", "calibration"),
        aside=("report_to", "save_steps"),
    ),
    Entry(
        verb="quantize",
        method="int8",
        backend="onnxruntime",
        module="optimize.quantize.int8_onnxruntime",
        takes=("onnx",),
        gives="onnx",
        summary="8-bit weights and activations by ONNX Runtime.",
        libraries=("onnx", "onnxruntime"),
        splits=("calibration",),
        refuses={
            **{f"{task} static": _TWO_GRAPHS for task in _TEXT_TO_TEXT},
            "causal-lm static": "ranges are not looked for in a graph with a key/value cache; mode: dynamic serves it",
        },
    ),
    Entry(
        verb="quantize",
        method="int4",
        backend="onnxruntime",
        module="optimize.quantize.int4_onnxruntime",
        takes=("onnx",),
        gives="onnx",
        summary="4-bit weights by ONNX Runtime, without calibration.",
        libraries=("onnx", "onnxruntime"),
        refuses=dict.fromkeys(_TEXT_TO_TEXT, _TWO_GRAPHS),
    ),
    Entry(
        verb="quantize",
        method="int8",
        backend="openvino",
        module="optimize.quantize.int8_openvino",
        takes=("openvino",),
        gives="openvino",
        summary="8-bit weights and activations for OpenVINO, by nncf.",
        libraries=("openvino", "nncf"),
        extra="openvino",
        splits=("calibration",),
    ),
    Entry(
        verb="quantize",
        method="int4",
        backend="openvino",
        module="optimize.quantize.int4_openvino",
        takes=("openvino",),
        gives="openvino",
        summary="4-bit weights for OpenVINO, by nncf, without calibration.",
        libraries=("openvino", "nncf"),
        extra="openvino",
    ),
    Entry(
        verb="export",
        method="onnx",
        module="optimize.export.onnx",
        takes=("transformers", "pytorch"),
        gives="onnx",
        summary="Export to ONNX, checked against the parent on real rows.",
        libraries=("torch", "transformers", "tokenizers", "onnx", "onnx_ir", "onnxscript", "onnxruntime"),
        splits=("validation", "calibration"),
    ),
    Entry(
        verb="export",
        method="openvino",
        module="optimize.export.openvino",
        takes=("transformers", "pytorch", "onnx"),
        gives="openvino",
        summary="Export to OpenVINO, checked against the parent on real rows.",
        libraries=("torch", "transformers", "tokenizers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino"),
        extra="openvino",
        splits=("validation",),
        refuses=_NO_CACHE,
    ),
    Entry(
        verb="export",
        method="torchscript",
        module="optimize.export.torchscript",
        takes=("transformers", "pytorch"),
        gives="torchscript",
        summary="Export to TorchScript, checked against the parent on real rows.",
        libraries=("torch", "transformers", "tokenizers"),
        splits=("validation",),
        refuses=_NO_CACHE,
        only={"method: script": ("pytorch",)},
    ),
    Entry(
        verb="export",
        method="torch_export",
        module="optimize.export.torch_export",
        takes=("transformers", "pytorch"),
        gives="torch_export",
        summary="Export to a program of torch.export, checked against the parent on real rows.",
        libraries=("torch", "transformers", "tokenizers"),
        splits=("validation",),
        refuses=_NO_CACHE,
    ),
)


@cache
def entries() -> tuple[Entry, ...]:
    """Every stage there is: our own, then those of installed third parties."""
    from importlib.metadata import entry_points

    return _BUILT_IN + tuple(point.load() for point in entry_points(group="optimize.stages"))


def find(verb: str, method: str) -> tuple[Entry, ...]:
    """All back ends of one method."""
    return tuple(entry for entry in entries() if entry.verb == verb and entry.method == method)


def methods(verb: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry.method for entry in entries() if entry.verb == verb))


def takers(format: str) -> Iterable[Entry]:
    """The stages that take a format (what a "try" suggests after a wrong order)."""
    return (entry for entry in entries() if format in entry.takes)
