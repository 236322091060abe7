"""What of a model's folder is taken, and what is refused before anything is loaded: pickles, code, damaged weights."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from optimize.errors import SourceError

SMALL_FILES = (
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("preprocessor_config.json", "processor_config.json", "feature_extractor_config.json"),
    *("image_processor_config.json", "video_preprocessor_config.json", "LICENSE*", "NOTICE*"),
    "sparsity.json",  # of ours: which layers' zeros are a mask
)
"""All that a model needs besides its weights, and its licence, which must go where the weights go."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
ONNX_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"}
"""The operators that ONNX Runtime brings along."""
MAX_JSON_BYTES = 64 * 2**20


def check_names(model: object, names: Collection[str]) -> None:
    """Refuse a folder that can be seen to hold no model, an adapter, or only pickled weights.

    `model` is what messages call it.
    """
    if "config.json" not in names:
        raise SourceError(f"{model} has no config.json", hint="name the folder that `save_pretrained` wrote")
    if "adapter_config.json" in names:
        # transformers would load the weights from wherever that file says that the base model is.
        raise SourceError(
            f"{model} has an adapter_config.json: it is an adapter to another model",
            hint="merge it: load it with peft, then merge_and_unload().save_pretrained(NEW_FOLDER)",
        )
    if not {"model.safetensors", "model.safetensors.index.json"} & set(names):
        raise _no_weights(model, names)


def _no_weights(model: object, names: Collection[str]) -> SourceError:
    pickled = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in PICKLED)]
    told = f"only pickled weights ({', '.join(sorted(pickled)[:3])}), which could run code when loaded"
    return SourceError(
        f"{model} has {told if pickled else 'no model.safetensors, and weights of other formats are not read'}",
        hint="convert to safetensors, where you trust the files: load the folder with the task's AutoModelFor... class "
        "and call save_pretrained(NEW_FOLDER)",
    )


def check_configs(model: object, directory: Path, trusted: bool) -> None:
    """Refuse configs that name files elsewhere, or code to run, unless trusted; then it must lie in the folder."""
    if not (directory / "config.json").is_file():
        raise SourceError(f"{model} has no config.json", hint="name the folder that `save_pretrained` wrote")
    for path in sorted(directory.glob("*config.json")):
        config = _read_json(model, path)
        if path.name == "tokenizer_config.json":
            _check_tokenizer(model, config)
        for reference in _code_references(config):
            if not trusted:
                raise SourceError(
                    f"{path.name} of {model} wants code of the model's own to run ({reference})",
                    hint="read that code; if you trust it, set model.trust_remote_code: true",
                )
            if "--" in reference or "/" in reference:
                raise SourceError(
                    f"{path.name} of {model} wants code of another repository to run ({reference})",
                    hint="copy that code into the model's folder, so that what runs is what was checked",
                )


def check_graph(model: object, directory: Path, names: Collection[str]) -> None:
    """Refuse an ONNX graph that would run a library of its own or read a file outside of its folder.

    `names` are the plain files of the folder; data that is not among them lies elsewhere, or behind a link.
    """
    import onnx
    from google.protobuf.message import DecodeError, Message

    def messages(message: Message) -> Iterator[Message]:
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                for child in [value] if isinstance(value, Message) else value:
                    yield from messages(child)

    for name in sorted(names):
        if name.endswith(".onnx"):
            try:
                parts = list(messages(onnx.load(directory / name, load_external_data=False)))
            except (OSError, DecodeError, RecursionError) as error:
                raise SourceError(f"{name} of {model} can't be read: {error}") from error
            _check_parts(f"{name} of {model}", parts, names)


def _check_parts(graph: str, parts: Sequence[Any], names: Collection[str]) -> None:
    import onnx

    own = {part.domain for part in parts if isinstance(part, onnx.FunctionProto)}
    used = {part.domain for part in parts if isinstance(part, onnx.NodeProto)}
    if strange := sorted(used - own - ONNX_DOMAINS):
        raise SourceError(
            f"{graph} uses operators of {', '.join(map(repr, strange))}, which need a library of its own",
            hint="export it with ONNX Runtime's own operators",
        )
    for part in parts:
        for entry in part.external_data if isinstance(part, onnx.TensorProto) else ():
            if entry.key == "location" and entry.value not in names:
                raise SourceError(
                    f"{graph} reads weights from {entry.value!r}, which is no plain file of its folder",
                    hint="save the model with its data beside it",
                )


