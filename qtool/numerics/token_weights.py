"""How much each token counts in a Hessian.

A few tokens with enormous activations (the first of a window, separators) otherwise decide every entry of Σ x xᵀ.
Dropping them is worse than keeping them, so they are kept but made to weigh less; measured in ``recipes/README.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import UsageError

RULES = ("uniform", "inverse-norm", "clip")


@dataclass(frozen=True)
class TokenWeight:
    """A rule for the weight of a token, from its norm alone, so that rotations do not change it.

    Attributes:
        rule: ``uniform``: 1. ``inverse-norm``: each token is divided by ``‖x‖**parameter``. ``clip``: tokens are
            shortened to at most ``parameter`` times the median norm of their window. A token of zeros weighs nothing.
        parameter: See ``rule``.
    """

    rule: str = "uniform"
    parameter: float = 1.0

    def __str__(self) -> str:
        return self.rule if self.rule == "uniform" else f"{self.rule}:{self.parameter:g}"

    def scales(self, x: Float[Tensor, "tokens n"], *, window: int = 0) -> Float[Tensor, " tokens"] | None:
        """Return the factor that multiplies each token before its outer product, or None for 1.

        Args:
            x: Tokens, whole windows one after the other.
            window: Tokens to a window, so that the result does not depend on how many windows come at once; where it
                does not divide the tokens, they count as one window.
        """
        if self.rule == "uniform":
            return None
        norms = torch.linalg.vector_norm(x, dim=-1)
        if self.rule == "inverse-norm":
            return torch.where(norms < torch.finfo(torch.float32).tiny, 0.0, torch.pow(norms, -self.parameter))
        windows = norms.reshape(-1, window) if window and len(norms) % window == 0 else norms.reshape(1, -1)
        bounds = (self.parameter * windows.median(-1, keepdim=True).values).expand_as(windows).reshape(-1)
        return torch.where(norms > bounds, bounds / norms, 1.0)


UNIFORM = TokenWeight()
"""All tokens count alike."""


def parse_token_weight(text: str) -> TokenWeight:
    """Read ``uniform``, ``inverse-norm``, ``inverse-norm:0.5``, ``clip`` or ``clip:3``.

    Raises:
        UsageError: Another rule, or a parameter that is no positive number.
    """
    rule, _, parameter = text.partition(":")
    defaults = {"uniform": 1.0, "inverse-norm": 1.0, "clip": 3.0}
    try:
        value = float(parameter) if parameter and rule != "uniform" else defaults[text]
    except (KeyError, ValueError):
        value = 0.0
    if rule not in defaults or not 0 < value < math.inf:
        raise UsageError(
            f"cannot read the token weight `{text}`",
            facts=(("known", ", ".join(RULES)),),
            hint="--token-weight inverse-norm, or clip:3",
        )
    return TokenWeight(rule, value)
