"""No transform: the model as it is, so that recipes can name the baseline like any other method."""

from __future__ import annotations

from dataclasses import dataclass

from qtool.model.plan import Proposal, TransformContext


@dataclass(frozen=True)
class IdentityConfig:
    """There is nothing to choose."""


class Identity:
    """Proposes nothing."""

    version = 1
    needs: tuple[str, ...] = ()
    Config = IdentityConfig

    def plan(self, context: TransformContext, config: IdentityConfig) -> Proposal:
        """Return no operators."""
        del context, config
        return Proposal()
