"""CUDA graphs: how device work is captured, and how what was captured for one solve is taken over by the next."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .._locks import Lock
from .host_waits import watch_host_waits

Work = Callable[[], None]
LATER = ""
"""What `Recorder.run` returns where it cannot say, this time."""

_capturing = Lock()  # torch allows one capture at a time in a process
_unused: dict[torch.device, list[Any]] = {}  # capture streams of recorders that are gone; torch has 32 for a device


class Recorder(Protocol):
    """What notes work and repeats it."""

    def run(self, work: Work) -> str | None:
        """Do `work`. Returns why it could not be recorded, LATER if that is not known, None if it can."""
        ...

    def record(self, work: Work) -> Work:
        """Note what `work` asks of the device, without doing it; returns what does it. Raises where it cannot."""
        ...

    def enter(self, tensors: Sequence[Tensor]) -> None:
        """A solve begins that uses this memory, on whichever stream it is on."""
        ...

    def leave(self) -> None:
        """It has ended."""
        ...

    def reset(self) -> None:
        """All that was recorded is gone."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory: they run one after the other.

    They are captured on a stream of this device that is no other recorder's. Torch's default capture stream belongs to
    the device that captured first, and sees nothing of what is asked of another; and what is captured on one stream
    shares the workspace of cuBLAS, which two threads may not use at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None
        self._stream: Any = None
        self._left: Any = None

    def run(self, work: Work) -> str | None:
        with watch_host_waits() as waits:
            work()
        if waits.found:
            return f"it makes the host wait for the device, {waits.found} times a call"
        return None if waits.known else LATER

    def record(self, work: Work) -> Work:
        if self._stream is None:
            self._stream = _take_stream(self, self.device)
        graph: Any = torch.cuda.CUDAGraph()
        with (
            _capturing,
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, self.pool, self._stream, capture_error_mode="thread_local"),
        ):
            work()
        self.pool = graph.pool() if self.pool is None else self.pool

        def replay() -> None:
            with torch.cuda.device(self.device):  # a graph is launched on the current device's current stream
                graph.replay()

        return replay

    def enter(self, tensors: Sequence[Tensor]) -> None:
        stream = torch.cuda.current_stream(self.device)
        if self._left is not None:
            stream.wait_event(self._left)
        for tensor in tensors:  # or, once freed, they would be another's while this stream still works on them
            tensor.record_stream(stream)

    def leave(self) -> None:
        event: Callable[[], Any] = torch.cuda.Event
        self._left = event()
        self._left.record(torch.cuda.current_stream(self.device))

    def reset(self) -> None:
        self.pool = None


def _take_stream(owner: object, device: torch.device) -> Any:
    """A capture stream that is the owner's as long as it lives."""
    unused, make = _unused.setdefault(device, []), cast("Callable[[torch.device], Any]", torch.cuda.Stream)
    try:
        stream = unused.pop()
    except IndexError:
        stream = make(device)
    weakref.finalize(owner, unused.append, stream).atexit = False
    return stream


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Weights are cast anew in every call: what autocast remembers is freed when its context ends, and a graph would go
    on reading it; what it makes in a capture is the graph's, and not for others to read."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
        torch.clear_autocast_cache()
