"""The parts of a decoder that become single operators of ONNX Runtime, as PyTorch modules and functions to trace.

`torch.onnx.ops.symbolic` notes down an operator that PyTorch does not know; what it returns has only a shape, so a
model with such parts can be traced but not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optimize.errors import StageError

if TYPE_CHECKING:
    from optimize.export.nbits import Bnb4, Packed

_END = 2**62


def operator(name: str, inputs: Sequence[Tensor | None], shape: Sequence[Any], **attributes: Any) -> Tensor:
    """One node (`domain::Type`) with one float32 output of that shape; inputs of None are left out."""
    given = list(inputs)
    while given[-1] is None:
        given.pop()
    version = None if name.startswith("::") else 1
    return torch.onnx.ops.symbolic(name, given, attributes, dtype=torch.float32, shape=shape, version=version)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last axis."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        attributes = {"axis": -1, "epsilon": self.epsilon, "stash_type": 1}
        return operator("::SimplifiedLayerNormalization", [x, self.weight], x.shape, **attributes)


class NBitsLinear(nn.Module):
    """A linear layer that computes on packed codes."""

    def __init__(self, packed: Packed, bias: Tensor | None, accuracy_level: int) -> None:
        super().__init__()
        self.codes: Tensor
        self.scales: Tensor
        self.zeros: Tensor | None
        self.order: Tensor | None
        self.bias: Tensor | None
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("zeros", packed.zeros)
        self.register_buffer("order", packed.order)
        self.register_buffer("bias", bias)
        self.attributes = {
            "K": packed.width,
            "N": len(packed.codes),
            "bits": packed.stored_bits,
            "block_size": packed.block,
            "accuracy_level": accuracy_level,
        }

    def forward(self, x: Tensor) -> Tensor:
        if self.order is not None:
            x = x.index_select(-1, self.order)
        inputs = [x, self.codes, self.scales, self.zeros, None, self.bias]
        return operator("com.microsoft::MatMulNBits", inputs, (*x.shape[:-1], len(self.codes)), **self.attributes)


class Bnb4Linear(nn.Module):
    """A linear layer that computes on codes of bitsandbytes."""

    def __init__(self, weight: Bnb4, bias: Tensor | None) -> None:
        super().__init__()
        self.codes: Tensor
        self.absmax: Tensor
        self.bias: Tensor | None
        self.register_buffer("codes", weight.codes)
        self.register_buffer("absmax", weight.absmax)
        self.register_buffer("bias", bias)
        self.attributes = {
            "K": weight.width,
            "N": weight.height,
            "block_size": weight.block,
            "quant_type": int(weight.nf4),
        }

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.attributes["N"])
        y = operator("com.microsoft::MatMulBnb4", [x, self.codes, self.absmax], shape, **self.attributes)
        return y if self.bias is None else y + self.bias


class JoinedLinear(nn.Module):
    """One of several layers that get the same input, and that are computed as one: the first to be called does it."""

    def __init__(self, whole: NBitsLinear, sizes: Sequence[int], index: int, shared: dict[str, Any]) -> None:
        super().__init__()
        if index == 0:
            self.whole = whole
        self.sizes = list(sizes)
        self.index = index
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        if self.index == 0:
            self.shared["input"] = x
            self.shared["parts"] = self.whole(x).split(self.sizes, dim=-1)
        if self.shared.get("input") is not x:
            raise StageError("layers that were seen to share their input no longer do while tracing")
        part: Tensor = self.shared["parts"][self.index]
        return part


class NBitsEmbedding(nn.Module):
    """Rows of a packed matrix, taken out of the very codes that a head computes on."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.codes: Tensor
        self.scales: Tensor
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.packed = packed

    def forward(self, indices: Tensor) -> Tensor:
        blocks = self.codes.shape[1]
        rows = operator(
            "com.microsoft::GatherBlockQuantized",
            [self.codes, indices, self.scales.unsqueeze(-1)],
            (*indices.shape, blocks, self.packed.block),
            bits=self.packed.stored_bits,
            block_size=self.packed.block,
            gather_axis=0,
            quantize_axis=2,
        )
        return rows.flatten(-2)


