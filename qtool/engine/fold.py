"""Folding: a block's weights with the plan's operators absorbed, in float64, one block at a time.

A linear that reads a site multiplies by ``T^{-T}`` of all its operators; one that writes a site by ``Tᵀ`` of the folded
ones. In front of a norm's linears the order is: the norm's weight, the residual's operators, the site's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import UsageError
from qtool.model.family import Norm
from qtool.model.graph import HEAD_IN, RESIDUAL, LinearSite, ModelGraph
from qtool.model.plan import Plan
from qtool.numerics.operators import Operator

State = Mapping[str, Tensor]

ROWS = 1024
"""Rows of an embedding that are folded at once: so many that a product rounds them as it rounds them all."""
SHIFT = "shift"
QUERIES_AND_KEYS = ("queries", "keys")
KEYS = QUERIES_AND_KEYS[1]


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
    residual = plan.at(RESIDUAL).operators if graph.from_residual(reads) else ()
    heads = plan.at(f"layers.{layer}.vo").operators if reads == "o_in" else ()
    return (*residual, *heads, *plan.at(f"layers.{layer}.{reads}").operators)


def fold_block(
    graph: ModelGraph,
    plan: Plan,
    layer: int,
    state: State,
    *,
    dtype: torch.dtype = torch.float64,
    rows: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Return the tensors of a block with the plan folded in.

    Args:
        graph: The model's sites and linears.
        plan: The operators.
        layer: Block index.
        state: The block's stored tensors, names relative to the block. Not modified.
        dtype: Of the linears' weights where the plan changes them. They are computed in float64, one at a time.
        rows: Outputs of the linears, by module, whose weights ``state`` leaves out; only their biases are folded, for
            which nothing in front of them may shift.

    Returns:
        The same names; what folding did not touch is unchanged, and what is small is float64.
    """
    if plan.empty:
        return dict(state)
    folded = dict(state)
    for linear in graph.readers_of(layer):
        if linear.spec.module in rows:
            bias = _fold_bias(graph, plan, linear, state, rows[linear.spec.module])
        else:
            weight, bias = fold_linear(graph, plan, linear, state)
            folded[f"{linear.spec.module}.weight"] = weight.to(dtype)
        if bias is not None:
            folded[f"{linear.spec.module}.bias"] = bias
    for reads in graph.input_sites_of(layer):
        site, norm = plan.at(f"layers.{layer}.{reads}"), graph.norm_of(reads)
        if norm is not None:
            folded |= _fold_norm(norm, plan, site.operators[: site.folded], state)
    if graph.family.rotary is not None and graph.family.rotary.norms is not None:
        for written, norm in zip(QUERIES_AND_KEYS, graph.family.rotary.norms, strict=True):
            folded |= _fold_norm(norm, plan, _in_front_of_positions(plan, layer, written), state)
    for through in {one.spec.writes_through for one in graph.readers_of(layer) if one.spec.writes_through}:
        folded |= _reorder_norm(through, plan.at(RESIDUAL).operators, state)
    return folded


def fold_linear(graph: ModelGraph, plan: Plan, linear: LinearSite, state: State) -> tuple[Tensor, Tensor | None]:
    """Return the folded weight and bias of one linear in float64."""
    module, reads, layer = linear.spec.module, linear.spec.reads, linear.layer
    weight = state[f"{module}.weight"].double()
    bias = state[f"{module}.bias"].double() if f"{module}.bias" in state else None
    norm = graph.norm_of(reads)
    if plan.fold_norms and norm is not None and norm.of_residual:
        weight, bias = _absorb_norm(norm, state, weight, bias)
    for operator in input_operators(graph, plan, layer, reads):
        bias = operator.bias_in(weight, bias)
        weight = operator.weight_in(weight)
    for operator, rows in written_operators(graph, plan, linear):
        weight = _at_rows(operator.weight_out, weight, rows)
        if operator.group == SHIFT and bias is None:
            bias = torch.zeros_like(weight[:, 0])
        bias = None if bias is None else _at_rows(operator.bias_out, bias, rows)
    return weight, bias


def shifts_inputs(graph: ModelGraph, plan: Plan, layer: int, has: Callable[[str], bool]) -> bool:
    """Say whether a linear's bias takes something of its weight: of a shift in front of it, or of its norm's bias.

    Args:
        graph: The model's sites.
        plan: The operators.
        layer: Block index.
        has: Says whether the block stores a tensor, by its name there.
    """
    linears = graph.readers_of(layer)
    fronts = (operator for linear in linears for operator in input_operators(graph, plan, layer, linear.spec.reads))
    norms = (graph.norm_of(linear.spec.reads) for linear in linears)
    biased = plan.fold_norms and any(norm is not None and has(f"{norm.module}.bias") for norm in norms)
    return biased or any(operator.group == SHIFT for operator in fronts)


