"""One linear layer's quantization problem, its solution, and the contract of a mitigator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from qtool.engine.grid import GlobalScales, Grid
from qtool.errors import ShapeError, UsageError
from qtool.model.statistics import BLOCKS
from qtool.numerics.outliers import Outliers
from qtool.numerics.second_moments import diagonal_blocks, inner_blocks
from qtool.scheme import GroupParameters

Reads: TypeAlias = Literal["quantized", "full"]


@dataclass(frozen=True)
class Adapter:
    """A low-rank correction beside a quantized weight: ``y = Ŵ x̂ + up (down x̂)``, as it is stored.

    Attributes:
        down: The factor that reads; codes if it has scales.
        up: The factor that writes; codes if it has scales.
        down_scale: What the codes of each component of ``down`` are multiplied by.
        up_scale: The same of ``up``.
        reads: What it multiplies: the layer's input as the weight does, or as it is before activations are rounded.
    """

    down: Float[Tensor, "rank in"] | Int8[Tensor, "rank in"]
    up: Float[Tensor, "out rank"] | Int8[Tensor, "out rank"]
    down_scale: Float[Tensor, " rank"] | None = None
    up_scale: Float[Tensor, " rank"] | None = None
    reads: Reads = "quantized"

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
        """Return ``down`` and ``up`` as values."""
        down, up = self.down, self.up
        if self.down_scale is not None:
            down = down.float() * self.down_scale.float().unsqueeze(-1)
        if self.up_scale is not None:
            up = up.float() * self.up_scale.float()
        return down.to(dtype), up.to(dtype)

    def on(self, device: torch.device) -> Adapter:
        """Return it with its tensors on a device."""
        down_scale, up_scale = (None if one is None else one.to(device) for one in (self.down_scale, self.up_scale))
        return Adapter(self.down.to(device), self.up.to(device), down_scale, up_scale, self.reads)

    def product(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """Return what it adds to the weight."""
        down, up = self.factors(dtype)
        return up @ down


@dataclass(frozen=True)
class QuantizedLinear:
    """What a mitigator makes of a weight.

    Attributes:
        codes: One code a weight, in ``[0, 2**bits)``, in storage order; straight from the solver, never re-fitted.
        parameters: Of each part of the grid: scales and zero points ``[out, groups]`` as stored, and the tensor-level
            multiplier.
        adapter: Low-rank correction, if any.
        report: What happened, as numbers: ``loss``, tr(EHEᵀ)/tr(WHWᵀ), ``loss_rtn`` of rounding to nearest,
            ``loss_before`` of what the last method that tells it started from (what the one to its left made, or
            rounding to nearest for the first), ``dampening_frac``, ….
        counters: What was not as usual, summed over the model: ``dead_columns``, ``raised_dampening``, ….
        outliers: Weights in 16 bits that stand in place of what their codes decode to, if any.
    """

    codes: UInt8[Tensor, "out in"]
    parameters: tuple[GroupParameters, ...]
    adapter: Adapter | None = None
    report: Mapping[str, float] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)
    outliers: Outliers | None = None

    def weight(self, grid: Grid) -> Float[Tensor, "out in"]:
        """Return the decoded weight in float32, outliers in it, without the adapter."""
        decoded = grid.decode(self.codes, self.parameters)
        return decoded if self.outliers is None else self.outliers.put(decoded)


@dataclass(frozen=True)
class LayerProblem:
    """Everything that a layer-wise method may know.

    Attributes:
        name: Full module name, for messages.
        weight: The weight after the transform, float32. Never modified.
        grid: What it is to be rounded to.
        hessian: Weighted mean of x xᵀ over calibration tokens, float32, or None where it is not known. Losses are told
            in it, so it is there for methods as well that do not need it, where statistics have it.
        entries: Other statistics of the layer's input by name (``absmax``, ``mean_abs``, ``sample``, …). Blocks of the
            Hessian are for ``need_blocks`` to find, here or in the whole.
        global_scales: Tensor-level multipliers that the parts of the grid must use (shared with the layer's siblings);
            empty where the layer may choose its own.
        seed: Seeds whatever is random.
        expert: Whether the linear belongs to a routed expert.
        previous: What the method to the left made, or None for the first.
        report: What methods that changed the problem have to say of it, as numbers.
        memory: What methods remember of ``hessian`` and ``entries`` for the other linears that have the same ones, such
            as a factor, under keys of their own.
    """

    name: str
    weight: Float[Tensor, "out in"]
    grid: Grid
    hessian: Float[Tensor, "in in"] | None = None
    entries: Mapping[str, Tensor] = field(default_factory=dict)
    global_scales: GlobalScales = ()
    seed: int = 0
    expert: bool = False
    previous: QuantizedLinear | None = None
    report: Mapping[str, float] = field(default_factory=dict)
    memory: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def need_hessian(self) -> Float[Tensor, "in in"]:
        """Return the Hessian.

        Raises:
            UsageError: It was not gathered.
        """
        if self.hessian is None:
            raise UsageError(
                f"no Hessian was gathered for `{self.name}`",
                hint="qtool calibrate MODEL --gather hessian,absmax,sample",
            )
        return self.hessian

    def need_blocks(self, columns: slice, size: int) -> Float[Tensor, "groups size size"]:
        """Return blocks along the Hessian's diagonal, of the whole or of larger blocks that were gathered in its place.

        Args:
            columns: Which the blocks are of.
            size: Of a block; 1 for the diagonal itself.

        Raises:
            UsageError: Neither was gathered, or blocks too small.
        """
        if self.hessian is not None or BLOCKS not in self.entries:
            return diagonal_blocks(self.need_hessian()[columns, columns], size)
        blocks = self.entries[BLOCKS]
        try:
            return inner_blocks(blocks, columns, size)
        except ShapeError as error:
            raise UsageError(
                f"groups of `{self.name}` do not lie in blocks of its Hessian that were gathered in place of the whole",
                facts=(("groups", size), ("blocks", blocks.shape[-1])),
                hint="qtool calibrate MODEL --gather hessian,absmax,sample",
            ) from error

    def after(self, previous: QuantizedLinear) -> LayerProblem:
        """Return the problem as the method to the right sees it."""
        return replace(self, previous=previous)


@runtime_checkable
class Mitigator(Protocol):
    """Turns one linear's weight into codes while compensating the error.

    Class attributes: ``version`` (raised whenever output bits change), ``needs`` (statistics of the layer's input
    that it reads: ``hessian`` and the like; ``hessian_blocks`` for what ``need_blocks`` returns, which costs nothing
    where the whole is there) and ``Config`` (a frozen dataclass of its options; those that need more statistics say so
    in a property ``needs``, and where more than codes is stored, ``bytes_beside(rows, columns, expert=…)`` tells a dry
    run how many bytes for a weight). A method that does better where propagated activations are rounded as the scheme
    says, and statistics are of those, also has ``rounded_inputs = True``.
    """

    version: int
    needs: tuple[str, ...]
    Config: type

    def quantize(self, problem: LayerProblem, config: Any) -> QuantizedLinear:  # noqa: ANN401 - each method has its Config
        """Solve one layer.

        Raises:
            NumericalError: The problem cannot be solved even after escalation.
        """


@runtime_checkable
class Retargeter(Protocol):
    """Changes what the methods to its right aim at, and rounds nothing itself.

    Class attributes as those of ``Mitigator``.
    """

    version: int
    needs: tuple[str, ...]
    Config: type

    def retarget(self, problem: LayerProblem, config: Any) -> LayerProblem:  # noqa: ANN401 - each method has its Config
        """Return the problem with another weight, and what there is to say of it in ``report``.

        Raises:
            NumericalError: The problem cannot be solved.
            UsageError: A method that rounds came first.
        """


@runtime_checkable
class SiblingMitigator(Mitigator, Protocol):
    """A mitigator that saves work where several linears read one site; no method has to.

    Siblings differ in name, weight, seed and previous result only. Each gets what ``quantize`` would give it alone, up
    to float rounding.
    """

    def quantize_siblings(self, problems: Sequence[LayerProblem], config: Any) -> list[QuantizedLinear]:  # noqa: ANN401
        """Solve linears of one site, in their order; raises as ``quantize`` does."""
