"""Encoders and decoders of other families than T5 as two graphs: they write what PyTorch and its `generate` do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize import runtimes
from optimize.beam import Search, write
from optimize.export import encoder_decoder, onnx_graph
from optimize.tasks.seq2seq import Summarization

CONTROL = {"decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 3, "forced_eos_token_id": None}
SIZES = {
    **{"vocab_size": 200, "d_model": 32, "max_position_embeddings": 64, "init_std": 0.3},
    **{f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 64))},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
}


def made(family: str, pico_model: Path) -> Any:
    import torch
    import transformers

    if family == "BERT":
        return Summarization().load_model(pico_model, {})
    head = {"Bart": "ForConditionalGeneration", "Marian": "MTModel"}[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**SIZES, **CONTROL)
        return getattr(transformers, f"{family}{head}")(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Bart", "Marian", "BERT"])
def test_graphs_write_what_generate_does(family: str, pico_model: Path, tmp_path: Path) -> None:
    import torch

    model = made(family, pico_model)
    model.generation_config.forced_eos_token_id = None
    model.save_pretrained(tmp_path)
    parent: Any = runtimes.get("transformers").open(tmp_path, 1)
    model.set_attn_implementation("eager")
    onnx_graph.save(encoder_decoder._encoder(model, None), tmp_path / "encoder.onnx")
    onnx_graph.save(encoder_decoder._decoder(model, None), tmp_path / "decoder.onnx")
    runner: Any = runtimes.get("onnx").open(tmp_path, 1)
    ids = np.random.default_rng(0).integers(5, 180, size=(3, 9))
    mask = np.array([[int(i < length) for i in range(9)] for length in (9, 6, 2)])
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    assert encoder_decoder._difference(runner, parent, batch, [[7, 8, 9], [10], [11, 12]]) < 1e-5
    for beams in (1, 3):
        got, expected = (write(one.writer(batch), Search(8, beams)) for one in (runner, parent))
        assert [text.tokens for text in got] == [text.tokens for text in expected]
        theirs = parent.model.generate(
            **{name: torch.from_numpy(array) for name, array in batch.items()},
            max_new_tokens=8,
            num_beams=beams,
            do_sample=False,
            suppress_tokens=[0],
        )
        for text, row in zip(expected, theirs.tolist(), strict=True):
            assert text.tokens == row[1 : 1 + len(text.tokens)]
