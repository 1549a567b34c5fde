"""CUDA graphs: a function recorded once and replayed, so that the host launches one graph instead of each kernel."""

from collections.abc import Callable
from typing import ClassVar, Generic, Literal, TypeVar

import torch

Result = TypeVar("Result")


class Captured(Generic[Result]):
    """`function` of tensors, as one CUDA graph for each place in memory that its inputs come in.

    The first call with inputs at a new place runs the function, so that it compiles, picks its algorithms and makes its
    state, captures it, and replays it; later calls only replay. So a first call does its work twice: make it before
    anything counts. A result lies in the graph's own memory and lasts until the next call. Random numbers from torch's
    default generator differ from replay to replay.
    """

    graphs = 0  # captured in this process: one more inside the timed region is a fault
    reserved_before = 0  # the most that torch reserved before a capture, in bytes: trials of algorithms need much
    # By purpose, what a capture allocated at most, on top of all that was there: replays use it without allocating it.
    own_bytes: ClassVar[dict[str, int]] = {}

    def __init__(self, function: Callable[..., Result], purpose: Literal["train", "eval"]) -> None:
        self._function = function
        self._purpose = purpose
        self._captured: dict[tuple[tuple[int, torch.Size], ...], tuple[torch.cuda.CUDAGraph, Result]] = {}
        self._inputs: list[torch.Tensor] = []  # kept alive: the graphs read them
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()  # one for all: a result is used before the next graph is replayed

    def __call__(self, *inputs: torch.Tensor) -> Result:
        place = tuple((tensor.data_ptr(), tensor.shape) for tensor in inputs)
        if place not in self._captured:
            self._captured[place] = self._capture(*inputs)
            self._inputs += inputs
        graph, result = self._captured[place]
        graph.replay()
        return result

    def forget(self) -> None:
        """Drops all graphs and their memory: the next call captures anew."""
        self._captured.clear()
        self._inputs.clear()
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    def _capture(self, *inputs: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, Result]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._function(*inputs)
        torch.cuda.synchronize()
        Captured.reserved_before = max(Captured.reserved_before, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        graph = torch.cuda.CUDAGraph()
        # thread_local: what DALI's threads do meanwhile is no part of the capture and must not end it
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = self._function(*inputs)
        own = torch.cuda.max_memory_allocated() - before
        self.own_bytes[self._purpose] = max(own, self.own_bytes.get(self._purpose, 0))
        Captured.graphs += 1
        return graph, result
