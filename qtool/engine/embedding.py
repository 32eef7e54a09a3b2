"""A quantized embedding: rounded to nearest, since each row is read alone and no weight makes up for another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.engine.block import SolvedBlock
from qtool.engine.grid import Grid
from qtool.engine.network import Network
from qtool.engine.problem import QuantizedLinear
from qtool.engine.solve import Solution
from qtool.engine.stored import read_linear
from qtool.errors import NumericalError
from qtool.model.graph import LinearSite
from qtool.numerics.groups import from_groups
from qtool.numerics.losses import relative_loss


def round_nearest(weight: Float[Tensor, "out in"], grid: Grid) -> QuantizedLinear:
    """Round each weight to the nearest value of a grid whose scales are fitted to the range of each group."""
    codes, parameters = [], []
    for columns, part in grid.places(weight.shape[1]):
        values = weight[:, columns]
        groups = part.groups(values)
        parameters.append(part.fit(groups, global_scale=part.global_scale(values.abs().amax())))
        codes.append(from_groups(part.format.encode(groups, parameters[-1]), values.shape))
    return QuantizedLinear(torch.cat(codes, dim=1), tuple(parameters))


def solve_embedding(embedding: LinearSite, weight: Float[Tensor, "out in"], grid: Grid) -> SolvedBlock:
    """Return a rounded embedding and what it loses by that.

    Raises:
        NumericalError: A weight is not finite.
    """
    if not torch.isfinite(weight).all():
        raise NumericalError(f"the weight of `{embedding.name}` holds NaN or Inf")
    found = round_nearest(weight, grid)
    error = relative_loss(weight, found.weight(grid))
    report = {"weight_error": error, "weight_error_rtn": error}
    return SolvedBlock(Solution({embedding.name: QuantizedLinear(found.codes, found.parameters, report=report)}))


def install_embedding(network: Network, embedding: LinearSite, tensors: Mapping[str, Tensor], grid: Grid) -> None:
    """Let a network look tokens up in a quantized embedding, as it is stored; a tied head keeps its own weights."""
    target = network.module.get_parameter(f"{embedding.name}.weight")
    target.data = read_linear(embedding.name, target.shape[1], tensors, grid).weight(grid).to(target)
