"""What an exporter raised, as an error that names the layer, the operation and what to try."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from optimize.errors import StageError

if TYPE_CHECKING:
    from types import TracebackType

_OPERATION = re.compile(r"\b(?:aten|torchao|quantized|prims|torchvision)(?:::|\.)\w+(?:\.\w+)?")
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_FIXED_SIZE = re.compile(r"Constraints violated|specialized|data-dependent|unbacked symint|GuardOnDataDependent", re.I)


def failed(error: BaseException, model: Any, hint: str) -> StageError:
    """Why `model` (a `torch.nn.Module`) could not be exported."""
    causes = _causes(error)
    told = "\n".join(str(cause) for cause in causes)
    # What wraps an error often only says that there was one.
    first = next((line for cause in reversed(causes) if (line := _first_line(cause))), type(error).__name__)
    reason = f"{type(causes[-1]).__name__}: {first}"
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(told):
        reason, hint = "out of memory", "lower data.max_length, or use a machine with more memory"
    elif _FIXED_SIZE.search(told):
        hint = "its code decides by a size or by numbers in its inputs: give every size its own export, or change it"
    where = next((name for cause in reversed(causes) if (name := _layer(cause.__traceback__, model))), None)
    operation = match[0] if (match := _OPERATION.search(told)) and match[0] not in reason else None
    place = " ".join(part for part in (f"in {where}" if where else "", f"at {operation}" if operation else "") if part)
    return StageError(f"the model can't be exported{f' ({place})' if place else ''}: {reason}", hint=hint)


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, outermost first."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _layer(trace: TracebackType | None, model: Any) -> str | None:
    """The name of the innermost module that was computing when an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self"))) or found
        trace = trace.tb_next
    return found
