"""Folding: a block's weights with the plan's operators absorbed, in float64, one block at a time.

A linear that reads a site multiplies by ``T^{-T}`` of all its operators; one that writes a site by ``Tᵀ`` of the folded
ones. In front of a norm's linears the order is: the norm's weight, the residual's operators, the site's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.model.family import Norm
from qtool.model.graph import HEAD_IN, RESIDUAL, LinearSite, ModelGraph
from qtool.model.plan import Plan
from qtool.numerics.operators import Operator

State = Mapping[str, Tensor]


def input_operators(graph: ModelGraph, plan: Plan, layer: int, reads: str) -> tuple[Operator, ...]:
    """Return every operator between a site's original input (norm weight removed) and its transformed one.

    Args:
        graph: The model's sites.
        plan: The operators.
        layer: Block index.
        reads: Name of the input site.

    Returns:
        Operators in the order in which activations meet them, folded and online ones alike.
    """
    residual = plan.at(RESIDUAL).operators if reads in graph.family.norms else ()
    heads = plan.at(f"layers.{layer}.vo").operators if reads == "o_in" else ()
    return (*residual, *heads, *plan.at(f"layers.{layer}.{reads}").operators)


def fold_block(graph: ModelGraph, plan: Plan, layer: int, state: State) -> dict[str, Tensor]:
    """Return the tensors of a block with the plan folded in.

    Args:
        graph: The model's sites and linears.
        plan: The operators.
        layer: Block index.
        state: The block's stored tensors, names relative to the block. Not modified.

    Returns:
        The same names; float64 where folding touched them, unchanged otherwise.
    """
    if plan.empty:
        return dict(state)
    folded = dict(state)
    for linear in graph.linears_of(layer):
        weight, bias = fold_linear(graph, plan, linear, state)
        folded[f"{linear.spec.module}.weight"] = weight
        if bias is not None:
            folded[f"{linear.spec.module}.bias"] = bias
    for reads, norm in graph.family.norms.items():
        site = plan.at(f"layers.{layer}.{reads}")
        folded |= _fold_norm(norm, plan, site.operators[: site.folded], state)
    for through in {linear.writes_through for linear in graph.family.linears if linear.writes_through}:
        folded |= _reorder_norm(through, plan.at(RESIDUAL).operators, state)
    return folded


def fold_linear(graph: ModelGraph, plan: Plan, linear: LinearSite, state: State) -> tuple[Tensor, Tensor | None]:
    """Return the folded weight and bias of one linear in float64."""
    module, reads, layer = linear.spec.module, linear.spec.reads, linear.layer
    weight = state[f"{module}.weight"].double()
    bias = state[f"{module}.bias"].double() if f"{module}.bias" in state else None
    if plan.fold_norms and reads in graph.family.norms:
        weight, bias = _absorb_norm(graph.family.norms[reads], state, weight, bias)
    for operator in input_operators(graph, plan, layer, reads):
        bias = operator.bias_in(weight, bias)
        weight = operator.weight_in(weight)
    for operator in _output_operators(plan, linear):
        weight = operator.weight_out(weight)
        if operator.group == "shift" and bias is None:
            bias = torch.zeros_like(weight[:, 0])
        bias = None if bias is None else operator.bias_out(bias)
    return weight, bias


def fold_ends(graph: ModelGraph, plan: Plan, state: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Return embedding, final norm and head with the plan folded in, by full tensor name.

    Args:
        graph: The model's sites.
        plan: The operators.
        state: Reads a stored tensor by its full name; gives the embedding for a tied head.
    """
    family = graph.family
    names = (f"{family.embedding}.weight", f"{family.head}.weight")
    embedding, head = (state(name) for name in names)
    final = {f"{family.final_norm.module}.weight": state(f"{family.final_norm.module}.weight")}
    if plan.empty:
        return {names[0]: embedding, names[1]: head, **final}
    embedding, head = embedding.double(), head.double()
    if plan.fold_norms:
        head, _ = _absorb_norm(family.final_norm, final, head, None)
    for operator in plan.at(RESIDUAL).operators:
        embedding, head = operator.act(embedding), operator.weight_in(head)
    site = plan.at(HEAD_IN)
    for operator in site.operators:
        head = operator.weight_in(head)
    final = _fold_norm(family.final_norm, plan, site.operators, final)
    return {names[0]: embedding, names[1]: head, **final}


def _output_operators(plan: Plan, linear: LinearSite) -> tuple[Operator, ...]:
    """Return the operators that a linear's output side absorbs."""
    if linear.spec.writes == RESIDUAL:
        return plan.at(RESIDUAL).operators
    if not linear.spec.writes:
        return ()
    site = plan.at(f"layers.{linear.layer}.{linear.spec.writes}")
    return site.operators[: site.folded]


def _absorb_norm(
    norm: Norm, state: State, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> tuple[Tensor, Tensor | None]:
    """Move a norm's weight (and bias) into a linear behind it."""
    gain = state[f"{norm.module}.weight"].double() + norm.offset
    shift = state.get(f"{norm.module}.bias")
    if shift is not None:
        moved = weight @ shift.double()
        bias = moved if bias is None else bias + moved
    return weight * gain, bias


def _reorder_norm(module: str, operators: tuple[Operator, ...], state: State) -> dict[str, Tensor]:
    """Return the tensors of a norm between a linear and the residual, behind the residual's signed permutations.

    Its weight follows the channels, and signs pass it; its bias, if it has one, takes both.
    """
    weight, bias = state[f"{module}.weight"].double(), state.get(f"{module}.bias")
    for operator in operators:
        weight = operator.act(weight) if operator.is_permutation else weight
        bias = None if bias is None else operator.act(bias.double())
    return {f"{module}.weight": weight} | ({} if bias is None else {f"{module}.bias": bias})


def _fold_norm(norm: Norm, plan: Plan, operators: tuple[Operator, ...], state: State) -> dict[str, Tensor]:
    """Return a norm's tensors: neutral if its weight moved into the linears, then the folded diagonals."""
    gain = state[f"{norm.module}.weight"].double() + norm.offset
    shift = state.get(f"{norm.module}.bias")
    if plan.fold_norms:
        gain = torch.ones_like(gain)
        shift = None if shift is None else torch.zeros_like(shift)
    for operator in operators:
        if operator.kind != "shift":
            gain = operator.act(gain)
        shift = None if shift is None else operator.act(shift.double())
    folded = {f"{norm.module}.weight": gain - norm.offset}
    return folded if shift is None else folded | {f"{norm.module}.bias": shift}
