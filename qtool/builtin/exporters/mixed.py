"""Linears of several schemes in one checkpoint: who has which, and what loaders that fuse linears make of them."""

from __future__ import annotations

from collections.abc import Sequence

from qtool.consumers.case import Case
from qtool.consumers.table import said
from qtool.engine.exporter import UNREADABLE
from qtool.engine.subject import Subject
from qtool.errors import SchemeError, UsageError
from qtool.model.graph import LinearSite
from qtool.scheme import ModelScheme

_REFUSED = ("refused", UNREADABLE, "unknown")

Groups = Sequence[tuple[ModelScheme, tuple[LinearSite, ...]]]
"""Schemes, each with the linears that have it."""


def groups_of(subject: Subject) -> Groups:
    """Return the schemes of what is quantized, that of most linears first; head and embedding come last of each.

    Raises:
        UsageError: There are none.
    """
    found: dict[ModelScheme, list[LinearSite]] = {}
    for linear in subject.coded if subject.quantized is not None else ():
        found.setdefault(subject.scheme.of(linear.name), []).append(linear)
    if not found:
        raise UsageError("there are no codes to export", hint="qtool mitigate makes a quantized artifact")
    return [(scheme, tuple(found[scheme])) for scheme in sorted(found, key=lambda one: -len(found[one]))]


def refuse_several(subject: Subject, layout: str) -> None:
    """Refuse linears of more than one scheme, for layouts that have one; those in 16 bits are no trouble.

    Raises:
        SchemeError: Names the first linear that differs, and the nearest scheme that is held.
    """
    (main, _), *others = groups_of(subject)
    if others:
        first, other = others[0][1][0].name, others[0][0]
        rules = ",".join(f"{rule.pattern}=none" for rule in subject.scheme.rules if rule.part == "weights")
        nearest = (
            f"--weights {main.weights},{rules}" if main.weights != other.weights else "--activations alike for all"
        )
        raise SchemeError(
            f"{layout} has one scheme for all linears that it quantizes",
            facts=(("most have", main), (first, other)),
            hint=f"nearest that fits: {nearest}, or pack --to hf",
        )


def refuse_mixed_experts(subject: Subject, layout: str) -> None:
    """Refuse experts of more than one scheme, for all loaders look for that of experts once.

    Raises:
        SchemeError: Names the first linear that differs.
    """
    experts = [linear for linear in subject.model.graph.linears if linear.expert is not None]
    for linear in experts:
        first, other = experts[0].name, subject.scheme.of(experts[0].name)
        scheme = subject.scheme.of(linear.name)
        if other != scheme:
            raise SchemeError(
                f"{layout} has one scheme for all experts",
                facts=((first, other.weights or "16 bits"), (linear.name, scheme.weights or "16 bits")),
                hint="name all of them, as in --weights int4-sym-g128,experts=int8, or pack --to hf",
            )


def fused_apart(subject: Subject) -> str:
    """Return the first linears that engines fuse into one and that differ in scheme, in words; empty if none do."""
    known: dict[tuple[str, str], tuple[str, ModelScheme]] = {}
    for linear in subject.model.graph.linears:
        scheme = subject.scheme.of(linear.name)
        first, other = known.setdefault(linear.fused_with, (linear.name, scheme))
        if other != scheme:
            return f"`{first}` and `{linear.name.rpartition('.')[2]}` are one linear there, and have one scheme"
    return ""


def mixed_consumers(each: Sequence[tuple[Sequence[LinearSite], Case]]) -> dict[str, str]:
    """Return what loads a checkpoint of several schemes, and what each loader executes of which linears.

    Args:
        each: Linears that are alike, each with how the checkpoint describes them.
    """
    told, of_each = {}, [said([case]) for _, case in each]
    for loader in (name for name in of_each[0] if all(name in words for words in of_each)):
        texts = [words[loader] for words in of_each]
        refused = next((text for text in texts if text.startswith(_REFUSED)), None)
        source = texts[0][at:] if (at := texts[0].rfind(" (")) >= 0 else ""
        source = source if all(text.endswith(source) for text in texts) else ""
        bare = [text.removesuffix(source) for text in texts]
        parts = [f"{_kinds(linears)}: {text}" for (linears, _), text in zip(each, bare, strict=True)]
        told[loader] = texts[0] if len(each) == 1 else refused or "; ".join(parts) + source
    return told


def _kinds(linears: Sequence[LinearSite]) -> str:
    kinds = ", ".join(dict.fromkeys(linear.name.rpartition(".")[2] for linear in linears))
    return f"{len(linears)} linears ({kinds})"
