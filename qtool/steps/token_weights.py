"""Rules for the weights of tokens as steps read them, and what has to be gathered for them."""

from __future__ import annotations

from collections.abc import Iterable

from qtool.engine.saliency import SALIENCY
from qtool.errors import UsageError
from qtool.model.graph import ModelGraph
from qtool.numerics.token_weights import TokenWeight, parse_token_weight
from qtool.steps.subjects import Opened

GRADIENT = "gradient"


def token_weight_of(text: str, graph: ModelGraph) -> TokenWeight:
    """Read the rule for the weight of a token, and refuse sites that the model does not have.

    Raises:
        UsageError: It cannot be read, or names another site.
    """
    weight = parse_token_weight(text)
    kinds = dict.fromkeys(linear.spec.reads.rpartition(".")[2] for linear in graph.linears)
    for site, _ in weight.sites:
        if site not in kinds:
            raise UsageError(
                f"no linear reads a site of the kind `{site}`",
                facts=(("token weight", weight), ("known", ", ".join(kinds))),
                hint=f"--token-weight {weight.rule},{next(iter(kinds))}=uniform",
            )
    return weight


def check_gradients(names: Iterable[str], opened: Opened, weight: TokenWeight, seq_len: int) -> None:
    """Refuse to gather what needs a backward pass where there can be none, or weights that need what is not gathered.

    Args:
        names: What is to be gathered of gradients.
        opened: The model, perhaps behind a plan.
        weight: The weight of a token.
        seq_len: Tokens to a window.

    Raises:
        UsageError: There is no loss, no gradient, or a token would go through some of a block's linears only.
    """
    if GRADIENT in weight.rules and SALIENCY not in names:
        raise UsageError(
            f"the token weight `{GRADIENT}` comes from `{SALIENCY}`, which is not gathered",
            hint=f"--gather hessian,{SALIENCY}",
        )
    for name in names:
        if any(opened.model.graph.dims.sparse):
            raise UsageError(
                f"`{name}` of experts is not gathered: a token reaches some of them only",
                facts=(("family", opened.model.graph.family.name),),
                hint=f"leave out `{name}`",
            )
        if opened.subject.quantized is not None:
            raise UsageError(
                f"`{name}` is of the full-precision model, and rounding has no gradient",
                hint="give the model, or the plan",
            )
        if seq_len < 2:
            raise UsageError(f"`{name}` needs windows of two tokens: one predicts the next", hint="--seq-len 2048")
