"""What calibrate found at the outputs of linears, as those who weigh tokens read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from qtool.engine.fold import SHIFT, written_operators
from qtool.errors import ArtifactError
from qtool.model.graph import LinearSite, ModelGraph
from qtool.model.plan import Plan
from qtool.numerics.operators import Operator
from qtool.numerics.saliency import shared_saliency

SALIENCY = "saliency"


def saliency_name(linear: LinearSite) -> str:
    """Return the name of a linear's saliency in the statistics."""
    return f"layers.{linear.layer}.{linear.spec.module}.{SALIENCY}"


@dataclass(frozen=True)
class Saliencies:
    """The saliency of each linear's outputs, of the model or behind a plan.

    What a plan does to the input of a linear leaves its outputs, and so their saliency, as they are. An orthogonal
    operator on the outputs keeps the sum over all of them, and groups of rows are told apart no longer: each gets the
    mean. Any other one scales outputs that only the gradients themselves could tell apart.

    Attributes:
        graph: The model's linears.
        read: Reads a tensor of the statistics by name.
        plan: What lies between the model that was calibrated and the one that is solved.
    """

    graph: ModelGraph
    read: Callable[[str], Tensor]
    plan: Plan = field(default_factory=Plan)

    @property
    def are_carried(self) -> bool:
        """Whether no operator on outputs stands in the way."""
        return all(one.is_orthogonal for linear in self.graph.linears for one in self._on_outputs(linear))

    def _on_outputs(self, linear: LinearSite) -> list[Operator]:
        return [one for one, _ in written_operators(self.graph, self.plan, linear) if one.group != SHIFT]

    def of(self, linear: LinearSite) -> Float[Tensor, "tokens groups"]:
        """Return the saliency of the rows of a linear in contiguous groups, tokens in the order of the windows.

        Raises:
            ArtifactError: The plan has an operator on its outputs that is not orthogonal.
        """
        saliency = self.read(saliency_name(linear)).float()
        operators = self._on_outputs(linear)
        for operator in operators:
            if not operator.is_orthogonal:
                raise ArtifactError(
                    f"the plan changes the outputs of `{linear.name}`, and saliency is not carried through that",
                    facts=(("operator", operator.kind),),
                    hint="qtool calibrate PLAN --gather hessian,saliency, then --input statistics=ITS_PATH",
                )
        mixed = any(not one.is_diagonal for one in operators)
        return saliency.mean(-1, keepdim=True).expand_as(saliency) if mixed else saliency

    def at(self, layer: int, site: str) -> Float[Tensor, " tokens"]:
        """Return the weight of each token at a site, which all linears that read it share; raises as ``of`` does."""
        return shared_saliency([self.of(one) for one in self.graph.linears_of(layer) if one.spec.reads == site])
