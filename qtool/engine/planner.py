"""The planner: checks proposed operators against the site graph, decides what is folded, refuses what is not exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qtool.errors import UsageError
from qtool.model.graph import HEAD_IN, RESIDUAL, ModelGraph, Site
from qtool.model.plan import Plan, Proposal, Segment, SitePlan
from qtool.numerics.operators import Diag, Operator, OperatorGroup, Shift, Signs

ABSORBED_BY: Mapping[OperatorGroup, frozenset[str]] = {
    "signs": frozenset({"signed_perm", "diag", "orthogonal", "general"}),
    "perm": frozenset({"perm", "signed_perm", "orthogonal", "general"}),
    "orthogonal": frozenset({"orthogonal", "general"}),
    "diag": frozenset({"diag", "general"}),
    "general": frozenset({"general"}),
    "shift": frozenset({"shift"}),
}
"""An operator's smallest group to the groups that a site may name as foldable and that contain it."""


def extend(plan: Plan, proposal: Proposal, graph: ModelGraph, *, method: str) -> Plan:
    """Add one method's operators behind those of the methods to its left.

    Args:
        plan: What the methods to the left made.
        proposal: Operators by site id.
        graph: The model's sites.
        method: Name of the method, for messages.

    Returns:
        The plan with each site's longest foldable prefix marked as folded.

    Raises:
        UsageError: An operator is not exact at its site; says why and what is.
    """
    _check_apart(plan, proposal, graph, method)
    sites = dict(plan.sites)
    for site_id in dict.fromkeys((*proposal.operators, *proposal.segments)):
        site, before, operators = graph.site(site_id), plan.at(site_id), proposal.operators.get(site_id, ())
        for operator in operators:
            _check_operator(operator, site, method)
        joined = (*before.operators, *operators)
        folded = _folded(joined, site)
        for operator in joined[folded:]:
            if not site.online or operator.group in site.refused:
                raise _refusal(operator, site, method)
        segments = proposal.segments.get(site_id, before.segments)
        _check_segments(segments, site, graph, method)
        sites[site_id] = SitePlan(joined, folded, segments)
    extended = replace(plan, sites=sites)
    return _rotated(extended, proposal.operators, graph) if proposal.operators.get(RESIDUAL) else extended


def _rotated(plan: Plan, proposal: Mapping[str, Sequence[Operator]], graph: ModelGraph) -> Plan:
    """Return the plan with norms folded, as a rotation of the residual needs.

    Diagonals of the methods to the left that only lived in a norm vanish with its weight. A permutation, with signs or
    without, folds no norm: it puts the weights of norms, and such diagonals, into its order. What runs online behind a
    norm stays, and from now on meets rotated channels: still exact, but not what its method saw.
    """
    sites, vanished, moved = dict(plan.sites), set(), set()
    rotates = any(operator.group not in ("perm", "signs") for operator in proposal[RESIDUAL])
    for site_id, site in plan.sites.items():
        name = graph.site(site_id).name
        earlier = len(site.operators) - len(proposal.get(site_id, ()))
        if not earlier or not (name == HEAD_IN or graph.from_residual(name)):
            continue
        if site.folded < earlier:
            moved.add(name)
        elif rotates:
            kept = site.operators[earlier:]
            sites[site_id] = SitePlan(kept, _folded(kept, graph.site(site_id)), site.segments)
            vanished.add(name)
        else:
            reordered = (_reordered(operator, proposal[RESIDUAL]) for operator in site.operators[:earlier])
            sites[site_id] = replace(site, operators=(*reordered, *site.operators[earlier:]))
    notes = plan.notes
    if vanished:
        notes += (
            f"scales at {', '.join(sorted(vanished))} vanish: the rotation that follows folds the norms they live in",
        )
    if moved:
        notes += (f"operators at {', '.join(sorted(moved))} act behind the rotation that follows them",)
    return replace(plan, sites=sites, fold_norms=plan.fold_norms or rotates, notes=notes)


