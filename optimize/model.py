"""An artifact that answers: `optimize.load("minilm-sentiment@production").predict(["a fine film"])`.

A language model writes on: `predict(["Once upon a time"], max_new_tokens=40)`, or `stream("Once upon a time")` for its
text as it comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize import runtimes, tasks
from optimize.errors import OptimizeError

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.generation import Answer, Sampling
    from optimize.runtimes import Runner
    from optimize.work import Work


class Model:
    """An artifact to ask. Its files are opened at the first question, with `threads` threads (None: every core)."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        name: str = "",
        scores: Mapping[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        self.artifact = artifact
        self.name = name or artifact.digest[:19]
        self.scores = dict(scores or {})
        self.threads = threads
        self.task = tasks.get(artifact.task["name"])

    @cached_property
    def runner(self) -> Runner:
        from optimize.evaluate.host import cpu_count

        return runtimes.open_artifact(self.artifact, self.threads or cpu_count())

    @cached_property
    def preprocessor(self) -> Any:
        return self.task.preprocessor(self.artifact.path, trust_remote_code=self.artifact.trust_remote_code)

    def predict(self, inputs: Sequence[Any], *, batch_size: int = 32, **sampling: Any) -> list[dict[str, Any]]:
        """One answer an input, in the order given, such as `{"label": "positive", "score": 0.98}`.

        A language model's is `{"text": what it wrote, "tokens": how many, "finish": "stop" or "length"}`; its inputs
        are texts or `{"messages": [{"role", "content"}, ...]}`, and `sampling` is `max_new_tokens` (64),
        `temperature` (0: the likeliest token), `top_p`, `seed` and `stop` (a text or several that end an answer). One
        with an encoder takes `max_new_tokens`, `num_beams` and `length_penalty`, by default what its recipe said.
        """
        if isinstance(inputs, (str, bytes, Mapping)):
            raise TypeError("predict takes a list: predict([text])")
        if self.task.generates and not self.task.encodes:
            return [self._complete(value, sampling) for value in inputs]
        if idle := [name for name in sampling if name not in self.task.options]:
            told = f"takes {', '.join(self.task.options)}" if self.task.options else "does not write"
            raise TypeError(f"a model for {self.task.name} {told}: {', '.join(idle)} says nothing")
        if not inputs:
            return []
        rows, spec = self.task.rows_of(inputs), {**self.artifact.task, **sampling}
        outputs = self.task.respond(self.runner, self.preprocessor, rows, spec, batch_size=batch_size)
        return self.task.answers(outputs, spec)

    def stream(self, prompt: Any, **sampling: Any) -> Iterator[str]:
        """What a language model writes, in pieces as they come; `prompt` and `sampling` as in `predict`."""
        if not self.task.generates or self.task.encodes:
            raise TypeError(f"a model for {self.task.name} does not write on from a text: ask `predict`")
        from optimize.generation import Answer

        return self._write(prompt, sampling, Answer())

    def _complete(self, prompt: Any, sampling: Mapping[str, Any]) -> dict[str, Any]:
        from optimize.generation import Answer

        answer = Answer()
        for _ in self._write(prompt, sampling, answer):
            pass
        return {"text": answer.text, "tokens": answer.tokens, "finish": answer.finish}

    def _write(self, prompt: Any, options: Mapping[str, Any], answer: Answer) -> Iterator[str]:
        from optimize.generation import Sampling, end_tokens, write

        sampling = Sampling(**options)
        ids = self._tokens(prompt)
        room = self._room(len(ids), sampling)
        decoder = self.runner.decoder(len(ids) + room)
        sampling = replace(sampling, max_new_tokens=room)
        yield from write(
            decoder, self.preprocessor, ids, sampling, end_tokens(self.artifact.path, self.preprocessor), answer
        )

    def _tokens(self, prompt: Any) -> list[int]:
        """A text with the tokenizer's special tokens, or a conversation as the model's chat template writes it."""
        tokenizer = self.preprocessor
        chat = isinstance(prompt, Mapping) and "messages" in prompt
        if chat:
            if not tokenizer.chat_template:
                raise OptimizeError("the model has no chat template", hint='give a text, or {"text": ...}')
            text = tokenizer.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True)
        else:
            text = self.task.rows_of([prompt])["text"][0].as_py()
        ids: list[int] = tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"]
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
        if not ids:
            raise OptimizeError("an empty prompt, and the tokenizer has no token that begins a text")
        return ids

    def _room(self, tokens: int, sampling: Sampling) -> int:
        """How many new tokens a model can take behind a prompt, at most what is asked for."""
        from optimize.tasks.causal_lm import max_positions
        from optimize.tasks.pretrained import read_config

        longest = max_positions(read_config(self.artifact.path / "config.json"))
        room = sampling.max_new_tokens if longest is None else min(sampling.max_new_tokens, longest - tokens)
        if room < 1:
            raise OptimizeError(f"the prompt has {tokens} tokens, and the model has room for {longest}")
        return room

    def __repr__(self) -> str:
        size = self.artifact.size_bytes / 1e6
        return f"<optimize.Model {self.name}: {self.artifact.format}, {size:.1f} MB, {self.artifact.digest[:19]}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from optimize.notebook import shown

        return shown.artifact(self.artifact, self.name, self.scores)


def load(
    reference: str | Path,
    *,
    work: Work | str | Path | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """A model by `name@alias`, `name@version`, digest, or the path of a folder of plain files.

    A folder of somebody else's that holds code, or a program (TorchScript, `.pt2`), needs `trust_remote_code`.

    Raises `StoreError` or `RegistryError` where the reference names nothing or the bytes are damaged.
    """
    return Model(
        find_artifact(reference, work, trust_remote_code=trust_remote_code), name=str(reference), threads=threads
    )


def find_artifact(
    reference: str | Path, work: Work | str | Path | None = None, *, trust_remote_code: bool = False
) -> Artifact:
    """The artifact that a person means, with its bytes checked. A folder wins over a name that looks the same."""
    from optimize.planning import as_work

    if is_folder(reference):
        from optimize.source.folder import load_folder

        return load_folder(Path(reference), trust_remote_code=trust_remote_code)
    work, reference = as_work(work), str(reference)
    digest = work.registry.resolve(reference).digest if "@" in reference else reference
    artifact = work.store.open(digest)
    work.store.verify(artifact)
    return artifact


def is_folder(reference: str | Path) -> bool:
    """Whether a person means a folder of plain files, and no name."""
    return isinstance(reference, Path) or Path(reference).is_dir() or reference.startswith((".", "/", "~"))
