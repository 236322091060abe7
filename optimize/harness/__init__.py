"""Downstream tasks through EleutherAI's lm-evaluation-harness (the extra `harness`), on any artifact that generates.

    from optimize import harness, load

    found = harness.evaluate("smollm2@production", tasks=["arc_easy", "hellaswag"], limit=200)
    found["results"]["arc_easy"]["acc,none"]

The model answers through the runtime that serves it, so an ONNX artifact is scored as an ONNX model. Requests are cut
into tokens as the harness does for a model of transformers, so that figures can be held against published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import EvaluationError

if TYPE_CHECKING:
    from optimize.model import Model
    from optimize.work import Work


def evaluate(
    model: Model | str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    include_path: str | Path | None = None,
    work: Work | str | Path | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """What the harness found: `results` (task -> metric -> value, with standard errors), `configs`, `n-shot`, ...

    `model` is a `Model` or what `optimize.load` takes; `limit` scores only so many rows of each task, `include_path`
    is a folder with tasks of your own (YAML). Tasks come with data sets of the hub, which are fetched; their code is
    not run. Raises `EvaluationError` where lm-eval is missing, a task is unknown or the model is no language model.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            f"lm-eval can't be imported: {error}", hint='pip install "optimize-workbench[harness]"'
        ) from error
    from optimize.harness.model import HarnessModel
    from optimize.model import Model, load
    from optimize.quiet import quiet

    opened = model if isinstance(model, Model) else load(model, work=work, threads=threads)
    if not opened.task.generates or opened.task.encodes:
        raise EvaluationError(f"{opened.name} is a model for {opened.task.name}: the harness asks language models")
    with quiet():
        # lm-eval's own tasks are ten thousand files to read: not where the folder has all that is asked for.
        wanted, folder = set(tasks), str(include_path) if include_path else None
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if folder and not wanted <= set(manager.match_tasks(list(tasks))):
            manager = TaskManager(include_path=folder, include_defaults=True)
        if unknown := sorted(wanted - set(manager.match_tasks(list(tasks)))):
            raise EvaluationError(
                f"lm-eval has no task {', '.join(map(repr, unknown))}", hint="`lm-eval ls tasks` lists what it has"
            )
        found: dict[str, Any] | None = lm_eval.simple_evaluate(
            HarnessModel(opened, batch_size),
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            task_manager=manager,
            log_samples=False,
            # Seeds would be set for the whole process; few-shot examples are drawn with one of their own.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    assert found is not None  # it is None in all but the first of several processes
    return found
