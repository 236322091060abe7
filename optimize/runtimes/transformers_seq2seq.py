"""PyTorch's models with an encoder and a decoder, as `optimize.runtimes.Writer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optimize.runtimes.seq2seq import control_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from optimize.runtimes.transformers import TorchRunner


class TorchWriter:
    """The encoder runs once; the decoder goes on from its cache, with the keys and values of both attentions."""

    def __init__(self, runner: TorchRunner, inputs: Mapping[str, NDArray[Any]]) -> None:
        import torch
        from transformers import DynamicCache, EncoderDecoderCache

        self._runner = runner
        model = runner.model
        self.tokens = control_tokens(model.config.to_dict(), model.generation_config.to_dict())
        self.rows = len(inputs["input_ids"])
        self._mask = torch.from_numpy(inputs["attention_mask"])
        with runner.answering():
            self._encoded = model.get_encoder()(
                input_ids=torch.from_numpy(inputs["input_ids"]), attention_mask=self._mask
            )
        self._cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def forward(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        import torch

        with self._runner.answering():
            logits = self._runner.model(
                encoder_outputs=self._encoded,
                attention_mask=self._mask,
                decoder_input_ids=torch.from_numpy(input_ids)[:, None],
                past_key_values=self._cache,
                use_cache=True,
            ).logits
        return logits[:, -1].float().numpy()  # type: ignore[no-any-return]

    def keep(self, rows: NDArray[np.int64]) -> None:
        import torch

        chosen = torch.from_numpy(rows)
        self.rows = len(rows)
        self._mask = self._mask[chosen]
        self._encoded.last_hidden_state = self._encoded.last_hidden_state[chosen]
        if self._cache.get_seq_length():
            self._cache.batch_select_indices(chosen)

    def truncate(self, length: int) -> None:
        self._cache.crop(min(length - self._cache.get_seq_length(), 0))
