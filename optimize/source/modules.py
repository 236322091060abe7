"""A PyTorch module of the user's own as a recipe's model: what makes it, its weights, and what images it wants.

    model:
      source: ./weights.safetensors      # or a folder with it, or a .pt or .pth file of a state dict
      module: my_package.nets:convnet    # called with module_args, in this environment
      module_args: {classes: 10}
      image: {size: 32, mean: [0.5], std: [0.25], channels: 1}
      task: image-classification

Weights are read as tensors and nothing else: safetensors, or a state dict by `torch.load(weights_only=True)`.
Without a `source` the module keeps the weights that the factory gives it, and has to be trained first.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import importlib.util
import json
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import SourceError

if TYPE_CHECKING:
    import torch

    from optimize.source import Origin
    from optimize.source.image import Image

SAFE = "*.safetensors"
PICKLED = ("*.pt", "*.pth", "*.bin")
_SEED = 0


@dataclass(frozen=True)
class ModuleSource:
    """A module, not made yet."""

    module: str
    args: dict[str, Any]
    image: Image | None
    origin: Origin | None
    """The weights; None for those that the factory gives."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Goes into the key: the factory's name, its arguments and the file that it stands in, and the weights."""
        from optimize.source import disk_errors

        found: dict[str, Any] = {"kind": "module", "module": self.module, "args": self.args, "code": self._code}
        if self.image:
            found["image"] = self.image.model_dump(mode="json")
        if self.origin:
            with disk_errors(self.origin):
                found["weights"] = self.origin.identity
        return found

    @property
    def _code(self) -> str | None:
        """SHA-256 of the factory's file: another net by the same name is another model. None where no file is told."""
        where = self.module.partition(":")[0]
        try:
            spec = importlib.util.find_spec(where)
            return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest() if spec and spec.origin else None
        except (ImportError, ValueError, OSError):
            return None

    def copy_to(self, directory: Path) -> None:
        """Make the module and write the folder of an artifact of the format `pytorch`, with weights in safetensors.

        Raises `SourceError` where the factory or the weights can't be had or do not go together.
        """
        import torch

        from optimize.runtimes import pytorch
        from optimize.source import disk_errors
        from optimize.tasks.images import PROCESSOR

        config: dict[str, Any] = {"module": self.module, "module_args": self.args}
        with disk_errors(self.origin or "the module"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model = pytorch.make(self.module, self.args)
            if self.origin:
                pytorch.fill(model, self._weights(self.origin, directory), str(self.origin))
            else:
                config[pytorch.FRESH] = True
            pytorch.save(model, directory, config)
            if self.image:
                (directory / PROCESSOR).write_text(json.dumps(self.image.processor(), indent=2) + "\n")

    def _weights(self, origin: Origin, directory: Path) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        name = weights_file(origin.names(), str(origin))
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            origin.copy([glob.escape(name)], Path(folder))
            file = Path(folder) / name
            if not fnmatch.fnmatchcase(name, SAFE):
                return _unpickled(file, str(origin))
            try:
                return load_file(file)
            except SafetensorError as error:
                raise SourceError(f"{name} is cut off or no safetensors file: {error}", location=str(origin)) from error


def weights_file(names: list[str], where: str) -> str:
    """The one file of weights among these. Raises `SourceError` where there is none, or several."""
    for patterns in (("model.safetensors",), (SAFE,), PICKLED):
        found = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if len(found) == 1:
            return found[0]
        if found:
            raise SourceError(f"{where} has several files of weights: {', '.join(found[:5])}", hint="name one of them")
    raise SourceError(f"{where} has no weights", hint=f"name a file that ends in {', '.join((SAFE, *PICKLED))}"[:200])


def _unpickled(file: Path, where: str) -> dict[str, torch.Tensor]:
    """A state dict, or a checkpoint that has one as `state_dict`."""
    import torch

    try:
        value = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zipfile's and torch's own
        raise SourceError(
            f"{file.name} holds more than weights, or none: {str(error).strip().partition('. ')[0][:200]}",
            location=where,
            hint="where you trust it, load it yourself and save model.state_dict() with safetensors.torch.save_file",
        ) from error
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        raise SourceError(f"{file.name} holds no state dict", location=where, hint="save model.state_dict()")
    return value
