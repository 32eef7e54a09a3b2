"""How much each token counts in a Hessian.

A few tokens with enormous activations (the first of a window, separators) otherwise decide every entry of Σ x xᵀ.
Dropping them is worse than keeping them, so they are kept but made to weigh less; measured in ``recipes/README.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from qtool.errors import UsageError

RULES = ("uniform", "inverse-norm", "clip", "gradient")
_DEFAULTS = {"uniform": 1.0, "inverse-norm": 1.0, "clip": 3.0, "gradient": 1.0}
_PLAIN = ("uniform", "gradient")  # rules without a parameter


@dataclass(frozen=True)
class TokenWeight:
    """A rule for the weight of a token; rotations of the inputs do not change it.

    Attributes:
        rule: ``uniform``: 1. ``inverse-norm``: each token is divided by ``‖x‖**parameter``. ``clip``: tokens are
            shortened to at most ``parameter`` times the median norm of their window. A token of zeros weighs nothing.
            ``gradient``: a token weighs what an error of its outputs costs, its saliency.
        parameter: See ``rule``.
        sites: Rules of kinds of sites that have another, by name, in the order of names.
    """

    rule: str = "uniform"
    parameter: float = 1.0
    sites: tuple[tuple[str, TokenWeight], ...] = ()

    def __str__(self) -> str:
        plain = self.rule if self.rule in _PLAIN else f"{self.rule}:{self.parameter:g}"
        return ",".join((plain, *(f"{name}={rule}" for name, rule in self.sites)))

    def at(self, site: str) -> TokenWeight:
        """Return the rule of one site, by its name without the layer; experts' sites go by their kind."""
        return dict(self.sites).get(site.rpartition(".")[2], replace(self, sites=()))

    @property
    def rules(self) -> frozenset[str]:
        """Every rule that some site may have."""
        return frozenset((self.rule, *(one.rule for _, one in self.sites)))

    def scales(
        self,
        x: Float[Tensor, "tokens n"],
        *,
        window: int = 0,
        saliency: Float[Tensor, " tokens"] | None = None,
    ) -> Float[Tensor, " tokens"] | None:
        """Return the factor that multiplies each token before its outer product, or None for 1.

        Args:
            x: Tokens, whole windows one after the other.
            window: Tokens to a window, so that the result does not depend on how many windows come at once; where it
                does not divide the tokens, they count as one window.
            saliency: What an error of each token's outputs costs; for ``gradient`` only.

        Raises:
            UsageError: The rule is ``gradient``, and there is no saliency.
        """
        if self.rule == "uniform":
            return None
        if self.rule == "gradient":
            if saliency is None:
                raise UsageError(
                    "the token weight `gradient` needs the saliency of tokens, which is not known here",
                    hint="--token-weight inverse-norm",
                )
            return saliency.to(x).sqrt()
        norms = torch.linalg.vector_norm(x, dim=-1)
        if self.rule == "inverse-norm":
            return torch.where(norms < torch.finfo(torch.float32).tiny, 0.0, torch.pow(norms, -self.parameter))
        windows = norms.reshape(-1, window) if window and len(norms) % window == 0 else norms.reshape(1, -1)
        bounds = (self.parameter * windows.median(-1, keepdim=True).values).expand_as(windows).reshape(-1)
        return torch.where(norms > bounds, bounds / norms, 1.0)


UNIFORM = TokenWeight()
"""All tokens count alike."""


def parse_token_weight(text: str) -> TokenWeight:
    """Read ``uniform``, ``inverse-norm:0.5``, ``clip:3``, ``gradient``, or one with others for some kinds of sites.

    ``inverse-norm,up_down=uniform`` is the first rule everywhere but at ``up_down``. A site that has the rule of all
    others is not remembered.

    Raises:
        UsageError: Another rule, a parameter that is no positive number, or a site that is named twice.
    """
    first, *others = text.split(",")
    default = _parse_rule(first, text)
    named = [one.partition("=") for one in others]
    sites = {name.strip(): _parse_rule(rule, text) for name, equals, rule in named if equals and name.strip()}
    if len(sites) < len(others):
        raise _unreadable(text)
    return replace(default, sites=tuple(sorted((name, rule) for name, rule in sites.items() if rule != default)))


def _parse_rule(text: str, whole: str) -> TokenWeight:
    rule, colon, parameter = text.strip().partition(":")
    try:
        value = float(parameter) if colon and rule not in _PLAIN else _DEFAULTS[text.strip()]
    except (KeyError, ValueError):
        value = 0.0
    if rule not in RULES or not 0 < value < math.inf:
        raise _unreadable(whole)
    return TokenWeight(rule, value)


def _unreadable(text: str) -> UsageError:
    return UsageError(
        f"cannot read the token weight `{text}`",
        facts=(("known", ", ".join(RULES)),),
        hint="--token-weight inverse-norm, or clip:3, or inverse-norm,up_down=uniform",
    )
