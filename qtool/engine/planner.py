"""The planner: checks proposed operators against the site graph, decides what is folded, refuses what is not exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qtool.errors import UsageError
from qtool.model.graph import RESIDUAL, ModelGraph, Site
from qtool.model.plan import Plan, Proposal, SitePlan
from qtool.numerics.operators import Operator, OperatorGroup
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
    sites = dict(plan.sites)
    for site_id, operators in proposal.items():
        site = graph.site(site_id)
        for operator in operators:
            _check_size(operator, site, graph, method)
        joined = (*plan.at(site_id).operators, *operators)
        folded = _folded(joined, site)
        if folded < len(joined) and not site.online:
            raise _refusal(joined[folded], site, method)
        sites[site_id] = SitePlan(joined, folded)
    rotated = bool(sites.get(RESIDUAL, SitePlan((), 0)).operators)
    if rotated and not plan.fold_norms:
        return _fold_norms(replace(plan, sites=sites), proposal, graph)
    return replace(plan, sites=sites)


def _fold_norms(plan: Plan, proposal: Proposal, graph: ModelGraph) -> Plan:
    """Return the plan with norms folded; diagonals that only lived in a norm before the rotation vanish with it."""
    sites, dropped = dict(plan.sites), set()
    for site_id, site in plan.sites.items():
        name = graph.site(site_id).name
        if name in graph.family.norms or name == "head_in":
            own = len(proposal.get(site_id, ()))
            earlier = site.operators[: len(site.operators) - own]
            if earlier and site.folded >= len(earlier):
                kept = site.operators[len(earlier) :]
                sites[site_id] = SitePlan(kept, _folded(kept, graph.site(site_id)))
                dropped.add(name)
    notes = plan.notes
    if dropped:
        notes += (f"scales at {', '.join(sorted(dropped))} vanish: the rotation that follows folds the norms they live in",)
    return replace(plan, sites=sites, fold_norms=True, notes=notes)


def _folded(operators: tuple[Operator, ...], site: Site) -> int:
    """Return the length of the longest prefix that the producers absorb."""
    for index, operator in enumerate(operators):
        if not ABSORBED_BY[operator.group] & site.foldable:
            return index
    return len(operators)


def _check_size(operator: Operator, site: Site, graph: ModelGraph, method: str) -> None:
    if operator.dim * operator.heads not in (site.dim, site.dim * site.heads):
        raise UsageError(
            f"`{method}` proposes an operator of the wrong size at `{site.id}`",
            facts=(("expected", f"{site.heads} x {site.dim}"), ("received", f"{operator.heads} x {operator.dim}")),
        )


def _refusal(operator: Operator, site: Site, method: str) -> UsageError:
    exact = ", ".join(sorted(site.foldable)) or "nothing"
    return UsageError(
        f"`{method}` is not exact on this model: `{operator.kind}` cannot be folded at `{site.id}`",
        facts=(("exact there", exact), ("because", site.why or "nothing can run online there")),
        hint="leave the operator out, or put it at a site that allows it",
    )