class SharedLinear(nn.Module):
    """A head in float that multiplies with the transposed embedding, so that the file and memory hold it once."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = operator("com.microsoft::FusedMatMul", [x, self.weight], (*x.shape[:-1], len(self.weight)), transB=1)
        return y if self.bias is None else y + self.bias


class Last(nn.Module):
    """A head that computes only the last `wanted` [1] positions (0: all), which is set for each trace."""

    wanted: Tensor

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(operator("::Slice", [x, -self.wanted, torch.tensor([_END]), torch.tensor([1])], x.shape))
        return y


class Rotary(nn.Module):
    """Stands in for a model's rotary embedding: gives the tables of all positions instead of these positions' rows.

    `tables` maps the kind of layer (Gemma 3 has two; else None) to cosines and sines, [positions, rotated / 2] each.
    """

    def __init__(self, tables: dict[str | None, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.tables = {key: (f"cos_{number}", f"sin_{number}") for number, key in enumerate(tables)}
        for key, names in self.tables.items():
            for name, table in zip(names, tables[key], strict=True):
                self.register_buffer(name, table)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        cos, sin = self.tables[layer_type]
        return getattr(self, cos), getattr(self, sin)


class Trace:
    """What attention needs of the graph around it, and what it leaves: a model is traced inside of one."""

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]], attention_mask: Tensor, positions: Tensor) -> None:
        self.past = past
        self.positions = positions
        self.presents: list[Tensor] = []
        # As the operator wants them: the last valid position of each row, and the longest row of the batch.
        self.last = attention_mask.sum(1).to(torch.int32) - 1
        self.longest = attention_mask.shape[1]
        self.total = torch.scalar_tensor(self.longest, dtype=torch.int32)
        self.rotated: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """x [batch, heads, length, size] turned by its positions; `attend` takes it back where it turns by itself."""
        turned = operator(
            "com.microsoft::RotaryEmbedding",
            [x, self.positions, cos, sin],
            x.shape,
            interleaved=int(interleaved),
            num_heads=x.shape[1],
            rotary_embedding_dim=2 * cos.shape[1] if 2 * cos.shape[1] < x.shape[-1] else 0,
        )
        self.rotated[id(turned)] = (turned, x, cos, sin)
        return turned

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        interleaved: bool,
    ) -> Tensor:
        """Causal attention over the cache and these [batch, heads, length, size] -> [batch, length, heads, size]."""
        attributes: dict[str, Any] = {"num_heads": query.shape[1], "kv_num_heads": key.shape[1]}
        tables: list[Tensor | None] = [None, None]
        if id(query) in self.rotated and id(key) in self.rotated and self.rotated[id(query)][2].shape[1] % 8 == 0:
            _, query, cos, sin = self.rotated[id(query)]
            _, key, *_ = self.rotated[id(key)]
            attributes |= {"do_rotary": 1, "rotary_interleaved": int(interleaved)}
            tables = [cos, sin]
        attributes |= {"scale": scale} if scale is not None else {}
        attributes |= {"local_window_size": window} if window is not None else {}
        attributes |= {"softcap": softcap} if softcap else {}
        batch, _, length, size = query.shape
        past = self.past[len(self.presents) // 2]
        flat = [x.transpose(1, 2).reshape(batch, length, -1) for x in (query, key, value)]
        cache = (batch, key.shape[1], self.longest, size)
        given = [*flat, *past, self.last, self.total, *tables]
        while given[-1] is None:
            given.pop()
        output, *presents = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            given,
            attributes,
            dtypes=[torch.float32] * 3,
            shapes=[flat[0].shape, cache, cache],
            version=1,
        )
        self.presents += presents
        return output.reshape(batch, length, -1, size)
