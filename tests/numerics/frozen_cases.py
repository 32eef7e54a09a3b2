"""Problems on grids whose scales are fitted to the weight, and all values that those grids have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.builtin.formats.fp4 import MXFP4, NVFP4
from qtool.builtin.formats.integer import Int2, Int3, Int4, Int8
from qtool.numerics.frozen_grid import FrozenColumns, round_rows
from qtool.numerics.gptq import ColumnGrid, gptq_round
from qtool.numerics.groups import to_groups
from qtool.scheme import Format, GroupParameters, TensorScheme

GLOBAL_SCALE = torch.tensor(1 / 512)
SIZE = 32

# Parts of a grid: format, scheme, columns and the columns that share a scale.
Part = tuple[Format, TensorScheme, int, int]
CASES: dict[str, list[Part]] = {
    "int4": [(Int4(), TensorScheme("int4"), SIZE, SIZE)],
    "int4-asym-g8": [(Int4(), TensorScheme("int4", symmetric=False), SIZE, 8)],
    "int2-g16-clipped": [(Int2(), TensorScheme("int2", clip=0.4), SIZE, 16)],
    "mxfp4": [(MXFP4(), MXFP4.defaults, SIZE, 32)],
    "nvfp4": [(NVFP4(), NVFP4.defaults, SIZE, 16)],
    "int3-g8 beside int8": [(Int3(), TensorScheme("int3"), 24, 8), (Int8(), TensorScheme("int8"), 8, 8)],
    "nvfp4 beside int4-asym": [
        (NVFP4(), NVFP4.defaults, 16, 16),
        (Int4(), TensorScheme("int4", symmetric=False), 16, 4),
    ],
}


def problem(seed: int, n_out: int = 3, n_in: int = SIZE, *, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Inputs that share a third as many directions as there are of them, and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_in, n_in // 3, generator=generator, dtype=torch.float64)
    hidden = torch.randn(n_in // 3, 4 * n_in, generator=generator, dtype=torch.float64)
    noise = torch.randn(n_in, 4 * n_in, generator=generator, dtype=torch.float64)
    sizes = torch.linspace(0.5, 2.0, n_in, dtype=torch.float64)[torch.randperm(n_in, generator=generator)]
    inputs = sizes[:, None] * (mixing @ hidden / n_in**0.5 + 0.3 * noise)
    weight = torch.randn(n_out, n_in, generator=generator, dtype=torch.float64)
    hessian = inputs @ inputs.T / inputs.shape[1]
    return weight, hessian + damping * hessian.diagonal().mean() * torch.eye(n_in)


def _fitted(part: Part, values: Tensor) -> GroupParameters:
    fmt, scheme, _, size = part
    multiplier = GLOBAL_SCALE if fmt.name == "nvfp4" else None
    return fmt.fit(to_groups(values, "group", size), scheme, global_scale=multiplier, clip=scheme.clip)


def frozen(case: str, weight: Tensor) -> list[FrozenColumns]:
    """Fit the grid of a case to a weight."""
    parts, start = [], 0
    for part in CASES[case]:
        fmt, _, columns, size = part
        fitted = _fitted(part, weight[:, start : start + columns])
        parts.append(FrozenColumns(columns, size, fitted, fmt.round))
        start += columns
    return parts


def to_be_fitted(case: str) -> list[ColumnGrid]:
    """The same grid, for GPTQ with static parameters."""

    def one(part: Part) -> ColumnGrid:
        fmt, scheme, columns, size = part
        multiplier = GLOBAL_SCALE if fmt.name == "nvfp4" else None

        def fit(values: Tensor, start: int) -> GroupParameters:
            return fmt.fit(values, scheme, global_scale=multiplier, clip=scheme.clip)

        return ColumnGrid(size, fit, fmt.round, fmt.encode, columns)

    return [one(part) for part in CASES[case]]


def levels(case: str, grid: Sequence[FrozenColumns]) -> list[Tensor]:
    """All values that each column may have, by decoding every code."""
    found = []
    for (fmt, _, columns, size), part in zip(CASES[case], grid, strict=True):
        rows, groups = part.parameters.scale.shape
        codes = torch.arange(2**fmt.bits, dtype=torch.uint8).expand(rows, groups, -1)
        decoded = fmt.decode(codes, part.parameters).double()
        found += [decoded[:, col // size] for col in range(columns)]
    return found


def decoded(case: str, codes: Tensor, parameters: Sequence[GroupParameters]) -> Tensor:
    """The values of codes."""
    values, start = [], 0
    for (fmt, _, columns, size), own in zip(CASES[case], parameters, strict=True):
        groups = to_groups(codes[:, start : start + columns], "group", size)
        values.append(fmt.decode(groups, own).reshape(len(codes), columns))
        start += columns
    return torch.cat(values, dim=1).double()


def row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """The diagonal of ``E H Eᵀ``."""
    return torch.einsum("ri,ij,rj->r", error.double(), hessian.double(), error.double())


def start_of(kind: str, case: str, weight: Tensor, hessian: Tensor, grid: Sequence[FrozenColumns]) -> Tensor:
    """The values of rounding to nearest, or of GPTQ."""
    if kind == "nearest":
        return round_rows(grid, weight, 0)
    solved = gptq_round(weight, hessian, grid=to_be_fitted(case), parameters="static")
    return decoded(case, solved.codes, solved.parameters)


def without_some_inputs(hessian: Tensor) -> Tensor:
    """A Hessian with two columns of zeros, and one on whose diagonal is less."""
    hessian = hessian.clone()
    hessian[[3, 20]] = 0
    hessian[:, [3, 20]] = 0
    hessian[7, 7] = -1e-3
    return hessian
