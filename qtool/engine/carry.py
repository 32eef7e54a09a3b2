"""Statistics as a transformed model would have given them, without running it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch

from qtool.artifacts.store import Artifact
from qtool.engine.fold import input_operators
from qtool.errors import ArtifactError
from qtool.model.graph import EXPERTS
from qtool.model.plan import Plan
from qtool.model.source import Model
from qtool.model.statistics import MOMENTS, SiteStatistics
from qtool.numerics.operators import Diag, Operator, Shift
from qtool.numerics.token_weights import parse_token_weight

VO, UNIFORM = "vo", "uniform"


class CarriedStatistics(Mapping[str, SiteStatistics]):
    """Statistics of each input site, read when asked for and carried through a plan.

    ``layers.3.vo`` gives those of ``o_in`` in front of that site's own operators: all heads side by side.

    Args:
        artifact: What calibrate gathered on the original model.
        model: That model.
        plan: The operators to carry through; empty leaves the statistics as they were gathered.
        moments: Which of the statistics whose tokens have weights are wanted.
    """

    def __init__(self, artifact: Artifact, model: Model, plan: Plan, *, moments: Collection[str] = MOMENTS) -> None:
        self.artifact, self.model, self.plan, self.unwanted = artifact, model, plan, MOMENTS - set(moments)
        self.tokens: int = artifact.manifest.details["tokens"]

    def __getitem__(self, site_id: str) -> SiteStatistics:
        """Read and carry the statistics of one site, or of an expert's share of one; empty where none were gathered.

        Raises:
            ArtifactError: A Hessian that is wanted and whose tokens have weights would be carried through a shift.
        """
        layer, _, name = site_id.rpartition(".")
        gathered_at = f"{layer}.o_in" if name == VO else site_id
        place = self._place(gathered_at)
        operators = self.plan.at(site_id).operators if name == VO else _between(self.model, self.plan, *place)
        entries = {entry: tensor.float() for entry, tensor in self.artifact.tensors(f"{gathered_at}.").items()}
        entries = {entry: tensor for entry, tensor in entries.items() if entry not in self.unwanted}
        config = self.artifact.manifest.step.config
        rule = config["token_weight"]
        if MOMENTS & entries.keys() and _shifts_weighted(operators, rule, place[1]):
            raise ArtifactError(
                "the mean that a shift needs counts all tokens alike, and these Hessians do not",
                facts=(("gathered with", parse_token_weight(rule).at(place[1])), ("site", site_id)),
                hint=f"qtool calibrate MODEL --token-weight {UNIFORM}",
            )
        return SiteStatistics(self.tokens, entries, gathered=frozenset(config["gather"])).carried(operators)

    def __iter__(self) -> Iterator[str]:
        """Yield the ids of the input sites."""
        graph = self.model.graph
        return (f"layers.{i}.{name}" for i in range(graph.dims.num_layers) for name in graph.input_sites_of(i))

    def __len__(self) -> int:
        """Return the number of input sites."""
        return sum(1 for _ in self)

    def _place(self, site_id: str) -> tuple[int, str]:
        """Return a site's layer and name; what an expert reads of a site that all share has the name of that site."""
        prefix, _, rest = site_id.partition(".")
        index, _, name = rest.partition(".")
        graph = self.model.graph
        if prefix != "layers" or not index.isdecimal() or int(index) >= graph.dims.num_layers:
            raise KeyError(site_id)
        names = graph.input_sites_of(int(index))
        for known in (name, name.rpartition(".")[2]) if name.startswith(EXPERTS) else (name,):
            if known in names:
                return int(index), known
        raise KeyError(site_id)


def can_carry_hessians(model: Model, plan: Plan, token_weight: str) -> bool:
    """Say whether Hessians of tokens with such weights can be carried through a plan to the inputs of all linears.

    Args:
        model: The model that they were gathered on.
        plan: The operators.
        token_weight: The rule that tokens were weighted by.
    """
    graph = model.graph
    places = ((i, name) for i in range(graph.dims.num_layers) for name in graph.input_sites_of(i))
    return not any(_shifts_weighted(_between(model, plan, *place), token_weight, place[1]) for place in places)


def _shifts_weighted(operators: Iterable[Operator], token_weight: str, name: str) -> bool:
    """Say whether weighted tokens of a site go through a shift."""
    weighted = parse_token_weight(token_weight).at(name).rule != UNIFORM
    return weighted and any(one.group == "shift" for one in operators)


def _between(model: Model, plan: Plan, layer: int, reads: str) -> tuple[Operator, ...]:
    """Return what lies between the gathered input of a site and the transformed one."""
    graph = model.graph
    operators, norm = input_operators(graph, plan, layer, reads), graph.norm_of(reads)
    if not plan.fold_norms or norm is None or not norm.of_residual:
        return operators
    place = f"{graph.block_name(layer)}.{norm.module}"
    gain = model.tensor(f"{place}.weight").float() + norm.offset
    # A channel whose gain is zero shows nothing of the residual; its linears' columns become zero as well.
    operators = (Diag(torch.where(gain == 0, torch.ones_like(gain), 1 / gain)), *operators)
    if model.has(f"{place}.bias"):
        operators = (Shift(model.tensor(f"{place}.bias").float()), *operators)
    return operators
