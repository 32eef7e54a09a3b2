"""QuIP: random orthogonal Kronecker factors on both sides of every weight (Chee et al. 2023, arXiv:2307.13304).

Inputs become ``x diag(1/s) P kron(L, R)`` and outputs ``y P' kron(L', R')``, which is undone behind the linear, so that
a weight is rounded as ``kron(L', R').T P'.T W diag(s) P kron(L, R)``. The factors are random and orthogonal, of orders
as near to each other as the width allows; the permutations are random; ``s_j = (H_jj / (W.T W)_jj)**(1/4)`` makes the
input and the weight equally large in each channel. Rounded with error feedback (``gptq``), this is the paper's QuIP.

The paper treats each linear by itself. Here ``s``, ``P`` and the factors of an input are shared by the linears that
read it (q, k and v; gate and up; all experts of a block), whose weights are stacked for ``s``: they see one input. The
damping that the paper adds to ``H`` belongs to the solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.model.graph import EXPERTS, OUTPUT, Site
from qtool.model.plan import Proposal, TransformContext
from qtool.numerics.incoherence import incoherence_scale, kron_split
from qtool.numerics.operators import Diag, Kron, Operator, Perm
from qtool.numerics.random_orthogonal import random_orthogonal


@dataclass(frozen=True)
class QuIPConfig:
    """Options of QuIP.

    Attributes:
        rescale: Scale the channels of inputs and weights to equal size first.
        outputs: Rotate the output side of each weight too.
    """

    rescale: bool = True
    outputs: bool = True


class QuIP:
    """Proposes a diagonal, an order and a Kronecker product at every input, and the latter two at every output."""

    version = 1
    needs: tuple[str, ...] = ("hessian",)
    Config = QuIPConfig

    def plan(self, context: TransformContext, config: QuIPConfig) -> Proposal:
        """Return the operators of both sides; an expert's input that calibration saw no token of keeps its scale."""
        graph = context.graph
        generator = torch.Generator().manual_seed(context.seed)
        proposal: dict[str, list[Operator]] = {}
        for layer in range(graph.dims.num_layers):
            for name in graph.input_sites_of(layer):
                site = graph.site(f"layers.{layer}.{name}")
                weights = [context.weights(linear.name) for linear in graph.consumers(site)]
                if not weights:
                    continue
                scale = _rescaling(context, site, weights) if config.rescale else []
                proposal[site.id] = [*scale, *random_kron(site.dim, generator)]
                for linear, weight in zip(graph.consumers(site), weights, strict=True):
                    if config.outputs:
                        output = f"layers.{layer}.{OUTPUT}.{linear.spec.module}"
                        proposal[output] = random_kron(weight.shape[0], generator)
        return Proposal(proposal)


def random_kron(n: int, generator: torch.Generator) -> list[Operator]:
    """Draw a permutation and a Kronecker product of two orthogonal matrices; a prime width has one dense factor."""
    left, right = (random_orthogonal(order, generator) for order in kron_split(n))
    return [Perm(torch.randperm(n, generator=generator)), Kron(left, right)]


def _rescaling(context: TransformContext, site: Site, weights: list[Tensor]) -> list[Operator]:
    """Return ``diag(1/s)``, or nothing for an expert without tokens."""
    statistics = context.statistics[site.id]
    if site.name.startswith(EXPERTS) and not statistics.entries:
        return []
    input_energy = statistics.need("hessian", site=site.id).diagonal()
    weight_energy = torch.cat(weights).square().sum(0)
    return [Diag(1 / incoherence_scale(input_energy, weight_energy))]
