"""Statistics as a transformed model would have given them, without running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from qtool.artifacts.store import Artifact
from qtool.engine.fold import input_operators
from qtool.model.plan import Plan
from qtool.model.source import Model
from qtool.model.statistics import SiteStatistics
from qtool.numerics.operators import Diag, Operator


class CarriedStatistics(Mapping[str, SiteStatistics]):
    """Statistics of each input site, read when asked for and carried through a plan.

    Args:
        artifact: What calibrate gathered on the original model.
        model: That model.
        plan: The operators to carry through; empty leaves the statistics as they were gathered.
    """

    def __init__(self, artifact: Artifact, model: Model, plan: Plan) -> None:
        self.artifact, self.model, self.plan = artifact, model, plan
        self.tokens: int = artifact.manifest.details["tokens"]

    def __getitem__(self, site_id: str) -> SiteStatistics:
        """Read and carry one site's statistics; empty entries where nothing was gathered."""
        site = self.model.graph.sites.get(site_id)
        if site is None or site.layer is None or site.name not in self.model.graph.input_sites:
            raise KeyError(site_id)
        gathered = SiteStatistics(self.tokens, {k: v.float() for k, v in self.artifact.tensors(f"{site_id}.").items()})
        return gathered.carried(self._operators(site.layer, site.name))

    def __iter__(self) -> Iterator[str]:
        """Yield the ids of the input sites."""
        graph = self.model.graph
        return (site.id for site in graph.sites.values() if site.layer is not None and site.name in graph.input_sites)

    def __len__(self) -> int:
        """Return the number of input sites."""
        return sum(1 for _ in self)

    def _operators(self, layer: int, reads: str) -> tuple[Operator, ...]:
        """Return what lies between the gathered input and the transformed one."""
        graph = self.model.graph
        operators = input_operators(graph, self.plan, layer, reads)
        if self.plan.fold_norms and reads in graph.family.norms:
            norm = graph.family.norms[reads]
            gain = self.model.tensor(f"{graph.block_name(layer)}.{norm.module}.weight").float() + norm.offset
            # A channel whose gain is zero shows nothing of the residual; its linears' columns become zero as well.
            inverse = torch.where(gain == 0, torch.ones_like(gain), 1 / gain)
            operators = (Diag(inverse), *operators)
        return operators
