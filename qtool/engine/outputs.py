"""What is calibrated of the outputs of linears: static scales, and multipliers of scales.

Both are of the range over all calibration tokens, as those of a KV cache are: what reads an output is not one linear
whose error could be looked at, as it is for inputs (``qtool.engine.static_scales``). Linears that engines fuse (q, k
and v; gate and up) have one for all, since vLLM has room for one. They are stored as
``layers.<i>.out.<module>.input_global_scale``, like those of any other site, and zero points likewise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qtool.engine.grid import Grid
from qtool.engine.static_scales import extremes_of, needs_of_range
from qtool.engine.stored import input_scales
from qtool.engine.subject import Subject
from qtool.model.graph import LinearSite
from qtool.model.statistics import SiteStatistics


def calibrated_outputs(subject: Subject, linears: Iterable[LinearSite]) -> dict[LinearSite, Grid]:
    """Return what outputs are rounded to of those linears where something of that is calibrated."""
    found = ((linear, subject.output_grid(linear)) for linear in linears)
    return {linear: grid for linear, grid in found if grid is not None and grid.parts[0].has_global_scale}


def output_needs(subject: Subject, layer: int) -> dict[str, tuple[str, ...]]:
    """Return the statistics that say the range of a block's outputs, by the place where they are gathered."""
    linears = subject.model.graph.linears_of(layer)
    return {linear.puts_out: needs_of_range(grid) for linear, grid in calibrated_outputs(subject, linears).items()}


def output_scales(subject: Subject, layer: int, statistics: Mapping[str, SiteStatistics]) -> dict[str, Tensor]:
    """Return what is calibrated of a block's outputs as it is stored.

    Args:
        subject: What is executed.
        layer: Block index.
        statistics: What was gathered of the block, by place.
    """
    fused: dict[tuple[Grid, tuple[str, str]], list[LinearSite]] = {}
    for linear, grid in calibrated_outputs(subject, subject.model.graph.linears_of(layer)).items():
        fused.setdefault((grid, linear.fused_with), []).append(linear)
    found: dict[str, Tensor] = {}
    for (grid, _), linears in fused.items():
        sites = {linear.puts_out: f"layers.{layer}.{linear.puts_out}" for linear in linears}
        ranges = [extremes_of(grid, statistics[name], site=site) for name, site in sites.items()]
        scale, zero_point = grid.parts[0].shared(torch.cat(ranges, dim=-1))
        for site in sites.values():
            found |= input_scales(site, (scale,), (zero_point,))
    return found
