"""The routed experts of a block as they are executed: a linear of its own for every expert, each with its own inputs.

transformers keeps all experts in three-dimensional parameters; here they are ``ExecutedLinear`` under the canonical
names, and the activation between them is the original module's own. Both conventions of calling are understood: tokens
with the indices and weights of their experts, and (Llama 4) a copy of the tokens for each expert, scaled by its score.
Only rows that were sent to an expert are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from qtool.engine.linear import ExecutedLinear, SiteInput
from qtool.model.graph import EXPERTS, LinearSite, ModelGraph

Mode = Literal["all", "routed"]
Gate = Callable[[Float[Tensor, "rows gate_up"]], Float[Tensor, "rows n"]]


class Expert(nn.Module):
    """One expert: what reads the block's site, an activation, what reads the expert's own site.

    Args:
        site: The input of its first linears; operators have been at work already.
        inner_site: The input of its last linear.
        first: Its first linears by name, in the order in which the activation wants them.
        last: Name of its last linear, and the linear.
        gate: The activation.
    """

    def __init__(
        self,
        site: SiteInput,
        inner_site: SiteInput,
        first: dict[str, ExecutedLinear],
        last: tuple[str, ExecutedLinear],
        gate: Gate,
    ) -> None:
        super().__init__()
        self.site, self.inner_site = site, inner_site
        for name, linear in (*first.items(), last):
            self.add_module(name, linear)
        self._first, self._last, self._gate = tuple(first), last[0], gate
        self.outputs = tuple(linear.output for linear in (*first.values(), last[1]))
        self.sites = (site, inner_site, *self.outputs)

    def inner(self, x: Float[Tensor, "rows n"]) -> Float[Tensor, "rows inner"]:
        """Return what the activation makes of some rows."""
        parts = [self.get_submodule(name)(x) for name in self._first]
        return self._gate(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))

    def forward(self, x: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """Return the expert's output for some rows."""
        result: Tensor = self.get_submodule(self._last)(self.inner(x))
        return result

    @property
    def observed(self) -> bool:
        """Whether somebody wants to see its inputs, or what its linears put out."""
        return any(site.observer is not None for site in self.sites)

    def show(self, x: Float[Tensor, "rows n"]) -> None:
        """Show what runs inside for some rows to its observers; nothing else comes of it."""
        if any(site.observer is not None for site in self.outputs):
            self(x)
        elif self.inner_site.observer is None:
            self.site.operated(x)
        else:
            self.inner_site.operated(self.inner(x))
        self.forget()

    @property
    def shares_scales(self) -> bool:
        """Whether a rounding inside is fitted to all tokens of a window."""
        return any(site.rounding is not None and site.rounding.shared for site in self.sites)

    def split_into(self, windows: list[int]) -> None:
        """Take note of how many of the rows that come next are of each window."""
        for site in self.sites:
            site.windows = windows

    def forget(self) -> None:
        """Let go of remembered tensors."""
        for site in self.sites:
            site.forget()

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Hide what runs inside from the observers."""
        observers = [site.observer for site in self.sites]
        try:
            for site in self.sites:
                site.observer = None
            yield
        finally:
            for site, observer in zip(self.sites, observers, strict=True):
                site.observer = observer


class ExecutedExperts(nn.Module):
    """All routed experts of a block, in place of the module that transformers has for them.

    Observers of an expert's inputs are shown the rows that it computes (``routed``), or every token of the pass, in
    order, with the routing and the output left as they are (``all``). A token that Llama 4 did not send to an expert
    then counts as with a score of one.

    Args:
        site: The input of the block's site, whose operators and observer are at work once for all experts.
        experts: The experts.
        observed: What their observers are shown.

    Attributes:
        routed: How many tokens went to each expert since ``reset``; on the CPU.
        windows: The rows of each window among the tokens; roundings that a window shares need them.
    """

    def __init__(self, site: SiteInput, experts: Sequence[Expert], observed: Mode) -> None:
        super().__init__()
        self.site, self.observed = site, observed
        site.readers += 1
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self.experts = tuple(experts)
        self.windows: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Count tokens from zero."""
        self.routed: Int64[Tensor, " experts"] = torch.zeros(len(self.experts), dtype=torch.int64)

    def forward(
        self,
        hidden_states: Float[Tensor, "rows n"],
        top_k_index: Int[Tensor, "rows chosen"] | None = None,
        top_k_weights: Float[Tensor, "rows chosen"] | None = None,
    ) -> Float[Tensor, "rows n"]:
        """Return the weighted sum of the experts' outputs, or each expert's outputs for its copy of the tokens."""
        if top_k_index is None or top_k_weights is None:
            return self._copies(hidden_states)
        x = self.site.operated(hidden_states)
        chosen = top_k_index.flatten().clamp(0, len(self.experts))  # beyond the last expert: nobody's
        order = chosen.argsort(stable=True)
        tokens, weights = order // top_k_index.shape[-1], top_k_weights.flatten()[order, None]
        counts = self._count(chosen)
        result = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        start = 0
        for expert, count in zip(self.experts, counts, strict=True):
            rows, start = slice(start, start + count), start + count
            if self.observed == "all" and expert.observed:
                self._show(expert, x)
            if count:
                found = self._run(expert, x[tokens[rows]], tokens[rows])
                result.index_add_(0, tokens[rows], (found * weights[rows]).to(result.dtype))
        return result.to(hidden_states.dtype)

    def _copies(self, hidden_states: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """Run each expert on its copy of the tokens: those that were not sent to it have a score of zero."""
        copies = hidden_states.reshape(len(self.experts), -1, hidden_states.shape[-1])
        chosen, tokens = copies.any(dim=-1).nonzero(as_tuple=True)
        counts = self._count(chosen)
        whole = self.site.recalled()
        result, start = torch.zeros_like(copies), 0
        for index, (expert, count) in enumerate(zip(self.experts, counts, strict=True)):
            sent, start = tokens[start : start + count], start + count
            # A score scales the site's values before the operators, so they cannot be those of the site itself.
            rows = self.site.turned(copies[index, sent])
            if self.observed == "all" and expert.observed:
                every = self.site.turned(copies[index]) if whole is None else whole.clone()
                every[sent] = rows
                self._show(expert, every)
            if count:
                result[index, sent] = self._run(expert, rows, sent).to(result.dtype)
        return result.flatten(0, 1)

    def _count(self, chosen: Int64[Tensor, " sent"]) -> list[int]:
        """Return the number of rows of each expert, and add it to what came before."""
        counts = chosen.bincount(minlength=len(self.experts) + 1)[: len(self.experts)].cpu()
        self.routed += counts
        found: list[int] = counts.tolist()
        return found

    def _show(self, expert: Expert, x: Float[Tensor, "tokens n"]) -> None:
        """Show an expert's inputs for every token to its observers."""
        expert.split_into(self.windows)
        expert.show(x)

    def _run(self, expert: Expert, x: Float[Tensor, "sent n"], tokens: Int64[Tensor, " sent"]) -> Tensor:
        """Return an expert's output for the rows of the tokens that were sent to it."""
        expert.split_into(self._split(tokens) if expert.shares_scales else [])
        with expert.unobserved() if self.observed == "all" else nullcontext():
            found: Tensor = expert(x)
        expert.forget()
        return found

    def _split(self, tokens: Int64[Tensor, " sent"]) -> list[int]:
        """Return how many of an expert's tokens are from each window."""
        ends = torch.tensor(self.windows, device=tokens.device).cumsum(0)
        counts: list[int] = torch.bucketize(tokens, ends, right=True).bincount(minlength=len(ends)).tolist()
        return counts


def activation_of(original: nn.Module, *, linears: int) -> Gate:
    """Return what a module of transformers does between its experts' linears, and let go of its parameters.

    Args:
        original: The module; it is stripped of its parameters, and stays alive for its activation only.
        linears: How many linears an expert has in front: one, fused or without a gate, or gate and up.
    """
    for name, _ in list(original.named_parameters(recurse=False)):
        delattr(original, name)
    apply_gate, act = getattr(original, "_apply_gate", None), getattr(original, "act_fn", None)
    if not getattr(original, "has_gate", True):
        return act  # type: ignore[return-value]
    if apply_gate is None:

        def halves(gate_up: Float[Tensor, "rows gate_up"]) -> Float[Tensor, "rows n"]:
            gate, up = gate_up.chunk(2, dim=-1)
            result: Tensor = up * act(gate)  # type: ignore[misc]
            return result

        return halves
    if linears == 1 or getattr(original, "is_concatenated", True):
        own: Gate = apply_gate
        return own

    def interleaved(gate_up: Float[Tensor, "rows gate_up"]) -> Float[Tensor, "rows n"]:
        result: Tensor = apply_gate(torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(-2))
        return result

    return interleaved


def executed_experts(
    original: nn.Module,
    linears: Sequence[LinearSite],
    sites: Mapping[str, SiteInput],
    graph: ModelGraph,
    *,
    dtype: torch.dtype,
    observed: Mode,
) -> ExecutedExperts:
    """Return what takes the place of the module that transformers has for the experts of a block.

    Args:
        original: That module; it is stripped of its parameters.
        linears: The linears of all experts.
        sites: The block's sites by name.
        graph: Knows the widths of sites.
        dtype: What the network computes in.
        observed: What observers of experts are shown.
    """
    biased = any(name.endswith("bias") for name, _ in original.named_parameters(recurse=False))
    by_expert: dict[int, list[LinearSite]] = {}
    for linear in linears:
        by_expert.setdefault(linear.expert or 0, []).append(linear)
    shared = next(iter(by_expert.values()))[0].spec.reads
    fronts = sum(linear.spec.reads == shared for linear in by_expert[0])
    gate = activation_of(original, linears=fronts)
    halves = 2 if fronts == 1 and getattr(original, "has_gate", True) else 1
    experts = []
    for group in by_expert.values():
        # What writes a site is the up projection, which the activation wants last.
        *first, last = sorted(group, key=lambda one: (one.spec.reads != shared, bool(one.spec.writes)))
        inner, outer = graph.width(last.spec.reads), graph.width(shared)

        def made(linear: LinearSite, *shape: int) -> tuple[str, ExecutedLinear]:
            weight = torch.empty(shape, dtype=dtype, device="meta")
            bias = torch.empty(shape[0], dtype=dtype, device="meta") if biased else None
            executed = ExecutedLinear(weight, bias, sites[linear.observed], linear.spec.module)
            return linear.name.rpartition(".")[2], executed

        fronted = dict(made(linear, inner * halves, outer) for linear in first)
        ended = made(last, outer, inner)
        experts.append(Expert(sites[first[0].observed], sites[last.observed], fronted, ended, gate))
    return ExecutedExperts(sites[shared], experts, observed)


def window_counter(experts: ExecutedExperts, sites: Mapping[str, SiteInput]) -> Callable[..., None]:
    """Return a hook that tells the sites of a sparse block, which flattens its input, where windows end."""

    def told(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = given[0] if given else named["hidden_states"]
        experts.windows = [hidden.shape[1]] * hidden.shape[0]
        for name, site in sites.items():
            if not name.startswith(EXPERTS):
                site.windows = experts.windows

    return told
