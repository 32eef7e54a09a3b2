"""QuIP#: randomised Hadamard rotations on both sides of every weight (Tseng et al. 2024, arXiv:2402.04396).

Inputs become ``x diag(S_V) H`` and outputs ``y diag(S_U) H``, which is undone behind the linear, so that a weight is
rounded as ``H.T diag(S_U) W diag(S_V) H``. The signs are random and stored. A width that no Hadamard matrix is known
for is rotated in blocks of the largest order that divides it.

The paper draws ``S_V`` for each linear; here linears that read one input (q, k and v; gate and up; all experts of a
block) share it. No statistics are needed. The paper's lattice codebook is a format, not part of the transform; for
scalar formats the output side helps little, and ``outputs`` leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtool.model.graph import OUTPUT
from qtool.model.plan import Proposal, TransformContext
from qtool.numerics.hadamard import random_signs
from qtool.numerics.incoherence import largest_hadamard_block
from qtool.numerics.operators import Hadamard, Operator


@dataclass(frozen=True)
class QuIPSharpConfig:
    """Options of QuIP#.

    Attributes:
        outputs: Rotate the output side of each weight too.
    """

    outputs: bool = True


class QuIPSharp:
    """Proposes a randomised Hadamard rotation at every input of linears and at every output."""

    version = 1
    needs: tuple[str, ...] = ()
    Config = QuIPSharpConfig

    def plan(self, context: TransformContext, config: QuIPSharpConfig) -> Proposal:
        """Return the rotations of both sides."""
        graph = context.graph
        generator = torch.Generator().manual_seed(context.seed)
        proposal: dict[str, list[Operator]] = {}
        for layer in range(graph.dims.num_layers):
            for name in graph.input_sites_of(layer):
                site = graph.site(f"layers.{layer}.{name}")
                linears = graph.consumers(site)
                if linears:
                    proposal[site.id] = [random_hadamard(site.dim, generator)]
                for linear in linears if config.outputs else ():
                    width = context.weights(linear.name).shape[0]
                    proposal[f"layers.{layer}.{OUTPUT}.{linear.spec.module}"] = [random_hadamard(width, generator)]
        return Proposal(proposal)


def random_hadamard(n: int, generator: torch.Generator) -> Hadamard:
    """Draw signs, and rotate in one block where a Hadamard matrix has order ``n``, else in as few as possible."""
    signs = random_signs(n, generator).to(torch.int8)
    return Hadamard(n, signs=signs, block_size=largest_hadamard_block(n))
