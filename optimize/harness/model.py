"""An artifact as lm-eval sees a model: log-likelihoods of continuations, and text until something ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from numpy.typing import NDArray

from optimize.generation import Answer, Sampling, end_tokens, write
from optimize.model import Model
from optimize.tasks.causal_lm import BATCH_BYTES, log_softmax, max_positions
from optimize.tasks.pretrained import read_config

LONGEST = 2048
"""Tokens, of a model whose config does not say how many it takes; as lm-eval has it."""
MAX_NEW_TOKENS = 256
"""Of an answer whose task does not say; as lm-eval has it."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """How a request becomes tokens is lm-eval's own code (`TemplateLM`), or what its `hf` model does."""

    def __init__(self, model: Model, batch_size: int) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = model.preprocessor
        self.batch_size = batch_size
        self.max_length = max_positions(read_config(model.artifact.path / "config.json")) or LONGEST
        self.ends = end_tokens(model.artifact.path, self.tokenizer)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return int(self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eot_token_id)

    @property
    def tokenizer_name(self) -> str:
        return self.model.artifact.digest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        special = add_special_tokens
        if special is None:  # the tokenizer's own way, but not a second token that begins a text
            special = not (self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token))
        return list(self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        found = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [("", *utils.make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        asked = next((options[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in options), 0)
        sampling = Sampling(
            max_new_tokens=min(asked or MAX_NEW_TOKENS, self.max_length - 1),
            temperature=options.get("temperature", 0.0) if options.get("do_sample") else 0.0,
            top_p=options.get("top_p", 1.0),
            stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        )
        ids = self.tok_encode(context)[-(self.max_length - sampling.max_new_tokens) :]
        decoder = self.model.runner.decoder(len(ids) + sampling.max_new_tokens)
        return "".join(write(decoder, self.tokenizer, ids, sampling, self.ends, Answer()))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is what greedy decoding would write), a request each."""
        # A token is foretold by those before it, so the last one is no input; what is too long loses its beginning.
        rows = [(context + answer)[-(self.max_length + 1) :][:-1] for _, context, answer in requests]
        answers = [answer for _, _, answer in requests]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        while order:
            fitting = BATCH_BYTES // (4 * len(rows[order[0]]) * len(self.tokenizer))
            batch = order[: max(1, min(self.batch_size, fitting))]
            order = order[len(batch) :]
            logits = self._logits([rows[i] for i in batch])
            for i, row in zip(batch, logits, strict=True):
                end = len(rows[i])
                piece = row[end - len(answers[i]) : end]
                shares = log_softmax(piece)[np.arange(len(piece)), answers[i]]
                found[i] = (float(shares.sum(dtype=np.float64)), bool((piece.argmax(axis=-1) == answers[i]).all()))
        return found

    def _logits(self, rows: Sequence[list[int]]) -> NDArray[np.float32]:
        """[batch, length, vocabulary], of rows padded on the right."""
        features = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
        return self.model.runner.run(self.model.task.collate(self.tokenizer, features))["logits"]