def _fold_bias(graph: ModelGraph, plan: Plan, linear: LinearSite, state: State, rows: int) -> Tensor | None:
    """Return the folded bias of a linear in front of which nothing shifts, in float64."""
    stored = state.get(f"{linear.spec.module}.bias")
    bias = None if stored is None else stored.double()
    for operator, places in written_operators(graph, plan, linear):
        if operator.group == SHIFT and bias is None:
            bias = torch.zeros(rows, dtype=torch.float64)
        bias = None if bias is None else _at_rows(operator.bias_out, bias, places)
    return bias


def written_operators(
    graph: ModelGraph, plan: Plan, linear: LinearSite
) -> Iterator[tuple[Operator, tuple[slice, ...]]]:
    """Yield the operators that the output side of a linear absorbs, each with its rows, in order."""
    for site, rows in graph.rows(linear.spec):
        yield from ((operator, rows) for operator in _absorbed(graph, plan, linear.layer, site))
    for site, rows in graph.rows_in_order(linear.spec):
        absorbed = _absorbed(graph, plan, linear.layer, site)
        yield from ((operator, rows) for operator in absorbed if operator.is_permutation)
    yield from ((operator, (slice(None),)) for operator in output_operators(plan, linear))


def output_operators(plan: Plan, linear: LinearSite) -> tuple[Operator, ...]:
    """Return what a linear's rows absorb for its own sake, and what is undone behind it."""
    return plan.at(f"layers.{linear.layer}.{linear.puts_out}").operators


