"""Work on a few columns that is done many times over: on a CUDA device it is recorded once, and then replayed.

A column is about ten kernels of 2 microseconds, each of which takes Python longer than that to launch. A CUDA graph
launches those of a run of columns at once, and they compute what they would have computed without it.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeAlias

import torch
from torch import Tensor

from qtool.numerics.groups import combine_parameters
from qtool.scheme import GroupParameters

Run: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""``run(parameters of each column, *tensors)`` returns tensors; it may change those that it is given."""

Leaves: TypeAlias = tuple[Tensor | None, ...]

_SHAPES = 16


def pays(tensor: Tensor) -> bool:
    """Say whether work on a tensor is launched rather than done, so that a recording saves time."""
    return tensor.is_cuda


@dataclass(frozen=True)
class _Recording:
    """A graph, what it reads and what it writes."""

    graph: torch.cuda.CUDAGraph
    given: Leaves
    made: tuple[Tensor, ...]


class Recorded:
    """Calls a function, on a CUDA device as a graph for each of the last few shapes that it was called with.

    A function that waits for the device, or copies from the host, cannot be recorded and is called as it is.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._recordings: OrderedDict[tuple[object, ...], _Recording | None] = OrderedDict()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def __call__(self, parameters: Sequence[GroupParameters], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Return what the function makes, in tensors that the next call may overwrite.

        Args:
            parameters: Of each column, ``[rows]``. Codes of scales and zero points are left out.
            tensors: Its other arguments; they may be changed.
        """
        given = _stacked(parameters) + tensors
        device = parameters[0].scale.device
        if device.type != "cuda":
            return self._played(given)
        key = (device, *(None if one is None else (one.shape, one.dtype) for one in given))
        with torch.cuda.device(device):
            if key not in self._recordings:
                self._recordings[key] = _record(self._played, given)
                if len(self._recordings) > _SHAPES:
                    self._recordings.popitem(last=False)
            self._recordings.move_to_end(key)
            recording = self._recordings[key]
            if recording is None:
                return self._played(given)
            for own, one in zip(recording.given, given, strict=True):
                if own is not None and one is not None:
                    own.copy_(one)
            recording.graph.replay()
            return recording.made

    def _played(self, given: Leaves) -> tuple[Tensor, ...]:
        return self._run(_each_column(given[:_LEAVES]), *given[_LEAVES:])


@lru_cache(maxsize=4)
def recorded(run: Run, *methods: Callable[..., Tensor]) -> Recorded:
    """Return ``run(*methods, ...)`` as a function that is recorded; the same object for the same methods."""
    return Recorded(partial(run, *methods))


def _record(run: Callable[[Leaves], tuple[Tensor, ...]], given: Leaves) -> _Recording | None:
    """Record a call, if it can be."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        run(_copies(given))
    except RuntimeError:
        # A capture that fails may leave random generators unusable, so what cannot be recorded is found without one.
        return None
    finally:
        torch.cuda.set_sync_debug_mode(before)
    own, graph = _copies(given), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        made = run(own)
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return _Recording(graph, own, made)


def _copies(given: Leaves) -> Leaves:
    return tuple(None if one is None else one.clone() for one in given)


_LEAVES = 5


def _stacked(parameters: Sequence[GroupParameters]) -> Leaves:
    """Return what rounding reads of parameters, with the columns first; ``_each_column`` undoes it."""
    one = combine_parameters(parameters, torch.stack)
    return one.scale, one.zero_point, one.negative, one.offset, one.global_scale


def _each_column(leaves: Leaves) -> list[GroupParameters]:
    *stacked, global_scale = leaves
    columns = len(next(one for one in stacked if one is not None))
    rows = zip(*([None] * columns if one is None else one for one in stacked), strict=True)
    return [GroupParameters(scale, zero, global_scale, None, None, *others) for scale, zero, *others in rows]