def _reordered(operator: Operator, permutations: Sequence[Operator]) -> Operator:
    """Return what a norm absorbs, for channels in another order: factors follow a permutation, shifts its signs too."""
    for permutation in permutations:
        if isinstance(operator, Shift):
            operator = replace(operator, z=permutation.act(operator.z))
        elif isinstance(operator, Diag | Signs) and permutation.is_permutation:
            operator = replace(operator, s=permutation.act(operator.s))
    return operator


def _folded(operators: tuple[Operator, ...], site: Site) -> int:
    """Return the length of the longest prefix that the producers absorb."""
    for index, operator in enumerate(operators):
        if not ABSORBED_BY[operator.group] & site.foldable:
            return index
    return len(operators)


def _check_apart(plan: Plan, proposal: Proposal, graph: ModelGraph, method: str) -> None:
    """Refuse to mix or to move channels that a method to the left set apart in a segment."""
    for site_id, site in plan.sites.items():
        if not site.segments:
            continue
        for place in (site_id, *_in_front(site_id, graph)):
            if any(not (one.is_diagonal or one.group == "shift") for one in proposal.operators.get(place, ())):
                raise UsageError(
                    f"`{method}` would mix channels that an earlier method set apart at `{site_id}`",
                    hint=f"put `{method}` in front of the method that sets channels apart",
                )
    for site_id in proposal.segments:
        turned = any(proposal.operators.get(place) for place in _in_front(site_id, graph))
        if turned and any(not one.is_diagonal for one in plan.at(site_id).online):
            raise UsageError(
                f"an earlier method would mix the channels that `{method}` sets apart at `{site_id}`",
                facts=(("it runs", ", ".join(one.kind for one in plan.at(site_id).online)),),
                hint=f"put `{method}` alone, or in front with a method that leaves its channels apart",
            )


def _in_front(site_id: str, graph: ModelGraph) -> list[str]:
    """Return the sites whose operators lie in front of an input site: the residual, or value heads."""
    name = graph.site(site_id).name
    heads = [f"{site_id.removesuffix(name)}vo"] if name == "o_in" else []
    return [RESIDUAL, *heads] if graph.from_residual(name) else heads


def _check_segments(segments: tuple[Segment, ...], site: Site, graph: ModelGraph, method: str) -> None:
    """Refuse segments where no linear reads, and more channels than there are."""
    if not segments:
        return
    width = graph.width(site.name) if graph.consumers(site) and site.name != "vo" else 0
    apart = sum(segment.channels for segment in segments)
    if not width or any(segment.channels < 1 for segment in segments) or apart >= width:
        raise UsageError(
            f"`{method}` sets apart channels that `{site.id}` does not have",
            facts=(("channels", width), ("set apart", [segment.channels for segment in segments])),
        )


def _check_operator(operator: Operator, site: Site, method: str) -> None:
    """Refuse an operator that is neither of one vector of the site nor made of blocks of it.

    Heads that repeat in front of their consumers (``vo``, where nothing runs online) take operators of one head only:
    what mixes heads, or splits one, would meet other channels in v_proj than in o_proj.
    """
    if isinstance(operator, Diag | Signs):
        s = operator.s
        if any(bool((s[..., one] != s[..., other]).any()) for one, other in site.ties):
            raise _refusal(operator, site, method)
    of_one = site.dim in (operator.dim, 0) and operator.heads in (1, site.heads)
    of_blocks = site.name != "vo" and operator.dim * operator.heads == site.dim
    if not (of_one or of_blocks):
        raise UsageError(
            f"`{method}` proposes an operator of the wrong size at `{site.id}`",
            facts=(("expected", f"{site.heads} x {site.dim}"), ("received", f"{operator.heads} x {operator.dim}")),
        )


def _refusal(operator: Operator, site: Site, method: str) -> UsageError:
    exact = ", ".join(sorted(site.foldable)) or "nothing"
    why = site.refused.get(operator.group) or site.why or "nothing can run online there"
    return UsageError(
        f"`{method}` is not exact on this model: `{operator.kind}` cannot be folded at `{site.id}`",
        facts=(("exact there", exact), ("because", why)),
        hint="leave the operator out, or put it at a site that allows it",
    )
