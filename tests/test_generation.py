from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import optimize
from optimize.errors import OptimizeError
from optimize.generation import Answer, Sampling, choose, end_tokens, write


class Script:
    """A decoder that says a text, whatever it is told."""

    def __init__(self, tokens: list[int], vocabulary: int) -> None:
        self.tokens = tokens
        self.vocabulary = vocabulary
        self.length = 0
        self.calls: list[int] = []

    def forward(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        assert input_ids.dtype == np.int64
        logits = np.zeros(self.vocabulary, dtype=np.float32)
        logits[self.tokens[len(self.calls)]] = 1
        self.calls.append(len(input_ids))
        self.length += len(input_ids)
        return logits

    def truncate(self, length: int) -> None:
        self.length = length


@pytest.fixture(scope="module")
def tokenizer(pico_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pico_llama)


def said(tokenizer: Any, text: str, ends: frozenset[int] = frozenset({1}), **sampling: Any) -> tuple[list[str], Answer]:
    """What `write` makes of a model that says `text` and ends."""
    decoder, answer = Script([*tokenizer(text)["input_ids"], 1], len(tokenizer)), Answer()
    prompt = tokenizer("Say: ")["input_ids"]
    pieces = list(write(decoder, tokenizer, prompt, Sampling(**sampling), ends, answer))
    assert answer.text == "".join(pieces)
    assert decoder.calls == [len(prompt), *[1] * (answer.tokens - 1)]
    return pieces, answer


# Text


@pytest.mark.parametrize("text", ["a film", "naïve 日本語 café", "🎬👨‍👩‍👧‍👦 fine!", " \n\n x", "�? it is"])
def test_pieces_are_whole_characters(tokenizer: Any, text: str) -> None:
    pieces, answer = said(tokenizer, text)
    assert answer.text == text
    assert answer.finish == "stop"
    assert answer.tokens == len(tokenizer(text)["input_ids"]) + 1
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)
    assert len(pieces) > 1


def test_a_character_that_is_never_finished_is_marked(tokenizer: Any) -> None:
    whole = len(tokenizer("日")["input_ids"])
    assert whole > 1
    pieces, answer = said(tokenizer, "日", max_new_tokens=whole - 1)
    assert set(answer.text) == {"�"}
    assert answer.finish == "length"
    assert len(pieces) == 1


def test_it_ends_at_length(tokenizer: Any) -> None:
    _, answer = said(tokenizer, "the film is fine", max_new_tokens=3)
    assert answer.tokens == 3
    assert "the film is fine".startswith(answer.text)
    assert answer.finish == "length"


@pytest.mark.parametrize(
    ("stop", "left"),
    [("plot", "the film. the "), (["fi", "film"], "the "), (".", "the film"), ("no such text", "the film. the plot")],
)
def test_a_text_to_stop_at_is_never_shown(tokenizer: Any, stop: Any, left: str) -> None:
    _, answer = said(tokenizer, "the film. the plot", stop=stop)
    assert answer.text == left
    assert answer.finish == "stop"


def test_what_might_have_been_a_stop_is_shown_when_it_is_none(tokenizer: Any) -> None:
    pieces, _ = said(tokenizer, "##, then ###: end", stop="###")
    assert "".join(pieces) == "##, then "


# Choice


def test_greedy_is_the_default() -> None:
    logits = np.array([0.0, 3.0, 2.0], dtype=np.float32)
    assert choose(logits, Sampling(), np.random.default_rng(0)) == 1


def test_drawing_follows_the_distribution_and_top_p_cuts_its_tail() -> None:
    shares = np.array([0.1, 0.5, 0.15, 0.25])
    logits = np.log(shares).astype(np.float32)

    def frequencies(**options: Any) -> NDArray[np.float64]:
        generator, sampling = np.random.default_rng(0), Sampling(**options)
        drawn = [choose(logits, sampling, generator) for _ in range(2_000)]
        return np.bincount(drawn, minlength=4) / len(drawn)

    np.testing.assert_allclose(frequencies(temperature=1), shares, atol=0.04)
    np.testing.assert_allclose(frequencies(temperature=1, top_p=0.7), [0, 2 / 3, 0, 1 / 3], atol=0.04)
    np.testing.assert_allclose(frequencies(temperature=0.5), shares**2 / (shares**2).sum(), atol=0.04)
    assert frequencies(temperature=1, top_p=0.01).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"stop": [""]}]
)
def test_what_can_not_be(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)) if "stop" not in options else "stop at"):
        Sampling(**options)


def test_end_tokens(tmp_path: Path, tokenizer: Any) -> None:
    assert end_tokens(tmp_path, tokenizer) == {1}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert end_tokens(tmp_path, tokenizer) == {7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert end_tokens(tmp_path, tokenizer) == {3, 4}


# Models


def test_a_folder_writes_as_transformers_does(pico_llama: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = optimize.load(pico_llama, threads=1)
    assert model.artifact.task == {"name": "causal-lm", "context_length": 256, "stride": 256}
    prompts = ["The film is", "It is a very"]
    answers = model.predict(prompts, max_new_tokens=12)
    theirs = AutoModelForCausalLM.from_pretrained(pico_llama)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([model.preprocessor(prompt)["input_ids"]])
        written = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0]
        expected = model.preprocessor.decode(written[ids.shape[1] :], skip_special_tokens=True)
        assert answer["text"].rstrip("�") == expected.rstrip("�")
        assert "".join(model.stream(prompt, max_new_tokens=12)) == answer["text"]
        assert answer["tokens"] <= 12
    drawn = [model.predict(prompts[:1], temperature=1, seed=seed)[0]["text"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_prompts_that_can_not_be(pico_llama: Path, pico_model: Path) -> None:
    model = optimize.load(pico_llama, threads=1)
    assert model.predict([], max_new_tokens=2) == []
    assert model.predict([""], max_new_tokens=2)[0]["tokens"] <= 2  # begins with the token that begins a text
    full = model.predict(["a" * 254], max_new_tokens=64)[0]
    assert full["tokens"] <= 256 - len(model.preprocessor("a" * 254)["input_ids"])
    with pytest.raises(OptimizeError, match="the model has room for 256"):
        model.predict(["日本" * 200])
    with pytest.raises(OptimizeError, match="no chat template"):
        model.predict([{"messages": [{"role": "user", "content": "hello"}]}])
    with pytest.raises(OptimizeError, match="inputs must be texts"):
        model.predict([7])
    with pytest.raises(TypeError, match="max_tokens"):
        model.predict(["a"], max_tokens=3)
    classifier = optimize.load(pico_model)
    with pytest.raises(TypeError, match="does not write: max_new_tokens"):
        classifier.predict(["a"], max_new_tokens=3)
    with pytest.raises(TypeError, match="does not write"):
        classifier.stream("a")


def test_a_conversation_goes_through_the_chat_template(pico_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(pico_llama, folder)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}bot:{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    model = optimize.load(folder, threads=1)
    asked = {"messages": [{"role": "user", "content": "a film?"}]}
    assert model.predict([asked], max_new_tokens=5) == model.predict(["user: a film?\nbot:"], max_new_tokens=5)
