"""Random operators of every kind, and plans that put them wherever a model's graph claims that they are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qtool.engine.planner import ABSORBED_BY, extend
from qtool.errors import UsageError
from qtool.model.graph import RESIDUAL, ModelGraph, Site
from qtool.model.plan import Plan, Proposal
from qtool.numerics.operators import (
    OPERATORS,
    Affine,
    Block,
    Diag,
    Hadamard,
    HeadMix,
    Kron,
    Operator,
    Orthogonal,
    Perm,
    Shift,
    Signs,
)
from qtool.testing.promise import CheckError


def random_operator(kind: str, site: Site, generator: torch.Generator) -> Operator:
    """Return an operator of a kind that fits a site; where a site has heads, each gets parameters of its own."""
    dim, heads, g = site.dim, site.heads, generator
    each = (heads, dim) if heads > 1 else (dim,)
    makers: Mapping[str, Callable[[], Operator]] = {
        "shift": lambda: Shift(_noise(g, *each), heads),
        "diag": lambda: Diag(_tied(_signs(g, *each) * (0.5 + _noise(g, *each).abs()), site), heads),
        "signs": lambda: Signs(_tied(_signs(g, *each), site), heads),
        "perm": lambda: Perm(torch.randperm(dim, generator=g)),
        "hadamard": lambda: Hadamard(dim, _signs(g, dim)),
        "head_mix": lambda: HeadMix(4, dim // 4),
        "orthogonal": lambda: Orthogonal(torch.linalg.qr(_noise(g, *each, dim))[0].contiguous(), heads),
        "affine": lambda: Affine.from_matrix(_invertible(g, *each), heads),
        "kron": lambda: Kron(_invertible(g, 4), _invertible(g, dim // 4)),
        "block": lambda: Block(_invertible(g, dim // 4, 4), dim),
    }
    return makers[kind]()


def _tied(factors: Tensor, site: Site) -> Tensor:
    """Return factors that are alike where the site wants them to be."""
    factors = factors.clone()
    for one, other in site.ties:
        factors[..., other] = factors[..., one]
    return factors


def _noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _signs(generator: torch.Generator, *shape: int) -> Tensor:
    return (1 - 2 * torch.randint(0, 2, shape, generator=generator)).to(torch.int8)


def _invertible(generator: torch.Generator, *shape: int) -> Tensor:
    size = shape[-1]
    return torch.eye(size, dtype=torch.float64).add(_noise(generator, *shape, size), alpha=0.5 / size**0.5)


def claims(site: Site) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the kinds that a site claims to fold, and those that run online behind them."""
    folds = tuple(kind for kind in OPERATORS if ABSORBED_BY[OPERATORS[kind].group] & site.foldable)
    runs = (kind for kind in OPERATORS if kind not in folds and OPERATORS[kind].group not in site.refused)
    return folds, tuple(runs) if site.online else ()


def everything(graph: ModelGraph, *, residual: bool) -> Plan:
    """Return a plan with every kind that is exact at every site, folded ones in front of those that run online.

    Args:
        graph: The model's sites.
        residual: Whether the residual is transformed too, and norms are folded, which a rotation of it needs.
    """
    sites = [site for site in graph.sites.values() if residual or site.id != RESIDUAL]
    return replace(_plan(graph, sites, tuple(OPERATORS)), fold_norms=residual)


def apart(graph: ModelGraph) -> Iterator[tuple[str, Plan, Iterator[tuple[str, Plan]]]]:
    """Yield a plan for each kind of site with every kind of operator, and a plan for each of these alone."""
    for name, sites in _by_kind(graph).items():
        kinds = [kind for kind in OPERATORS if any(kind in claimed for one in sites for claimed in claims(one))]
        yield name, _plan(graph, sites, tuple(OPERATORS)), ((one, _plan(graph, sites, (one,))) for one in kinds)


def _plan(graph: ModelGraph, sites: list[Site], kinds: tuple[str, ...]) -> Plan:
    """Return a plan with operators of some kinds at some sites, as far as these claim them."""
    generator = torch.Generator().manual_seed(7)
    proposal = {
        site.id: [random_operator(one, site, generator) for claimed in claims(site) for one in claimed if one in kinds]
        for site in sites
    }
    proposed = Proposal({name: operators for name, operators in proposal.items() if operators})
    return extend(Plan(), proposed, graph, method="check")


def check_refusals(graph: ModelGraph, label: str) -> None:
    """Check that the planner folds what a site claims, and refuses or runs online everything else.

    Raises:
        CheckError: It takes an operator that the site does not claim.
    """
    generator = torch.Generator().manual_seed(7)
    for name, sites in _by_kind(graph).items():
        site = sites[0]
        folds, online = claims(site)
        for kind in OPERATORS:
            try:
                operator = random_operator(kind, site, generator)
                plan = extend(Plan(), Proposal({site.id: [operator]}), graph, method="check")
            except UsageError:
                if kind in (*folds, *online):
                    raise
                continue
            if kind not in (*folds, *online) or plan.at(site.id).folded != (kind in folds):
                raise CheckError(f"the planner takes `{kind}` at `{name}`, which does not claim it ({label})")


def _by_kind(graph: ModelGraph) -> dict[str, list[Site]]:
    found: dict[str, list[Site]] = {}
    for site in graph.sites.values():
        found.setdefault(site.kind, []).append(site)
    return found
