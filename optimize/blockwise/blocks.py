"""A model's blocks, one after the other: found from the model, filled from its checkpoint, run, and emptied again.

A transformer is a list of blocks of one kind between an embedding and a head. `Blocks` holds the model without weights
but those of one block at a time. What a block is called with besides its hidden states (masks, position embeddings,
...) is never kept: the model's own `forward` runs each time, passes the stored hidden states over the blocks before
that one, and ends behind it. Without an embedding and other blocks that costs next to nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from optimize.errors import StageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from optimize.blockwise.lazy_weights import Stored
    from optimize.tasks import Inputs

_HINT = "decoders and encoders that are a list of blocks of one kind can be quantised block by block"


class _Ended(Exception):
    """Ends a forward pass where nothing more is wanted of it."""

    def __init__(self, result: Any) -> None:
        self.result = result


class _Pass(threading.local):
    """One forward pass; several can be under way, each in a thread of its own."""

    stop = -1
    hidden: Any = None
    reached: list[int]


def find_blocks(model: nn.Module) -> str:
    """Name of the longest list of modules of one class that lies in no other such list.

    Raises `StageError` where there is none. That the forward pass runs through it in order is checked when it does.
    """
    from torch import nn

    found: dict[str, int] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inner and len({type(member) for member in module}) == 1:
            found[name] = len(module)
    if not found or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise StageError(f"{type(model).__name__} has no list of blocks that hidden states run through", hint=_HINT)
    return max(found, key=lambda name: found[name])


def shared_inputs(modules: Mapping[str, nn.Module], forward: Callable[[], object]) -> list[list[str]]:
    """Names of the modules that `forward` gives the very same tensor, in the order in which it first reaches them."""
    groups: dict[int, list[str]] = {}
    alive = []  # or another tensor could get the address of one that is gone

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            alive.append(args[0])
            if not any(name in names for names in groups.values()):
                groups.setdefault(id(args[0]), []).append(name)

        return hook

    hooks = [module.register_forward_pre_hook(look(name)) for name, module in modules.items()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return list(groups.values())


class Blocks:
    """The blocks of a model of transformers, and behind them its `head` where that is to be one more.

    With `tensors`, the model's parameters lie on the meta device and are read as they are needed; without, the model is
    whole and stays so. `compute_dtype` is what layers multiply in; what they are added to keeps the model's own type.
    """

    def __init__(
        self,
        model: Any,
        tensors: Mapping[str, Stored] | None,
        *,
        head: str | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        import inspect

        self.model = model
        self.prefix = find_blocks(model)
        self.names = [f"{self.prefix}.{i}" for i in range(len(model.get_submodule(self.prefix)))]
        self.names += [head] if head else []
        self.gives_tuple: bool | None = None
        """Whether a block answers with a tuple; known once the first has run."""
        self._tensors = tensors
        self.compute_dtype = compute_dtype
        self._takes = inspect.signature(model.forward).parameters
        self._pass = _Pass()
        names = {module: name for name, module in model.named_modules()}
        self._embedding = names[model.get_input_embeddings()]
        last = model.get_output_embeddings()
        self._lazy = (*self.names, self._embedding, *([names[last]] if last is not None else []))
        """What is only in memory in its turn."""

    def holds(self, index: int, name: str) -> bool:
        """Whether a module is block `index` or lies in it."""
        return f"{name}.".startswith(f"{self.names[index]}.")

    @contextlib.contextmanager
    def opened(self, device: torch.device) -> Iterator[None]:
        """Have in memory what stands around the blocks, but for the embedding and the head; run only inside of it."""
        self.device = device
        around = [name for name, _ in self.model.named_modules() if not self._waits(name)]
        use_cache = getattr(self.model.config, "use_cache", False)
        patched = {
            self._embedding: self._looked_up,
            **{name: self._in_turn(position) for position, name in enumerate(self.names)},
        }
        self._fill(around)
        self.model.config.use_cache = False
        for name, wrap in patched.items():
            module = self.model.get_submodule(name)
            module.forward = wrap(module.forward)
        try:
            yield
        finally:
            for name in patched:
                del self.model.get_submodule(name).forward  # that of its class again
            self.model.config.use_cache = use_cache
            self._empty(around)

    @contextlib.contextmanager
    def embedding(self) -> Iterator[None]:
        """Have the embedding in memory: `embed` needs it, and `run` does not."""
        with self._filled(self._embedding):
            yield

    @contextlib.contextmanager
    def filled(self, index: int) -> Iterator[None]:
        """Have block `index` in memory. Raises `StageError` where the checkpoint lacks a weight of it."""
        with self._filled(self.names[index]):
            yield

    def original(self, name: str) -> Tensor:
        """A parameter as the checkpoint has it, in float32."""
        import torch

        value = self.model.get_parameter(name).detach() if self._tensors is None else self._tensors[name].load()
        return value.to(self.device, torch.float32, copy=True)

    def embed(self, inputs: Inputs) -> Tensor:
        """What the first block gets: hidden states [batch, length, width]."""
        return self._forward(-1, inputs, None)

    def run(self, index: int, inputs: Inputs, hidden: Tensor) -> Tensor:
        """What block `index` makes of `hidden`, which the block before it, or the embedding, gave for `inputs`."""
        return self._forward(index, inputs, hidden)

    def _forward(self, stop: int, inputs: Inputs, hidden: Tensor | None) -> Tensor:
        import torch

        given = {name: torch.from_numpy(array).to(self.device) for name, array in inputs.items() if name in self._takes}
        self._pass.stop, self._pass.hidden, self._pass.reached = stop, hidden, []
        try:
            with torch.no_grad(), self._multiplying():
                self.model(**given)
        except _Ended as ended:
            if self._pass.reached == list(range(max(stop, 0) + 1)):
                return ended.result  # type: ignore[no-any-return]
        raise StageError(f"{type(self.model).__name__} does not run through {self.prefix} in order", hint=_HINT)

    def _multiplying(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        dtype = self.compute_dtype
        if dtype in (None, self.model.dtype):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype, cache_enabled=False)  # weights change between calls

    def _in_turn(self, position: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A block's forward: a pass goes over the blocks before its own, through its own, and no further."""

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                current = self._pass
                current.reached.append(position)
                if len(current.reached) <= position:
                    raise _Ended(None)  # out of order
                if position == 0 and current.hidden is not None:
                    args, kwargs = (current.hidden, *args[1:]), {**kwargs}
                    kwargs.pop("hidden_states", None)
                hidden = args[0] if args else kwargs["hidden_states"]
                if current.stop == -1:
                    raise _Ended(hidden)
                if position < current.stop:
                    return (hidden,) if self.gives_tuple else hidden
                result = original(*args, **kwargs)
                if position == 0:
                    self.gives_tuple = isinstance(result, tuple)
                raise _Ended(result[0] if isinstance(result, tuple) else result)

            return forward

        return wrap

    def _looked_up(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The embedding's forward: where hidden states are given only the shape of its answer matters."""

        def forward(ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            hidden = self._pass.hidden
            width = self.model.get_submodule(self._embedding).weight.shape[1]
            return original(ids, *args, **kwargs) if hidden is None else hidden.new_zeros((*ids.shape, width))

        return forward

    @contextlib.contextmanager
    def _filled(self, name: str) -> Iterator[None]:
        names = [below for below, _ in self.model.get_submodule(name).named_modules(prefix=name)]
        self._fill(names)
        try:
            yield
        finally:
            self._empty(names)

    def _waits(self, name: str) -> bool:
        return any(name == lazy or name.startswith(f"{lazy}.") for lazy in self._lazy)

    def _fill(self, names: Iterable[str]) -> None:
        """Read the modules' own tensors, in the model's types; what is no part of a checkpoint only moves."""
        from torch import nn

        if self._tensors is None:
            return
        for module, prefix in ((self.model.get_submodule(name), f"{name}." if name else "") for name in names):
            for key, parameter in module.named_parameters(recurse=False):
                if prefix + key not in self._tensors:
                    raise StageError(f"the weights of {prefix}{key} are missing")
                value = self._tensors[prefix + key].load().to(self.device, parameter.dtype)
                setattr(module, key, nn.Parameter(value, requires_grad=False))
            for key, buffer in module.named_buffers(recurse=False):
                stored = self._tensors.get(prefix + key)
                setattr(module, key, (stored.load() if stored else buffer).to(self.device))

    def _empty(self, names: Iterable[str]) -> None:
        from torch import nn

        if self._tensors is None:
            return
        for module in map(self.model.get_submodule, names):
            for key, parameter in module.named_parameters(recurse=False):
                setattr(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))
