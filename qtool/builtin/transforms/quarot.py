"""QuaRot: randomised Hadamard rotations that spread outliers over channels (Ashkboos et al. 2024, arXiv:2404.00456).

R1 rotates the residual stream and is folded into every linear that reads or writes it; R2 rotates each value head and
is folded into v_proj and o_proj; R3 rotates queries and keys behind the rotary positions and runs online, for a
quantized key cache; R4 rotates the input of down_proj and runs online. Any width that has a Hadamard matrix is
rotated whole.

The paper mixes heads in front of o_proj as well: ``kron(H_heads, I)`` runs online and makes of R2, which is
``kron(I, H_head)`` there, a Hadamard rotation of o_proj's whole input. This is left out unless ``head_mix`` is set: our
recipes were measured without it, and it needs a number of heads that has a Hadamard matrix.

The paper's scheme with its clip ratios is the preset ``QuaRot-W4A4KV4``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from qtool.errors import UsageError
from qtool.model.graph import RESIDUAL
from qtool.model.plan import Proposal, TransformContext
from qtool.numerics.hadamard import random_signs
from qtool.numerics.incoherence import largest_hadamard_block
from qtool.numerics.operators import Hadamard, HeadMix, Operator


@dataclass(frozen=True)
class QuaRotConfig:
    """Which rotations are applied.

    Attributes:
        r1: Rotate the residual stream.
        r2: Rotate value heads.
        r3: Rotate queries and keys online; ``auto`` does so if the scheme quantizes the KV cache.
        r4: Rotate the input of every down projection online, each expert's included.
        head_mix: Mix the heads in front of every attention's output projection online.
    """

    r1: bool = True
    r2: bool = True
    r3: Literal["auto", "on", "off"] = "auto"
    r4: bool = True
    head_mix: bool = False


class QuaRot:
    """Proposes R1 to R4, and the mixing of heads."""

    version = 1
    needs: tuple[str, ...] = ()
    Config = QuaRotConfig

    def plan(self, context: TransformContext, config: QuaRotConfig) -> Proposal:
        """Return a Hadamard operator for each rotation.

        Raises:
            UsageError: Heads are to be mixed, and no Hadamard matrix is known for their number.
        """
        graph, dims = context.graph, context.graph.dims
        if config.head_mix and largest_hadamard_block(dims.num_heads) < dims.num_heads:
            raise UsageError(
                f"`quarot` cannot mix {dims.num_heads} heads: no Hadamard matrix has that order",
                hint="leave out `head_mix`",
            )
        proposal: dict[str, list[Operator]] = {}
        if config.r1:
            generator = torch.Generator().manual_seed(context.seed)
            proposal[RESIDUAL] = [Hadamard(dims.hidden, signs=random_signs(dims.hidden, generator))]
        r3 = config.r3 == "on" or (config.r3 == "auto" and context.scheme.kv is not None)
        for layer in range(dims.num_layers):
            if config.r2:
                proposal |= {site.id: [Hadamard(site.dim)] for site in graph.of_kind("vo", layer)}
            if config.head_mix:
                heads = dims.num_heads
                proposal |= {site.id: [HeadMix(heads, site.dim // heads)] for site in graph.of_kind("o_in", layer)}
            if r3:
                proposal[f"layers.{layer}.qk_post"] = [Hadamard(dims.head_dim)]
            if config.r4:
                proposal |= {site.id: [Hadamard(site.dim)] for site in graph.of_kind("up_down", layer)}
        return Proposal(proposal)
