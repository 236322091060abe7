"""Questions out of running text: a sentence with a name or a number blanked out, which is the answer.

Training on such questions is unsupervised question answering (Lewis et al., 2019, https://arxiv.org/abs/1906.04980).
The sentence itself stands in the context, so that what is learnt, and scored, is finding more than understanding.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

BLANK = "what"
LENGTHS = range(40, 250)
"""Characters of a sentence that makes a question."""
_SENTENCE = re.compile(r"[^.!?]+[.!?]")
_ANSWER = re.compile(r"\b[a-z][\w'-]* ([A-Z][\w'-]+(?: [A-Z][\w'-]+)*|\d[\d,]*)(?= )")
"""Behind a word in lower case: a whole name, of one word or several, or a number."""


def questions(contexts: Sequence[str | None]) -> list[dict[str, Any]]:
    """One question a context where one can be made: {"question", "context", "answers": {"text", "answer_start"}}.

    The answer occurs once in its context. The same contexts make the same questions.
    """
    return [made for context in contexts if context and (made := _question(context.strip()))]


def _question(context: str) -> dict[str, Any] | None:
    found = [
        (sentence, answer)
        for sentence in _SENTENCE.finditer(context)
        if len(sentence[0].strip()) in LENGTHS
        for answer in _ANSWER.finditer(sentence[0])
        if context.count(answer[1]) == 1
    ]
    if not found:
        return None
    sentence, answer = random.Random(context).choice(found)
    asked = f"{sentence[0][: answer.start(1)]}{BLANK}{sentence[0][answer.end(1) :]}"
    place = {"text": [answer[1]], "answer_start": [sentence.start() + answer.start(1)]}
    return {"question": asked.strip(), "context": context, "answers": place}
