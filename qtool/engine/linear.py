"""A linear layer as it is executed: online operators, activation rounding, weight, adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from qtool.engine.grid import GlobalScales, Grid, GridPart, ZeroPoints
from qtool.engine.online import Acts
from qtool.engine.problem import Adapter
from qtool.engine.stored import read_input_scales
from qtool.numerics.groups import from_groups
from qtool.numerics.straight_through import straight_through

Observer = Callable[[Float[Tensor, "tokens n"]], None]
OutputObserver = Callable[[Float[Tensor, "*batch out"]], None]


@dataclass(frozen=True)
class Rounding:
    """How activations are quantized: dynamic scales in each part of a grid, and calibrated multipliers if any.

    What all tokens share (the scale of the strategy ``tensor``, a multiplier or a static scale that was not calibrated,
    which columns are outliers) is taken over one window, so that no window sees which others run beside it. Values of
    more than two axes are windows along the first.

    Attributes:
        grid: The parts of the last axis.
        global_scales: The calibrated tensor-level multiplier of each part; none where nothing was calibrated.
        spared: Names inside the block of linears that read the values as they are.
        zero_points: Of static scales, likewise.
    """

    grid: Grid
    global_scales: GlobalScales = ()
    spared: frozenset[str] = frozenset()
    zero_points: ZeroPoints = ()

    def calibrated(self, site_id: str, find: Callable[[str], Tensor | None], device: torch.device) -> Rounding:
        """Return how values are quantized with what was calibrated of their site.

        Args:
            site_id: The site.
            find: Finds a stored tensor by name.
            device: Where scales are to be.
        """
        scales, zeros = read_input_scales(site_id, self.grid, find, device)
        return replace(self, global_scales=scales, zero_points=zeros)

    def __call__(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return the values that the codes of ``x`` stand for, in its dtype; gradients pass straight through."""
        values = x.detach()
        if x.ndim > 2 and self.shared:
            return straight_through(x, torch.stack([self._rounded(window) for window in values]))
        return straight_through(x, self._rounded(values))

    @property
    def shared(self) -> bool:
        """Whether the tokens of a window share something that is fitted to them."""
        schemes = [part.scheme for part in self.grid.parts]
        apart = any(scheme.outlier_threshold is not None for scheme in schemes)
        fitted = any(scheme.strategy == "tensor" and not scheme.static for scheme in schemes)
        return apart or fitted or any(self._fits_multiplier)

    @cached_property
    def _calibrated(self) -> tuple[tuple[Tensor | None, Tensor | None], ...]:
        """The calibrated multiplier and zero point of each part."""
        nothing = (None,) * len(self.grid.parts)
        return tuple(zip(self.global_scales or nothing, self.zero_points or nothing, strict=True))

    @cached_property
    def _fits_multiplier(self) -> tuple[bool, ...]:
        """Whether the format of each part wants a tensor-level multiplier and none was calibrated."""
        scales = zip(self.grid.parts, self._calibrated, strict=True)
        return tuple(scale is None and part.has_global_scale for part, (scale, _) in scales)

    def _rounded(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        rounded = []
        places = self.grid.places(x.shape[-1])
        for (columns, part), found, fits in zip(places, self._calibrated, self._fits_multiplier, strict=True):
            values = x[..., columns]
            outliers = _outlier_columns(values, part.scheme.outlier_threshold)
            inner = values if outliers is None else values.masked_fill(outliers, 0.0)
            inner = _rounded_part(inner, part, *(part.shared(inner) if fits else found))
            rounded.append(inner if outliers is None else torch.where(outliers, values, inner))
        return rounded[0] if len(rounded) == 1 else torch.cat(rounded, dim=-1)


def _outlier_columns(x: Float[Tensor, "*batch n"], threshold: float | None) -> Bool[Tensor, " n"] | None:
    """Say which columns hold a value of a magnitude that is not quantized; None where all magnitudes are."""
    return None if threshold is None else (x.abs() >= threshold).flatten(0, -2).any(0)


def _rounded_part(
    x: Float[Tensor, "*batch n"], part: GridPart, scale: Tensor | None, zero_point: Tensor | None
) -> Float[Tensor, "*batch n"]:
    groups = part.groups(x)
    parameters = part.fit(groups.float(), global_scale=scale, zero_point=zero_point)
    return from_groups(part.format.round(groups, parameters), x.shape)


class SiteInput(nn.Module):
    """The values at a site, shared by what reads it: operators, then an observer, then rounding.

    The three projections of an attention are given one tensor; the work is done for the first and remembered until the
    last of its readers has had it, or another tensor comes, or that one is written to. A view of all of it is the same
    tensor: blocks with experts flatten their windows for some readers and not for others.

    Attributes:
        operators: What acts online.
        rounding: How activations are quantized, if they are.
        observer: Is shown the values behind the operators.
        readers: How many modules read the site in a forward pass.
        windows: Of flattened values, the rows of each window.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: tuple[Acts, ...] = ()
        self.rounding: Rounding | None = None
        self.observer: Observer | None = None
        self.readers = 0
        self.windows: list[int] = []
        self._seen: _Seen | None = None

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return what quantized linears multiply with their weights."""
        return self.both(x)[0]

    def both(self, x: Float[Tensor, "*batch n"]) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n"]]:
        """Return the values rounded, and as they are before that, to one reader."""
        seen = self._at(x)
        return self._read(seen, self._multiplied(seen), x), _shaped(seen.operated, x)

    def multiplied(self) -> Float[Tensor, "tokens n"]:
        """Return what the values that are being observed are rounded to, a row a token: for observers only.

        Raises:
            TypeError: Nothing is being observed.
        """
        if self._seen is None:
            raise TypeError(self._seen)
        return self._multiplied(self._seen).reshape(-1, self._seen.operated.shape[-1])

    def _multiplied(self, seen: _Seen) -> Float[Tensor, "*batch n"]:
        if seen.rounded is None:
            seen.rounded = self._rounded(seen.operated)
        return seen.rounded

    def operated(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return the values behind the operators, not rounded: what routers and gates read."""
        seen = self._at(x)
        return self._read(seen, seen.operated, x)

    def turned(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return what the operators make of other values than those of the site itself: nothing is observed."""
        for operator in self.operators:
            x = operator.act(x)
        return x

    def recalled(self) -> Float[Tensor, "tokens n"] | None:
        """Return the values behind the operators that are remembered, a row a token, as one of the readers."""
        if self._seen is None or not self._seen.holds(self._seen.x):
            return None
        return self._read(self._seen, self._seen.operated, self._seen.x).flatten(0, -2)

    def forget(self) -> None:
        """Let go of the remembered tensors."""
        self._seen = None

    def _at(self, x: Float[Tensor, "*batch n"]) -> _Seen:
        """Return what is known of a tensor, after operators and observer have had it."""
        if self._seen is None or not self._seen.holds(x):
            self._seen = None  # before the work, so that two tensors are never held at once
            self._seen = _Seen(x, self.turned(x), self.readers)
            if self.observer is not None:
                self.observer(self._seen.operated.reshape(-1, self._seen.operated.shape[-1]))
        return self._seen

    def _read(self, seen: _Seen, result: Tensor, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
        seen.left -= 1
        # Writes do not count in inference mode.
        self._seen = seen if seen.left > 0 and not x.is_inference() else None
        return _shaped(result, x)

    def _rounded(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        if self.rounding is None:
            return x
        if x.ndim == 2 and len(self.windows) > 1 and self.rounding.shared:
            return torch.cat([self.rounding(window) for window in torch.split(x, self.windows) if len(window)])
        return self.rounding(x)


def _shaped(result: Tensor, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
    """Return a result with the leading axes of the view that was asked with."""
    return result if result.shape[:-1] == x.shape[:-1] else result.reshape(*x.shape[:-1], result.shape[-1])


class _Seen:
    """A tensor that a site was given last, and what became of it."""

    def __init__(self, x: Tensor, operated: Tensor, readers: int) -> None:
        # A reference is held, so that no other tensor can pass for `x`.
        self.x, self.operated, self.left = x, operated, readers
        self.rounded: Tensor | None = None
        self.version = None if x.is_inference() else x._version

    def holds(self, x: Tensor) -> bool:
        """Say whether a tensor is the one that was seen, or a view of all of it, and nobody has written to it since."""
        if x.is_inference() or x._version != self.version:
            return False
        return x is self.x or (
            x.data_ptr() == self.x.data_ptr()
            and x.untyped_storage().data_ptr() == self.x.untyped_storage().data_ptr()
            and x.numel() == self.x.numel() > 0
            and x.shape[-1] == self.x.shape[-1]
            and x.dtype == self.x.dtype
            and x.is_contiguous()
            and self.x.is_contiguous()
        )


class ExecutedLinear(nn.Module):
    """A linear in place of ``nn.Linear``, with the same parameter names.

    Args:
        weight: The weight of the layer that it replaces; may be on the device ``meta``.
        bias: Its bias, if it has one.
        site: The input that it shares with its siblings.
        module: Its name inside the block.

    Attributes:
        output: What it puts out, bias and adapter included, before operators on it are undone: what observes and rounds
            that.
    """

    def __init__(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, site: SiteInput, module: str = ""
    ) -> None:
        super().__init__()
        self.module = module
        self.weight = nn.Parameter(weight, requires_grad=False)
        # Registered also where there is none: a shift gives it one when it is folded.
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.site = site
        site.readers += 1
        self.adapter: Adapter | None = None
        self.replaced: Tensor | None = None
        self.undone: tuple[Acts, ...] = ()
        self.output = SiteInput()
        self.output_observer: OutputObserver | None = None

    def replace(self, weight: Float[Tensor, "out in"], adapter: Adapter | None) -> None:
        """Compute with what was made of the weight; the weight itself stays with ``replaced``."""
        self.replaced = self.weight.data if self.replaced is None else self.replaced
        self.weight.data, self.adapter = weight, adapter

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Compute with the weight that was replaced, if any was, for as long as the context lasts."""
        found = self.weight.data, self.adapter
        if self.replaced is not None:
            self.weight.data, self.adapter = self.replaced, None
        try:
            yield
        finally:
            self.weight.data, self.adapter = found

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return ``Ŵ x̂ + b``, with an adapter's ``up (down x̂)`` or ``up (down x)``, rounded if outputs are.

        Operators on the output are undone behind that, as hooks of the official library do.
        """
        rounded, full = self.site.both(x)
        if self.site.rounding is not None and self.module in self.site.rounding.spared:
            rounded = full
        y = torch.nn.functional.linear(rounded, self.weight, self.bias)
        if self.adapter is not None:
            read = full if self.adapter.reads == "full" else rounded
            down, up = (factor.to(read) for factor in self.adapter.factors(read.dtype))
            y = y + torch.nn.functional.linear(torch.nn.functional.linear(read, down), up)
        if self.output_observer is not None:
            self.output_observer(y)
        y = self.output(y)
        for operator in self.undone:
            y = operator.act(y)
        return y