def fold_ends(
    graph: ModelGraph, plan: Plan, state: Callable[[str], Tensor], *, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Return embedding, final norm and head with the plan folded in, by full tensor name.

    Args:
        graph: The model's sites.
        plan: The operators.
        state: Reads a stored tensor by its full name; gives the embedding for a tied head.
        dtype: Of the embedding and the head where the plan changes them. They are computed in float64, but never as a
            whole: of a large vocabulary that would be the largest tensor of all.

    Returns:
        Those tensors, and those of the family's other writers of the residual where the plan changes them.
    """
    family = graph.family
    names = (f"{family.embedding}.weight", f"{family.head}.weight")
    embedding, head = (state(name) for name in names)
    leaves = ("weight", "bias") if family.final_norm.kind == "layer" and family.final_norm.bias else ("weight",)
    final = {name: state(name) for name in (f"{family.final_norm.module}.{leaf}" for leaf in leaves)}
    if plan.empty:
        return {names[0]: embedding, names[1]: head, **final}
    residual, last = plan.at(RESIDUAL).operators, plan.at(HEAD_IN).operators

    def embedded(rows: Float[Tensor, "rows hidden"]) -> Tensor:
        for operator in residual:
            rows = operator.act(rows)
        return rows

    def headed(rows: Float[Tensor, "rows hidden"]) -> Tensor:
        if plan.fold_norms:
            rows = rows * _movable_gain(family.final_norm, final)
        for operator in (*residual, *last):
            rows = operator.weight_in(rows)
        return rows

    folded = {names[0]: _by_rows(embedded, embedding, dtype), names[1]: _by_rows(headed, head, dtype)}
    for writer in family.writers if residual else ():
        folded |= _fold_writer(writer, residual, state)
    return folded | _fold_norm(family.final_norm, plan, last, final, keep_bias=True)


def require_biases(graph: ModelGraph, plan: Plan, has: Callable[[str], bool]) -> None:
    """Refuse a plan that folds a shift into a norm of this model that stores no bias.

    Args:
        graph: The model's sites.
        plan: The operators.
        has: Says whether the model stores a tensor, by its full name.

    Raises:
        UsageError: There is such a norm; names it.
    """
    for layer in range(graph.dims.num_layers):
        for reads, norm in graph.family.norms.items():
            if norm is None:
                continue
            site, name = plan.at(f"layers.{layer}.{reads}"), f"{graph.block_name(layer)}.{norm.module}"
            if any(one.kind == SHIFT for one in site.operators[: site.folded]) and not has(f"{name}.bias"):
                raise _no_bias(name)


def _by_rows(fold: Callable[[Tensor], Tensor], weight: Float[Tensor, "out in"], dtype: torch.dtype) -> Tensor:
    """Fold the rows of a weight in float64, some at a time."""
    folded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for start in range(0, len(weight), ROWS):
        folded[start : start + ROWS] = fold(weight[start : start + ROWS].double())
    return folded


def _absorbed(graph: ModelGraph, plan: Plan, layer: int, written: str) -> tuple[Operator, ...]:
    """Return the operators that the output side of a linear absorbs at the site that it writes."""
    if written == RESIDUAL:
        return plan.at(RESIDUAL).operators
    if written in QUERIES_AND_KEYS:
        shared = graph.family.rotary is not None and graph.family.rotary.norms is not None
        return () if shared else _in_front_of_positions(plan, layer, written)
    site = plan.at(f"layers.{layer}.{written}")
    return site.operators[: site.folded]


def _in_front_of_positions(plan: Plan, layer: int, written: str) -> tuple[Operator, ...]:
    """Return what keys meet in front of the rotary positions, or what queries meet: there is only what is diagonal."""
    operators = plan.at(f"layers.{layer}.qk_pre").operators
    return operators if written == KEYS else tuple(operator.inverse() for operator in operators)


def _at_rows(fold: Callable[[Tensor], Tensor], tensor: Tensor, rows: tuple[slice, ...]) -> Tensor:
    """Apply a function to some rows, side by side, and leave the others."""
    if rows == (slice(None),):
        return fold(tensor)
    folded = tensor.clone()
    changed = fold(torch.cat([tensor[part] for part in rows]))
    start = 0
    for part in rows:
        stop = start + part.stop - part.start
        folded[part], start = changed[start:stop], stop
    return folded


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


def _movable_gain(norm: Norm, state: State) -> Tensor:
    """Return a norm's weight as the linear behind it absorbs it while the norm keeps its bias: 1 in place of 0."""
    gain = state[f"{norm.module}.weight"].double() + norm.offset
    return torch.where(gain == 0, torch.ones_like(gain), gain)


def _fold_writer(module: str, operators: tuple[Operator, ...], state: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Return a linear outside of the blocks that writes the residual, with the residual's operators behind it."""
    weight, bias = state(f"{module}.weight").double(), state(f"{module}.bias").double()
    for operator in operators:
        weight, bias = operator.weight_out(weight), operator.bias_out(bias)
    return {f"{module}.weight": weight, f"{module}.bias": bias}


def _reorder_norm(module: str, operators: tuple[Operator, ...], state: State) -> dict[str, Tensor]:
    """Return the tensors of a norm between a linear and the residual, behind the residual's signed permutations.

    Its weight follows the channels, and signs pass it; its bias, if it has one, takes both.
    """
    weight, bias = state[f"{module}.weight"].double(), state.get(f"{module}.bias")
    for operator in operators:
        weight = operator.act(weight) if operator.is_permutation else weight
        bias = None if bias is None else operator.act(bias.double())
    return {f"{module}.weight": weight} | ({} if bias is None else {f"{module}.bias": bias})


def _fold_norm(
    norm: Norm, plan: Plan, operators: tuple[Operator, ...], state: State, *, keep_bias: bool = False
) -> dict[str, Tensor]:
    """Return a norm's tensors: neutral if its weight moved into the linears, in the order of the residual's channels.

    Args:
        norm: The norm.
        plan: Says whether norms are folded, and what permutes the residual.
        operators: What the norm absorbs of the site behind it.
        state: Its stored tensors.
        keep_bias: Whether its bias stays where it is (behind the final norm there is none that could take it).
    """
    gain = state[f"{norm.module}.weight"].double() + norm.offset
    shift = state.get(f"{norm.module}.bias")
    shift = None if shift is None else shift.double()
    if plan.fold_norms and norm.of_residual:
        moved = _movable_gain(norm, state)
        if shift is not None:
            shift = shift / moved if keep_bias else torch.zeros_like(shift)
        gain = gain / moved if keep_bias else torch.ones_like(gain)
    for operator in plan.at(RESIDUAL).operators if norm.of_residual else ():
        gain = operator.act(gain) if operator.is_permutation else gain
        shift = None if shift is None else operator.act(shift)
    for operator in operators:
        if operator.kind != SHIFT:
            gain = operator.act(gain)
        elif shift is None:
            raise _no_bias(norm.module)
        shift = None if shift is None else operator.act(shift)
    folded = {f"{norm.module}.weight": gain - norm.offset}
    return folded if shift is None else folded | {f"{norm.module}.bias": shift}


def _no_bias(norm: str) -> UsageError:
    return UsageError(
        f"the plan folds a shift into the norm `{norm}`, which has no bias to hold it",
        hint="leave out the transform that shifts, or describe the norm with `bias=False`: then the shift runs online",
    )
