"""One linear layer's quantization problem, its solution, and the contract of a mitigator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, UInt8
from torch import Tensor

from qtool.engine.grid import GlobalScales, Grid
from qtool.errors import UsageError
from qtool.numerics.outliers import Outliers
from qtool.scheme import GroupParameters


@dataclass(frozen=True)
class Adapter:
    """A low-rank correction beside a quantized weight: ``y = Ŵ x̂ + up (down x̂)``; both as they are stored."""

    down: Float[Tensor, "rank in"]
    up: Float[Tensor, "out rank"]


@dataclass(frozen=True)
class QuantizedLinear:
    """What a mitigator makes of a weight.

    Attributes:
        codes: One code a weight, in ``[0, 2**bits)``, in storage order; straight from the solver, never re-fitted.
        parameters: Of each part of the grid: scales and zero points ``[out, groups]`` as stored, and the tensor-level
            multiplier.
        adapter: Low-rank correction, if any.
        report: What happened, as numbers: ``loss`` and ``loss_rtn`` (tr(EHEᵀ)/tr(WHWᵀ)), ``dampening_frac``, ….
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
        hessian: Weighted mean of x xᵀ over calibration tokens, float32, or None when it was not gathered.
        entries: Other statistics of the layer's input by name (``absmax``, ``mean_abs``, ``sample``, …).
        global_scales: Tensor-level multipliers that the parts of the grid must use (shared with the layer's siblings);
            empty where the layer may choose its own.
        seed: Seeds whatever is random.
        previous: What the method to the left made, or None for the first.
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
    previous: QuantizedLinear | None = None
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

    def after(self, previous: QuantizedLinear) -> LayerProblem:
        """Return the problem as the method to the right sees it."""
        return replace(self, previous=previous)


@runtime_checkable
class Mitigator(Protocol):
    """Turns one linear's weight into codes while compensating the error.

    Class attributes: ``version`` (raised whenever output bits change), ``needs`` (statistics of the layer's input
    that it reads: ``hessian`` and the like) and ``Config`` (a frozen dataclass of its options; those that need more
    statistics say so in a property ``needs``).
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
class SiblingMitigator(Mitigator, Protocol):
    """A mitigator that saves work where several linears read one site; no method has to.

    Siblings differ in name, weight, seed and previous result only. Each gets what ``quantize`` would give it alone, up
    to float rounding.
    """

    def quantize_siblings(self, problems: Sequence[LayerProblem], config: Any) -> list[QuantizedLinear]:  # noqa: ANN401
        """Solve linears of one site, in their order; raises as ``quantize`` does."""
