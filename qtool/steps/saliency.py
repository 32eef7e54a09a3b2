"""Saliency as mitigate reads it: what calibrate found at the outputs of linears, behind a plan or not."""

from __future__ import annotations

from collections.abc import Collection

from qtool.artifacts.store import Artifact
from qtool.engine.saliency import SALIENCY, Saliencies, saliency_name
from qtool.errors import ArtifactError, UsageError
from qtool.model.plan import Plan
from qtool.numerics.token_weights import TokenWeight
from qtool.steps.subjects import Opened
from qtool.steps.token_weights import GRADIENT
from qtool.steps.transform import gathered_behind

ATTENTION = "attn_in"
WITH_GRADIENTS = f"uniform,{ATTENTION}={GRADIENT}"
WITHOUT_GRADIENTS = "inverse-norm:0.5"


def default_token_weight(statistics: Artifact | None, opened: Opened, propagate: str) -> str:
    """Return the rule of solvers where users give none: the best that there are statistics for (``recipes/README.md``).

    Args:
        statistics: What calibrate gathered.
        opened: What is solved.
        propagate: ``none``: Hessians are those of the statistics, and so is their rule.
    """
    if statistics is None:
        return WITHOUT_GRADIENTS
    gathered = statistics.manifest.step.config
    if propagate == "none":
        return str(gathered["token_weight"])
    if SALIENCY not in gathered["gather"] or not _carried(statistics, opened).are_carried:
        return WITHOUT_GRADIENTS
    attends = any(linear.spec.reads == ATTENTION for linear in opened.model.graph.linears)
    return WITH_GRADIENTS if attends else GRADIENT


def saliencies_of(
    statistics: Artifact | None, opened: Opened, needs: Collection[str], weight: TokenWeight, propagate: str
) -> Saliencies | None:
    """Return what is known of the outputs of linears, where methods or token weights need it; otherwise None.

    Args:
        statistics: What calibrate gathered.
        opened: What is solved.
        needs: Statistics that methods read.
        weight: The weight of a token.
        propagate: ``none``: nothing is gathered on the way, so that no token is weighed.

    Raises:
        ArtifactError: It was not gathered.
        UsageError: A method weighs tokens itself, and there are none.
    """
    if statistics is None or not needs:
        return None
    if propagate == "none":
        if SALIENCY in needs:
            raise UsageError(
                f"a method that needs `{SALIENCY}` weighs the tokens of forward passes, and there are none",
                hint="--propagate quantized",
            )
        return None
    if SALIENCY not in needs and GRADIENT not in weight.rules:
        return None
    graph = opened.model.graph
    for linear in graph.linears:
        if saliency_name(linear) not in statistics.header.slots:
            gathered = statistics.manifest.step.config["gather"]
            raise ArtifactError(
                f"the statistics lack `{SALIENCY}` at `{linear.name}`",
                facts=(("gathered", ", ".join(gathered) or "nothing"),),
                hint=f"qtool calibrate MODEL --gather {','.join(sorted({*gathered, SALIENCY}))}",
            )
    return _carried(statistics, opened)


def _carried(statistics: Artifact, opened: Opened) -> Saliencies:
    """Return saliencies behind the plan, if they were gathered in front of it."""
    plan = Plan() if gathered_behind(statistics.manifest) is not None else opened.subject.plan
    return Saliencies(opened.model.graph, statistics.tensor, plan)
