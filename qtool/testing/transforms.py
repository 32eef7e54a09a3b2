"""The check of transforms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from qtool.artifacts.identity import digest_tensor
from qtool.engine.planner import extend
from qtool.engine.subject import Subject
from qtool.errors import UsageError
from qtool.model.family import Family
from qtool.model.plan import Plan, Transform
from qtool.plugins import Plugins
from qtool.scheme import ModelScheme, TensorScheme
from qtool.steps.transform import context_of
from qtool.testing.families import family_configs
from qtool.testing.promise import EXACT, CheckError
from qtool.testing.tiny_models import TinyModel, decoded_logits, double_precision, exact_logits, tiny_model_of

SCHEME = ModelScheme(
    weights=TensorScheme("int4"), activations=TensorScheme("int4", symmetric=False, strategy="token"), name="W4A4"
)
"""What the methods are told that models are going to be quantized to: INT4 per output row, and per token."""


def check_transform(transform: Transform, config: object = None, *, families: Sequence[str] | None = None) -> None:
    """Check that a transform leaves the function of every family's model unchanged, to 1e-9 in float64.

    So must what it decodes token by token, with a cache of keys and values. Each family stands for itself with its
    usual variant, with an untied and with a tied head. A family on which qtool refuses the method as inexact is passed
    over; one at least must be left.

    Args:
        transform: The method.
        config: Its options; None for its defaults.
        families: Names of families; None for all that are installed.

    Raises:
        CheckError: The logits changed; names the family and the largest difference. Or the method proposes other
            operators when it is asked again.
        UsageError: Every family refuses the method; this is the first refusal.
    """
    plugins = Plugins.discover()
    options = transform.Config() if config is None else config
    refused, passed = list[UsageError](), False
    for name in families or sorted(plugins.offers["families"]):
        family: Family = plugins.load("families", name)
        for made in islice(family_configs(family), 2):
            head = "tied head" if made.tie_word_embeddings else "untied head"
            with tiny_model_of(made, plugins, loader=family.loader) as tiny:
                try:
                    _check_invariance(transform, options, tiny, f"{name}, {head}")
                    passed = True
                except UsageError as error:
                    refused.append(error)
    if refused and not passed:
        raise refused[0]


def plan_of(
    transform: Transform, options: object, tiny: TinyModel, *, scheme: ModelScheme = SCHEME
) -> tuple[Subject, Plan]:
    """Return a tiny model's subject, and the plan that a transform makes for it, told of a scheme."""
    model = tiny.workspace.model(str(tiny.path))
    subject = Subject(model, tiny.workspace.plugins)
    context = context_of(subject, tiny.statistics, scheme=scheme)
    return subject, extend(Plan(), transform.plan(context, options), model.graph, method=type(transform).__name__)


def _check_invariance(transform: Transform, options: object, tiny: TinyModel, label: str) -> None:
    subject, plan = plan_of(transform, options, tiny)
    again = plan_of(transform, options, tiny)[1]
    if _digest(plan) != _digest(again):
        raise CheckError(f"{type(transform).__name__} proposes other operators when it is asked again ({label})")
    with double_precision():
        before = exact_logits(subject)
        after = exact_logits(replace(subject, plan=plan))
        decoded = decoded_logits(replace(subject, plan=plan))
    for found, what in ((after, "the model"), (decoded, "what the model decodes with a cache")):
        difference = float((found - before).abs().max() / before.abs().max())
        if not difference < EXACT:
            raise CheckError(
                f"{type(transform).__name__} changes {what} ({label}): relative difference {difference:.2e}, "
                f"allowed {EXACT:.0e}"
            )


def _digest(plan: Plan) -> tuple[dict[str, str], dict[str, Any]]:
    """Return what two plans that are alike to the last bit have in common."""
    tensors, described = plan.to_state()
    return {name: digest_tensor(tensor) for name, tensor in tensors.items()}, described
