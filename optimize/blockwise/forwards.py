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
from typing import TYPE_CHECKING

from optimize.blockwise.abreast import threads

if TYPE_CHECKING:
    from torch import Tensor, nn

Run = Callable[[int], "Tensor"]
"""Number of a batch -> the block's output for it."""
Look = Callable[[int, int, "Tensor"], None]
"""Number of a batch, number of a layer, and that layer's input."""


class Forwards:
    """All batches' passes through a block, as many at a time as torch has threads.

    Where a layer's inputs are wanted, a pass is `paused`, or else given up and run once more from the beginning.
    """

    def __init__(self, run: Run, batches: int, *, paused: bool) -> None:
        self._work = [partial(run, batch) for batch in range(batches)]
        self._lanes = [_Lane(work) for work in self._work]
        self._paused = paused

    def reach(self, layers: Sequence[nn.Module], look: Look) -> None:
        """Run every batch as far as the last of `layers`, which are in the order in which the block runs them."""
        for first, lanes in self._abreast():
            with _shown(layers):
                _advance(lanes)
            for batch, lane in enumerate(lanes, first):
                for layer, x in lane.shown:
                    look(batch, layer, x)
                lane.shown.clear()
                if not self._paused:
                    lane.abandon()
                    self._lanes[batch] = _Lane(self._work[batch])

    def finish(self) -> Iterator[Tensor]:
        """Each batch's output, with the weights as they are now."""
        for _, lanes in self._abreast():
            _advance(lanes)
            for lane in lanes:
                yield lane.take()

    def close(self) -> None:
        """Give up what is under way."""
        for lane in self._lanes:
            lane.abandon()

    def _abreast(self) -> Iterator[tuple[int, list[_Lane]]]:
        import torch

        size = torch.get_num_threads()
        for first in range(0, len(self._lanes), size):
            yield first, self._lanes[first : first + size]


class _Stopped(BaseException):
    """Unwinds a pass that is not wanted any more; no `except Exception` of a model's own catches it."""


def _advance(lanes: Sequence[_Lane]) -> None:
    """All of them to their next pause, or to their end; raises what one of them raises."""
    with threads(1):
        for lane in lanes:
            lane.go_on()
        for lane in lanes:
            lane.wait()


@contextlib.contextmanager
def _shown(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Have lanes note the layers' inputs as they are reached, and pause at the last one."""

    def hook(number: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        lane = _current.lane
        lane.shown.append((number, args[0]))
        if number == len(layers) - 1:
            lane.pause()

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
        self.shown: list[tuple[int, Tensor]] = []
        """Numbers of layers that were reached, and their inputs."""
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._result: Tensor | None = None
        self._error: BaseException | None = None
        self._abandoned = False

    def go_on(self) -> None:
        """Run to the next pause or to the end, which `wait` waits for."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._main, daemon=True)
            self._thread.start()
        else:
            self._turn.release()

    def wait(self) -> None:
        """Raises what the function raises."""
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def take(self) -> Tensor:
        """The result, once."""
        result, self._result = self._result, None
        assert result is not None
        return result

    def pause(self) -> None:
        """Called from the function: stop until `go_on` is called again."""
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
        _current.lane = self
        try:
            self._result = self._work()
        except _Stopped:
            pass  # kept, it would keep the pass's activations: its traceback refers to this lane
        except BaseException as error:  # handed to whoever waits
            self._error = error
        self._back.release()


class _Current(threading.local):
    """Which lane a thread runs."""

    lane: _Lane


_current = _Current()
