"""QServe (QoQ): rotation, smoothed keys, smoothed block outputs, reordered channels (Lin et al., arXiv:2405.04532).

Everything folds; nothing runs online:

- *block input rotation*: R1, a Hadamard matrix without random signs, turns the residual stream;
- *SmoothAttention*: ``K / lambda`` and ``Q * lambda`` with ``lambda_i = max|K_i|**alpha`` and ``alpha = 0.5``.
  Positions turn channels ``i`` and ``i + d/2`` together, so both get one factor;
- *block output smoothing*: ``s_j = max|X_j|**a / max_i|W_ij|**(1 - a)`` with a small ``a``, at the value heads and in
  front of down projections whose gate lets a scale pass. Weights are those behind R1;
- *reordering*: where channels share a scale in groups, those in front of a down projection are sorted by their largest
  magnitude. Behind R1 all channels of the residual are alike, and value heads keep their order, since one permutation
  would have to serve all heads.

Keys are made from the sample of their inputs, in front of the positions: ``K = X W_k.T``, without a bias of k_proj.
A turned pair never exceeds its length, so ``sqrt(k_i**2 + k_j**2)`` stands for the largest magnitude of both channels
at any position. Models whose keys pass a norm (Qwen 3) keep them as they are: that norm bounds its outputs itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.builtin.transforms.awq import HEADS, by_value_head
from qtool.builtin.transforms.smoothquant import SMALLEST, smoothing_scale
from qtool.errors import UsageError
from qtool.model.graph import EXPERTS, RESIDUAL, Site
from qtool.model.plan import Proposal, TransformContext
from qtool.numerics.operators import Diag, Hadamard, Operator, Perm

Switch = Literal["auto", "on", "off"]
KEYS = "keys"


@dataclass(frozen=True)
class QServeConfig:
    """Which parts of QoQ are applied.

    Attributes:
        r1: Rotate the residual stream.
        smooth_attention: Scale keys; ``auto`` does so if the scheme quantizes the KV cache.
        attention_alpha: Share of a key's largest magnitude that moves into the queries, in [0, 1].
        smooth_outputs: Scale value heads and inputs of down projections.
        output_alpha: Share of the difficulty that moves into the weights there, in [0, 1].
        reorder: Sort the inputs of down projections; ``auto`` does so if the scheme has groups.
    """

    r1: bool = True
    smooth_attention: Switch = "auto"
    attention_alpha: float = 0.5
    smooth_outputs: bool = True
    output_alpha: float = 0.3
    reorder: Switch = "auto"

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        for name in ("attention_alpha", "output_alpha"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                option = name.replace("_", "-")
                raise UsageError(
                    f"`{option}` must lie between 0 and 1", facts=(("received", share),), hint=f"--set {option}=0.3"
                )


class QServe:
    """Proposes a rotation of the residual, diagonals at keys, values and down projections, and an order for these."""

    version = 1
    needs = ("absmax", "sample")
    Config = QServeConfig

    def plan(self, context: TransformContext, config: QServeConfig) -> Proposal:
        """Return the operators of each part.

        Raises:
            UsageError: The residual cannot be rotated.
            ArtifactError: The statistics lack largest magnitudes or, for keys, the sample.
        """
        graph, scheme = context.graph, context.scheme
        residual = graph.site(RESIDUAL)
        if config.r1 and "orthogonal" not in residual.foldable:
            raise UsageError(
                "the residual of this model cannot be rotated",
                facts=(("because", residual.why),),
                hint="--set r1=false",
            )
        found: dict[str, list[Operator]] = {RESIDUAL: [Hadamard(residual.dim)]} if config.r1 else {}
        attention = _is_on(config.smooth_attention, auto=scheme.kv is not None)
        groups = any(part.strategy == "group" for name in ("weights", "activations") for part in scheme.every(name))
        reorder = _is_on(config.reorder, auto=groups)
        for layer in range(graph.dims.num_layers):
            for site in graph.of_kind("qk_pre", layer) if attention else ():
                if (keys := _keys(context, site)) is not None:
                    scale = key_scale(keys, site.ties, config.attention_alpha)
                    found[site.id] = [Diag(1 / scale, heads=site.heads)]
            for site in graph.of_kind("vo", layer) if config.smooth_outputs else ():
                scale = _output_scale(_heads(_absmax(context, site.id), site), context, site, config)
                found[site.id] = [Diag(1 / scale, heads=site.heads)]
            for site in graph.of_kind("up_down", layer):
                if operators := _in_front_of_down(context, site, config, reorder=reorder):
                    found[site.id] = operators
        _refuse_unmet("smooth_attention", config.smooth_attention, any(".qk_pre" in place for place in found))
        moved = any(isinstance(one, Perm) for operators in found.values() for one in operators)
        _refuse_unmet("reorder", config.reorder, moved)
        return Proposal(found)


def key_scale(
    keys: Float[Tensor, "tokens heads dim"], ties: Sequence[tuple[int, int]], alpha: float
) -> Float[Tensor, "heads dim"]:
    """Return ``lambda = max|K|**alpha``, one for channels that are turned together; 1 where keys are always zero.

    In float64: queries are multiplied by the inverse, which has to be as exact as the weights that it is folded into.

    Args:
        keys: In front of the positions. Not modified.
        ties: Channels that positions turn together; they count with the length of the pair.
        alpha: Share of the magnitude that moves into the queries.
    """
    squares = keys.double().square()
    lengths = squares.clone()
    for one, other in ties:
        lengths[..., one] = lengths[..., other] = squares[..., one] + squares[..., other]
    reach = lengths.amax(0).sqrt()
    return torch.where(reach > 0, reach.clamp_min(SMALLEST) ** alpha, torch.ones_like(reach))


def _refuse_unmet(option: str, switch: Switch, done: bool) -> None:
    """Refuse what was asked for and has no place in this model.

    Raises:
        UsageError: There is no site that takes it.
    """
    if switch == "on" and not done:
        raise UsageError(f"no site of this model takes `{option}`", hint=f"--set {option}=auto")


def _is_on(switch: Switch, *, auto: bool) -> bool:
    """Say whether a part is applied, given what ``auto`` means here."""
    return switch == "on" or (switch == "auto" and auto)


def _keys(context: TransformContext, site: Site) -> Float[Tensor, "tokens heads dim"] | None:
    """Return keys in front of the positions; None where they pass a norm first.

    Raises:
        ArtifactError: The statistics lack the sample.
    """
    graph = context.graph
    if site.layer is None or graph.family.rotary is None or graph.family.rotary.norms is not None:
        return None
    for linear in graph.linears_of(site.layer):
        for rows in (rows for written, rows in graph.rows(linear.spec) if written == KEYS):
            weight = context.weights(linear.name)
            inputs = context.statistics[linear.reads].need("sample", site=linear.reads)
            keys = inputs @ torch.cat([weight[part] for part in rows]).T
            return keys.reshape(-1, site.heads, site.dim)
    return None


def _absmax(context: TransformContext, site_id: str) -> Float[Tensor, " n"]:
    """Return the largest magnitude of each channel of an input site.

    Raises:
        ArtifactError: The statistics lack it.
    """
    return context.statistics[site_id].need("absmax", site=site_id)


def _heads(maxima: Float[Tensor, " n"], site: Site) -> Float[Tensor, "*heads dim"]:
    """Return the largest of each channel over the query heads that share a value head; of other sites, as it is."""
    return by_value_head(maxima, site).amax(1) if site.kind == HEADS else maxima


def _output_scale(
    activations: Float[Tensor, "*heads dim"], context: TransformContext, site: Site, config: QServeConfig
) -> Float[Tensor, "*heads dim"]:
    """Return the scale of a site from what its consumers' weights are behind the rotation."""
    maxima = []
    for linear in context.graph.consumers(site):
        weight = context.weights(linear.name)
        if config.r1 and linear.spec.writes == RESIDUAL:
            weight = Hadamard(context.graph.dims.hidden).weight_out(weight)
        maxima.append(weight.abs().amax(0))
    weights = _heads(torch.stack(maxima).amax(0), site)
    return smoothing_scale(activations.flatten(), weights.flatten(), config.output_alpha).view_as(activations)


def _in_front_of_down(context: TransformContext, site: Site, config: QServeConfig, *, reorder: bool) -> list[Operator]:
    """Return the scale and the order of the inputs of a down projection, as far as something in front absorbs them."""
    if site.name.startswith(EXPERTS) and not context.statistics[site.id].entries:
        return []
    absmax, operators = _absmax(context, site.id), list[Operator]()
    if config.smooth_outputs and "diag" in site.foldable:
        operators.append(Diag(1 / _output_scale(absmax, context, site, config)))
        absmax = operators[0].act(absmax)
    if reorder and "perm" in site.foldable:
        operators.append(Perm(absmax.argsort(descending=True, stable=True)))
    return operators
