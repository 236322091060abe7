"""Two processes that train together do what one does with batches of twice the size."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from rooms import QUICK
from safetensors.torch import load_file
from transformers import AutoConfig

from optimize.artifact import Artifact
from optimize.distill import features, finetune
from optimize.errors import StageError
from optimize.progress import Progress

Of = Callable[[str], Any]


class Watch(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def update(self, name: str, done: float, total: float, text: str = "") -> None:
        if "asking" not in text:
            self.steps.append((done, total))


@pytest.fixture(scope="module")
def calm(teacher_of: Of, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A teacher without dropout, which every process would draw for itself."""
    import shutil

    teacher = teacher_of("text-classification")
    folder = tmp_path_factory.mktemp("calm") / "model"
    shutil.copytree(teacher.path, folder, copy_function=shutil.copyfile)
    config = AutoConfig.from_pretrained(folder)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.save_pretrained(folder)
    return Artifact.from_directory(folder, format="transformers", task=teacher.task)


def settings(processes: int, **more: Any) -> dict[str, Any]:
    return {
        **QUICK,
        "batch_size": 8 // processes,
        "optim": "sgd",
        "learning_rate": 0.05,
        "processes": processes,
        **more,
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["finetune", "features"])
def test_two_processes_give_the_weights_of_one(method: str, calm: Artifact, room_of: Of) -> None:
    """144 training rows, eight at a time: every row once."""
    room = room_of("text-classification")
    module: Any = {"finetune": finetune, "features": features}[method]
    more = {} if method == "finetune" else {"teacher": "teacher", "cache_teacher": True}
    watch = Watch()
    one = module.run(calm, module.Config(**settings(1, **more)), room.make(teacher=calm))
    two = module.run(calm, module.Config(**settings(2, **more)), room.make(teacher=calm, progress=watch))
    assert one.details["steps"] == two.details["steps"] == 18
    assert watch.steps == [(step, 18) for step in range(1, 19)]
    assert set(one.files) == set(two.files)
    ours, theirs, before = (load_file(artifact.path / "model.safetensors") for artifact in (two, one, calm))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-5, rtol=1e-4)
    assert any((theirs[name] - before[name]).abs().max() > 1e-3 for name in theirs)
    assert two.details["validation"]["accuracy"] == one.details["validation"]["accuracy"]


@pytest.mark.slow
def test_what_goes_wrong_in_one_is_said_by_the_stage(calm: Artifact, room_of: Of) -> None:
    wild = settings(2, learning_rate=1e30, max_grad_norm=1e30, warmup_ratio=0)
    context = room_of("text-classification").make()
    with pytest.raises(StageError, match=r"the loss is (nan|inf)"):
        finetune.run(calm, finetune.Config(**wild), context)
    assert not [path for path in context.scratch.iterdir() if path.name.startswith("tmp")]


@pytest.mark.slow
def test_weights_that_were_shared_out_are_whole_in_the_end(calm: Artifact, room_of: Of) -> None:
    """FSDP's settings reach accelerate, and every process holds a part."""
    one = finetune.run(calm, finetune.Config(**settings(1, epochs=0.2)), room_of("text-classification").make())
    shared = finetune.Config(**settings(2, epochs=0.2, fsdp={"version": 2}))
    two = finetune.run(calm, shared, room_of("text-classification").make())
    ours, theirs = (load_file(artifact.path / "model.safetensors") for artifact in (two, one))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(calm: Artifact, room_of: Of) -> None:
    """As after Ctrl-C in the middle of training."""
    began = threading.Event()

    class Interrupted(Progress):
        def update(self, name: str, done: float, total: float, text: str = "") -> None:
            began.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune.run(
            calm,
            finetune.Config(**settings(2, epochs=50)),
            room_of("text-classification").make(progress=Interrupted()),
        )
    assert began.is_set()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        left = [
            p for p in psutil.Process().children(recursive=True) if "optimize.distill.launch" in " ".join(p.cmdline())
        ]
        if not left:
            return
        time.sleep(0.2)
    for process in left:
        os.kill(process.pid, signal.SIGKILL)
    raise AssertionError(f"still there: {left}")
