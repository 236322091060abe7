"""Forward passes of many batches through one block that stop where a layer's inputs are wanted.

Layers are quantised in the order in which the block runs them, each on inputs that those before it gave with their
quantised weights (`true_sequential`). A pass that is *paused* at a layer until that layer is done goes on from there: a
block then costs a single forward pass. All batches wait at the same layer, so their activations are in memory together;
where that is too much, passes are *restarted* at the block's beginning for every layer, with the same results.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

Run = Callable[[int], "Tensor"]
"""Number of a batch -> the block's output for it."""
Look = Callable[[int, int, "Tensor"], None]
"""Number of a batch, number of a layer, and that layer's input."""


class Forwards(Protocol):
    """Both ways to run a block."""

    def reach(self, layers: Sequence[nn.Module], look: Look) -> None:
        """Run every batch as far as the last of `layers`, which are in the order in which the block runs them."""

    def finish(self) -> Iterator[Tensor]:
        """Each batch's output, with the weights as they are now."""

    def close(self) -> None:
        """Give up what is under way."""


class Restarted:
    """Every pass begins at the block's beginning: one batch's activations are in memory."""

    def __init__(self, run: Run, batches: int) -> None:
        self._run, self._batches = run, batches

    def reach(self, layers: Sequence[nn.Module], look: Look) -> None:
        for batch in range(self._batches):
            with _shown(layers, partial(look, batch), _stop), contextlib.suppress(_Stopped):
                self._run(batch)

    def finish(self) -> Iterator[Tensor]:
        for batch in range(self._batches):
            yield self._run(batch)

    def close(self) -> None:
        pass


class Paused:
    """Every pass is begun once, in a thread of its own, and goes on where it paused; one thread runs at a time."""

    def __init__(self, run: Run, batches: int) -> None:
        self._lanes = [_Lane(partial(run, batch)) for batch in range(batches)]

    def reach(self, layers: Sequence[nn.Module], look: Look) -> None:
        for batch, lane in enumerate(self._lanes):
            with _shown(layers, partial(look, batch), lane.pause):
                lane.go_on()

    def finish(self) -> Iterator[Tensor]:
        for lane in self._lanes:
            yield lane.go_on()

    def close(self) -> None:
        for lane in self._lanes:
            lane.abandon()


class _Stopped(BaseException):
    """Unwinds a pass that is not wanted any more; no `except Exception` of a model's own catches it."""


def _stop() -> None:
    raise _Stopped


@contextlib.contextmanager
def _shown(
    layers: Sequence[nn.Module], look: Callable[[int, Tensor], None], then: Callable[[], None]
) -> Iterator[None]:
    """Have the layers' inputs looked at as they are reached, and `then` called at the last one."""

    def hook(number: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        look(number, args[0])
        if number == len(layers) - 1:
            then()

    handles = [layer.register_forward_pre_hook(partial(hook, number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Lane:
    """A function in a thread that runs only while somebody waits for it, and that can pause in the middle."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        self._work = work
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self._ended = self._abandoned = False

    def go_on(self) -> Any:
        """Run to the next pause (None) or to the end (the result); raises what the function raises."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, daemon=True)
            self._thread.start()
        elif self._ended:
            return self._result
        else:
            self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        return self._result

    def pause(self) -> None:
        """Called from the function: wait until `go_on` is called again."""
        self._back.release()
        self._turn.acquire()
        if self._abandoned:
            raise _Stopped

    def abandon(self) -> None:
        """Unwind the function where it pauses."""
        self._abandoned = True
        if self._thread is not None:
            self._turn.release()
            self._thread.join()

    def _main(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # handed to whoever waits
            self._error = error
        self._ended = True
        self._back.release()
