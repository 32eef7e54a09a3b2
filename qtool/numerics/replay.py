"""Many small operations that are done again and again: on a CUDA device they are recorded once, and then replayed.

A kernel of 2 microseconds takes Python longer than that to launch. A CUDA graph launches many at once, and they compute
what they would have computed without it.
"""

from __future__ import annotations

import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TypeAlias

import torch
from torch import Tensor

from qtool.numerics.groups import combine_parameters
from qtool.scheme import GroupParameters

Run: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""``run(parameters of each column, *tensors)`` returns tensors; it may change those that it is given."""

Leaves: TypeAlias = tuple[Tensor | None, ...]

_EAGER_CALLS = 2
"""Calls that run as they are before one is recorded: kernels are loaded and workspaces allocated by then."""
_SHAPES = 16
_LEAVES = 5  # of what ``_stacked`` returns


class Replayed:
    """Calls a function on fixed tensors; on CUDA the third call and those after it replay what it did.

    Args:
        function: Reads and writes tensors that stay where they are, and moves nothing between host and device.
        device: Where they are.
        recorded: Whether it always does the same operations.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, *, recorded: bool = True) -> None:
        self.function, self.device = function, device
        self.calls = 0
        self.graph = torch.cuda.CUDAGraph() if recorded and device.type == "cuda" else None

    def __call__(self) -> None:
        """Do it once."""
        self.calls += 1
        if self.graph is None:
            self.function()
            return
        with torch.cuda.device(self.device):  # where streams and graphs are made, wherever the tensors are
            if self.calls <= _EAGER_CALLS:
                stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self.function()
                torch.cuda.current_stream().wait_stream(stream)
                return
            if self.calls == _EAGER_CALLS + 1:
                gc.collect()  # a graph of before that is freed meanwhile would break the recording
                with torch.cuda.graph(self.graph):
                    self.function()
            self.graph.replay()


def pays(tensor: Tensor) -> bool:
    """Say whether work on a tensor is launched rather than done, so that replay saves time."""
    return tensor.is_cuda


@lru_cache(maxsize=4)
def replayed_columns(run: Run, *methods: Callable[..., Tensor]) -> ReplayedColumns:
    """Return ``run(*methods, ...)`` as a function that is replayed; the same object for the same methods."""
    return ReplayedColumns(partial(run, *methods))


class ReplayedColumns:
    """Calls a function of a few columns; on CUDA replayed, for each of the last 16 shapes that it was called with.

    A function that waits for the device, or copies from the host, cannot be recorded and is called as it is.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._by_shape: OrderedDict[tuple[object, ...], _OfShape] = OrderedDict()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def __call__(self, parameters: Sequence[GroupParameters], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Return what the function makes, in tensors that the next call may overwrite.

        Args:
            parameters: Of each column, ``[rows]``. Codes of scales and zero points are left out.
            tensors: Its other arguments; they stay as they are.
        """
        given = _stacked(parameters) + tensors
        device = parameters[0].scale.device
        key = (device, *(None if one is None else (one.shape, one.dtype) for one in given))
        if key not in self._by_shape:
            self._by_shape[key] = _OfShape(self._run, given, device)
            if len(self._by_shape) > _SHAPES:
                self._by_shape.popitem(last=False)
        self._by_shape.move_to_end(key)
        return self._by_shape[key](given)


class _OfShape:
    """A function of columns with room for what it is given and what it makes."""

    def __init__(self, run: Run, given: Leaves, device: torch.device) -> None:
        self.run, self.given = run, _copies(given)
        self.made: tuple[Tensor, ...] = ()
        self.replayed = Replayed(self._play, device, recorded=device.type == "cuda" and self._never_waits(device))

    def __call__(self, given: Leaves) -> tuple[Tensor, ...]:
        for own, one in zip(self.given, given, strict=True):
            if own is not None and one is not None:
                own.copy_(one)
        self.replayed()
        return self.made

    def _play(self) -> None:
        self.made = self.run(_each_column(self.given[:_LEAVES]), *self.given[_LEAVES:])

    def _never_waits(self, device: torch.device) -> bool:
        """Try the function. A recording that failed could leave random generators unusable."""
        before = torch.cuda.get_sync_debug_mode()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
                torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.device(device):
                self._play()
        except RuntimeError:
            return False
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return True


def _copies(given: Leaves) -> Leaves:
    return tuple(None if one is None else one.clone() for one in given)


def _stacked(parameters: Sequence[GroupParameters]) -> Leaves:
    """Return what rounding reads of parameters, with the columns first; ``_each_column`` undoes it."""
    one = combine_parameters(parameters, torch.stack)
    return one.scale, one.zero_point, one.negative, one.offset, one.global_scale


def _each_column(leaves: Leaves) -> list[GroupParameters]:
    *stacked, global_scale = leaves
    columns = len(next(one for one in stacked if one is not None))
    each = zip(*([None] * columns if one is None else one for one in stacked), strict=True)
    return [
        GroupParameters(scale, zero_point, global_scale, negative=negative, offset=offset)
        for scale, zero_point, negative, offset in each
    ]