def check_openvino(model: object, directory: Path, names: Collection[str]) -> None:
    """Refuse an OpenVINO model whose weights lie elsewhere, behind a link, or beyond the end of their file."""
    from xml.etree import ElementTree

    path, weights = directory / "model.xml", directory / "model.bin"
    try:
        if b"<!" in path.read_bytes():  # entities can grow without end
            raise ValueError("it is no plain XML")
        spans = [
            (int(data.attrib["offset"]), int(data.attrib["size"]))
            for data in ElementTree.parse(path).getroot().iter("data")
            if "offset" in data.attrib and "size" in data.attrib
        ]
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise SourceError(f"model.xml of {model} can't be read: {error}") from error
    size = weights.stat().st_size if "model.bin" in names else 0
    if any(offset < 0 or length < 0 or offset + length > size for offset, length in spans):
        raise SourceError(
            f"model.bin of {model} is cut off, missing, or no plain file of its folder",
            hint="save the model with openvino.save_model, both files in one folder",
        )


def _code_references(value: Any) -> Iterator[str]:
    """Every module that an `auto_map` or `custom_pipelines` wants imported, and every kernel of the hub."""
    for node in _nodes(value):
        for key, named in node.items() if isinstance(node, dict) else ():
            words = [leaf for leaf in _nodes(named) if isinstance(leaf, str)]
            if key in ("auto_map", "custom_pipelines"):
                yield from words or [key]
            elif key.endswith(("attn_implementation", "experts_implementation")):
                # `sdpa` and the like are in transformers; `ORGANISATION/NAME` is fetched from the hub and run.
                yield from [word for word in words if "/" in word]


def _check_tokenizer(model: object, config: dict[str, Any]) -> None:
    """Refuse a tokenizer's config whose vocabulary is a path: it would be read, from anywhere, and saved as our own."""
    for key in ("vocab", "merges", "init_inputs"):
        if paths := [leaf for leaf in _nodes(config.get(key)) if isinstance(leaf, str)]:
            raise SourceError(
                f"tokenizer_config.json of {model} takes {key!r} from {paths[0]!r}",
                hint="load the tokenizer with AutoTokenizer and call save_pretrained(NEW_FOLDER)",
            )


def _nodes(value: Any) -> Iterator[Any]:
    stack = [value]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())


def _read_json(model: object, path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("it is too large")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path.name} of {model} can't be read: {error}") from error
    return value


def weight_files(model: object, directory: Path, names: Collection[str]) -> tuple[str, ...]:
    """The files that hold the weights: one file or listed shards, whichever transformers would look for first."""
    index = directory / "model.safetensors.index.json"
    if not index.exists() or "model.safetensors" in names:
        return ("model.safetensors",)
    listed = _read_json(model, index).get("weight_map")
    shards = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    for name in shards:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise SourceError(f"{index.name} of {model} names weights outside of its folder: {name!r}")
    return tuple(shards)


def check_weights(model: object, directory: Path, names: Collection[str]) -> None:
    """Every shard is there and is as long as its header says: neither cut off nor a placeholder of git-lfs."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise _no_weights(model, names)
    missing = sorted(set(weight_files(model, directory, names)) - {path.name for path in files})
    if missing:
        raise SourceError(f"{model} lacks {missing[0]}, which its index lists", hint="fetch the whole model again")
    for path in files:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            try:
                tensors = json.loads(file.read(header) if header <= min(size, MAX_JSON_BYTES) else b"")
                ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
                whole = 8 + header + max(ends, default=0) == size
            except (ValueError, RecursionError, AttributeError, KeyError, IndexError, TypeError):
                whole = False
        if not whole:
            raise SourceError(
                f"{path.name} of {model} is cut off or no safetensors file",
                hint="fetch it again (a file of about 130 bytes is a placeholder: `git lfs pull`)",
            )
