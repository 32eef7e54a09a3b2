"""A graph with experts, and statistics for it that nothing was run for."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.model.family import EXPERT_LINEARS, LLAMA_LIKE_LINEARS, LLAMA_LIKE_NORMS, Experts, Family, Linear, Norm
from qtool.model.graph import Dimensions, ModelGraph
from qtool.model.statistics import SiteStatistics, summarize
from qtool.numerics.second_moments import diagonal_blocks

HIDDEN, INNER = 16, 8


def sparse_graph(experts: int = 4, chosen: int = 2) -> ModelGraph:
    """Two blocks, the first of them dense."""
    family = Family(
        name="sparse",
        model_types=("sparse",),
        final_norm=Norm("model.norm"),
        norms=LLAMA_LIKE_NORMS,
        linears=(
            *LLAMA_LIKE_LINEARS[:4],
            *(Linear(one.module, one.reads, one.writes, blocks="dense") for one in LLAMA_LIKE_LINEARS[4:]),
            Linear("mlp.gate", reads="mlp_in", kept="the router", blocks="sparse"),
        ),
        experts=Experts("mlp.experts", "n", "k", EXPERT_LINEARS),
    )
    sizes = {"hidden": HIDDEN, "o_in": HIDDEN, "up_down": 24, "experts.up_down": INNER}
    return ModelGraph(
        family, Dimensions(2, HIDDEN, 24, 2, 2, 8, 8, 32, 64, False, experts, chosen, (False, True), sizes=sizes)
    )


def of_tokens(x: Tensor) -> SiteStatistics:
    """Everything that calibrate knows of some tokens, uniformly weighted; nothing of none."""
    if not len(x):
        return SiteStatistics(0, {})
    return SiteStatistics(
        len(x),
        {
            "hessian": x.T @ x / len(x),
            "hessian_blocks": diagonal_blocks(x.T @ x / len(x), 8),
            "mean": x.mean(0),
            "sample": x[:3].bfloat16(),
            **summarize(x),
        },
    )


def drawn(tokens: int, n: int, seed: int) -> Tensor:
    """Correlated tokens, other ones for every seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, n, generator=generator) @ (torch.eye(n) + 0.4 * torch.randn(n, n, generator=generator))
